"""Prefix language modelling: a decoder reads the beginning of a text in both directions and says the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from isoform.contracts import IGNORE, Document, Encoded, Ints, Prompt, Sample, Tokenizer
from isoform.objectives.causal import Causal, shifted
from isoform.objectives.crossentropy import TokenObjective
from isoform.registry import Options, register


@register("objective", "prefix")
class Prefix(TokenObjective):
    """loss = -sum_{i >= c} log p(s_i+1 | s_1 .. s_i), the first c tokens seeing one another, c uniform in {1 .. L - 1}.

    Documents and windows are those of `causal`. Within the prefix attention looks both ways, so nothing there may be
    asked: its tokens see what would be the answer. A prompt is a prefix too.

    Source: Raffel et al. 2020, section 3.2.1 (prefix LM), and Dong et al. 2019. Differs: nothing.
    """

    class Config(Options):
        bidirectional: bool = True
        # whether tokens of the prefix see one another; false: a causal model that is asked the rest alone
        bos: bool | None = None
        # whether a document begins with the special token `bos`; null: where the tokenizer has one
        eos: bool | None = None
        # whether it ends with `eos`; null: where the tokenizer has one

    alternatives: tuple[tuple[str, ...], ...] = (("text",),)
    optional_fields: tuple[str, ...] = ()
    needs: frozenset[str] = frozenset({"causal"})
    stochastic: bool = True
    windowed: bool = True
    metrics: tuple[str, ...] = ("loss", "perplexity", "token_accuracy")

    def __init__(self, config: Config, tokenizer: Tokenizer, max_tokens: int) -> None:
        super().__init__(config, tokenizer, max_tokens)
        self.causal = Causal(Causal.Config(bos=config.bos, eos=config.eos), tokenizer, max_tokens)
        self.window_tokens = self.causal.window_tokens

    def encode(self, document: Document) -> Encoded:
        return self.causal.encode(document)

    def encoding_key(self) -> str:
        return self.causal.encoding_key()

    def planned_tokens(self, field_tokens: Mapping[str, Ints]) -> Ints:
        return self.causal.planned_tokens(field_tokens)

    def prepare(self, encoded: Encoded, rng: np.random.Generator) -> Sample:
        tokens, targets = shifted(encoded.fields["text"][: self.window_tokens])
        prefix = int(rng.integers(1, len(tokens), endpoint=True))
        targets = targets.copy()
        targets[: prefix - 1] = IGNORE
        return Sample(encoded.id, tokens, targets, prefix=prefix if self.config.bidirectional else 0)

    def prompt(self, encoded: Encoded) -> Prompt:
        """The document without its end, all of it prefix, to be continued."""
        prompt = self.causal.prompt(encoded)
        return dataclasses.replace(prompt, prefix=len(prompt.tokens) if self.config.bidirectional else 0)
