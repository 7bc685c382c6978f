"""One run: a training stage plus its evaluation, in a folder that explains itself.

prepare -> (resume) -> loop -> choose the checkpoint -> final/ -> eval.json, predictions.jsonl -> manifest.json
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

import isoform
from isoform import machine
from isoform.checkpoints.folders import load_model
from isoform.checkpoints.forms import save_base, save_model, weights_file
from isoform.checkpoints.state import latest_state
from isoform.config import RunConfig
from isoform.errors import CheckpointError, ConfigError, DataError
from isoform.models.accounting import accounts
from isoform.models.lora import read_in_bits
from isoform.registry import Reads, recording
from isoform.storage import (
    fingerprint,
    locked,
    read_json,
    remove,
    remove_leftovers,
    sha256_file,
    write_json,
    write_text,
)
from isoform.training import classical, compiling, sharding
from isoform.training.logs import RunLog, forget_after, open_trackers, track_scores
from isoform.training.loop import BEST_LOSS, BEST_METRIC, Loop, planned_rates
from isoform.training.plan import warnings
from isoform.training.prepare import Prepared, cache_folder, fits, prepare
from isoform.training.progress import Progress
from isoform.training.scoring import score, score_all
from isoform.training.step import autocast

# Fields that a resume may change: they alter neither the weights nor what is measured. Another path to the teacher is
# none of them by itself, its fingerprint tells whether it is the same one; whether blocks are compiled stays as it was.
FREE = {
    "name",
    "about",
    "track",
    "data.root",
    "train.compile",
    "objective.teacher",
    "train.checkpoint_every_steps",
    "train.checkpoint_every_seconds",
    "train.keep_checkpoints",
    "train.log_every_steps",
    "train.step_minutes",
    "evaluate.max_predictions",
    "evaluate.train_examples",
}


@dataclass
class RunResult:
    """Where a finished run is and what it measured; rows are those of eval.json."""

    folder: Path
    rows: list[dict[str, Any]]
    manifest: dict[str, Any] = field(default_factory=dict)


def train(
    config: RunConfig,
    folder: Path,
    *,
    resume: bool = False,
    start: Path | None = None,
    precision: str | None = None,
    quiet: bool = False,
) -> RunResult:
    """Trains and evaluates one stage in `folder`; a finished run is returned as it is.

    resume: go on from the newest complete checkpoint. start: the model folder of the stage before.

    Raises: ConfigError (also: the folder holds another run), DataError, CheckpointError, LockedError, NonFiniteError,
    Stopped.
    """
    if start is None and fits(config):
        return fit_and_score(config, folder, precision=precision)
    accelerator = _accelerator(_precision(config, folder, precision))
    reads = Reads()
    if not accelerator.is_main_process:
        return _train(config, folder, accelerator, reads, resume=resume, start=start, precision=precision, quiet=True)
    with _held(folder), recording(reads):
        return _train(config, folder, accelerator, reads, resume=resume, start=start, precision=precision, quiet=quiet)


def _precision(config: RunConfig, folder: Path, chosen: str | None) -> str:
    """What the run computes in: as its study chose, else as it was begun, else what its config asks for.

    Raises: ConfigError where that is fp16 and there is no GPU.
    """
    path = folder / "manifest.json"
    begun = read_json(path).get("precision") if path.exists() else None
    asked = str(chosen or begun or config.train.precision)
    # Only fp16 is anything to Accelerate; between bf16 and fp32 `prepare` chooses.
    return machine.choose_precision(asked, machine.choose_device().type, lambda: False)


def _accelerator(precision: str = "fp32") -> Accelerator:
    """A fresh Accelerator: a study makes many runs in one process, and Accelerate keeps its state globally.

    It scales the gradients of fp16; autocast is the loop's own. Raises: ConfigError where it is launched in a way that
    the loop does not know.
    """
    if PartialState._shared_state == {} or PartialState().num_processes == 1:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    mixed = "fp16" if precision == "fp16" else "no"
    accelerator = Accelerator(cpu=machine.choose_device().type == "cpu", mixed_precision=mixed)
    sharding.check(accelerator)
    return accelerator


def _train(
    config: RunConfig,
    folder: Path,
    accelerator: Accelerator,
    reads: Reads,
    *,
    resume: bool,
    start: Path | None,
    precision: str | None,
    quiet: bool,
) -> RunResult:
    began, started = time.monotonic(), _now()
    manifest_path = folder / "manifest.json"
    earlier = read_json(manifest_path) if manifest_path.exists() else {}
    # Chosen once: a resume on another machine goes on as the run began.
    run = prepare(
        config,
        start=start,
        precision=precision or earlier.get("precision"),
        kernels=None if earlier.get("complete") else earlier.get("kernels"),
        device=accelerator.device,
        accelerator=accelerator,
    )
    if accelerator.is_main_process:
        remove_leftovers(folder)
        remove_leftovers(folder / "checkpoints")
        _refuse_foreign(run, folder, earlier, resume)
    if earlier.get("complete"):
        return RunResult(folder, read_json(folder / "eval.json"), earlier)
    compiled = compiling.choose(run, accelerator, earlier)
    if accelerator.is_main_process:
        for warning in () if quiet or resume else warnings(run, planned_rates(run)):
            print(f"{config.name}: {warning}", file=sys.stderr)
        write_text(folder / "config.yaml", yaml.safe_dump(run.resolved, sort_keys=False, allow_unicode=True, width=110))
        write_json(manifest_path, {**_manifest(run, accelerator, earlier.get("started", started)), "compile": compiled})
        save_base(folder / "base", run.model, run.tokenizer)
    accelerator.wait_for_everyone()
    if run.objective.helper is not None:
        run.objective.helper.rehearse(
            run.datasets["train"],
            cache_folder(),
            run.device,
            run.precision,
            lambda: autocast(run.precision, run.device),
        )
    damaged: list[dict[str, Any]] = []
    found = latest_state(folder / "checkpoints", lambda kind, **what: damaged.append(what)) if resume else None
    forget_after(folder, found.state.step if found else -1) if accelerator.is_main_process else None
    trackers = open_trackers(config.track, folder, config.name, run.resolved) if accelerator.is_main_process else []
    log_folder = folder if accelerator.is_main_process else folder / f".rank-{accelerator.process_index}"
    log = RunLog(log_folder, trackers)
    try:
        with _progress(config, run, found.state.step if found else 0, quiet) as progress:
            loop = Loop(run, folder, accelerator, log, lambda model, split: score(run, model, split), progress)
            for what in damaged:
                log.event("checkpoint-damaged", **what)
            if found is not None:
                loop.resume(found)
            outcome = loop()
        if not accelerator.is_main_process:
            return RunResult(folder, [])
        manifest = read_json(manifest_path)
        manifest.update(
            steps=outcome.state.step,
            tokens=outcome.state.tokens,
            unused_parameters=outcome.unused,
            seconds={"training": outcome.seconds},
        )
        rows = _finish(run, folder, outcome.state.scalars, manifest)
        log.scored(outcome.state.step, rows)
        before = float(found.state.scalars.get("seconds", 0.0)) if found else 0.0
        manifest["seconds"]["total"] = before + time.monotonic() - began
        manifest.update(
            complete=True,
            finished=_now(),
            final_sha256=sha256_file(weights_file(folder / "final")),
            config_unread=reads.unread(config),
        )
        write_json(manifest_path, manifest)
        return RunResult(folder, rows, manifest)
    finally:
        log.close()


def fit_and_score(config: RunConfig, folder: Path, *, precision: str | None = None) -> RunResult:
    """Fits a classical model, in a run folder like any other: no step, each training text read once.

    Raises: ConfigError, DataError, LockedError.
    """
    began, started = time.monotonic(), _now()
    accelerator = _accelerator()
    with _held(folder):
        path = folder / "manifest.json"
        earlier = read_json(path) if path.exists() else {}
        run = prepare(config, precision=precision or earlier.get("precision"), device=accelerator.device)
        _refuse_foreign(run, folder, earlier, resume=True)
        if earlier.get("complete"):
            return RunResult(folder, read_json(folder / "eval.json"), earlier)
        run, trials = classical.fit(run)
        fitted = time.monotonic() - began
        manifest = {**_manifest(run, accelerator, started), "tokens": len(run.datasets["train"]), "trials": trials}
        return _score_once(run, folder, manifest, {"training": fitted}, began)


def score_as_is(config: RunConfig, folder: Path, *, precision: str | None = None) -> RunResult:
    """Scores a model that is not trained, in a run folder like any other: no step, no token.

    Raises: ConfigError, DataError, CheckpointError, LockedError.
    """
    began, started = time.monotonic(), _now()
    accelerator = _accelerator()
    with locked(folder):
        run = prepare(config, precision=precision, device=accelerator.device, for_training=False)
        manifest = {**_manifest(run, accelerator, started), "tokens": 0}
        return _score_once(run, folder, manifest, {"training": 0.0}, began)


def _score_once(
    run: Prepared,
    folder: Path,
    manifest: dict[str, Any],
    seconds: dict[str, float],
    began: float,
) -> RunResult:
    """Writes the folder of a model that is what it is: scored once, at step 0."""
    write_text(folder / "config.yaml", yaml.safe_dump(run.resolved, sort_keys=False, allow_unicode=True, width=110))
    save_model(folder / "final", run.model, run.tokenizer, generation=run.generation)
    rows = score_all(run, run.model, run.config.evaluate.scored(run.datasets), folder, manifest)
    track_scores(run.config.track, folder, run.config.name, run.resolved, rows)
    write_json(folder / "eval.json", rows)
    write_json(folder / "selections.json", {"final": "last", "selections": {"last": {"step": 0, "rows": rows}}})
    manifest.update(steps=0, seconds={**seconds, "total": time.monotonic() - began}, complete=True)
    manifest.update(finished=_now(), final_sha256=sha256_file(weights_file(folder / "final")))
    write_json(folder / "manifest.json", manifest)
    return RunResult(folder, rows, manifest)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """The folder, locked; it vanishes where the run is refused before there was anything to keep."""
    made = not folder.exists()
    try:
        with locked(folder):
            yield
    finally:
        if made and [path.name for path in folder.iterdir()] == [".lock"]:
            remove(folder)


# ---------------------------------------------------------------------------------- before the first step


def _refuse_foreign(run: Prepared, folder: Path, manifest: dict[str, Any], resume: bool) -> None:
    """A folder that holds another run, or the same with other data, is never written into."""
    path = folder / "config.yaml"
    if not path.exists():
        return
    old = yaml.safe_load(path.read_text(encoding="utf-8"))
    changed = [line for line in differences(old, run.resolved) if line.split(":")[0] not in FREE]
    if changed:
        raise ConfigError(
            f"{folder} holds a run with another config: {'; '.join(changed[:5])}"
            f"{f' and {len(changed) - 5} more' if len(changed) > 5 else ''}. "
            "Use another --out, or the config it was made with"
        )
    stored = manifest.get("fingerprints", {})
    for what, value in run.fingerprints.items():
        if what in stored and stored[what] != value:
            lines = differences(manifest.get("data"), _data_report(run)) or [f"fingerprint: {stored[what]} -> {value}"]
            raise DataError(
                f"{folder}: the {what} has changed since this run began: {'; '.join(lines[:4])}"
                f"{f' and {len(lines) - 4} more' if len(lines) > 4 else ''}. "
                "Put the old files back, or start a new run with another --out"
            )
    if not resume and not manifest.get("complete") and (folder / "checkpoints").exists():
        raise ConfigError(f"{folder} holds an unfinished run; add --resume to go on with it, or use another --out")


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """`field: old -> new` for every value that differs between two resolved configs."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in [*old, *(key for key in new if key not in old)]:
            lines += differences(old.get(key), new.get(key), f"{where}.{key}" if where else str(key))
        return lines
    return [] if old == new else [f"{where}: {old!r} -> {new!r}"]


def _manifest(run: Prepared, accelerator: Accelerator, started: str) -> dict[str, Any]:
    context = run.config.text.max_tokens
    return {
        "format": 1,
        "complete": False,
        "code": {"isoform": isoform.__version__, "sources": sources_fingerprint()},
        "packages": machine.package_versions(),
        "machine": machine.describe(),
        "device": str(run.device),
        "precision": run.precision,
        "kernels": run.kernels,
        "processes": accelerator.num_processes,
        "distribution": accelerator.distributed_type.value,
        "fingerprints": {"config": fingerprint(run.resolved), **run.fingerprints},
        "seed": run.config.seed,
        "model": accounts(run.model, context),
        "data": _data_report(run),
        "num_steps": run.num_steps,
        "steps_per_epoch": run.batch_plan.steps_per_epoch if run.batch_plan else None,
        "test_scored": 0,
        "started": started,
    }


def _data_report(run: Prepared) -> dict[str, Any]:
    datasets = {name: dataset.report for name, dataset in run.datasets.items()}
    return {"splits": run.splits.report, "datasets": datasets}


def sources_fingerprint() -> str:
    """A hash of the sources that affect numbers: everything but the command line, reports and serving."""
    root = Path(isoform.__file__).parent
    quiet = {"cli.py", "studies", "serving", "recipes"}
    suffixes = {".py", ".cpp", ".h"}
    files = [p for p in sorted(root.rglob("*")) if p.suffix in suffixes and p.relative_to(root).parts[0] not in quiet]
    return fingerprint([[str(p.relative_to(root)), sha256_file(p)] for p in files])


def _progress(config: RunConfig, run: Prepared, start: int, quiet: bool) -> Progress:
    from rich.console import Console

    return Progress(config.name, run.num_steps, start, Console(stderr=True, quiet=quiet))


# ---------------------------------------------------------------------------------- after the last step


def _finish(run: Prepared, folder: Path, scalars: dict[str, Any], manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Writes final/ and what it scores; beside it every other way to choose, scored on the same splits."""
    select = run.config.train.select
    chosen: dict[str, int] = {"last": int(manifest["steps"])}
    for name in (BEST_LOSS, BEST_METRIC):
        if name in scalars:
            chosen[name] = int(scalars[name]["step"])
    final = "last" if select.metric == "last" else (BEST_LOSS if select.metric == "loss" else BEST_METRIC)
    if final not in chosen:
        raise CheckpointError(
            f"train.select: {select.metric} on {select.split} was never a number, so no checkpoint can be chosen; "
            "look at events.jsonl"
        )
    save_model(folder / "last", run.model, run.tokenizer, generation=run.generation)
    splits = run.config.evaluate.scored(run.datasets)
    scored: dict[int, list[dict[str, Any]]] = {}
    selections = {}
    for name in sorted(chosen, key=lambda name: name != final):
        step = chosen[name]
        if step not in scored:
            model = _reopened(run, folder / name)
            target = folder if name == final else folder / name
            scored[step] = score_all(run, model, splits, target, manifest)
        selections[name] = {"step": step, "rows": scored[step]}
    save_model(folder / "final", load_model(folder / final).model, run.tokenizer, generation=run.generation)
    write_json(folder / "eval.json", scored[chosen[final]])
    write_json(folder / "selections.json", {"final": final, "selections": selections})
    return scored[chosen[final]]


def _reopened(run: Prepared, folder: Path) -> Any:
    """A kept model on the run's device, read in as many bits as it was trained in."""
    bits = (run.config.adapter or {}).get("base_bits")
    if bits is None:
        return load_model(folder, device=run.device).model
    model = load_model(folder).model
    read_in_bits(model, bits)
    return model.to(run.device)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
