"""Next-token language modelling."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np

from isoform.contracts import IGNORE, Document, Encoded, IntArray, Ints, Prompt, Sample, Tokenizer
from isoform.objectives.crossentropy import TokenObjective
from isoform.objectives.fields import edge_ids, required_text, tokens_of
from isoform.registry import Options, register


@register("objective", "causal")
class Causal(TokenObjective):
    """Every token from those before it: loss = -sum_i log p(s_i+1 | s_1 .. s_i).

    A document is `bos text eos`. Windows are cut from that, so the real beginning and end alone carry the two tokens,
    and `max_tokens + 1` tokens make a window: one more than the model reads, for the last target.
    """

    class Config(Options):
        bos: bool | None = None
        # whether a document begins with the special token `bos`; null: where the tokenizer has one
        eos: bool | None = None
        # whether it ends with `eos`, so that generation learns to stop; null: where the tokenizer has one

    alternatives: tuple[tuple[str, ...], ...] = (("text",),)
    optional_fields: tuple[str, ...] = ()
    needs: frozenset[str] = frozenset({"causal"})
    stochastic: bool = False
    windowed: bool = True
    metrics: tuple[str, ...] = ("loss", "perplexity", "bits_per_byte", "token_accuracy")

    def __init__(self, config: Config, tokenizer: Tokenizer, max_tokens: int) -> None:
        super().__init__(config, tokenizer, max_tokens)
        self.window_tokens = max_tokens + 1

    @cached_property
    def bos(self) -> int | None:
        """Id that begins a document, or None."""
        return next(iter(edge_ids(self.tokenizer, ("bos",), self.config.bos, "objective.bos")), None)

    @cached_property
    def eos(self) -> int | None:
        """Id that ends a document, or None."""
        return next(iter(edge_ids(self.tokenizer, ("eos",), self.config.eos, "objective.eos")), None)

    def encode(self, document: Document) -> Encoded:
        text = required_text(document, "text")
        begin, end = (() if token is None else (token,) for token in (self.bos, self.eos))
        ids = tokens_of(begin, self.tokenizer.encode(text), end)
        return Encoded(document.id, {"text": ids}, len(text.encode()), document)

    def encoding_key(self) -> str:
        return f"causal bos={self.bos} eos={self.eos}"

    def planned_tokens(self, field_tokens: Mapping[str, Ints]) -> Ints:
        return np.clip(field_tokens["text"] - 1, 1, self.max_tokens)

    def prepare(self, encoded: Encoded, rng: np.random.Generator) -> Sample:
        tokens, targets = shifted(encoded.fields["text"][: self.window_tokens])
        return Sample(encoded.id, tokens, targets, num_bytes=encoded.num_bytes)

    def prompt(self, encoded: Encoded) -> Prompt:
        """The document without its end, to be continued."""
        ids = encoded.fields["text"]
        if self.eos is not None and len(ids) and ids[-1] == self.eos:
            ids = ids[:-1]
        text = encoded.document.fields["text"] if encoded.document else self.tokenizer.decode(ids.tolist())
        stop = () if self.eos is None else (self.eos,)
        return Prompt(encoded.id, ids, stop, self.max_tokens, text)


def shifted(sequence: IntArray) -> tuple[IntArray, IntArray]:
    """(what is read, what is asked): all but the last token, all but the first; a lone token is asked nothing."""
    if len(sequence) < 2:
        return sequence, np.full_like(sequence, IGNORE)
    return sequence[:-1], sequence[1:]
