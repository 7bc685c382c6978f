"""A step that never ends: the run is ended with a code of its own, and what it waited for is on disk."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from isoform.errors import HangError
from isoform.storage import read_jsonl
from isoform.training.guards import Watch
from isoform.training.run import train

HANGING = """
import sys, time, yaml
from pathlib import Path
from isoform.config import run_config
from isoform.training.loop import Loop
from isoform.training.run import train

update = Loop._update

def waits_for_ever(loop, step):
    if step.step == 7:
        time.sleep(60)
    return update(loop, step)

Loop._update = waits_for_ever
train(run_config(yaml.safe_load(open(sys.argv[1]))), Path(sys.argv[2]))
"""


def test_a_hanging_step_ends_the_run_and_it_goes_on_from_its_last_checkpoint(make, tmp_path):
    config = make({"train": {"step_minutes": 0.1}})
    file, out = tmp_path / "config.yaml", tmp_path / "run"
    file.write_text(config.model_dump_json())
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", HANGING, str(file), str(out)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == HangError.exit_code == 9, done.stderr
    assert time.monotonic() - began < 50, "nobody waits for the end of what hangs"
    assert "step 8, or saving before it, has not ended in 0.1 minutes" in done.stderr
    assert "waits_for_ever" in (out / "stacks-0.txt").read_text()
    assert not (out / "final").exists()
    train(config, out, resume=True)
    assert next(event["step"] for event in read_jsonl(out / "events.jsonl") if event["event"] == "resumed") == 6
    assert (out / "final").exists()


@pytest.mark.parametrize("rests", [True, False])
def test_an_evaluation_may_take_as_long_as_it_likes(tmp_path, monkeypatch, rests):
    ended = []
    monkeypatch.setattr("isoform.training.guards.os._exit", ended.append)
    with Watch(tmp_path, 0.002) as watch:
        watch.step(3)
        if rests:
            watch.rest()
        time.sleep(0.4)
    assert (9 in ended) is not rests


def test_time_in_which_the_process_was_stopped_is_not_the_step_s(tmp_path, monkeypatch):
    ended, clock = [], [0.0]
    monkeypatch.setattr("isoform.training.guards.os._exit", ended.append)
    monkeypatch.setattr("isoform.training.guards.time.monotonic", lambda: clock[0])
    with Watch(tmp_path, 0.02) as watch:
        watch.step(3)
        time.sleep(0.5)
        clock[0] += 3600.0
        time.sleep(0.5)
    assert not ended


def test_a_disk_that_does_not_write_holds_nothing_up(tmp_path, monkeypatch, capfd):
    ended = []
    monkeypatch.setattr("isoform.training.guards.os._exit", ended.append)
    with Watch(tmp_path / "nowhere", 0.002) as watch:
        watch.step(3)
        time.sleep(0.4)
    told = capfd.readouterr().err
    assert 9 in ended and "step 3" in told and "test_a_disk_that_does_not" in told


def test_without_a_limit_nothing_is_watched(make, tmp_path, monkeypatch):
    monkeypatch.setattr(Watch, "_look", lambda watch: pytest.fail("watched"))
    train(make({"train": {"step_minutes": None, "max_steps": 2}}), tmp_path / "run")
