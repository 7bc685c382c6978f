"""What a person sees while a run goes: loss, rate, time left; a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

PLAIN_EVERY_SECONDS = 20.0


class Progress:
    """One run's progress; used as a context manager."""

    def __init__(self, name: str, num_steps: int, start: int = 0, console: Console | None = None) -> None:
        self.name = name
        self.num_steps = num_steps
        self.console = console or Console(stderr=True)
        self.live = self.console.is_terminal
        self.start = start
        self.loss: float | None = None
        self._tokens = 0
        self._began = self._window = self._said = time.monotonic()
        self._rate = 0.0
        self._bar: Bar | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Progress:
        if self.live:
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._task = self._bar.add_task(self.name, total=self.num_steps, completed=self.start, text="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, step: int, loss: float, tokens: int) -> None:
        """After each update: `loss` in nats per target, `tokens` of the global batch."""
        self.loss = loss if self.loss is None else 0.9 * self.loss + 0.1 * loss
        self._tokens += tokens
        now = time.monotonic()
        if now - self._window >= 1.0:
            self._rate, self._tokens, self._window = self._tokens / (now - self._window), 0, now
        text = f"loss {self.loss:.3f}  {self._rate:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
        elif now - self._said >= PLAIN_EVERY_SECONDS or step == self.num_steps:
            self._said = now
            left = (now - self._began) / max(1, step - self.start) * (self.num_steps - step)
            line = f"{self.name}: step {step}/{self.num_steps}  {text}  {clock(left)} left"
            self.console.print(line, highlight=False, soft_wrap=True)

    def evaluation(self, step: int, split: str, values: Mapping[str, float | None]) -> None:
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items() if value is not None)
        if self.live:
            self.console.print(f"{self.name}: step {step}  {split}: {shown}", highlight=False)


def clock(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
