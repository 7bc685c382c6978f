"""What stands in two splits: documents that are given the same input, exactly or nearly.

The splits that are scored are held as hashes and sketches; the training split streams past them, once.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from isoform.contracts import Document, Source
from isoform.data.blocks import blocks
from isoform.data.identity import OUTCOMES, Hashes, input_hash
from isoform.data.near import Finder, Pair, Sketches, near_pairs, sketch
from isoform.storage import fingerprint

MAX_EXAMPLES = 3
EXCERPT_CHARACTERS = 120


@dataclass(frozen=True)
class Overlap:
    """What was found between each two splits.

    report: rows {splits: [first, second], exact, near: documents of the second that stand in the first, examples};
    an example of an exact one has no similarity. drop: sorted input hashes of the training documents that stand,
    exactly or nearly, in another split. documents: how many each split has.
    """

    report: list[dict[str, Any]]
    drop: Hashes
    documents: dict[str, int]

    @property
    def found(self) -> bool:
        return any(row["exact"] or row["near"] for row in self.report)


# Finding reads everything; the runs of a study ask for the same splits again and again.
_remembered: dict[str, Overlap] = {}


def find_overlap(splits: Mapping[str, Source], threshold: float) -> Overlap:
    """Exact and near overlap between all splits; `threshold`: see `near`."""
    key = fingerprint([[name, source.fingerprint()] for name, source in splits.items()] + [threshold])
    if key not in _remembered:
        _remembered[key] = _find(splits, threshold)
    return _remembered[key]


def input_text(document: Document) -> str:
    """What the model would be given, as one text."""
    inputs = [text for name, text in document.fields.items() if name not in OUTCOMES]
    return "\n".join(inputs or document.fields.values())


def place(document: Document) -> str:
    """`source:row`."""
    return f"{document.meta.get('source', document.id)}:{document.meta.get('row', '')}".rstrip(":")


@dataclass
class _Held:
    """The scored splits: input hash, split number and place of every document, and all sketches."""

    names: list[str]
    hashes: Hashes
    splits: list[int]
    places: list[str]
    excerpts: list[str]
    sketches: Sketches


def _hold(splits: Mapping[str, Source]) -> _Held:
    names = [name for name in splits if name != "train"]
    hashes: array[int] = array("Q")
    numbers: list[int] = []
    places: list[str] = []
    excerpts: list[str] = []

    def texts() -> Iterator[str]:
        for number, name in enumerate(names):
            for document in splits[name]:
                hashes.append(input_hash(document))
                numbers.append(number)
                places.append(place(document))
                text = input_text(document)
                excerpts.append(text[:EXCERPT_CHARACTERS])
                yield text

    sketches = sketch(texts())
    return _Held(names, np.frombuffer(hashes, dtype=np.uint64), numbers, places, excerpts, sketches)


class _Rows:
    """Counts and examples for each two splits."""

    def __init__(self, held: _Held) -> None:
        self._held = held
        self._exact: dict[tuple[str, str], set[int]] = defaultdict(set)
        self._near: dict[tuple[str, str], set[int]] = defaultdict(set)
        self._examples: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)

    def add(self, first_split: str, first: str, second: int, similarity: float | None) -> None:
        """The document at `first` stands in the split of the held document `second`; similarity None: exactly."""
        splits = (first_split, self._held.names[self._held.splits[second]])
        (self._exact if similarity is None else self._near)[splits].add(second)
        if len(self._examples[splits]) < MAX_EXAMPLES:
            example = {"first": first, "second": self._held.places[second], "text": self._held.excerpts[second]}
            rounded = None if similarity is None else round(similarity, 3)
            self._examples[splits].append({**example, "similarity": rounded})

    def report(self, names: list[str]) -> list[dict[str, Any]]:
        rows = []
        for number, first in enumerate(names):
            for second in names[number + 1 :]:
                key = (first, second)
                near = self._near[key] - self._exact[key]
                rows.append(
                    {
                        "splits": [first, second],
                        "exact": len(self._exact[key]),
                        "near": len(near),
                        "examples": self._examples[key],
                    }
                )
        return rows


def _find(splits: Mapping[str, Source], threshold: float) -> Overlap:
    held = _hold(splits)
    rows = _Rows(held)
    counts = {name: held.splits.count(number) for number, name in enumerate(held.names)}
    dropped: set[int] = set()
    if "train" in splits:
        if held.names:
            dropped, counts["train"] = _against_train(splits["train"], held, rows, threshold)
        else:
            counts["train"] = sum(1 for _ in splits["train"])
    _among_held(held, rows, threshold)
    documents = {name: counts[name] for name in splits}
    return Overlap(rows.report(list(splits)), np.array(sorted(dropped), dtype=np.uint64), documents)


def _against_train(train: Source, held: _Held, rows: _Rows, threshold: float) -> tuple[set[int], int]:
    """Notes what of the training split stands in the held ones; returns its input hashes, and the split's size."""
    order = np.argsort(held.hashes, kind="stable")
    known = held.hashes[order]
    finder = Finder(held.sketches, threshold)
    hashes: array[int] = array("Q")
    dropped: set[int] = set()
    for block in blocks(train):
        found = np.array([input_hash(document) for document in block], dtype=np.uint64)
        hashes.extend(found.tolist())
        finder.see([input_text(document) for document in block])
        starts, ends = np.searchsorted(known, found, "left"), np.searchsorted(known, found, "right")
        for number in np.flatnonzero(ends > starts).tolist():
            dropped.add(int(found[number]))
            for second in order[starts[number] : ends[number]].tolist():
                rows.add("train", place(block[number]), second, None)
    pairs = finder.pairs()
    places = _places(train, pairs)
    for pair in pairs:
        dropped.add(hashes[pair.first])
        rows.add("train", places[pair.first], pair.second, pair.similarity)
    return dropped, len(hashes)


def _places(source: Source, pairs: list[Pair]) -> dict[int, str]:
    """Places of the paired documents of a stream, by number."""
    numbers = {pair.first for pair in pairs}
    if not numbers:
        return {}
    return {number: place(document) for number, document in enumerate(source) if number in numbers}


def _among_held(held: _Held, rows: _Rows, threshold: float) -> None:
    """Notes what stands in two of the scored splits."""
    order = np.argsort(held.hashes, kind="stable")
    same = np.flatnonzero(held.hashes[order][1:] == held.hashes[order][:-1])
    exact = [Pair(int(order[i]), int(order[i + 1]), 1.0) for i in same.tolist()]
    for pairs, is_exact in ((exact, True), (near_pairs(held.sketches, threshold), False)):
        for pair in pairs:
            first, second = sorted((pair.first, pair.second))
            if held.splits[first] != held.splits[second]:
                name = held.names[held.splits[first]]
                rows.add(name, held.places[first], second, None if is_exact else pair.similarity)
