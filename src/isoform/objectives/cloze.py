"""Cloze views: a document's facts, asked for one or two at a time from its name and the few words before each.

    name and words MASK span MASK words MASK span MASK ...

A model that has only ever completed whole texts knows a fact as the continuation of one wording. Asked from its name
in ever-changing, short company, the same fact can be drawn on later by a question that no text contains.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property

import numpy as np
from pydantic import Field

from isoform.contracts import IGNORE, Document, Encoded, IntArray, Ints, Prompt, Sample
from isoform.objectives.crossentropy import TokenObjective
from isoform.objectives.fields import required_text, special_id, tokens_of
from isoform.objectives.salient import name_end, salient_spans, tokens_at
from isoform.registry import Options, register

WORD = re.compile(r"\w[\w'’-]*")
ENDINGS = (".", "?", ",")


@register("objective", "cloze")
class Cloze(TokenObjective):
    """Loss on masked spans, and the mask that ends each, from the document's name and the words before the span.

    Spans are the first `num_spans` runs of capitalised words after the leading name (the text up to the first `. `)
    that are not the name itself. A view asks for one or more of them in random order. Each is preceded by at most
    `max_words` of the words before it, of which some are dropped; the first also by the name, at a random place among
    its words. A document without a name or without a span is asked for the rest of its text after its first word.

    Source: Guu et al. 2020, REALM, section 3.4 (salient spans); Allen-Zhu & Li 2023, Physics of Language Models 3.1
    (knowledge is extractable where it was seen in varied forms).
    Differs: the spans are found by their capitals, not by a tagger; most of the text around them is left out.
    """

    class Config(Options):
        num_spans: int = Field(2, gt=0)
        # candidates of a document: its first spans
        numbers: bool = False
        # whether numbers and dates are candidates too
        max_words: int = Field(2, ge=0)
        # words before the span
        max_asks: int = Field(2, gt=0)
        # spans asked for in one view
        single_fraction: float = Field(0.3, ge=0, le=1)
        # of views: one span alone; the others ask for a number uniform in {1 .. max_asks}
        first_fraction: float = Field(0.5, ge=0, le=1)
        # of views with one span: it is the document's first; in the others any of the candidates
        bare_fraction: float = Field(0.1, ge=0, le=1)
        # of asks for the first span: no word before it; any other span keeps one
        drop_fraction: float = Field(0.2, ge=0, le=1)
        # of words: dropped
        shuffle_fraction: float = Field(0.15, ge=0, le=1)
        # of spans: its words in random order
        ending_fraction: float = Field(0.3, ge=0, le=1)
        # of views: a `.`, `?` or `,` before the first mask
        capital_fraction: float = Field(0.5, ge=0, le=1)
        # of views: a capital at the beginning

    alternatives: tuple[tuple[str, ...], ...] = (("text",),)
    optional_fields: tuple[str, ...] = ()
    needs: frozenset[str] = frozenset({"causal"})
    stochastic: bool = True
    windowed: bool = False
    metrics: tuple[str, ...] = ("loss", "perplexity", "token_accuracy")

    config: Config

    @cached_property
    def mask(self) -> int:
        return special_id(self.tokenizer, "mask", "text.tokenizer")

    @cached_property
    def space(self) -> IntArray:
        return self.tokenizer.encode(" ")

    @cached_property
    def endings(self) -> list[IntArray]:
        return [self.tokenizer.encode(ending) for ending in ENDINGS]

    @cached_property
    def _capitals(self) -> dict[int, int]:
        return {}

    def encode(self, document: Document) -> Encoded:
        """Places, in tokens: `_name`, its stop; `_spans` and `_words`, start and stop of each, in order."""
        text = required_text(document, "text")
        head = name_end(text)
        name = text[:head].removesuffix(". ")
        spans = [span for span in salient_spans(text) if span[0] >= head and self._candidate(text[slice(*span)], name)]
        taken = {place for span in salient_spans(text) for place in range(*span)}
        words = [match.span() for match in WORD.finditer(text, head) if match.start() not in taken]
        places = [len(name), *(place for pair in [*spans, *words] for place in pair)]
        ids, marks = tokens_at(self.tokenizer, text, places)
        cut = 1 + 2 * len(spans)
        fields = {"text": ids, "_name": marks[:1], "_spans": marks[1:cut], "_words": marks[cut:]}
        return Encoded(document.id, fields, len(text.encode()), document)

    def _candidate(self, span: str, name: str) -> bool:
        if any(character.isdigit() for character in span):
            return self.config.numbers
        return not set(span.split()) <= set(name.split())

    def encoding_key(self) -> str:
        return f"cloze numbers={self.config.numbers}"

    def planned_tokens(self, field_tokens: Mapping[str, Ints]) -> Ints:
        """About the name, and as many words and spans as a view asks for; the batch plan needs no more."""
        usual = 24 + 24 * (1 + self.config.max_asks) // 2
        return np.clip(np.minimum(field_tokens["text"] + 2, usual), 1, self.max_tokens)

    def prepare(self, encoded: Encoded, rng: np.random.Generator) -> Sample:
        text = encoded.fields["text"]
        name = text[: int(encoded.fields["_name"][0])]
        spans = encoded.fields["_spans"].reshape(-1, 2)[: self.config.num_spans]
        if not len(name) or not len(spans):
            return self._rest(encoded.id, text)
        words = encoded.fields["_words"].reshape(-1, 2)
        pieces: list[IntArray] = []
        asked: list[bool] = []
        for number, place in enumerate(self._chosen(len(spans), rng)):
            before = self._before(words, int(spans[place, 0]), rng, may_be_bare=place == 0)
            shown = [text[start:stop] for start, stop in before]
            if number == 0:
                shown.insert(int(rng.integers(len(shown) + 1)), name)
            cue = self._joined(shown)
            if number == 0:
                cue = self._dressed(cue, rng)
            answer = text[slice(*spans[place])]
            pieces += [tokens_of(cue, self.mask), tokens_of(answer, self.mask)]
            asked += [False, True]
        return self._sample(encoded.id, pieces, asked)

    def _chosen(self, num_spans: int, rng: np.random.Generator) -> list[int]:
        """The spans that a view asks for, in the order in which it does."""
        most = 1 if rng.random() < self.config.single_fraction else int(rng.integers(1, self.config.max_asks + 1))
        order = [int(place) for place in rng.permutation(num_spans)]
        is_first = rng.random() < self.config.first_fraction
        return [0] if most == 1 and is_first else order[:most]

    def _before(self, words: IntArray, start: int, rng: np.random.Generator, *, may_be_bare: bool) -> IntArray:
        """Some of the words before a span, `(w, 2)`; without any word only the first span can be meant."""
        bare = rng.random() < self.config.bare_fraction
        least = 0 if may_be_bare else 1
        num_words = int(rng.integers(least, max(least, self.config.max_words) + 1))
        kept = rng.random(num_words) >= self.config.drop_fraction
        stop = int(np.searchsorted(words[:, 0], start))
        nearest = words[max(0, stop - num_words) : stop]
        chosen = nearest[kept[: len(nearest)]]
        if may_be_bare and bare:
            return words[:0]
        if not may_be_bare and not len(chosen):
            chosen = nearest[-1:]
        return rng.permutation(chosen) if rng.random() < self.config.shuffle_fraction else chosen

    def _joined(self, parts: list[IntArray]) -> IntArray:
        spaced = [piece for part in parts for piece in (self.space, part)]
        return tokens_of(*spaced[1:]) if spaced else np.zeros(0, dtype=np.int32)

    def _dressed(self, cue: IntArray, rng: np.random.Generator) -> IntArray:
        """The cue as a sentence or question might begin and end."""
        if rng.random() < self.config.capital_fraction:
            cue = tokens_of(self._capital(int(cue[0])), cue[1:])
        if rng.random() < self.config.ending_fraction:
            cue = tokens_of(cue, self.endings[int(rng.integers(len(self.endings)))])
        return cue

    def _capital(self, token: int) -> int:
        """The token with a capital, where that is one token."""
        if token not in self._capitals:
            upper = self.tokenizer.encode(self.tokenizer.decode([token]).capitalize())
            unknown = self.tokenizer.special_ids.get("unk")
            self._capitals[token] = int(upper[0]) if len(upper) == 1 and upper[0] != unknown else token
        return self._capitals[token]

    def _rest(self, id: str, text: IntArray) -> Sample:
        first = 1 + int(np.argmax(text == self.space[0])) if len(self.space) and (text == self.space[0]).any() else 1
        return self._sample(id, [text[:first], tokens_of(text[first:], self.mask)], [False, True])

    def _sample(self, id: str, pieces: list[IntArray], asked: list[bool]) -> Sample:
        string = np.concatenate(pieces)[: self.max_tokens + 1]
        wanted = np.repeat(asked, [len(piece) for piece in pieces])[: len(string)]
        targets = np.where(wanted[1:], string[1:], IGNORE).astype(np.int32)
        return Sample(id, string[:-1].astype(np.int32), targets)

    def prompt(self, encoded: Encoded) -> Prompt:
        """The text, asked for what a mask would stand for."""
        text = encoded.document.fields["text"] if encoded.document else ""
        tokens = tokens_of(encoded.fields["text"][: self.max_tokens - 1], self.mask)
        return Prompt(encoded.id, tokens, (self.mask,), self.max_tokens, text)
