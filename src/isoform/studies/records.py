"""Reads what a study or a run left on disk, as plain values; what is missing is absent, what is damaged is named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from isoform.errors import ConfigError, DataError
from isoform.storage import finite, iterate_jsonl, read_json
from isoform.studies.wording import is_number
from isoform.yaml12 import parse_yaml

if TYPE_CHECKING:
    import numpy.typing as npt

    Column = npt.NDArray[np.float64]

Results = dict[str, Any]
# Columns of models that route begin with one of these.
ROUTING = ("router_entropy", "expert_load.")
_CARRIED = ("audit", "data", "command", "machine", "precision", "started", "finished")


class Records:
    """A study's or run's folder: its `results`, its runs by relative name, and `damage`, one line a damaged file.

    A single run is read as a study of one arm and no question. A damaged file counts as far as it can be read.

    Raises: DataError where the folder holds neither a study nor a run, or the study's results cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.damage: list[str] = []
        self.is_study = (folder / "results.json").is_file()
        names = ("manifest.json", "config.yaml", "eval.json", "metrics.jsonl")
        if not self.is_study and not any((folder / name).is_file() for name in names):
            raise DataError(f"{folder}: neither a study (results.json) nor a run (config.yaml, manifest.json) is there")
        results = self._json("results.json") if self.is_study else self._run_as_results()
        if not isinstance(results, dict):
            raise DataError(
                f"{folder / 'results.json'}: not a study's results; run the study again or restore the file"
            )
        if self.is_study and results.get("jobs") is None:
            results["jobs"] = (self._json("manifest.json") or {}).get("jobs")
        self.results: Results = results

    def config_text(self, name: str) -> str | None:
        """The resolved config of a run folder as it was written."""
        try:
            return (self.folder / name / "config.yaml").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None

    def training_columns(self, name: str) -> dict[str, Column]:
        """`metrics.jsonl` by column, each `(steps,)`, NaN where a value is absent.

        A step that is there twice, since the run was resumed, counts once, as it was the last time.
        """
        by_step: dict[float, Mapping[str, Any]] = {}
        for number, row in enumerate(self._rows(f"{name}/metrics.jsonl")):
            by_step[float(row["step"]) if is_number(row.get("step")) else float(number)] = row
        rows = [by_step[step] for step in sorted(by_step)]
        names = ["step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second"]
        names += [key for key in (rows[-1] if rows else ()) if key.startswith(ROUTING)]
        columns = {column: np.array([_number(row.get(column)) for row in rows], dtype=np.float64) for column in names}
        return {column: values for column, values in columns.items() if np.isfinite(values).any()}

    def evaluation_curves(self, name: str) -> dict[tuple[str, str], dict[str, Column]]:
        """(metric, split) -> columns step, tokens, value of the evaluations during training, in order of steps."""
        found: dict[tuple[str, str], dict[float, tuple[float, float]]] = {}
        for event in self._rows(f"{name}/events.jsonl"):
            if event.get("event") != "evaluation" or not is_number(event.get("step")):
                continue
            for row in event.get("rows") or ():
                if isinstance(row, dict) and is_number(row.get("value")):
                    curve = found.setdefault((str(row.get("metric") or ""), str(row.get("split") or "")), {})
                    curve[float(event["step"])] = (_number(event.get("tokens")), float(row["value"]))
        curves = {}
        for key, points in found.items():
            steps = sorted(points)
            tokens, values = (np.array([points[step][side] for step in steps]) for side in (0, 1))
            curves[key] = {"step": np.array(steps), "tokens": tokens, "value": values}
        return curves

    def breakdown(self, name: str) -> dict[str, Any]:
        """Where a classifier errs, as its run wrote it down; empty where it did not."""
        value = self._json(f"{name}/breakdown.json")
        return value if isinstance(value, dict) else {}

    def prediction_rows(self, name: str, split: str | None) -> dict[str, Mapping[str, Any]]:
        """id -> row of `predictions.jsonl`, of one split where it is named."""
        return {
            str(row.get("id")): row
            for row in self._rows(f"{name}/predictions.jsonl")
            if (split is None or row.get("split") == split) and row.get("prediction") is not None
        }

    def _run_as_results(self) -> Results:
        manifest = self._json("manifest.json")
        manifest = manifest if isinstance(manifest, dict) else {}
        rows = self._json("eval.json")
        rows = [row for row in rows if isinstance(row, dict) and "metric" in row] if isinstance(rows, list) else []
        columns, seconds = self.training_columns("."), manifest.get("seconds")
        seconds = seconds.get("total") if isinstance(seconds, dict) else seconds
        last = {f"final_{key}" if key == "loss" else key: _last(columns, key) for key in ("step", "tokens", "loss")}
        stage = {"name": "training", "folder": ".", "seconds": seconds, "steps": last.pop("step"), **last}
        name = self._name() or self.folder.resolve().name
        arm = {
            "name": name,
            "stages": ["training"],
            "parameters": manifest.get("model"),
            "runs": [{"seed": manifest.get("seed", 0), "stages": [stage], "final": ".", "metrics": rows}],
            "tuning": manifest.get("trials") or [],
            "summary": [{**row, "mean": row.get("value"), "values": [row.get("value")]} for row in rows],
        }
        results = {key: manifest[key] for key in _CARRIED if key in manifest}
        code = manifest.get("code") or {}
        results["code"] = {"version": code.get("isoform"), "packages": manifest.get("packages")}
        if (self.folder / "config.yaml").is_file():
            results.setdefault("command", "isoform train config.yaml")
        return {"name": name, "arms": [arm], "seconds": seconds, **results}

    def _name(self) -> str | None:
        """The run's name as its config has it."""
        try:
            config = parse_yaml(self.config_text(".") or "", "config.yaml")
        except ConfigError as error:
            self.damage.append(str(error))
            return None
        return str(config["name"]) if isinstance(config, dict) and config.get("name") else None

    def _json(self, name: str) -> Any:
        """The file's value, non-finite numbers as None; None where there is no readable file."""
        try:
            return finite(read_json(self.folder / name))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, DataError) as error:
            self.damage.append(f"{name}: {error}")
            return None

    def _rows(self, name: str) -> Iterator[Mapping[str, Any]]:
        """The rows up to the first damaged one."""
        try:
            yield from (row for row in iterate_jsonl(self.folder / name) if isinstance(row, dict))
        except (OSError, ValueError, DataError) as error:
            self.damage.append(str(error).replace(f"{self.folder}/", ""))


def _last(columns: Mapping[str, Column], name: str) -> float | None:
    values = columns.get(name, np.empty(0))
    values = values[np.isfinite(values)]
    return float(values[-1]) if len(values) else None


def _number(value: Any) -> float:
    return float(value) if is_number(value) else float("nan")
