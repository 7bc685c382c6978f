"""Runs side by side: the same numbers, the same errors, and a stop that saves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from isoform.errors import ConfigError, DataError, HangError, NonFiniteError
from isoform.storage import read_json
from isoform.studies.forecast import forecast
from isoform.studies.study import study
from isoform.studies.workers import num_jobs


def scores(results: dict[str, Any]) -> list[Any]:
    return [
        [run["seed"], stage["name"], stage["final_loss"]]
        for arm in results["arms"]
        for run in arm["runs"]
        for stage in run["stages"]
    ]


def test_the_numbers_do_not_depend_on_how_many_run_at_once(values: dict[str, Any], tmp_path: Path) -> None:
    alone = study(values, tmp_path / "alone", quiet=True)
    together = study({**values, "jobs": 2}, tmp_path / "together", quiet=True)
    assert read_json(tmp_path / "together" / "manifest.json")["jobs"] == 2
    for one, other in zip(scores(alone), scores(together), strict=True):
        assert one[:2] == other[:2] and one[2] == pytest.approx(other[2], rel=1e-5)
    # a finished study starts no process
    study({**values, "jobs": 2}, tmp_path / "together", quiet=True, say=pytest.fail)


def test_a_run_that_fails_fails_the_study_as_itself(values: dict[str, Any], tmp_path: Path) -> None:
    values["stages"]["pretrain"]["train"] |= {"learning_rate": 1e30, "clip_norm": None}
    with pytest.raises(NonFiniteError, match="no update was made"):
        study({**values, "jobs": 2}, tmp_path / "run", quiet=True)


def test_a_hanging_step_of_a_worker_is_told_as_that(values: dict[str, Any], tmp_path: Path, capfd: Any) -> None:
    values["stages"]["pretrain"]["train"]["step_minutes"] = 1e-5
    with pytest.raises(HangError, match="a worker process: a step hung, see above"):
        study({**values, "jobs": 2}, tmp_path / "run", quiet=True)
    assert "has not ended in 1e-05 minutes" in capfd.readouterr().err


def test_a_stopped_study_saves_what_runs_and_goes_on(values: dict[str, Any], tmp_path: Path) -> None:
    values["stages"]["pretrain"]["train"]["max_steps"] = 250
    (tmp_path / "study.yaml").write_text(json.dumps(values))
    command = [sys.executable, "-m", "isoform.cli", "study", str(tmp_path / "study.yaml"), "--jobs", "2"]
    command += ["--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not list(tmp_path.glob("run/stages/pretrain-*/manifest.json")) and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert "the same command goes on from there" in told.splitlines()[-1]
    seconds = read_json(tmp_path / "run" / "manifest.json")["seconds"]
    assert seconds > 0.5
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "run" / "report.html").is_file()
    assert read_json(tmp_path / "run" / "manifest.json")["seconds"] > seconds


def test_a_forecast_measures_as_many_at_once_as_will_run(values: dict[str, Any]) -> None:
    plan = forecast({**values, "jobs": 2})
    assert plan["jobs"] == 2
    each = [stage["runs"] * stage["seconds_total"] for stage in plan["stages"]]
    assert min(each) > 0 and plan["seconds_total"] == pytest.approx(sum(each) / 2)
    broken = {**values, "stages": {**values["stages"], "pretrain": {"data": {"train": "absent.txt"}}}}
    with pytest.raises(DataError, match=r"absent\.txt"):
        forecast({**broken, "jobs": 2})


def test_jobs_are_as_many_as_there_are_runs_and_one_under_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    assert num_jobs(8, 3) == 3
    assert 1 <= num_jobs("auto", 100) <= (os.cpu_count() or 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert num_jobs("auto", 4) == 1
    with pytest.raises(ConfigError, match="jobs: 2 given"):
        num_jobs(2, 4)
