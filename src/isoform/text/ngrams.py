"""Words and runs of words as ids: what a bag of words is made of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from isoform import storage
from isoform.errors import DataError

if TYPE_CHECKING:
    from isoform.contracts import IntArray

# scikit-learn's: two letters or digits at least.
WORD = re.compile(r"\b\w\w+\b")
FILE = "vocabulary.json"
# What a text is read as that has none of the known terms.
NOTHING = 0


class NGrams:
    """The known terms of a text, one id each time that a term occurs; implements `contracts.Tokenizer`.

    terms: of the ids 1, 2, ...; shortest, longest: words of a term. What is unknown is left out.
    Source: scikit-learn's `CountVectorizer`. Differs: nothing.
    """

    kind = "n-grams"
    chat_template = None

    def __init__(self, terms: Sequence[str], shortest: int, longest: int) -> None:
        self.terms = list(terms)
        self.shortest, self.longest = shortest, longest

    @property
    def vocab_size(self) -> int:
        return len(self.terms) + 1

    @property
    def special_ids(self) -> Mapping[str, int]:
        return {}

    @property
    def sentinel_ids(self) -> Sequence[int]:
        return ()

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {term: index for index, term in enumerate(self.terms, start=1)}

    def encode(self, text: str) -> IntArray:
        """Ids of the known terms, the short ones first; `NOTHING` where there is none."""
        found = (self._ids.get(term) for term in terms_of(text, self.shortest, self.longest))
        ids = [index for index in found if index is not None]
        return np.array(ids or [NOTHING], dtype=np.int32)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The terms, one after the other."""
        return " ".join(self.terms[index - 1] for index in ids if index != NOTHING)

    def fingerprint(self) -> str:
        return storage.fingerprint([self.terms, self.shortest, self.longest])

    def save(self, folder: Path) -> None:
        """Writes vocabulary.json."""
        words = {"shortest_words": self.shortest, "longest_words": self.longest}
        storage.write_json(folder / FILE, {**words, "terms": self.terms})


def load_ngrams(folder: Path) -> NGrams:
    """What `NGrams.save` wrote. Raises: DataError."""
    try:
        value: Any = storage.read_json(folder / FILE)
        return NGrams([str(term) for term in value["terms"]], int(value["shortest_words"]), int(value["longest_words"]))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / FILE}: not a vocabulary of terms: {error!r}") from None


def terms_of(text: str, shortest: int, longest: int) -> Iterator[str]:
    """The text's words in lower case and their runs, of `shortest` to `longest` words."""
    words = WORD.findall(text.lower())
    for length in range(shortest, longest + 1):
        for start in range(len(words) - length + 1):
            yield " ".join(words[start : start + length])
