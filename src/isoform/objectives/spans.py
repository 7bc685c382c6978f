"""Span corruption for decoders, in its character form: fill in what was cut out, after everything else was read.

    prefix MASK suffix MASK masked MASK

A draw has two parts, a *view* (which tokens of the document are seen) and a *span* of it (which are masked).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import Field

from isoform.contracts import IGNORE, Document, Encoded, Ints, Prompt, Sample, Tokenizer
from isoform.errors import ConfigError
from isoform.objectives.crossentropy import TokenObjective
from isoform.objectives.fields import required_text, special_id, tokens_of
from isoform.objectives.salient import name_end, salient_spans, tokens_at
from isoform.registry import Options, register

MIN_VIEW_TOKENS = 4
# The three masks around and after the masked span, of which the last is only a target.
MASKS_READ = 2


class Draw(NamedTuple):
    """Token places in a document: the view is `[0, head)` and `[first, end)`, the masked span `[start, stop)`."""

    head: int
    first: int
    start: int
    stop: int
    end: int


@register("objective", "span-corruption")
class SpanCorruption(TokenObjective):
    """Loss on the next token of `prefix MASK suffix MASK masked MASK`, for a random view and span of each document.

    The published rule (the defaults): the view is the first t tokens, t uniform in {4 .. min(96, length)}; the span has
    m tokens, m uniform in {1 .. t // 2}, and begins at a place uniform in {0 .. t - m}; every next token is asked.
    Tokens after the 96th are then never seen; the other views see the whole document.

    view   prefix  the first t tokens
           window  t tokens from a random place
           whole   the whole document, or as many tokens as the context holds, from a random place
           named   the leading name (see `salient.name_end`) and a window of the rest; see `bare_fraction`. A name that
                   leaves no room for the rest is not kept
    spans  random  as above, inside the view (inside the window, if `named`)
           salient a run of capitalised words or a number, drawn first; the view is then drawn around it. A document
                   without one falls back to `random`

    Source: CS224N assignment 5, `CharCorruptionDataset`.
    Differs: not padded; documents shorter than 4 tokens are views as they are.
    """

    class Config(Options):
        form: Literal["characters"] = "characters"
        # one kind of mask, and the masked span after the third part
        view: Literal["prefix", "window", "whole", "named"] = "prefix"
        max_prefix_tokens: int = Field(96, ge=MIN_VIEW_TOKENS)
        # longest view of `prefix`; the others are bounded by the context alone
        spans: Literal["random", "salient"] = "random"
        loss_on: Literal["all", "masked"] | Annotated[float, Field(gt=0, lt=1)] = "all"
        # every next token; or the masked span and its end alone; or these and a random fraction of all others, which
        # weights the others by that fraction
        bare_fraction: float = Field(0.0, ge=0, le=1)
        # of `named` views: how often nothing but the name is seen beside the masked span

    alternatives: tuple[tuple[str, ...], ...] = (("text",),)
    optional_fields: tuple[str, ...] = ()
    needs: frozenset[str] = frozenset({"causal"})
    stochastic: bool = True
    windowed: bool = False
    metrics: tuple[str, ...] = ("loss", "perplexity", "token_accuracy")

    def __init__(self, config: Config, tokenizer: Tokenizer, max_tokens: int) -> None:
        if max_tokens < MIN_VIEW_TOKENS + MASKS_READ:
            raise ConfigError(f"text.max_tokens: {max_tokens} given, span corruption needs at least 6")
        if config.bare_fraction and config.view != "named":
            raise ConfigError(f"objective.bare_fraction: nothing to do with `view: {config.view}`; use `view: named`")
        super().__init__(config, tokenizer, max_tokens)
        self.max_view_tokens = max_tokens - MASKS_READ

    @cached_property
    def mask(self) -> int:
        return special_id(self.tokenizer, "mask", "text.tokenizer")

    def encode(self, document: Document) -> Encoded:
        """The text, and `_marks`, in tokens: where the leading name ends, start and stop of every candidate span."""
        text = required_text(document, "text")
        head = name_end(text) if self.config.view == "named" else 0
        spans = salient_spans(text) if self.config.spans == "salient" else []
        places = [head, *(place for span in spans if span[0] >= head for place in span)]
        ids, marks = tokens_at(self.tokenizer, text, places)
        return Encoded(document.id, {"text": ids, "_marks": marks}, len(text.encode()), document)

    def encoding_key(self) -> str:
        return f"span-corruption named={self.config.view == 'named'} salient={self.config.spans == 'salient'}"

    def planned_tokens(self, field_tokens: Mapping[str, Ints]) -> Ints:
        longest = self.max_view_tokens
        if self.config.view == "prefix":
            longest = min(longest, self.config.max_prefix_tokens)
        return np.minimum(field_tokens["text"], longest) + MASKS_READ

    def prepare(self, encoded: Encoded, rng: np.random.Generator) -> Sample:
        text = encoded.fields["text"]
        draw = self.draw(len(text), encoded.fields["_marks"].tolist(), rng)
        masked = text[draw.start : draw.stop]
        prefix = tokens_of(text[: draw.head], text[draw.first : draw.start])
        string = tokens_of(prefix, self.mask, text[draw.stop : draw.end], self.mask, masked, self.mask)
        targets = string[1:].copy()
        if self.config.loss_on != "all":
            others = targets[: -len(masked) - 1]
            fraction = 0.0 if self.config.loss_on == "masked" else self.config.loss_on
            others[rng.random(len(others)) >= fraction] = IGNORE
        return Sample(encoded.id, string[:-1], targets)

    def draw(self, num_tokens: int, marks: list[int], rng: np.random.Generator) -> Draw:
        """A random view and span of a document with these marks."""
        head = marks[0] if marks[0] <= min(num_tokens, self.max_view_tokens) - MIN_VIEW_TOKENS else 0
        spans = list(zip(marks[1::2], marks[2::2], strict=True))
        draw = self._salient(spans, head, num_tokens, rng) or self._random(head, num_tokens, rng)
        if self.config.bare_fraction and head and rng.random() < self.config.bare_fraction:
            draw = draw._replace(first=draw.start, end=draw.stop)
        return draw

    def _random(self, head: int, num_tokens: int, rng: np.random.Generator) -> Draw:
        """First a view, then a span of at most half of it."""
        longest = min(self.max_view_tokens, num_tokens) - head
        if self.config.view == "prefix":
            longest = min(longest, self.config.max_prefix_tokens)
        shortest = longest if self.config.view == "whole" else min(MIN_VIEW_TOKENS, longest)
        length = _between(rng, shortest, longest)
        first = head if self.config.view == "prefix" else _between(rng, head, num_tokens - length)
        masked = _between(rng, 1, max(1, length // 2))
        start = first + _between(rng, 0, length - masked)
        return Draw(head, first, start, start + masked, first + length)

    def _salient(
        self, spans: list[tuple[int, int]], head: int, num_tokens: int, rng: np.random.Generator
    ) -> Draw | None:
        """First one of the candidate spans, then a view around it; None where no candidate fits into a view."""
        longest = min(self.max_view_tokens, num_tokens) - head
        if self.config.view == "prefix":
            longest = min(longest, self.config.max_prefix_tokens)
            spans = [span for span in spans if span[1] <= longest]
        spans = [span for span in spans if span[1] - span[0] <= longest]
        if not spans:
            return None
        start, stop = spans[_between(rng, 0, len(spans) - 1)]
        if self.config.view == "prefix":
            return Draw(0, 0, start, stop, _between(rng, max(min(MIN_VIEW_TOKENS, longest), stop), longest))
        if self.config.view == "whole":
            first = _between(rng, max(0, stop - longest), min(start, num_tokens - longest))
            return Draw(0, first, start, stop, first + longest)
        first = _between(rng, max(head, stop - longest), start)
        return Draw(head, first, start, stop, _between(rng, stop, min(num_tokens, first + longest)))

    def prompt(self, encoded: Encoded) -> Prompt:
        """The text, to be continued until a mask."""
        ids = encoded.fields["text"]
        text = encoded.document.fields["text"] if encoded.document else self.tokenizer.decode(ids.tolist())
        return Prompt(encoded.id, ids, (self.mask,), self.max_tokens, text)


def _between(rng: np.random.Generator, low: int, high: int) -> int:
    """Uniform in {low .. high}."""
    return int(rng.integers(low, high, endpoint=True))
