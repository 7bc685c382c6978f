"""T5's span corruption: spans are cut out of a text, a sentinel in the place of each; the decoder says what they held.

encoder   Thank you <0> me to your party <1> END      decoder, asked   <0> for inviting <1> last week END
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field

from isoform.contracts import Document, Encoded, IntArray, Ints, Prompt, Sample, Tokenizer
from isoform.errors import ConfigError
from isoform.objectives.crossentropy import TokenObjective
from isoform.objectives.fields import Decoded, required_text, tokens_of
from isoform.registry import Options, register

Mask = npt.NDArray[np.bool_]
SENTINEL = re.compile(r"<extra_id_(\d+)>")


class Lengths(NamedTuple):
    """Tokens of a window, of what the encoder reads of it and of what the decoder is asked, END in both."""

    window: int
    source: int
    target: int


@register("objective", "t5-spans")
class T5Spans(Decoded, TokenObjective):
    """Loss on what random spans held, each after the sentinel that stands in its place.

    Of a window of L tokens N = round(L noise_fraction) are cut out, in S = round(N / mean_span_tokens) spans whose
    lengths, like those of the pieces between them, are a random composition; the text begins with a piece that is kept.
    The window is the longest that leaves at most `text.max_tokens` tokens for the encoder: 568 for 512, of which the
    decoder is asked 114. A long text is cut into windows, a short one is a window as it is.

    Source: Raffel et al. 2020, section 3.1.4, and its code: `random_spans_noise_mask`,
    `compute_input_and_target_lengths`. Differs: texts are not joined to fill a window; no more spans than sentinels.
    """

    class Config(Options):
        noise_fraction: float = Field(0.15, gt=0, lt=1)
        # of the tokens: cut out
        mean_span_tokens: float = Field(3.0, ge=1)
        start: str = "pad"
        # role of the special token that the decoder begins with
        end: str = "eos"
        # role of the special token at the end of both streams

    alternatives: tuple[tuple[str, ...], ...] = (("text",),)
    optional_fields: tuple[str, ...] = ()
    needs: frozenset[str] = frozenset({"encoder-decoder"})
    stochastic: bool = True
    windowed: bool = True
    metrics: tuple[str, ...] = ("loss", "perplexity", "token_accuracy")

    def __init__(self, config: Config, tokenizer: Tokenizer, max_tokens: int) -> None:
        if max_tokens < 4:
            raise ConfigError(f"text.max_tokens: {max_tokens} given, t5-spans needs at least 4")
        super().__init__(config, tokenizer, max_tokens)
        self.window_tokens = input_and_target_lengths(max_tokens, config.noise_fraction, config.mean_span_tokens).window

    @cached_property
    def sentinels(self) -> IntArray:
        """Ids of the sentinels. Raises: ConfigError where a full window has more spans."""
        ids = np.array(self.tokenizer.sentinel_ids, dtype=np.int32)
        need = noise_counts(self.window_tokens, self.config.noise_fraction, self.config.mean_span_tokens)[1]
        if len(ids) < need:
            raise ConfigError(
                f"text.tokenizer.sentinels: the tokenizer has {len(ids)} tokens <extra_id_0> ..., windows of "
                f"{self.window_tokens} tokens have {need} spans; give at least so many sentinels"
            )
        return ids

    def encode(self, document: Document) -> Encoded:
        text = required_text(document, "text")
        return Encoded(document.id, {"text": self.tokenizer.encode(text)}, len(text.encode()), document)

    def encoding_key(self) -> str:
        return f"t5-spans for {len(self.sentinels)} sentinels"

    def planned_tokens(self, field_tokens: Mapping[str, Ints]) -> Ints:
        """Of both streams together: every token, two sentinels a span, START or END."""
        lengths = np.clip(field_tokens["text"], 1, self.window_tokens)
        noise = np.maximum(np.round(lengths * self.config.noise_fraction), 1)
        spans = np.maximum(np.round(noise / self.config.mean_span_tokens), 1)
        planned: Ints = (lengths + 2 * spans + 2).astype(np.int64)
        return planned

    def prepare(self, encoded: Encoded, rng: np.random.Generator) -> Sample:
        text = encoded.fields["text"][: self.window_tokens]
        noise = noise_mask(len(text), self.config.noise_fraction, self.config.mean_span_tokens, rng)
        source = tokens_of(replaced(text, noise, self.sentinels), self.end)
        targets = tokens_of(replaced(text, ~noise, self.sentinels), self.end)
        return Sample(encoded.id, tokens_of(self.start, targets[:-1]), targets, source=Sample(encoded.id, source))

    def prompt(self, encoded: Encoded) -> Prompt:
        """The text, in which `<extra_id_0>` and so on are sentinels, to be filled in."""
        ids = encoded.fields["text"]
        text = encoded.document.fields["text"] if encoded.document else self.tokenizer.decode(ids.tolist())
        pieces: list[IntArray | int] = []
        for index, piece in enumerate(SENTINEL.split(text)):
            if index % 2 and int(piece) < len(self.sentinels):
                pieces.append(int(self.sentinels[int(piece)]))
            else:
                pieces.append(self.tokenizer.encode(f"<extra_id_{piece}>" if index % 2 else piece))
        source = tokens_of(tokens_of(*pieces)[: self.max_tokens - 1], self.end)
        return Prompt(encoded.id, tokens_of(self.start), (self.end,), self.max_tokens, text, source=source)


def noise_counts(num_tokens: int, fraction: float, mean_span: float) -> tuple[int, int]:
    """(tokens cut out, spans) of a text of at least two tokens: at least one of each is cut out, and one is kept."""
    noise = min(max(round(num_tokens * fraction), 1), num_tokens - 1)
    return noise, min(max(round(noise / mean_span), 1), num_tokens - noise)


def input_and_target_lengths(source_tokens: int, fraction: float, mean_span: float) -> Lengths:
    """The longest window of which the encoder reads at most `source_tokens`: what is kept, a sentinel a span, END."""

    def lengths(window: int) -> Lengths:
        noise = round(window * fraction)
        spans = round(noise / mean_span)
        return Lengths(window, window - noise + spans + 1, noise + spans + 1)

    window = source_tokens - 1
    while lengths(window + 1).source <= source_tokens:
        window += 1
    found = lengths(window)
    # As published: with half the tokens cut out, both streams get the same length.
    return lengths(window - 1) if fraction == 0.5 and found.target > found.source else found


def noise_mask(num_tokens: int, fraction: float, mean_span: float, rng: np.random.Generator) -> Mask:
    """bool `(t,)`: True where a token is cut out; pieces that are kept and cut out alternate, a kept one first."""
    if num_tokens < 2:
        return np.zeros(num_tokens, dtype=bool)
    noise, spans = noise_counts(num_tokens, fraction, mean_span)
    cut, kept = _composition(noise, spans, rng), _composition(num_tokens - noise, spans, rng)
    lengths = np.stack([kept, cut], axis=1).ravel()
    return np.repeat(np.arange(2 * spans) % 2 == 1, lengths)


def _composition(total: int, parts: int, rng: np.random.Generator) -> Ints:
    """`(parts,)` lengths of at least 1 that add up to `total`, every composition equally likely."""
    begins = np.concatenate([[False], rng.permutation(np.arange(total - 1) < parts - 1)])
    return np.bincount(np.cumsum(begins), minlength=parts)


def replaced(tokens: IntArray, mask: Mask, sentinels: IntArray) -> IntArray:
    """The tokens with each run of masked ones replaced by the next sentinel."""
    first = mask & ~np.concatenate([[False], mask[:-1]])
    number = np.cumsum(first) - 1
    named: IntArray = np.where(first, sentinels[np.clip(number, 0, None)], tokens).astype(np.int32)
    kept: IntArray = named[~mask | first]
    return kept
