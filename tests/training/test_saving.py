"""Checkpoints written beside training: of the moment in which they were asked for, in order, never silently lost."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch
from safetensors.torch import load_file

from isoform.contracts import RunState
from isoform.errors import DiskError
from isoform.models.gpt2 import GPT2
from isoform.storage import read_json, read_jsonl
from isoform.training import saving
from isoform.training.loop import Loop
from isoform.training.run import train
from isoform.training.saving import Writer


def untold(kind, **what):
    raise AssertionError(f"nobody was to be told of {kind}: {what}")


def full(*_, **__):
    raise DiskError("no space left")


@pytest.fixture
def held(monkeypatch):
    """The disk, which waits to be told to go on; what was written, in order, with the sum of its weights."""
    go, written = threading.Event(), []

    def write(folder, model, tokenizer, state=None, **more):
        assert go.wait(10)
        written.append((folder.name, total(model), state, more))

    monkeypatch.setattr(saving, "save_model", write)
    monkeypatch.setattr(saving, "save_state", write)
    return go, written


def total(model) -> float:
    return float(model.embedding.weight.detach().double().sum())


def test_what_is_written_is_what_was_there_when_it_was_asked_for(held, tmp_path):
    go, written = held
    model = GPT2.tiny()
    before = total(model)
    moments = {"embedding.weight": {"exp_avg": torch.ones(3), "step": 4}}
    state = RunState(step=7, optimizer=moments, scalars={"best": {"value": 1}})
    part = torch.ones(2)
    with Writer(untold) as writer:
        writer.model(tmp_path / "best", model, None, 7)
        writer.state(tmp_path / "checkpoints", model, None, state, 2, {"part": part})
        assert written == [], "training goes on meanwhile"
        with torch.no_grad():
            model.embedding.weight.zero_()
        moments["embedding.weight"]["exp_avg"].zero_()
        part.zero_()
        state.scalars["best"]["value"] = 2
        state.step = 8
        go.set()
    (first, *_), (second, weights, kept, more) = written
    assert (first, second, weights) == ("best", "checkpoints", before)
    assert kept.step == 7 and kept.scalars == {"best": {"value": 1}}
    assert kept.optimizer["embedding.weight"]["exp_avg"].sum() == 3 and more["companion"]["part"].sum() == 2


def test_where_there_is_no_room_for_a_copy_the_loop_waits(held, monkeypatch, tmp_path):
    go, written = held
    go.set()
    monkeypatch.setattr(saving, "COPY_FRACTION", 0.0)
    with Writer(untold) as writer:
        writer.model(tmp_path / "best", GPT2.tiny(), None, 1)
        assert len(written) == 1


def test_a_full_disk_is_told_at_the_next_checkpoint_or_at_the_end(monkeypatch, tmp_path):
    monkeypatch.setattr(saving, "save_model", full)
    with pytest.raises(DiskError, match="no space"), Writer(untold) as writer:
        writer.model(tmp_path, GPT2.tiny(), None, 1)
    after = []
    with pytest.raises(DiskError, match="no space"), Writer(untold) as writer:
        writer.model(tmp_path, GPT2.tiny(), None, 1)
        writer.model(tmp_path, GPT2.tiny(), None, 2)
        after.append(True)
    assert not after


def test_a_run_whose_checkpoint_cannot_be_written_ends_with_that(make, tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "save_state", full)
    steps = []
    update = Loop._update
    monkeypatch.setattr(Loop, "_update", lambda loop, step: steps.append(step.step) or update(loop, step))
    with pytest.raises(DiskError, match="no space"):
        train(make(), tmp_path / "run", quiet=True)
    assert len(steps) < 12


def test_a_state_never_names_a_best_model_that_was_not_written(make, tmp_path, monkeypatch):
    """Both best models of the last step are refused, and the disk has room again when the state's turn comes."""
    config = make({"train": {"max_steps": 8, "checkpoint_every_steps": 100}})
    clean, broken = tmp_path / "clean", tmp_path / "broken"
    train(config, clean, quiet=True)
    write = saving.save_model

    def refusing(folder, *rest, **options):
        full() if folder.parent == broken and folder.exists() else write(folder, *rest)

    with monkeypatch.context() as patch, pytest.raises(DiskError, match="no space"):
        patch.setattr(saving, "save_model", refusing)
        train(config, broken, quiet=True)
    train(config, broken, resume=True, quiet=True)
    assert sorted(path.name for path in (broken / "checkpoints").iterdir()) == ["step-000004", "step-000008"]
    first, second = (load_file(folder / "final" / "model.safetensors") for folder in (clean, broken))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert read_json(clean / "eval.json") == read_json(broken / "eval.json")


def test_an_error_of_training_is_not_replaced_by_one_of_the_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(saving, "save_model", full)
    told = []
    with pytest.raises(ZeroDivisionError), Writer(lambda kind, **what: told.append((kind, what))) as writer:
        writer.model(tmp_path, GPT2.tiny(), None, 1)
        raise ZeroDivisionError
    assert told == [("checkpoint-lost", {"problem": "no space left"})]


def test_a_run_that_is_stopped_says_saved_only_where_it_is(make, tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "save_state", full)
    update = Loop._update
    monkeypatch.setattr(Loop, "_update", lambda loop, step: os.kill(os.getpid(), signal.SIGTERM) or update(loop, step))
    with pytest.raises(DiskError, match="no space"):
        train(make(), tmp_path / "run", quiet=True)
    assert not [row for row in read_jsonl(tmp_path / "run" / "events.jsonl") if row["event"] == "checkpoint-lost"]
