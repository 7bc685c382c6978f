"""Rows of predictions.jsonl, and the predictions.csv of another tool read into the same rows.

    {"id", "split", "input", "gold", "prediction", "stats": {column: number}}

`stats` are the additive columns of `metrics`, so that statistics can be made from files alone.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from isoform.errors import DataError
from isoform.registry import nearest
from isoform.storage import iterate_jsonl, json_line, staged_file

COLUMNS = ("id", "split", "input", "gold", "prediction", "correct", "label")
TRUE, FALSE = frozenset({"1", "1.0", "true", "yes"}), frozenset({"0", "0.0", "false", "no"})


@contextmanager
def writing(path: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Gives what writes a row of predictions.jsonl; the file is there, whole, when the block ends without an error."""
    with staged_file(path) as file:

        def write(row: Mapping[str, Any]) -> None:
            file.write(json_line(dict(row)))

        yield write


def read_predictions(path: Path, split: str | None = None) -> list[dict[str, Any]]:
    """The rows of a predictions.jsonl or predictions.csv, or of the one in a folder; of one split where it is named.

    Raises: DataError naming file, line and column.
    """
    if path.is_dir():
        found = [path / name for name in ("predictions.jsonl", "predictions.csv") if (path / name).is_file()]
        if not found:
            raise DataError(f"{path}: neither predictions.jsonl nor predictions.csv is in this folder")
        path = found[0]
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    rows = _read_csv(path) if path.suffix in {".csv", ".tsv"} else _read_jsonl(path)
    _refuse_repeated_ids(path, rows)
    return [row for row in rows if split is None or row["split"] in (None, split)]


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, row in enumerate(iterate_jsonl(path), start=1):
        if not isinstance(row, dict) or "id" not in row or not isinstance(row.get("stats"), dict):
            raise DataError(f"{path}:{number}: an object with `id` and `stats` is expected")
        rows.append({**dict.fromkeys(("split", "input", "gold", "prediction")), **row, "id": str(row["id"])})
    return rows


def _read_csv(path: Path) -> list[dict[str, Any]]:
    """Columns `id` and either `correct`, or `prediction` with `gold` (or `label`); `split` and `input` if present."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        try:
            header = reader.fieldnames or []
            _check_header(path, header)
            return [_csv_row(f"{path}:{reader.line_num}", row) for row in reader]
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}:{reader.line_num + 1}: not readable as UTF-8 CSV: {error}") from None


def _check_header(path: Path, header: Iterable[str]) -> None:
    names = list(header)
    given = f"{path}: columns {', '.join(names) or 'none'} given"
    if "id" not in names:
        raise DataError(f"{given}, `id` is missing{_hint(names, 'id')}; it pairs the rows of two files")
    if "correct" in names:
        return
    if "prediction" not in names:
        raise DataError(f"{given}, `correct`, or `prediction` with `gold` is expected{_hint(names, 'prediction')}")
    if "gold" not in names and "label" not in names:
        raise DataError(f"{given}, `gold` or `label` is expected beside `prediction`{_hint(names, 'gold')}")


def _hint(names: list[str], wanted: str) -> str:
    close = nearest(wanted, [name for name in names if name not in COLUMNS])
    return close.replace("did you mean", "is it")


def _csv_row(where: str, row: Mapping[str | None, Any]) -> dict[str, Any]:
    if None in row or None in row.values():
        raise DataError(f"{where}: another number of columns than in the header")
    gold = row.get("gold", row.get("label"))
    prediction = row.get("prediction")
    correct = _number(where, str(row["correct"])) if "correct" in row else float(prediction == gold)
    return {
        "id": str(row["id"]),
        "split": row.get("split"),
        "input": row.get("input"),
        "gold": gold,
        "prediction": prediction,
        "stats": {"correct": correct, "examples": 1.0},
    }


def _number(where: str, text: str) -> float:
    """1, 0, true, false, yes, no, or a number between."""
    word = text.strip().lower()
    if word in TRUE or word in FALSE:
        return float(word in TRUE)
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise DataError(f"{where}: column `correct` has {text!r}, a number from 0 to 1, true or false is expected")
    return value


def _refuse_repeated_ids(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    seen: set[tuple[Any, str]] = set()
    for row in rows:
        key = (row["split"], row["id"])
        if key in seen:
            raise DataError(f"{path}: the id {row['id']!r} stands there twice; ids pair the rows of two files")
        seen.add(key)
