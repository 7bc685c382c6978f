"""Where a text states its facts: the leading name, runs of capitalised words, numbers; in tokens of any tokenizer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from isoform.contracts import IntArray, Tokenizer

# A number, or a word with the apostrophes, hyphens and dots inside it.
PIECE = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_](?:[\w'’-]|\.(?=\w))*")
STOP = ". "
# The beginning of a document such as `Ada B. Lovelace. English mathematician ...`.
LEADING_NAME = re.compile(r".*?(?:\w\w|[^\w\s])\. ", re.DOTALL)
# Words of at most so many letters may be abbreviated inside a run: `St. Louis`, `John F. Kennedy`.
ABBREVIATION_LETTERS = 2


def name_end(text: str) -> int:
    """How many characters the leading name has, with the `. ` that ends it (after no single letter); 0 without one."""
    found = LEADING_NAME.match(text)
    return found.end() if found else 0


def salient_spans(text: str) -> list[tuple[int, int]]:
    """(start, stop) of every number, date and run of capitalised words, in characters, in order.

    A run is joined by single spaces, or by `. ` after an abbreviation. A capitalised word alone at the beginning of a
    sentence says nothing about what it is, and is left out. A word alone before a number belongs to it: `4 May 1970`.
    """
    spans: list[tuple[int, int]] = []
    run: tuple[int, int] | None = None
    last_word = ""
    for match in PIECE.finditer(text):
        start, stop, word = match.start(), match.end(), match.group()
        if word[0].isdigit():
            spans += _dated(text, spans, run, start, stop)
            run = None
        elif run is not None and word[0].isupper() and _joined(text[run[1] : start], last_word):
            run = (run[0], stop)
        else:
            spans += _kept(text, run)
            run = (start, stop) if word[0].isupper() else None
        last_word = word
    return spans + _kept(text, run)


def _dated(
    text: str, spans: list[tuple[int, int]], run: tuple[int, int] | None, start: int, stop: int
) -> list[tuple[int, int]]:
    """The number `[start, stop)` with the single word before it, and the number before that, which leaves `spans`."""
    if run is None or " " in text[run[0] : run[1]] or text[run[1] : start] != " ":
        return [*_kept(text, run), (start, stop)]
    if spans and text[spans[-1][1] : run[0]] == " ":
        return [(spans.pop()[0], stop)]
    return [(run[0], stop)]


def _joined(gap: str, word_before: str) -> bool:
    return gap == " " or (gap == STOP and len(word_before) <= ABBREVIATION_LETTERS)


def _kept(text: str, run: tuple[int, int] | None) -> list[tuple[int, int]]:
    if run is None:
        return []
    alone = " " not in text[run[0] : run[1]]
    begins = run[0] == 0 or text.endswith(STOP, 0, run[0])
    return [] if alone and begins else [run]


def tokens_at(tokenizer: Tokenizer, text: str, places: Sequence[int]) -> tuple[IntArray, IntArray]:
    """Ids of the text, and how many of them stand before each of the character places, int32.

    The text is encoded in pieces that end at the places, so that no token crosses one.
    """
    cuts = sorted({0, len(text), *places})
    pieces = [tokenizer.encode(text[first:end]) for first, end in pairwise(cuts)]
    before = dict(zip(cuts, np.cumsum([0, *(len(piece) for piece in pieces)]).tolist(), strict=True))
    ids = np.concatenate(pieces) if pieces else tokenizer.encode(text)
    return ids, np.array([before[place] for place in places], dtype=np.int32)
