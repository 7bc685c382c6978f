"""One arm's scores, example by example and seed by seed, as the statistics take them.

Windows of one document hang together, so that counting them one by one makes intervals too narrow: their additive
columns are summed, and the document is the example.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from isoform.errors import DataError
from isoform.evaluation.metrics import columns_of
from isoform.storage import iterate_jsonl

if TYPE_CHECKING:
    from isoform.contracts import Floats

# id -> column -> number, of one seed
Table = dict[str, dict[str, float]]

# With fewer documents there is no saying how far documents differ, and the windows stay the examples.
MIN_DOCUMENTS = 5
# `d39e#0`, `d39e#1`: the windows of one document, or a document that stands there twice.
WINDOW = re.compile(r"([^#]+)(?:#\d+)+")


@dataclass(frozen=True)
class Scores:
    """One arm, one split: the additive statistics of every example under every seed.

    pooled: whether an example may be the sum of several rows of predictions. notes: what to hold against an interval.
    Shapes: each of columns `(S, N)`; ids N; seeds S.
    """

    columns: Mapping[str, Floats]
    ids: list[str]
    seeds: list[int]
    pooled: bool = False
    notes: tuple[str, ...] = ()


def load_scores(paths_by_seed: Mapping[int, Path], split: str, metric: Any) -> Scores:
    """The columns that a metric needs, from one predictions.jsonl a seed, with a document's windows summed.

    Rows are {"id", "split", "stats": {column: number}}; the order of the rows does not matter.
    Raises: DataError where a row lacks a column or a number, an id stands twice, or the seeds' examples differ.
    """
    tables = {seed: _read(path, split, metric) for seed, path in paths_by_seed.items()}
    if not tables:
        raise DataError(f"{metric.name} on {split}: no predictions given; expected one file a seed")
    seeds = list(tables)
    for seed in seeds[1:]:
        same_examples(tables[seeds[0]].keys(), tables[seed].keys(), f"seed {seeds[0]}", f"seed {seed}")
    return stacked(tables)


def stacked(tables: Mapping[int, Table]) -> Scores:
    """Scores from one table a seed, all with the same ids, with a document's windows summed."""
    seeds = list(tables)
    ids = list(tables[seeds[0]])
    names = list(tables[seeds[0]][ids[0]])
    values = np.array([[[tables[seed][id][name] for name in names] for id in ids] for seed in seeds], dtype=np.float64)
    return by_document(Scores({name: values[..., index] for index, name in enumerate(names)}, ids, seeds))


def by_document(scores: Scores) -> Scores:
    """The same scores with one example a document, the sum of its windows; as they are where there are no windows.

    With fewer documents than `MIN_DOCUMENTS` the windows stay, and a note says so.
    Shapes: columns `(S, N)` -> `(S, number of documents)`.
    """
    matches = [WINDOW.fullmatch(id) for id in scores.ids]
    owners = [match.group(1) if match else id for match, id in zip(matches, scores.ids, strict=True)]
    documents = {owner: index for index, owner in enumerate(dict.fromkeys(owners))}
    if len(documents) == len(owners):
        return scores
    if len(documents) < MIN_DOCUMENTS:
        these = "1 document" if len(documents) == 1 else f"{len(documents)} documents"
        note = f"the examples are windows of only {these}, which hang together: the interval may be too narrow"
        return Scores(scores.columns, scores.ids, scores.seeds, notes=(note,))
    places = np.array([documents[owner] for owner in owners])
    columns: dict[str, Floats] = {
        name: np.stack(
            [np.bincount(places, weights=of_seed, minlength=len(documents)).astype(float) for of_seed in column]
        )
        for name, column in scores.columns.items()
    }
    return Scores(columns, list(documents), scores.seeds, pooled=True)


def _read(path: Path, split: str, metric: Any) -> Table:
    """The metric's columns, of one file and split."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected the predictions of a finished run")
    rows: Table = {}
    columns: tuple[str, ...] | None = None
    splits: dict[str, int] = {}
    for number, row in enumerate(iterate_jsonl(path), 1):
        where = row.get("split")
        splits[str(where)] = splits.get(str(where), 0) + 1
        if where not in (split, None):
            continue
        columns = columns or columns_of(metric, row["stats"])
        values = {column: row["stats"].get(column) for column in columns}
        for column, value in values.items():
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise DataError(f"{path}:{number}: stats.{column} is {value!r}; {metric.name} needs a finite number")
        if str(row["id"]) in rows:
            raise DataError(
                f"{path}:{number}: id {row['id']!r} stands there twice in split {split!r}; ids must be unique"
            )
        rows[str(row["id"])] = {column: float(value) for column, value in values.items()}
    if not rows:
        known = ", ".join(f"{name} ({count} rows)" for name, count in splits.items()) or "none"
        raise DataError(f"{path}: no row of split {split!r}; splits there: {known}")
    return rows


def same_examples(first: Any, second: Any, first_name: str, second_name: str) -> None:
    """Raises: DataError with counts and an example where two arms or seeds were not scored on the same examples."""
    only_first, only_second = set(first) - set(second), set(second) - set(first)
    if only_first or only_second:
        example = next(iter(sorted(only_first or only_second)))
        raise DataError(
            f"the examples differ: {len(only_first)} of {len(first)} only in {first_name}, {len(only_second)} of "
            f"{len(second)} only in {second_name}, {example!r} for one; expected the same examples in both"
        )
