"""A study: every arm at every seed, what is missing and no more; then audit, statistics and the report.

lay out -> audit the plan -> tune -> train stage by stage -> read scores -> compare -> audit the results -> report
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

import isoform
from isoform import machine
from isoform.config import StudyConfig, study_config
from isoform.errors import AuditError, ConfigError
from isoform.layers import choice
from isoform.layers.choice import Shape
from isoform.registry import lookup
from isoform.storage import fingerprint, iterate_jsonl, locked, read_json, write_json, write_text
from isoform.studies import audit
from isoform.studies.conclusions import conclude
from isoform.studies.layout import AS_IS, Layout, StageRun, arms_of, begins_from_arm, some_arms
from isoform.studies.report import write_report
from isoform.studies.workers import Say, carry_out, num_jobs
from isoform.training.origins import shape_of
from isoform.training.run import sources_fingerprint


def study(
    values: dict[str, Any],
    folder: Path,
    *,
    arms: Sequence[str] | None = None,
    command: str = "",
    quiet: bool = False,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Carries the study out in `folder` and returns its results; a study that was stopped goes on where it was.

    arms: those that are carried out now; None: all. What they made is kept when more are asked for.

    Raises: ConfigError, DataError, AuditError (exit 10, before anything is trained where that can be known), Stopped.
    """
    whole = study_config(values)
    config = some_arms(whole, arms)
    with locked(folder):
        began = time.monotonic()
        record = _record(folder, whole, command, say)
        _write_study(folder, whole)
        layout = Layout(
            config,
            list(range(config.seed, config.seed + config.seeds)),
            record["precision"],
            sources_fingerprint(),
            record["kernels"]["native"],
        )
        planned = [*audit.before(layout), *audit.left_out(whole, config)]
        _refuse(planned)
        jobs = num_jobs(config.jobs, sum(1 for _ in layout.all()))
        record["jobs"] = jobs

        @choice.held(record["kernels"])
        def train_missing(runs: Sequence[StageRun], note: str = "") -> None:
            carry_out(runs, folder, layout.precision, jobs=jobs, quiet=quiet, say=say, note=note)

        try:
            tuning = _tune(layout, folder, train_missing)
            train_missing(list(layout.all()))
        finally:  # the time of a study that is stopped counts too
            record["seconds"] = float(record.get("seconds", 0.0)) + time.monotonic() - began
            record["finished"] = _now()
            write_json(folder / "manifest.json", record)
        results = conclude(layout, folder, planned, tuning, record, whole)
        write_json(folder / "results.json", results)
        write_report(folder)
        _refuse(results["audit"])
        return results


def _record(folder: Path, config: StudyConfig, command: str, say: Say) -> dict[str, Any]:
    """The study's manifest: precision, kernels and machine are chosen once, for all of its arms, and kept by every
    resume, with more seeds or arms too.

    Raises: ConfigError where the kernels that it was begun with are not here.
    """
    path = folder / "manifest.json"
    key = fingerprint(config.model_dump(mode="json", exclude={"jobs", "seeds"}))
    if path.exists():
        record: dict[str, Any] = read_json(path)
        if record["fingerprint"] == key:
            device = machine.choose_device()
            return {
                **record,
                "command": command,
                "kernels": choice.choose(record["precision"], device, record.get("kernels")),
            }
        say(
            f"{folder} holds another study, or an earlier form of this one: its results and report are written anew, "
            "finished stages that this one shares are kept"
        )
    wanted = {**config.base.get("train", {})}.get("precision", "auto")
    device = machine.choose_device()
    shapes = shapes_of(config)
    precision = choice.choose_precision(wanted, device, shapes)
    record = {
        "format": 1,
        "fingerprint": key,
        "command": command,
        "precision": precision,
        "kernels": choice.choose(precision, device, shapes=shapes),
        "machine": machine.describe(),
        "packages": machine.package_versions(),
        "code": {"isoform": isoform.__version__, "sources": sources_fingerprint()},
        "started": _now(),
        "seconds": 0.0,
    }
    write_json(path, record)
    return record


def _write_study(folder: Path, config: StudyConfig) -> None:
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)
    write_text(folder / "study.yaml", text)


def shapes_of(study: StudyConfig) -> list[Shape]:
    """Those of the models that its arms begin with: precision and kernels have to serve them all."""
    layout = Layout(study, [study.seed], "", "")
    trained = [(arm, options.stages) for arm, options in layout.arms() if options.results is None]
    configs = [layout.config(arm, [*stages, AS_IS][0], study.seed, {}) for arm, stages in trained]
    known = [config for config in configs if not begins_from_arm(config)]
    return list(dict.fromkeys(shape for config in known for shape in shape_of(config)))


def _refuse(rows: list[dict[str, Any]]) -> None:
    refused = [row["message"] for row in rows if row["level"] == "refuse"]
    if refused:
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise AuditError(f"the audit refuses this study: {refused[0]}{more}")


# ---------------------------------------------------------------------------------- tuning and training


def _tune(
    layout: Layout, folder: Path, train_missing: Callable[[Sequence[StageRun], str], None]
) -> dict[str, list[dict[str, Any]]]:
    """The trials of each arm that tunes, by the first seed; the layout goes on with the best on the selection split.

    Trials run side by side over the arms, up to one that asks for the model of another, whose setting must be known.
    """
    trials: dict[str, list[dict[str, Any]]] = {}
    waiting: list[str] = []

    def decide_waiting() -> None:
        tried = {arm: layout.trials(arm) for arm in waiting}
        runs = [run for pairs in tried.values() for _, chain in pairs for run in chain]
        if runs:
            train_missing(runs, "trials: ")
        for arm, pairs in tried.items():
            trials[arm] = _judged(pairs, folder)
            layout.chosen[arm] = next(row["setting"] for row in trials[arm] if row["chosen"])
        waiting.clear()

    for arm, options in layout.arms():
        if not options.tune:
            continue
        if any(arms_of(layout.config(arm, stage, layout.seeds[0], {})) for stage in options.stages):
            decide_waiting()
        waiting.append(arm)
    decide_waiting()
    return trials


def _judged(pairs: list[tuple[dict[str, Any], list[StageRun]]], folder: Path) -> list[dict[str, Any]]:
    """The settings of an arm with their values on the selection split; the first of the best is chosen."""
    rows: list[dict[str, Any]] = [
        {"setting": setting, "value": _selected_value(chain[-1], folder)} for setting, chain in pairs
    ]
    select = pairs[0][1][-1].config.train.select
    sign = 1 if lookup("metric", select.metric).higher_is_better else -1
    best = max(rows, key=lambda row: -math.inf if row["value"] is None else sign * row["value"])
    for row in rows:
        row["chosen"] = row is best
    return rows


def _selected_value(run: StageRun, folder: Path) -> float | None:
    """The selection metric of the checkpoint that a finished run kept."""
    select = run.config.train.select
    if select.metric == "last":
        raise ConfigError(f"tune: stage {run.stage!r} has no train.select.metric to choose a setting by; name one")
    values: list[float] = [
        row["value"]
        for event in iterate_jsonl(folder / run.folder / "events.jsonl")
        if event["event"] == "evaluation"
        for row in event["rows"]
        if row["metric"] == select.metric and row["split"] == select.split and row["value"] is not None
    ]
    if not values:
        return None
    return max(values) if lookup("metric", select.metric).higher_is_better else min(values)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
