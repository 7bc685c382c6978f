"""What stands in two splits: documents that are given the same input, exactly or nearly.

One split, the training split where there is one, streams past; the others are held as hashes and sketches.
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
from isoform.text.conversations import spoken

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
    return "\n".join(map(spoken, inputs or document.fields.values()))


def place(document: Document) -> str:
    """`source:row`."""
    return f"{document.meta.get('source', document.id)}:{document.meta.get('row', '')}".rstrip(":")


@dataclass
class _Held:
    """The splits but one: input hash, split number and place of every document, and all sketches."""

    names: list[str]
    hashes: Hashes
    splits: list[int]
    places: list[str]
    excerpts: list[str]
    sketches: Sketches


def _hold(splits: Mapping[str, Source], names: list[str]) -> _Held:
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
    streamed = "train" if "train" in splits else next(iter(splits))
    held = _hold(splits, [name for name in splits if name != streamed])
    rows = _Rows(held)
    counts = {name: held.splits.count(number) for number, name in enumerate(held.names)}
    found: set[int] = set()
    if held.names:
        found, counts[streamed] = _against_held(splits[streamed], streamed, held, rows, threshold)
    else:
        counts[streamed] = sum(1 for _ in splits[streamed])
    _among_held(held, rows, threshold)
    drop = np.array(sorted(found) if streamed == "train" else [], dtype=np.uint64)
    return Overlap(rows.report([streamed, *held.names]), drop, {name: counts[name] for name in splits})


def _against_held(source: Source, name: str, held: _Held, rows: _Rows, threshold: float) -> tuple[set[int], int]:
    """Notes what of the streaming split stands in the held ones; returns its input hashes, and the split's size."""
    order = np.argsort(held.hashes, kind="stable")
    known = held.hashes[order]
    finder = Finder(held.sketches, threshold)
    hashes: array[int] = array("Q")
    common: set[int] = set()
    for block in blocks(source):
        found = np.array([input_hash(document) for document in block], dtype=np.uint64)
        hashes.extend(found.tolist())
        finder.see([input_text(document) for document in block])
        starts, ends = np.searchsorted(known, found, "left"), np.searchsorted(known, found, "right")
        for number in np.flatnonzero(ends > starts).tolist():
            common.add(int(found[number]))
            for second in order[starts[number] : ends[number]].tolist():
                rows.add(name, place(block[number]), second, None)
    pairs = finder.pairs()
    places = _places(source, pairs)
    for pair in pairs:
        common.add(hashes[pair.first])
        rows.add(name, places[pair.first], pair.second, pair.similarity)
    return common, len(hashes)


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
