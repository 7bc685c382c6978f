"""Masked language modelling: guess the tokens that were hidden, from both sides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property

import numpy as np
from pydantic import Field, model_validator

from isoform.contracts import IGNORE, Document, Encoded, IntArray, Ints, Prompt, Sample, Tokenizer
from isoform.errors import ConfigError
from isoform.objectives.crossentropy import TokenObjective
from isoform.objectives.fields import Edged, required_text, special_id, tokens_of
from isoform.registry import Options, register
from isoform.text.tokenizers import TextTokenizer
from isoform.text.words import WordStarts

MIN_TOKENS = 3


@register("objective", "masked")
class Masked(Edged, TokenObjective):
    """loss = -sum over chosen places i of log p(s_i | the sequence with its chosen places hidden).

    A window of running text is `cls text sep`. Of its n tokens max(1, round(fraction n)) are chosen at random; of these
    mask_fraction are hidden behind the mask, random_fraction behind a random token, and the others stay as they are.
    Which places are asked follows from the draw alone. Special tokens are not chosen; the unknown one only where there
    is nothing else. In an evaluation each window has one draw for ever.

    Source: Devlin et al. 2019, section 3.1; Liu et al. 2019, section 4.1 for new draws in each epoch.
    Differs: no second sentence, and no loss on whether it is the next one.
    """

    class Config(Options):
        fraction: float = Field(0.15, gt=0, lt=1)
        # of tokens: chosen
        mask_fraction: float = Field(0.8, ge=0, le=1)
        # of chosen tokens: hidden behind the mask
        random_fraction: float = Field(0.1, ge=0, le=1)
        # of chosen tokens: replaced by a random one; the rest is left as it is
        whole_words: bool = False
        # choose all tokens of a word or none
        edges: bool | None = None
        # whether `cls` and `sep` (or `bos` and `eos`) stand around each window; null: where the tokenizer has them

        @model_validator(mode="after")
        def _shares(self) -> Masked.Config:
            if self.mask_fraction + self.random_fraction > 1:
                raise ValueError("mask_fraction and random_fraction are more than 1 together; lower one of them")
            return self

    alternatives: tuple[tuple[str, ...], ...] = (("text",),)
    optional_fields: tuple[str, ...] = ()
    needs: frozenset[str] = frozenset({"bidirectional"})
    stochastic: bool = True
    windowed: bool = True
    window_overlap: int = 0
    metrics: tuple[str, ...] = ("loss", "masked_accuracy")

    def __init__(self, config: Config, tokenizer: Tokenizer, max_tokens: int) -> None:
        if max_tokens < MIN_TOKENS:
            raise ConfigError(f"text.max_tokens: {max_tokens} given, masked needs at least {MIN_TOKENS}")
        super().__init__(config, tokenizer, max_tokens)
        # Tokens of text that fit between the edges; a draft of the objective, made to read the data, has no tokenizer.
        self.window_tokens = max_tokens - (0 if tokenizer is None else len(self.begin) + len(self.end))

    @cached_property
    def mask(self) -> int:
        return special_id(self.tokenizer, "mask", "text.tokenizer")

    @cached_property
    def ordinary(self) -> Ints:
        """Ids that are no special token, from which random ones are drawn."""
        return np.setdiff1d(np.arange(self.tokenizer.vocab_size), list(self.tokenizer.special_ids.values()))

    @cached_property
    def word_starts(self) -> WordStarts:
        if not isinstance(self.tokenizer, TextTokenizer):
            raise ConfigError("objective.whole_words: this tokenizer does not tell where words begin")
        return WordStarts(self.tokenizer)

    def encode(self, document: Document) -> Encoded:
        _ = self.mask  # a tokenizer without one is refused before anything is encoded
        text = required_text(document, "text")
        return Encoded(document.id, {"text": self.tokenizer.encode(text)}, len(text.encode()), document)

    def encoding_key(self) -> str:
        return f"masked begin={self.begin} end={self.end}"

    def planned_tokens(self, field_tokens: Mapping[str, Ints]) -> Ints:
        longest: Ints = np.minimum(field_tokens["text"], self.window_tokens) + len(self.begin) + len(self.end)
        return longest

    def prepare(self, encoded: Encoded, rng: np.random.Generator) -> Sample:
        text = encoded.fields["text"][: self.window_tokens]
        chosen = self._chosen(text, rng)
        draws = rng.random(len(chosen))
        hidden = text[chosen].copy()
        hidden[draws < self.config.mask_fraction] = self.mask
        swapped = (draws >= self.config.mask_fraction) & (
            draws < self.config.mask_fraction + self.config.random_fraction
        )
        hidden[swapped] = rng.choice(self.ordinary, swapped.sum())
        return self._sample(encoded, text, chosen, hidden)

    def _sample(self, encoded: Encoded, text: IntArray, chosen: Ints, hidden: IntArray | int) -> Sample:
        """The window with `hidden` in its chosen places, and what stood there as targets."""
        seen, targets = text.copy(), np.full_like(text, IGNORE)
        seen[chosen], targets[chosen] = hidden, text[chosen]
        before, after = [IGNORE] * len(self.begin), [IGNORE] * len(self.end)
        tokens, asked = tokens_of(self.begin, seen, self.end), tokens_of(before, targets, after)
        return Sample(encoded.id, tokens, asked, num_bytes=encoded.num_bytes)

    def _chosen(self, text: IntArray, rng: np.random.Generator) -> Ints:
        """Sorted places of the tokens to guess, at least one."""
        allowed = ~np.isin(text, list(self.tokenizer.special_ids.values()))
        if not allowed.any():
            allowed[:] = True
        number = max(1, round(self.config.fraction * int(allowed.sum())))
        if not self.config.whole_words:
            return np.sort(rng.choice(np.flatnonzero(allowed), number, replace=False))
        word = np.cumsum(self.word_starts(text)) - 1
        words = np.split(np.arange(len(text)), np.flatnonzero(np.diff(word)) + 1)
        words = [places for places in words if allowed[places].all()] or [np.flatnonzero(allowed)[:1]]
        taken: list[Ints] = []
        left = number
        for at in rng.permutation(len(words)).tolist():
            if len(words[at]) <= left or not taken:
                taken.append(words[at])
                left -= len(words[at])
            if left <= 0:
                break
        return np.sort(np.concatenate(taken))

    def one_by_one(self, encoded: Encoded) -> Iterator[Sample]:
        """The window once for each of its tokens, which alone is hidden, for the pseudo-perplexity."""
        text = encoded.fields["text"][: self.window_tokens]
        for place in range(len(text)):
            yield self._sample(encoded, text, np.array([place]), self.mask)

    def prompt(self, encoded: Encoded) -> Prompt | None:
        return None
