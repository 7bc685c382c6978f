"""The stage runs of a study, one by one or several side by side, each in a process with its share of the cores.

A small model cannot use many cores: two runs with half of them each take less time than one after the other with all.
A worker is `python -m isoform.studies.worker`; it is told what to do in lines of JSON and answers in such lines.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from isoform import errors, machine
from isoform.config import RunConfig, run_config
from isoform.errors import ConfigError, HangError, IsoformError, Stopped
from isoform.storage import read_json
from isoform.studies.layout import StageRun
from isoform.training.guards import Interrupts
from isoform.training.plan import plan_config
from isoform.training.run import score_as_is, train

Say = Callable[[str], None]

# What a process of its own takes beside its model.
WORKER_BYTES = 2_000_000_000
POLL_SECONDS = 0.05


def num_jobs(asked: int | Literal["auto"], num_runs: int) -> int:
    """Runs at once; auto: one a core as far as memory and runs go, one alone where there is a GPU.

    Raises: ConfigError under a launcher of several processes, which share one run.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if asked not in (1, "auto"):
            raise ConfigError(f"jobs: {asked} given, but this study was launched in several processes; leave it out")
        return 1
    if asked != "auto":
        return max(1, min(asked, num_runs))
    if machine.choose_device().type != "cpu":
        return 1
    return max(1, min(machine.cores(), machine.memory_bytes() // WORKER_BYTES, num_runs))


def carry_out(
    runs: Sequence[StageRun], folder: Path, precision: str, *, jobs: int, quiet: bool, say: Say, note: str = ""
) -> None:
    """Carries out what is missing of `runs`, in their order as far as one does not start from another.

    Raises: whatever a run raises, as soon as those beside it have stopped and saved; Stopped.
    """
    distinct = list({needed.key: needed for run in runs for needed in run.lineage()}.values())
    missing = [run for run in distinct if not is_complete(folder / run.folder)]

    def told(run: StageRun) -> str:
        return f"{note}{run.stage} of {run.arm}, seed {run.seed} ({distinct.index(run) + 1} of {len(distinct)})"

    if jobs > 1 and len(missing) > 1:
        _SideBySide(missing, folder, precision, min(jobs, len(missing)), quiet, lambda run: say(told(run)))()
        return
    for run in missing:
        say(told(run))
        try:
            do(task(run, folder, precision, quiet))
        except Stopped as stopped:
            raise _go_on(stopped.exit_code) from None


def is_complete(folder: Path) -> bool:
    manifest = folder / "manifest.json"
    return manifest.exists() and bool(read_json(manifest).get("complete"))


def task(run: StageRun, folder: Path, precision: str, quiet: bool) -> dict[str, Any]:
    """What a worker needs to know of a run, as plain values."""
    return {
        "config": run.placed(folder).model_dump(mode="json"),
        "folder": str(folder / run.folder),
        "start": None if run.parent is None else str(folder / run.parent.folder / "final"),
        "precision": precision,
        "trains": run.trains,
        "quiet": quiet,
    }


def do(task: dict[str, Any]) -> dict[str, Any]:
    """One run, from its task, or its plan alone. Raises: what `train` raises."""
    config = run_config(task["config"])
    if "folder" not in task:
        return plan_config(config, task["precision"])
    folder = Path(task["folder"])
    if task["trains"]:
        start = None if task["start"] is None else Path(task["start"])
        train(config, folder, resume=True, start=start, precision=task["precision"], quiet=task["quiet"])
    else:
        score_as_is(config, folder, precision=task["precision"])
    # A finished stage is never resumed: its optimiser states would only fill the disk.
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return {}


def measured(config: RunConfig, precision: str, workers: Sequence[Worker]) -> dict[str, Any]:
    """The plan of a run, its times being the means over workers that all try it at once. Raises: what a plan raises."""
    for worker in workers:
        worker.begin({"config": config.model_dump(mode="json"), "precision": precision})
    while any(worker.answer is None for worker in workers):
        time.sleep(POLL_SECONDS)
    plans = [worker.answer for worker in workers if worker.answer is not None]
    for failure in filter(None, map(_error, plans)):
        raise failure
    times = {name: sum(plan[name] for plan in plans) / len(plans) for name in plans[0] if name.startswith("seconds_")}
    return {**plans[0], **times}


def _go_on(exit_code: int) -> Stopped:
    return Stopped("stopped, everything so far is saved; the same command goes on from there", exit_code)


class Worker:
    """A process that carries out one run at a time. Its own session: a Ctrl-C reaches it once, through us."""

    def __init__(self, threads: int) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "isoform.studies.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )
        self.run: StageRun | None = None
        # what it is busy with
        self.answer: dict[str, Any] | None = None
        streams = ((self.process.stdout, self._answers), (self.process.stderr, self._relay))
        self._readers = [threading.Thread(target=reader, args=(stream,), daemon=True) for stream, reader in streams]
        for thread in self._readers:
            thread.start()

    def begin(self, told: dict[str, Any], run: StageRun | None = None) -> None:
        self.run, self.answer = run, None
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(told) + "\n")
        self.process.stdin.flush()

    def interrupt(self, number: int) -> None:
        """Asks the run to stop and save."""
        if self.run is not None:
            self.process.send_signal(number)

    def end(self) -> None:
        """No run will follow: the process ends when it reads that."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()

    def wait(self) -> None:
        for thread in self._readers:
            thread.join()
        self.process.wait()

    def _answers(self, stream: IO[str]) -> None:
        with stream:
            for line in stream:
                self.answer = json.loads(line)
        if self.answer is None:
            code = self.process.wait()
            hung = code == HangError.exit_code
            what = "a step hung, see above" if hung else f"it ended without an answer, with the code {code}"
            self.answer = {"error": "HangError" if hung else "RuntimeError", "message": f"a worker process: {what}"}

    @staticmethod
    def _relay(stream: IO[str]) -> None:
        with stream:
            for line in stream:
                sys.stderr.write(line)


@contextlib.contextmanager
def crew(jobs: int) -> Iterator[list[Worker]]:
    """So many workers, which end with the block."""
    workers = [Worker(max(1, machine.cores() // jobs)) for _ in range(jobs)]
    try:
        yield workers
    except SystemExit:
        for worker in workers:
            worker.process.kill()
        raise
    finally:
        for worker in workers:
            worker.end()
        for worker in workers:
            worker.wait()


@dataclass
class _SideBySide:
    """Hands runs to workers as soon as what they start from is there."""

    missing: list[StageRun]
    folder: Path
    precision: str
    jobs: int
    quiet: bool
    say: Callable[[StageRun], None]
    workers: list[Worker] = field(default_factory=list)

    def __call__(self) -> None:
        waiting = list(self.missing)
        failure: IsoformError | RuntimeError | None = None
        signalled = False
        with Interrupts() as interrupts, crew(self.jobs) as self.workers:
            while waiting or any(worker.run for worker in self.workers):
                found = self._collect()
                failure = failure or found  # what came after it are runs that were stopped
                if (interrupts.requested or failure) and not signalled:
                    signalled = True
                    waiting.clear()
                    for worker in self.workers:
                        worker.interrupt(interrupts.requested or signal.SIGTERM)
                self._hand_out(waiting)
                time.sleep(POLL_SECONDS)
        if interrupts.requested is not None:
            raise _go_on(128 + interrupts.requested)
        if failure is not None:
            raise failure

    def _collect(self) -> IsoformError | RuntimeError | None:
        """Frees the workers that have answered; the first failure among them that is more than a stop."""
        failures = []
        for worker in self.workers:
            if worker.run is not None and worker.answer is not None:
                worker.run = None
                failures.append(_error(worker.answer))
        found = [failure for failure in failures if failure is not None and not isinstance(failure, Stopped)]
        return found[0] if found else None

    def _hand_out(self, waiting: list[StageRun]) -> None:
        unfinished = {run.key for run in waiting} | {worker.run.key for worker in self.workers if worker.run}
        for run in list(waiting):
            if any(needed.key in unfinished for needed in run.needs):
                continue
            worker = next((worker for worker in self.workers if worker.run is None), None)
            if worker is None:
                return
            waiting.remove(run)
            self.say(run)
            worker.begin(task(run, self.folder, self.precision, self.quiet), run)


def _error(answer: dict[str, Any]) -> IsoformError | RuntimeError | None:
    """What a worker's answer says went wrong, as the error that it was."""
    if "error" not in answer:
        return None
    name, message = answer["error"], answer["message"]
    if name == "Stopped":
        return Stopped(message, answer["exit_code"])
    cls = getattr(errors, name, None)
    return RuntimeError(message) if cls is None else cls(message)
