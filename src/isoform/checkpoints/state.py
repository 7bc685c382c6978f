"""Exact training state: a step folder is a model folder plus `state/`, complete or absent.

    step-000500/   model.safetensors, config.json, tokenizer.json, ...   a model folder (see `forms`)
                   state/run.json                tokens, data cursor, random streams, numbers of the optimiser
                   state/optimizer.safetensors   tensors of the optimiser: `parameter name/state name`
                   state/companion.safetensors   what the objective trains beside the model, if anything
                   state/master.safetensors      the weights, only where the model folder does not hold them bit by bit
                                                 (of an adapted model: the adapter's, without the frozen base)
                   manifest.json                 step, size and SHA-256 of each file, written last

The newest step is the highest one whose files all have the hashes of its manifest; times of files are never looked at.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isoform import storage
from isoform.checkpoints import folders, forms, manifest, tensors
from isoform.checkpoints.optimizers import optimizer_state_by_name, restore_optimizer
from isoform.contracts import RunState, Tokenizer
from isoform.errors import CheckpointError

STATE = "state"
_STEP_NAME = re.compile(r"step-(\d+)")

__all__ = [
    "Loaded",
    "latest_state",
    "load_state",
    "optimizer_state_by_name",
    "prune",
    "restore_optimizer",
    "save_state",
]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A verified step: its folder, the run's state, and the weights under the model's own names, bit by bit.

    companion: the tensors of what the objective trains beside the model.
    """

    path: Path
    state: RunState
    tensors: dict[str, Tensor]
    companion: dict[str, Tensor]


def save_state(
    folder: Path,
    model: Any,
    tokenizer: Tokenizer | None,
    run_state: RunState,
    *,
    keep: int,
    protect: Set[int] = frozenset(),
    extra: dict[str, Any] | None = None,
    companion: Mapping[str, Tensor] | None = None,
) -> Path:
    """Writes `folder/step-<run_state.step>`, then removes older steps but the last `keep` and those in `protect`.

    Nothing is removed before the new step is on the disk. Raises: DiskError, before writing where the room is too
    small, and with nothing half-written where it runs out on the way.
    """
    form = forms.disk_form(model, tokenizer)
    master = {} if _is_exact(model, form) else forms.kept_tensors(model)
    moments = _flat(run_state.optimizer)
    beside = dict(companion or {})
    size = sum(tensors.num_bytes(table) for table in (form.weights, master, moments, beside))
    step = run_state.step
    final = folder / f"step-{step:06d}"
    storage.require_free(final, size + 10_000_000)
    with storage.staged_folder(final) as staged:
        forms.write_files(staged, model, tokenizer, form, extra=extra)
        (staged / STATE).mkdir()
        tensors.write_tensors(staged / STATE / "optimizer.safetensors", moments)
        if beside:
            tensors.write_tensors(staged / STATE / "companion.safetensors", beside)
        if master:
            tensors.write_tensors(staged / STATE / "master.safetensors", master)
        storage.write_text(staged / STATE / "run.json", _run_text(run_state))
        manifest.write(staged, step=step)
    prune(folder, step, keep=keep, protect=protect)
    return final


def latest_state(folder: Path, on_event: Callable[..., None] | None = None) -> Loaded | None:
    """The highest step whose files all verify; None where no step was ever saved.

    Damaged steps stay where they are; each is told as `on_event("checkpoint-damaged", checkpoint=..., problem=...)`
    and the next lower one is tried. Raises: CheckpointError where steps exist and none is whole: training must not
    silently begin anew.
    """
    found = _steps(folder)
    problems: list[str] = []
    for path in found:
        try:
            return load_state(path)
        except CheckpointError as error:
            problems.append(str(error))
            if on_event is not None:
                on_event("checkpoint-damaged", checkpoint=path.name, problem=str(error))
    if problems:
        raise CheckpointError(
            f"{folder}: none of {len(found)} checkpoints is whole (newest: {problems[0]}); "
            "restore one from a copy, or move the folder away to begin anew"
        )
    return None


def load_state(path: Path) -> Loaded:
    """One step folder, verified and read; its weights go to `folders.load_weights`, its optimiser part to
    `restore_optimizer`. Raises: CheckpointError that names the first missing or damaged file.
    """
    value = manifest.verify(path)
    step = _manifest_step(path, value)
    if (path / STATE / "master.safetensors").is_file():
        weights = tensors.read_tensors(path / STATE / "master.safetensors")
    else:
        weights = folders.read_weights(path)
    run = tensors.read_object(path / STATE / "run.json")
    optimizer: dict[str, dict[str, Any]] = {name: dict(numbers) for name, numbers in run["optimizer"].items()}
    for key, tensor in tensors.read_tensors(path / STATE / "optimizer.safetensors").items():
        parameter, name = key.rsplit("/", 1)
        optimizer[parameter][name] = tensor
    beside = path / STATE / "companion.safetensors"
    companion = tensors.read_tensors(beside) if beside.is_file() else {}
    state = RunState(step, run["tokens"], run["cursor"], run["rng"], optimizer, run["scalars"])
    return Loaded(path, state, weights, companion)


def prune(folder: Path, step: int, *, keep: int, protect: Set[int] = frozenset()) -> None:
    """Removes steps below `step` beyond the last `keep` whole ones; a damaged step is never counted as one of them."""
    whole = 0
    for path in _steps(folder):
        number = _folder_step(path)
        if number > step:
            continue
        if whole >= keep and number != step and number not in protect:
            storage.remove_folder(path)
        elif number == step:
            whole += 1
        elif whole < keep:
            try:
                manifest.verify(path)
                whole += 1
            except CheckpointError:
                continue


def _steps(folder: Path) -> list[Path]:
    """Step folders, the highest step first; the manifest says which step it is, the name where it cannot."""
    if not folder.is_dir():
        return []
    return sorted(
        (path for path in folder.iterdir() if _STEP_NAME.fullmatch(path.name) and path.is_dir()),
        key=_folder_step,
        reverse=True,
    )


def _folder_step(path: Path) -> int:
    try:
        return _manifest_step(path, manifest.read(path))
    except CheckpointError:
        match = _STEP_NAME.fullmatch(path.name)
        assert match is not None
        return int(match[1])


def _manifest_step(path: Path, value: dict[str, Any]) -> int:
    step = value.get("step")
    if not isinstance(step, int) or not (path / STATE).is_dir():
        raise CheckpointError(f"{path}: no training state: its {manifest.NAME} names no step or {STATE}/ is missing")
    return step


def _is_exact(model: Any, form: forms.Form) -> bool:
    """Whether the weights come back from the form on disk bit by bit; an adapter's need their base for that."""
    if form.adapter:
        return False
    if form.native_because is not None:
        return True
    back = model.state_from_hf(form.config, form.weights)
    state = model.state_dict()
    return back.keys() == state.keys() and all(
        back[name].dtype == tensor.dtype and torch.equal(back[name], tensor) for name, tensor in state.items()
    )


def _flat(optimizer: dict[str, dict[str, Any]]) -> dict[str, Tensor]:
    return {
        f"{parameter}/{name}": value
        for parameter, states in optimizer.items()
        for name, value in states.items()
        if isinstance(value, Tensor)
    }


def _run_text(run_state: RunState) -> str:
    """state/run.json; unlike other files it may hold NaN and Infinity, which must come back as they were."""
    numbers = {
        parameter: {name: value for name, value in states.items() if not isinstance(value, Tensor)}
        for parameter, states in run_state.optimizer.items()
    }
    value = {
        "tokens": run_state.tokens,
        "cursor": run_state.cursor,
        "rng": run_state.rng,
        "scalars": run_state.scalars,
        "optimizer": numbers,
    }
    return json.dumps(value) + "\n"
