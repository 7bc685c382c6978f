"""A step is on the disk whole or not at all, whatever happens while it is written and afterwards."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from isoform import storage
from isoform.checkpoints import folders, forms, manifest, tensors
from isoform.checkpoints.state import Loaded, latest_state, load_state, restore_optimizer, save_state
from isoform.errors import CheckpointError, DiskError


def save(folder: Path, run: Any, *, keep: int = 2, **options: Any) -> Path:
    return save_state(folder, run.model, None, run.state(), keep=keep, **options)


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def flat(state: dict[str, dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {f"{name}/{key}": value.clone() for name, states in state.items() for key, value in states.items()}


@pytest.fixture
def two_steps(tmp_path: Path, training: Any) -> tuple[Path, dict[int, dict[str, torch.Tensor]]]:
    """A folder with steps 1 and 2, and the weights of each."""
    run, weights = training(), {}
    for _ in range(2):
        save(tmp_path, run.update())
        weights[run.step] = run.weights()
    return tmp_path, weights


def test_state_comes_back_bit_by_bit_and_training_goes_on_as_if_never_stopped(
    tmp_path: Path, training: Any, equal_tensors: Any
) -> None:
    run = training().update(3)
    save(tmp_path, run)
    loaded = latest_state(tmp_path)
    assert loaded is not None
    state = run.state()
    assert equal_tensors(loaded.tensors, run.weights())
    assert equal_tensors(flat(loaded.state.optimizer), flat(state.optimizer))
    for field in ("step", "tokens", "cursor", "rng", "scalars"):
        assert getattr(loaded.state, field) == getattr(state, field)

    other = training()
    folders.load_weights(other.model, loaded.tensors, "test")
    restore_optimizer(other.optimizers, other.names, loaded.state.optimizer)
    other.step = loaded.state.step
    assert equal_tensors(other.update(2).weights(), run.update(2).weights())


def test_weights_that_the_model_file_does_not_hold_exactly_are_kept_beside_it(
    tmp_path: Path, training: Any, equal_tensors: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = training().update()
    lossy = type(run.model).state_to_hf
    monkeypatch.setattr(
        type(run.model), "state_to_hf", lambda self: {name: t.bfloat16() for name, t in lossy(self).items()}
    )
    path = save(tmp_path, run)
    assert (path / "state" / "master.safetensors").is_file()
    assert equal_tensors(load_state(path).tensors, run.weights())
    monkeypatch.undo()
    assert not (save(tmp_path, run.update()) / "state" / "master.safetensors").exists()


def test_no_step_is_none_and_a_stray_folder_is_no_step(tmp_path: Path) -> None:
    assert latest_state(tmp_path / "absent") is None
    (tmp_path / "step-best").mkdir()
    assert latest_state(tmp_path) is None


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_at_every_operation_of_a_save_leaves_the_new_or_the_old_step_whole(
    tmp_path: Path, training: Any, disk: Any, killed: Any, equal_tensors: Any, when: str
) -> None:
    run = training().update()
    save(tmp_path / "start", run, keep=1)
    weights = {1: run.weights()}
    moments = {1: flat(run.state().optimizer)}
    run.update()
    weights[2], moments[2] = run.weights(), flat(run.state().optimizer)

    with disk().installed() as whole:
        shutil.copytree(tmp_path / "start", tmp_path / "counted")
        save(tmp_path / "counted", run, keep=1)
    total = len(whole.operations)
    assert set(whole.operations) == {"write", "sync", "rename", "remove"}
    assert total > 30

    ended = set()
    for at in range(1, total + 1):
        folder = tmp_path / f"{at}"
        shutil.copytree(tmp_path / "start", folder)
        with disk(at, when).installed(), pytest.raises(killed):
            save(folder, run, keep=1)
        found = latest_state(folder)
        assert found is not None, whole.operations[at - 1]
        assert equal_tensors(found.tensors, weights[found.state.step])
        assert equal_tensors(flat(found.state.optimizer), moments[found.state.step])
        ended.add(found.state.step)
        for name in steps(folder):
            manifest.verify(folder / name)

        storage.remove_leftovers(folder)
        save(folder, run, keep=1)
        assert [path.name for path in folder.iterdir()] == ["step-000002"]
        shutil.rmtree(folder)
    assert ended == {1, 2}


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_while_a_folder_is_replaced_leaves_the_old_or_the_new_one(
    tmp_path: Path, training: Any, disk: Any, killed: Any, equal_tensors: Any, when: str
) -> None:
    run = training().update()
    forms.save_model(tmp_path / "start" / "final", run.model, None)
    weights = [run.weights(), run.update().weights()]
    with disk().installed() as whole:
        shutil.copytree(tmp_path / "start", tmp_path / "counted")
        forms.save_model(tmp_path / "counted" / "final", run.model, None)
    for at in range(1, len(whole.operations) + 1):
        folder = tmp_path / f"{at}"
        shutil.copytree(tmp_path / "start", folder)
        with disk(at, when).installed(), pytest.raises(killed):
            forms.save_model(folder / "final", run.model, None)
        storage.remove_leftovers(folder)
        found = folders.load_model(folder)
        assert any(equal_tensors(dict(found.model.state_dict()), table) for table in weights), whole.operations[at - 1]
        assert [path.name for path in folder.iterdir()] == ["final"]
        shutil.rmtree(folder)


def check_falls_back(folder: Path, damaged: Path, weights: dict[int, dict[str, torch.Tensor]], equal: Any) -> None:
    """Step 2 is refused with the damaged file named, and step 1 is used."""
    events: list[dict[str, Any]] = []
    found = latest_state(folder, lambda event, **values: events.append({"event": event, **values}))
    assert found is not None
    assert found.state.step == 1
    assert equal(found.tensors, weights[1])
    assert [event["event"] for event in events] == ["checkpoint-damaged"]
    assert str(damaged) in events[0]["problem"]
    assert (folder / "step-000002").is_dir()


def test_every_flipped_bit_is_seen_and_named(two_steps: Any, equal_tensors: Any) -> None:
    folder, weights = two_steps
    newest = [path for path in (folder / "step-000002").rglob("*") if path.is_file()]
    draw = random.Random(0)
    for number, path in enumerate(newest + draw.choices(newest, k=200 - len(newest))):
        data = path.read_bytes()
        flipped = bytearray(data)
        flipped[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match=path.name):
            manifest.verify(folder / "step-000002")
        if number < len(newest):
            check_falls_back(folder, path, weights, equal_tensors)
        path.write_bytes(data)
    found = latest_state(folder)
    assert found is not None and found.state.step == 2


def test_every_truncation_zeroing_and_removal_is_seen_and_named(two_steps: Any, equal_tensors: Any) -> None:
    folder, weights = two_steps
    draw = random.Random(1)
    for path in [path for path in (folder / "step-000002").rglob("*") if path.is_file()]:
        data = path.read_bytes()
        for length in {0, 1, len(data) - 1, *draw.sample(range(len(data)), 3)}:
            path.write_bytes(data[:length])
            check_falls_back(folder, path, weights, equal_tensors)
        path.write_bytes(bytes(len(data)))
        check_falls_back(folder, path, weights, equal_tensors)
        path.unlink()
        check_falls_back(folder, path, weights, equal_tensors)
        path.write_bytes(data)


def test_swapped_files_are_seen(two_steps: Any, equal_tensors: Any) -> None:
    folder, weights = two_steps
    swapped = folder / "step-000002" / "model.safetensors"
    shutil.copy(folder / "step-000001" / "model.safetensors", swapped)
    check_falls_back(folder, swapped, weights, equal_tensors)


def test_the_newest_step_is_the_manifest_s_whatever_times_say(two_steps: Any) -> None:
    folder, _ = two_steps
    for path in [folder / "step-000002", *(folder / "step-000002").rglob("*")]:
        os.utime(path, (0, 0))
    (folder / "step-000001").rename(folder / "step-000009")
    found = latest_state(folder)
    assert found is not None and found.state.step == 2


def test_all_damaged_is_an_error_and_nothing_is_deleted(two_steps: Any) -> None:
    folder, _ = two_steps
    for step in (1, 2):
        (folder / f"step-00000{step}" / "model.safetensors").write_bytes(b"")
    before = files(folder)
    with pytest.raises(
        CheckpointError, match=r"none of 2 checkpoints is whole .*step-000002.model.safetensors"
    ) as error:
        latest_state(folder)
    assert error.value.exit_code == 4
    assert files(folder) == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EDQUOT])
def test_a_full_disk_at_any_write_keeps_the_old_step_and_leaves_nothing(
    tmp_path: Path, training: Any, disk: Any, number: int
) -> None:
    run = training().update()
    save(tmp_path, run)
    before = files(tmp_path)
    with disk().installed() as whole:
        save(tmp_path, run.update())
    shutil.rmtree(tmp_path / "step-000002")
    for at, name in enumerate(whole.operations, start=1):
        if name == "write":
            error = OSError(number, os.strerror(number))
            with (
                disk(at, error=error).installed(),
                pytest.raises(DiskError, match=r"cannot write .*free there") as caught,
            ):
                save(tmp_path, run)
            assert caught.value.exit_code == 6
            assert files(tmp_path) == before
            assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    found = latest_state(tmp_path)
    assert found is not None and found.state.step == 1


def test_the_system_s_own_refusal_to_write_is_one_line_too(two_steps: Any, training: Any) -> None:
    folder, _ = two_steps
    before = files(folder)
    run = training().update(3)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, limits[1]))
    try:
        with pytest.raises(DiskError, match=r"cannot write .*step-000003: File too large; free there"):
            save(folder, run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(folder) == before


def test_too_little_room_is_told_before_anything_is_written(
    two_steps: Any, training: Any, disk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = two_steps
    before = files(folder)
    monkeypatch.setattr(storage, "free_bytes", lambda path: 1_000_000)
    with disk().installed() as watched, pytest.raises(DiskError, match=r"0\.010 GB are needed, 0\.001 GB are free"):
        save(folder, training().update(3))
    assert watched.operations == []
    assert files(folder) == before


def test_the_last_and_the_protected_steps_are_kept(tmp_path: Path, training: Any) -> None:
    run = training()
    for _ in range(6):
        save(tmp_path, run.update(), keep=2, protect={2})
    assert steps(tmp_path) == ["step-000002", "step-000005", "step-000006"]


def test_a_damaged_step_never_counts_as_one_of_those_kept(tmp_path: Path, training: Any) -> None:
    run = training()
    for _ in range(3):
        save(tmp_path, run.update(), keep=3)
    (tmp_path / "step-000003" / "model.safetensors").write_bytes(b"damaged")
    save(tmp_path, run.update(), keep=2)
    assert steps(tmp_path) == ["step-000002", "step-000003", "step-000004"]


def test_steps_beyond_the_one_saved_are_left_alone(tmp_path: Path, training: Any) -> None:
    save(tmp_path, training().update(7))
    run = training()
    for _ in range(3):
        save(tmp_path, run.update(), keep=2)
    assert steps(tmp_path) == ["step-000002", "step-000003", "step-000007"]


def test_a_failed_save_removes_nothing(tmp_path: Path, training: Any, disk: Any) -> None:
    run = training().update()
    save(tmp_path, run, keep=1)
    with disk(3, error=OSError(errno.ENOSPC, "full")).installed(), pytest.raises(DiskError):
        save(tmp_path, run.update(), keep=1)
    assert steps(tmp_path) == ["step-000001"]


def test_a_model_folder_without_state_is_no_step(tmp_path: Path, training: Any) -> None:
    forms.save_model(tmp_path / "step-000001", training().model, None)
    with pytest.raises(CheckpointError, match="no training state"):
        latest_state(tmp_path)


def test_a_step_folder_is_a_model_folder(two_steps: Any, equal_tensors: Any) -> None:
    folder, weights = two_steps
    loaded = folders.load_model(folder / "step-000002")
    assert equal_tensors(dict(loaded.model.state_dict()), weights[2])
    assert loaded.info["verified"]


def test_the_manifest_lists_every_file(two_steps: Any) -> None:
    folder, _ = two_steps
    assert manifest.unlisted(folder / "step-000002") == []
    (folder / "step-000002" / "notes.txt").write_text("mine")
    assert manifest.unlisted(folder / "step-000002") == [folder / "step-000002" / "notes.txt"]
    found = latest_state(folder)
    assert isinstance(found, Loaded)
    assert found.state.step == 2
    assert tensors.read_header(folder / "step-000002" / "model.safetensors")
