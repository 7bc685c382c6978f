"""`isoform plan`: what a run or a study will take, before it takes it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from isoform import machine
from isoform.config import is_study, run_config, study_config
from isoform.storage import free_bytes
from isoform.studies import audit
from isoform.studies.layout import Layout, StageRun
from isoform.training.plan import plan_run
from isoform.training.prepare import prepare
from isoform.training.run import sources_fingerprint, train


def forecast(values: dict[str, Any], *, attempt: bool = False) -> dict[str, Any]:
    """{name, stages: [plan of each distinct stage and how often it runs], seconds_total, disk_bytes, warnings, ...}."""
    if not is_study(values):
        config = run_config(values)
        stage = {"name": config.name, "runs": 1, **plan_run(prepare(config))}
        return _total(config.name, [stage], [], config_attempt=_attempt(values) if attempt else None)
    study = study_config(values)
    wanted = {**study.base.get("train", {})}.get("precision", "auto")
    precision = machine.choose_precision(wanted, machine.choose_device().type)
    layout = Layout(study, list(range(study.seed, study.seed + study.seeds)), precision, sources_fingerprint())
    stages = []
    for label, run, count in _distinct(layout):
        stages.append({"name": label, "runs": count, **plan_run(prepare(run.config, precision=precision))})
    trials = {name: _num_trials(options.tune) for name, options in layout.arms() if options.tune}
    return _total(study.name, stages, audit.before(layout), trials=trials)


def _distinct(layout: Layout) -> list[tuple[str, StageRun, int]]:
    """(label, a run of it, how many runs there are) for each stage that differs by more than the seed."""
    counted: dict[str, tuple[str, StageRun, int]] = {}
    first = layout.seeds[0]
    labels = {
        run.key: f"{run.arm}: {run.stage}" for arm, _ in layout.arms() for run in reversed(layout.chain(arm, first))
    }
    for run in layout.all():
        if run.seed == first:
            counted[run.key] = (labels[run.key], run, len(layout.seeds))
    return list(counted.values())


def _num_trials(tune: dict[str, list[Any]]) -> int:
    trials = 1
    for choices in tune.values():
        trials *= len(choices)
    return trials


def _attempt(values: dict[str, Any]) -> dict[str, Any]:
    """One real step, evaluation, save and reload in a temporary folder."""
    short = {**values, "train": {**values.get("train", {}), "max_steps": 1}}
    short["train"].pop("max_epochs", None)
    short["train"].pop("schedule", None)
    with tempfile.TemporaryDirectory(prefix="isoform-try-") as folder:
        result = train(run_config(short), Path(folder) / "try", quiet=True)
        return {"rows": result.rows, "final_sha256": result.manifest["final_sha256"]}


def _total(
    name: str,
    stages: list[dict[str, Any]],
    checks: list[dict[str, Any]],
    *,
    trials: dict[str, int] | None = None,
    config_attempt: dict[str, Any] | None = None,
) -> dict[str, Any]:
    return {
        "name": name,
        "stages": stages,
        "tuning_trials": trials or {},
        "seconds_total": sum(stage["runs"] * stage.get("seconds_total", 0.0) for stage in stages),
        "disk_bytes": sum(stage["runs"] * stage["disk_bytes"] for stage in stages),
        "free_disk_bytes": free_bytes(Path.cwd()),
        "memory_bytes": machine.memory_bytes(),
        "audit": checks,
        "attempt": config_attempt,
    }
