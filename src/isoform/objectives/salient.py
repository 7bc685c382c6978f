"""Where a text states its facts: the leading name, runs of capitalised words, numbers; in tokens of any tokenizer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from isoform.contracts import Tokenizer

if TYPE_CHECKING:
    from isoform.contracts import IntArray

# A number, or a word with the apostrophes, hyphens and dots inside it.
PIECE = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_](?:[\w'’-]|\.(?=\w))*")
# What ends the leading name of a document such as `Ada Lovelace. English mathematician ...`.
NAME_END = ". "
# Words of at most so many letters may be abbreviated inside a run: `St. Louis`, `John F. Kennedy`.
ABBREVIATION_LETTERS = 2


def name_end(text: str) -> int:
    """How many characters the leading name has, with the `. ` that ends it; 0 without one."""
    found = text.find(NAME_END)
    return 0 if found < 0 else found + len(NAME_END)


def salient_spans(text: str) -> list[tuple[int, int]]:
    """(start, stop) of every number and every run of capitalised words, in characters, in order.

    A run is joined by single spaces, or by `. ` after an abbreviation. A capitalised word alone at the beginning of a
    sentence says nothing about what it is, and is left out.
    """
    spans: list[tuple[int, int]] = []
    run: tuple[int, int] | None = None
    last_word = ""
    for match in PIECE.finditer(text):
        start, stop, word = match.start(), match.end(), match.group()
        if run is not None and word[0].isupper() and _joined(text[run[1] : start], last_word):
            run = (run[0], stop)
        else:
            spans += _kept(text, run)
            run = (start, stop) if word[0].isupper() else None
            if word[0].isdigit():
                spans.append((start, stop))
        last_word = word
    return spans + _kept(text, run)


def _joined(gap: str, word_before: str) -> bool:
    return gap == " " or (gap == NAME_END and len(word_before) <= ABBREVIATION_LETTERS)


def _kept(text: str, run: tuple[int, int] | None) -> list[tuple[int, int]]:
    if run is None:
        return []
    alone = " " not in text[run[0] : run[1]]
    begins = run[0] == 0 or text[: run[0]].endswith(NAME_END)
    return [] if alone and begins else [run]


def tokens_at(tokenizer: Tokenizer, text: str, places: Sequence[int]) -> tuple[IntArray, IntArray]:
    """Ids of the text, and the token that each of the character places stands before, int32.

    Where every character is one token, these are the places themselves. Elsewhere the text is encoded in pieces that
    end at the places, a space going with the word after it, so that no token crosses a place.
    """
    ids = tokenizer.encode(text)
    if tokenizer.kind == "char" and len(ids) == len(text):
        return ids, np.array(places, dtype=np.int32)
    moved = [place - 1 if place > 0 and text[place - 1] == " " else place for place in places]
    cuts = sorted({0, len(text), *moved})
    pieces = [tokenizer.encode(text[first:end]) for first, end in pairwise(cuts)]
    before = dict(zip(cuts, np.cumsum([0, *(len(piece) for piece in pieces)]).tolist(), strict=True))
    return np.concatenate(pieces), np.array([before[place] for place in moved], dtype=np.int32)
