"""`isoform plan`: what a run or a study will take, before it takes it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from isoform import machine
from isoform.config import RunConfig, run_config, study_config
from isoform.errors import ConfigError
from isoform.layers import choice
from isoform.reading import is_study
from isoform.storage import free_bytes
from isoform.studies import audit
from isoform.studies.audit_probe import Probes
from isoform.studies.layout import Layout, StageRun, some_arms
from isoform.studies.study import shapes_of
from isoform.studies.workers import crew, measured, num_jobs
from isoform.training.paper import plan_on_paper, why_on_paper
from isoform.training.plan import plan_config
from isoform.training.run import sources_fingerprint, train


def forecast(values: dict[str, Any], *, arms: Sequence[str] | None = None, attempt: bool = False) -> dict[str, Any]:
    """{name, stages: [plan of each distinct stage and how often it runs], seconds_total, disk_bytes, warnings, ...}."""
    if not is_study(values):
        if arms is not None:
            raise ConfigError("--arms: this is a single run, which has none")
        config = run_config(values)
        reason = why_on_paper(config)
        plan = plan_config(config) if reason is None else plan_on_paper(config, reason)
        stage = {"name": config.name, "runs": 1, **plan}
        return _total(config.name, [stage], [], attempt=_attempt(config) if attempt else None)
    whole = study_config(values)
    study = some_arms(whole, arms)
    wanted = {**study.base.get("train", {})}.get("precision", "auto")
    device, shapes = machine.choose_device(), shapes_of(whole)
    precision = choice.choose_precision(wanted, device, shapes)
    kernels = choice.choose(precision, device, shapes=shapes)["native"]
    seeds = list(range(study.seed, study.seed + study.seeds))
    layout = Layout(study, seeds, precision, sources_fingerprint(), kernels)
    jobs = num_jobs(study.jobs, sum(1 for _ in layout.all()))
    stages = []
    with ExitStack() as made:
        workers = made.enter_context(crew(jobs)) if jobs > 1 else None
        probes = made.enter_context(Probes(layout))
        for label, run, count in _distinct(layout):
            config = probes.placed(run.config)
            plan = measured(config, precision, workers) if workers else plan_config(config, precision)
            stages.append({"name": label, "runs": count, **plan})
    trials = {name: len(layout.trials(name)) for name, options in layout.arms() if options.tune}
    attempted = attempt_study(layout) if attempt else None
    return _total(study.name, stages, audit.before(layout), trials=trials, attempt=attempted, jobs=jobs)


def _distinct(layout: Layout) -> list[tuple[str, StageRun, int]]:
    """(label, a run of it, how many runs there are) for each stage that differs by more than seed or tuned values."""
    counted: dict[str, tuple[str, StageRun, int]] = {}
    first = layout.seeds[0]
    labels = {
        run.key: f"{run.arm}: {run.stage}" for arm, _ in layout.arms() for run in reversed(layout.chain(arm, first))
    }
    for run in layout.all():
        if run.seed == first:
            counted[run.key] = (labels[run.key], run, len(layout.seeds))
    for arm, _ in layout.arms():
        trials: dict[str, dict[str, StageRun]] = {}
        for run in (run for _, chain in layout.trials(arm) for run in chain if run.key not in counted):
            trials.setdefault(run.stage, {})[run.key] = run
        for stage, runs in trials.items():
            key, run = next(iter(runs.items()))
            counted[key] = (f"{arm}: {stage}, trial", run, len(runs))
    return list(counted.values())


def _one_step(config: RunConfig) -> RunConfig:
    """The same run, one update long."""
    values = config.model_dump()
    schedule = {"kind": values["train"]["schedule"]["kind"]}
    values["train"] |= {"max_steps": 1, "max_epochs": None, "schedule": schedule}
    return run_config(values)


def _attempt(config: RunConfig) -> dict[str, Any]:
    """One real step, evaluation, save and reload in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="isoform-try-") as folder:
        result = train(_one_step(config), Path(folder) / "try", quiet=True)
        return {"rows": result.rows}


def attempt_study(layout: Layout) -> dict[str, Any]:
    """The same for every stage of every arm, each starting from the one before."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="isoform-try-") as folder:
        for arm, options in layout.arms():
            if not options.stages:
                continue
            for run in layout.chain(arm, layout.seeds[0]):
                start = Path(folder) / run.parent.folder / "final" if run.parent else None
                target = Path(folder) / run.folder
                if not target.exists():
                    config = _one_step(run.placed(Path(folder)))
                    rows += train(config, target, start=start, precision=layout.precision, quiet=True).rows
    return {"rows": rows}


def _total(
    name: str,
    stages: list[dict[str, Any]],
    checks: list[dict[str, Any]],
    *,
    trials: dict[str, int] | None = None,
    attempt: dict[str, Any] | None = None,
    jobs: int = 1,
) -> dict[str, Any]:
    timed = all("seconds_total" in stage for stage in stages)
    return {
        "name": name,
        "stages": stages,
        "tuning_trials": trials or {},
        "jobs": jobs,
        "seconds_total": sum(stage["runs"] * stage["seconds_total"] for stage in stages) / jobs if timed else None,
        "disk_bytes": sum(stage["runs"] * stage["disk_bytes"] for stage in stages),
        "free_disk_bytes": free_bytes(Path.cwd()),
        "memory_bytes": machine.memory_bytes(),
        "audit": checks,
        "attempt": attempt,
    }
