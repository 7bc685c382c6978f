"""Permutation language modelling: tokens are guessed one after another in a random order, from all that came before."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from pydantic import Field
from torch import Tensor

from isoform.contracts import (
    IGNORE,
    Batch,
    Document,
    Encoded,
    Ints,
    LossPart,
    Model,
    Output,
    Prompt,
    Sample,
    Tokenizer,
)
from isoform.errors import ConfigError
from isoform.objectives.crossentropy import TokenObjective
from isoform.objectives.fields import Edged, required_text, tokens_of
from isoform.registry import Options, register

MIN_TOKENS = 2


@register("objective", "permutation")
class Permutation(Edged, TokenObjective):
    """loss = -sum over r of log p(s_z(r) | known tokens, s_z(1) .. s_z(r-1)), z a random order of the guessed places.

    A window of running text is `cls text sep`. Of its n tokens max(1, round(fraction n)) are guessed, one at least is
    known; known tokens see one another. p comes from the model's second stream, which has the place z(r) and not its
    token. In an evaluation each window has one draw for ever.

    Source: Yang et al. 2019, sections 2.2 and 2.3, and its code: K = 6.
    Differs: guessed places are single tokens, there spans of one to five; special tokens stand as in BERT, there at the
    end; no memory of the window before.
    """

    class Config(Options):
        fraction: float = Field(1 / 6, gt=0, lt=1)
        # of tokens: guessed
        edges: bool | None = None
        # whether `cls` and `sep` (or `bos` and `eos`) stand around each window; null: where the tokenizer has them

    alternatives: tuple[tuple[str, ...], ...] = (("text",),)
    optional_fields: tuple[str, ...] = ()
    needs: frozenset[str] = frozenset({"two-stream"})
    stochastic: bool = True
    windowed: bool = True
    window_overlap: int = 0
    metrics: tuple[str, ...] = ("loss", "perplexity", "token_accuracy")

    def __init__(self, config: Config, tokenizer: Tokenizer, max_tokens: int) -> None:
        super().__init__(config, tokenizer, max_tokens)
        # Tokens of text that fit between the edges; a draft of the objective, made to read the data, has no tokenizer.
        self.window_tokens = max_tokens - (0 if tokenizer is None else len(self.begin) + len(self.end))
        if self.window_tokens < MIN_TOKENS:
            raise ConfigError(f"text.max_tokens: {max_tokens} given, permutation needs room for {MIN_TOKENS} of text")

    def encode(self, document: Document) -> Encoded:
        text = required_text(document, "text")
        return Encoded(document.id, {"text": self.tokenizer.encode(text)}, len(text.encode()), document)

    def encoding_key(self) -> str:
        return f"permutation begin={self.begin} end={self.end}"

    def planned_tokens(self, field_tokens: Mapping[str, Ints]) -> Ints:
        longest: Ints = np.minimum(field_tokens["text"], self.window_tokens) + len(self.begin) + len(self.end)
        return longest

    def prepare(self, encoded: Encoded, rng: np.random.Generator) -> Sample:
        text = encoded.fields["text"][: self.window_tokens]
        edges = len(self.begin) + len(self.end)
        number = min(max(1, round(self.config.fraction * len(text))), len(text) + edges - 1)
        chosen = rng.permutation(len(text))[:number]
        ranks, targets = np.zeros_like(text), np.full_like(text, IGNORE)
        ranks[chosen], targets[chosen] = np.arange(1, number + 1), text[chosen]
        before, after = [0] * len(self.begin), [0] * len(self.end)
        return Sample(
            encoded.id,
            tokens_of(self.begin, text, self.end),
            tokens_of([IGNORE] * len(before), targets, [IGNORE] * len(after)),
            num_bytes=encoded.num_bytes,
            ranks=tokens_of(before, ranks, after),
        )

    def prompt(self, encoded: Encoded) -> Prompt | None:
        return None

    def loss(self, model: Model, batch: Batch, output: Output) -> dict[str, LossPart]:
        """The weighted sum of -log p(target) by the second stream, in nats."""
        return super().loss(model, batch, _second(output))

    def statistics(self, model: Model, batch: Batch, output: Output) -> dict[str, Tensor]:
        """Unweighted sums of each sequence by the second stream, float64 `(b,)`: nats, tokens, correct_tokens."""
        return super().statistics(model, batch, _second(output))


def _second(output: Output) -> Output:
    assert output.second is not None, "a batch with ranks has a second stream"
    return Output(output.second)
