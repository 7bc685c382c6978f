"""What ends a run from outside: signals, after the step and with everything saved, and a step that never ends."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from isoform.errors import HangError, Stopped

# How often a step's time is looked at, where the limit is long.
LOOK_SECONDS = 5.0
# How long a disk may take to write what each thread was doing.
WRITE_SECONDS = 10.0


class Interrupts:
    """While active, Ctrl-C and SIGTERM set `requested`; a second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self.requested: int | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            raise SystemExit(128 + number)
        self.requested = number

    def stopped(self, what: str) -> Stopped:
        """The error to raise once `what` has been saved."""
        assert self.requested is not None
        return Stopped(f"{what}; the same command with --resume goes on from there", 128 + self.requested)


class Watch:
    """While active, ends the process with the code of a HangError once a step takes longer than `minutes`.

    A step that waits for another rank or for a dead disk would wait for ever, and no exception can reach it there; what
    each thread was doing is written to `stacks-RANK.txt` in the run's folder, or to standard error where that cannot
    be. Time in which the whole process was stopped is not the step's. minutes: None: never.
    """

    def __init__(self, folder: Path, minutes: float | None, rank: int = 0) -> None:
        self.file = folder / f"stacks-{rank}.txt"
        self.seconds = None if minutes is None else 60 * minutes
        self._step: int | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="isoform-watch", daemon=True)

    def __enter__(self) -> Watch:
        if self.seconds is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self.seconds is not None:
            self._thread.join()

    def step(self, number: int) -> None:
        """The step of this number begins; what the one before it has left to be saved counts as part of it."""
        self._step = number

    def rest(self) -> None:
        """What comes now may take as long as it likes."""
        self._step = None

    def _look(self) -> None:
        assert self.seconds is not None
        interval = min(LOOK_SECONDS, self.seconds / 4)
        seen, waited, looked = None, 0.0, time.monotonic()
        while not self._over.wait(interval):
            now = time.monotonic()
            step = self._step
            # A process that was stopped looks late, once.
            waited = waited + min(now - looked, 2 * interval) if step is not None and step == seen else 0.0
            seen, looked = step, now
            if step is not None and waited > self.seconds:
                self._end(step)

    def _end(self, number: int) -> None:
        assert self.seconds is not None
        error = HangError(
            f"step {number}, or saving before it, has not ended in {self.seconds / 60:g} minutes; what each thread was "
            f"doing is in {self.file}; the same command goes on from the last checkpoint (a run with --resume). Raise "
            "train.step_minutes where steps honestly take so long; null waits for ever"
        )
        try:
            print(f"isoform: {error}", file=sys.stderr, flush=True)
            # A disk that does not answer must not hold this up too.
            writing = threading.Thread(target=self._write_stacks, daemon=True)
            writing.start()
            writing.join(WRITE_SECONDS)
        finally:
            os._exit(error.exit_code)

    def _write_stacks(self) -> None:
        try:
            with self.file.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            faulthandler.dump_traceback(2, all_threads=True)  # standard error, whatever stands for it in Python
