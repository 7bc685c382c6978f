"""Who a document is: a hash of its content, so that an id survives reordering, added rows and another file name."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from isoform.contracts import Document

# What a document is asked to yield, not what it is given: two documents that differ in these alone are the same input.
OUTCOMES = frozenset({"label", "answer", "output", "chosen", "rejected"})

Hashes = npt.NDArray[np.uint64]


def content_hash(fields: Mapping[str, str]) -> int:
    """A 64-bit hash of the fields, names included, in any order."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(fields):
        for part in (name.encode(), fields[name].encode()):
            digest.update(len(part).to_bytes(8, "little") + part)
    return int.from_bytes(digest.digest(), "little")


def input_hash(document: Document) -> int:
    """A 64-bit hash of what the model would be given: equal inputs must not stand in two splits."""
    inputs = {name: text for name, text in document.fields.items() if name not in OUTCOMES}
    return content_hash(inputs or document.fields)


class Occurrences:
    """How often each hash was seen before, at 8 bytes a hash: sorted runs, merged as they grow."""

    def __init__(self) -> None:
        self._runs: list[Hashes] = []
        self._repeated: dict[int, int] = {}

    def number(self, hashes: Hashes) -> list[int]:
        """For each hash `(m,)`: how many equal ones came before it, in earlier calls and in this one."""
        unique, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
        seen = np.zeros(len(unique), dtype=bool)
        for run in self._runs:
            places = np.minimum(np.searchsorted(run, unique), len(run) - 1)
            seen |= run[places] == unique
        self._add(unique[~seen])
        numbers = []
        for value, index in zip(hashes.tolist(), inverse.tolist(), strict=True):
            if counts[index] == 1 and not seen[index]:
                numbers.append(0)
                continue
            number = self._repeated.get(value, 1 if seen[index] else 0)
            self._repeated[value] = number + 1
            numbers.append(number)
        return numbers

    def _add(self, run: Hashes) -> None:
        if not len(run):
            return
        while self._runs and len(self._runs[-1]) <= 2 * len(run):
            run = np.concatenate([self._runs.pop(), run])
            run.sort()
        self._runs.append(run)
