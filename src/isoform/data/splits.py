"""Splits that are disjoint by construction, and what is done where given files are not.

A document's split follows from a keyed hash of what the model is given (its fields without label and answer), so
equal inputs never part, and neither another order nor another file name moves anything. Numbers are exact: documents
are ranked by hash and cut at the share asked for. All is decided before any window is cut.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from isoform import chance
from isoform.config import DataConfig, Files
from isoform.contracts import Document
from isoform.data.blocks import blocks
from isoform.data.identity import Hashes, content_hash, input_hash
from isoform.data.overlap import Overlap, find_overlap
from isoform.data.sources import Alternatives, DocumentSource, Origin, alternatives_of, open_source
from isoform.errors import ConfigError, DataError
from isoform.registry import nearest
from isoform.storage import fingerprint

NAMES = ("train", "holdout", "dev", "test")
# Codes of the splits that an assignment knows; NONE is in no split.
NONE = 255

Codes = npt.NDArray[np.uint8]
Booleans = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Assignment:
    """Which documents are in which split, by hash: sorted keys `(k,)` and the split's code of each `(k,)`."""

    keys: Hashes
    codes: Codes

    def of(self, hashes: Hashes, default: int) -> Codes:
        """The code of each hash, `default` where it is not known."""
        if not len(self.keys):
            return np.full(len(hashes), default, dtype=np.uint8)
        places = np.minimum(np.searchsorted(self.keys, hashes), len(self.keys) - 1)
        return np.where(self.keys[places] == hashes, self.codes[places], np.uint8(default)).astype(np.uint8)


class Part:
    """The documents of a source that a rule keeps; implements `contracts.Source`.

    keep: hashes and documents of a block -> which of them belong to the part.
    """

    def __init__(
        self,
        name: str,
        source: Splittable,
        hash_of: Callable[[Document], int],
        keep: Callable[[Hashes, list[Document]], Booleans],
        rule: Any,
    ) -> None:
        self.name = name
        self.origins: tuple[Origin, ...] = source.origins
        self._source, self._hash_of, self._keep, self._rule = source, hash_of, keep, rule

    def __iter__(self) -> Iterator[Document]:
        for block in blocks(self._source):
            hashes = np.array([self._hash_of(document) for document in block], dtype=np.uint64)
            kept = self._keep(hashes, block)
            yield from (document for document, yes in zip(block, kept.tolist(), strict=True) if yes)

    def fingerprint(self) -> str:
        return fingerprint([self._source.fingerprint(), self._rule])


Splittable = DocumentSource | Part


@dataclass
class SplitSources:
    """The splits that there are, by name, what was counted on the way, and a hash of the whole.

    report: {documents: {split: number}, overlap: rows as in `Overlap`, policy, dropped_from_train: number of documents,
    fingerprints: {split: hash}, sources: {split: {source: hash of its bytes, or commit of the hub}}}.
    """

    splits: dict[str, Splittable]
    report: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = ""


def load_splits(
    data: DataConfig, required: tuple[str, ...] | Alternatives, optional: tuple[str, ...] = ()
) -> SplitSources:
    """The splits of a data section.

    required: the fields that a document needs, or alternatives of which any one suffices; optional: those that may be
    missing outside the training split.

    Raises: ConfigError where the section contradicts itself; DataError from the sources, for a split without
    documents, and for an overlap that `data.overlap` refuses.
    """
    alternatives = alternatives_of(required)
    if data.path is not None:
        splits = _by_hash(data, alternatives, optional)
    else:
        splits = _by_files(data, alternatives, optional)
    if data.holdout is not None:
        splits = _with_holdout(splits, data)
    overlap = find_overlap(splits, data.near_fraction)
    for name, number in overlap.documents.items():
        if number == 0:
            raise DataError(
                f"the split {name} has no documents ({splits[name].name}); give more documents, other shares, "
                "or a smaller `data.unit` (`piece` for one long text)"
            )
    splits, dropped = _after_policy(splits, overlap, data)
    documents = {name: number - (dropped if name == "train" else 0) for name, number in overlap.documents.items()}
    prints = {name: source.fingerprint() for name, source in splits.items()}
    report = {
        "documents": documents,
        "overlap": overlap.report,
        "policy": data.overlap,
        "dropped_from_train": dropped,
        "fingerprints": prints,
        "sources": {name: {origin.spec: origin.digest() for origin in split.origins} for name, split in splits.items()},
    }
    return SplitSources(splits, report, fingerprint(prints))


def _by_files(data: DataConfig, required: Alternatives, optional: tuple[str, ...]) -> dict[str, Splittable]:
    """One source for each split whose files are named."""
    if data.holdout is None and (data.group is not None or data.stratify is not None):
        raise ConfigError("data.group, data.stratify: train, dev and test are given as files, so that nothing is split")
    named: dict[str, Files | None] = {"train": data.train, "dev": data.dev, "test": data.test}
    splits: dict[str, Splittable] = {
        name: open_source(files, data, required, () if name == "train" else optional)
        for name, files in named.items()
        if files is not None
    }
    if not splits:
        raise ConfigError("data: no source is named; give `data.path`, or `data.train` with `dev` and `test`")
    return splits


# ------------------------------------------------------------------------------------------------- splitting one source


def _by_hash(data: DataConfig, required: Alternatives, optional: tuple[str, ...]) -> dict[str, Splittable]:
    """One source cut into train, dev and test by hash of the content, or of the group."""
    for name in ("dev", "test"):
        if getattr(data, name) is not None:
            raise ConfigError(
                f"data.{name}: given beside `data.path`; use `data.train` for the training files, or `splits`"
            )
    assert data.path is not None
    shares = {"train": data.splits.train, "dev": data.splits.dev, "test": data.splits.test}
    wanted = [name for name, share in shares.items() if share > 0]
    source = open_source(data.path, data, required, () if "train" in wanted else optional)
    if shares["train"] == 1.0:
        return {"train": source}
    hash_of = _keyed(data)
    assignment = assign(source, hash_of, [shares[name] for name in ("train", "dev", "test")], _stratum(data))
    splits: dict[str, Splittable] = {}
    for code, name in enumerate(("train", "dev", "test")):
        if name in wanted:
            rule = [name, data.splits.model_dump(), data.split_seed, data.stratify, data.group]
            splits[name] = Part(f"{source.name} [{name}]", source, hash_of, _in_split(assignment, code), rule)
    return splits


def _in_split(assignment: Assignment, code: int) -> Callable[[Hashes, list[Document]], Booleans]:
    return lambda hashes, block: assignment.of(hashes, NONE) == code


def _keyed(data: DataConfig, purpose: str = "split") -> Callable[[Document], int]:
    """A hash of the document's input, or of its group, keyed by the split seed."""
    group = data.group

    def hash_of(document: Document) -> int:
        value = input_hash(document) if group is None else content_hash({"group": _column(document, group, "group")})
        return chance.key64(data.split_seed, purpose, value) & 0xFFFF_FFFF_FFFF_FFFF

    return hash_of


def _stratum(data: DataConfig) -> Callable[[Document], str]:
    column = data.stratify
    return (lambda document: "") if column is None else (lambda document: _column(document, column, "stratify"))


def _column(document: Document, column: str, setting: str) -> str:
    value = document.fields.get(column, document.meta.get(column))
    if value is None:
        there = ", ".join([*document.fields, *document.meta])
        place = f"{document.meta['source']}:{document.meta['row']}"
        raise DataError(f"{place}: no column {column!r} for `data.{setting}`; there are {there}")
    return str(value)


def assign(
    source: Splittable,
    hash_of: Callable[[Document], int],
    shares: Sequence[float],
    stratum_of: Callable[[Document], str] = lambda document: "",
    among: Callable[[Document], bool] = lambda document: True,
) -> Assignment:
    """Cuts the documents, ranked by hash within each stratum, at the shares; equal hashes stay together.

    shares: fractions, or whole numbers of documents (int). A hash that stands in several strata belongs to that of
    its first document. among: which documents take part.
    """
    codes: dict[str, int] = {}
    hashes: array[int] = array("Q")
    strata: array[int] = array("L")
    for document in source:
        if among(document):
            hashes.append(hash_of(document))
            strata.append(codes.setdefault(stratum_of(document), len(codes)))
    if not hashes:
        return Assignment(np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.uint8))
    fractions = [share / len(hashes) if isinstance(share, int) else share for share in shares]
    keys, first, counts = np.unique(np.frombuffer(hashes, dtype=np.uint64), return_index=True, return_counts=True)
    stratum_of_key = np.frombuffer(strata, dtype=f"u{strata.itemsize}")[first]
    result = np.full(len(keys), NONE, dtype=np.uint8)
    for stratum in range(len(codes)):
        members = np.flatnonzero(stratum_of_key == stratum)
        after = np.cumsum(counts[members])
        start = 0
        for code, share in enumerate(np.cumsum(fractions).tolist()):
            end = int(np.searchsorted(after, round(float(after[-1]) * min(share, 1.0)), side="right"))
            result[members[start:end]] = code
            start = end
    return Assignment(keys, result)


# ------------------------------------------------------------------------------------------------- holdout and overlap


def _with_holdout(splits: dict[str, Splittable], data: DataConfig) -> dict[str, Splittable]:
    """Carves the holdout from train: the same documents whatever else train holds."""
    assert data.holdout is not None
    if "train" not in splits:
        raise ConfigError("data.holdout: there is no training split to carve it from")
    train = splits["train"]
    tables = _tables(train, data.holdout_from)

    def among(document: Document) -> bool:
        return tables is None or document.meta["source"] in tables

    def held_out(hashes: Hashes, block: list[Document]) -> Booleans:
        candidates = np.array([among(document) for document in block], dtype=bool)
        chosen: Booleans = (assignment.of(hashes, NONE) == 0) & candidates
        return chosen

    def left_over(hashes: Hashes, block: list[Document]) -> Booleans:
        return np.not_equal(assignment.of(hashes, NONE), 0)

    hash_of = _keyed(data, "holdout")
    assignment = assign(train, hash_of, [data.holdout], _stratum(data), among)
    rule = [data.holdout, data.holdout_from, data.split_seed, data.group, data.stratify]
    carved: dict[str, Splittable] = {
        "train": Part(f"{train.name} [without holdout]", train, hash_of, left_over, ["train", *rule]),
        "holdout": Part(f"{train.name} [holdout]", train, hash_of, held_out, ["holdout", *rule]),
    }
    return carved | {name: source for name, source in splits.items() if name != "train"}


def _tables(train: Splittable, spec: str | None) -> set[str] | None:
    """Names of the tables of the one training source that the holdout comes from; None: of all."""
    if spec is None:
        return None
    for origin in train.origins:
        if origin.spec == spec:
            return {table.name for table in origin.tables}
    specs = [origin.spec for origin in train.origins]
    raise ConfigError(
        f"data.holdout_from: {spec!r} is none of the training sources{nearest(spec, specs)}: {', '.join(specs)}"
    )


def _after_policy(
    splits: dict[str, Splittable], overlap: Overlap, data: DataConfig
) -> tuple[dict[str, Splittable], int]:
    """The splits after what `data.overlap` says, and how many training documents were dropped.

    Raises: DataError where overlap is refused.
    """
    if not overlap.found or data.overlap == "keep":
        return splits, 0
    if data.overlap == "refuse":
        raise DataError(_refusal(overlap))
    if not len(overlap.drop):
        return splits, 0
    drop = Assignment(overlap.drop, np.zeros(len(overlap.drop), dtype=np.uint8))
    train = splits["train"]

    def stays(hashes: Hashes, block: list[Document]) -> Booleans:
        return np.equal(drop.of(hashes, NONE), NONE)

    rule = ["without", fingerprint(overlap.drop.tolist())]
    cleaned = Part(f"{train.name} [without overlap]", train, input_hash, stays, rule)
    left = sum(1 for _ in cleaned)
    if left == 0:
        raise DataError("data.overlap: every training document stands in another split too, so that none is left")
    return {**splits, "train": cleaned}, overlap.documents["train"] - left


def _refusal(overlap: Overlap) -> str:
    row = next(row for row in overlap.report if row["exact"] or row["near"])
    first, second = row["splits"]
    example = row["examples"][0]
    how = "exactly" if example["similarity"] is None else f"with {example['similarity']:.0%} of the words"
    return (
        f"data.overlap: {row['exact']} documents of {second} stand exactly in {first}, {row['near']} nearly "
        f"({example['second']} in {example['first']} {how}); clean the files, or set `data.overlap` to "
        "`drop_from_train` or `keep`"
    )
