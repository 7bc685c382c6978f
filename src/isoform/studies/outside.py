"""Results that exist, from any tool: runs, folders with predictions, a predictions.csv."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from isoform.errors import ConfigError, DataError
from isoform.evaluation.metrics import columns_of
from isoform.evaluation.predictions import read_predictions
from isoform.registry import lookup, names
from isoform.storage import read_json
from isoform.studies.audit_outside import Result, audit_results, differences, read_result
from isoform.studies.scores import Scores, Table, stacked
from isoform.studies.statistics import compare, decide, interval_over_seeds


def read_results(path: Path, split: str | None, metric: Any) -> Scores:
    """The scores of one arm: a file or folder of predictions, or a folder of several, `seed-0`, `seed-1`, ...

    Raises: DataError where a row lacks a column of the metric.
    """
    seeds = sorted(folder for folder in path.glob("seed-*") if folder.is_dir()) if path.is_dir() else []
    tables = [_table(place, split, metric) for place in seeds or [path]]
    ids = list(tables[0])
    for place, table in zip(seeds, tables, strict=False):
        if table.keys() != tables[0].keys():
            raise DataError(f"{place}: {len(table)} examples, {len(ids)} in {seeds[0]}, and not the same ids")
    return stacked(dict(enumerate(tables)))


def _table(path: Path, split: str | None, metric: Any) -> Table:
    rows = read_predictions(path, split)
    if not rows:
        raise DataError(f"{path}: no prediction of the split {split!r} stands there")
    table = {}
    columns = columns_of(metric, rows[0]["stats"])
    for row in rows:
        missing = [column for column in columns if column not in row["stats"]]
        if missing:
            raise DataError(f"{path}: the row {row['id']!r} has no {missing[0]!r}, which {metric.name} needs")
        table[str(row["id"])] = {column: float(row["stats"][column]) for column in columns}
    return table


def compare_results(
    paths: list[Path], *, metric: str | None = None, split: str | None = None, margin: float | None = None
) -> dict[str, Any]:
    """Each result against the first: the same values as a study's results, with what its runs say of themselves.

    Raises: ConfigError, DataError (other examples, a metric that one of them lacks).
    """
    if len(paths) < 2:
        raise ConfigError(f"compare: {len(paths)} result given, two or more are expected")
    labels = _labels(paths)
    split = split or _common_split(paths)
    chosen = metric or _common_metric(paths, split)
    cls = lookup("metric", chosen, "--metric")
    scores = [read_results(path, split, cls) for path in paths]
    decided = decide([compare(scores[0], other, cls, margin=margin) for other in scores[1:]])
    made = [read_result(label, path) for label, path in zip(labels, paths, strict=True)]
    arms = []
    for result, path, found in zip(made, paths, scores, strict=True):
        mean, low, high, deviation = interval_over_seeds(found, cls)
        row: dict[str, Any] = {
            "metric": chosen,
            "split": split,
            "mean": mean,
            "low": low,
            "high": high,
            "sd": deviation,
        }
        row["values"] = [
            float(cls().value({name: column[index].sum() for name, column in found.columns.items()}))
            for index in range(len(found.seeds))
        ]
        arms.append({**_arm(made[0], result), "results": str(path), "summary": [row], "tuning": []})
    questions = [
        {**decision.as_dict(), "pair": [labels[0], label], "split": split, "published": None}
        for label, decision in zip(labels[1:], decided, strict=True)
    ]
    return {
        "name": "comparison",
        "question": "",
        "published": [],
        "seeds": scores[0].seeds,
        "compare": {"metric": chosen, "split": split, "confidence": 0.95},
        "arms": arms,
        "questions": questions,
        "audit": audit_results(made, split, min(len(found.seeds) for found in scores)),
    }


def _arm(first: Result, result: Result) -> dict[str, Any]:
    """What the runs of a result say of themselves; empty where only predictions are there."""
    return {
        "name": result.name,
        "stages": [stage["name"] for stage in result.runs[0].stages] if result.runs else [],
        "differences": {} if result is first else differences(first, result),
        "parameters": result.runs[0].manifest.get("model") or {} if result.runs else {},
        "runs": [
            {
                "seed": run.manifest.get("seed"),
                "stages": run.stages,
                "final": str(run.folder),
                "metrics": read_json(run.folder / "eval.json") if (run.folder / "eval.json").is_file() else [],
                "diverged": run.diverged,
            }
            for run in result.runs
        ],
    }


def _labels(paths: list[Path]) -> list[str]:
    """Short names that differ: the last part of each path, or the whole of it where those are equal."""
    short = [path.stem if path.is_file() else path.resolve().name for path in paths]
    return short if len(set(short)) == len(short) else [str(path) for path in paths]


def _first_rows(path: Path) -> list[dict[str, Any]]:
    folders = sorted(path.glob("seed-*")) if path.is_dir() else []
    return read_predictions(folders[0] if folders else path)


def _common_split(paths: list[Path]) -> str | None:
    """The one split that every result has; None where the files name none."""
    sets = [{row["split"] for row in _first_rows(path)} - {None} for path in paths]
    named = [found for found in sets if found]
    if not named:
        return None
    common = set.intersection(*named)
    if len(common) != 1:
        raise ConfigError(
            f"--split: the results share {', '.join(sorted(common)) or 'no split'}; name the one to compare"
        )
    return str(common.pop())


def _common_metric(paths: list[Path], split: str | None) -> str:
    sets = [set(_first_rows(path)[0]["stats"]) for path in paths]
    columns = set.intersection(*sets)
    preferred = sorted(names("metric"), key=lambda name: (name not in {"exact_match", "accuracy"}, name))
    for name in preferred:
        if set(columns_of(lookup("metric", name), columns)) <= columns:
            return name
    raise DataError(
        f"the results share the columns {', '.join(sorted(columns)) or 'none'}, from which no metric follows"
    )
