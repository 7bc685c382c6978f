"""Signals become a stop after the step, with everything saved."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from isoform.errors import Stopped


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
