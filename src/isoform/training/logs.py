"""What a run writes while it goes: metrics.jsonl (a line a step), events.jsonl, and trackers when asked."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path
from typing import IO, Any, Protocol

import yaml

from isoform.errors import ConfigError
from isoform.registry import lookup, register
from isoform.storage import disk_errors, finite, iterate_jsonl, json_line, write_text


class Tracker(Protocol):
    """Where else numbers go: the resolved config, every logged step (`train/loss`), every evaluation (`dev/accuracy`)
    and the scores of the checkpoint that was kept (`final/test/accuracy`). One that fails is dropped, and told of; it
    never stops a run.
    """

    def __init__(self, folder: Path, name: str, config: dict[str, Any]) -> None: ...

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


@register("tracker", "tensorboard")
class TensorBoard:
    """Scalars for TensorBoard under `tensorboard/` in the run folder, and the config as text."""

    def __init__(self, folder: Path, name: str, config: dict[str, Any]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError("track: tensorboard is not installed; `pip install 'isoform[track]'`") from None
        self.writer = SummaryWriter(str(folder / "tensorboard"))
        # Four spaces: shown as it is.
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        self.writer.add_text("config", "".join(f"    {line}\n" for line in text.splitlines()))

    def log(self, step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        self.writer.close()


@register("tracker", "wandb")
class WeightsAndBiases:
    """A W&B run; WANDB_MODE decides between online, offline and disabled. Without a key it is offline."""

    def __init__(self, folder: Path, name: str, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError("track: wandb is not installed; `pip install 'isoform[track]'`") from None
        logged_in = "WANDB_API_KEY" in os.environ or bool(getattr(wandb.api, "api_key", None))
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if logged_in else "offline")
        known = folder / "wandb-id"
        if not known.exists():
            write_text(known, secrets.token_hex(4))
        self.run = wandb.init(
            project="isoform",
            id=known.read_text(encoding="utf-8"),
            name=name,
            dir=str(folder),
            config=config,
            mode=mode,
            resume="allow",
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


class _Unopened:
    """In the place of a tracker that could not be opened: dropped, with its reason, when it is first told something."""

    def __init__(self, reason: Exception) -> None:
        self.reason = reason

    def log(self, step: int, values: dict[str, float]) -> None:
        raise self.reason

    def close(self) -> None: ...


def open_trackers(names: list[str], folder: Path, name: str, config: dict[str, Any]) -> list[Tracker]:
    """The trackers that the config asks for. Raises: ConfigError for an unknown or missing one."""
    trackers: list[Tracker] = []
    for kind in names:
        try:
            trackers.append(lookup("tracker", kind, "track")(folder, name, config))
        except ConfigError:
            raise
        except Exception as error:  # no network, no room, no right to write: the run goes on without it
            trackers.append(_Unopened(error))
    return trackers


def track_scores(names: list[str], folder: Path, name: str, config: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """What trackers are told of a run without steps. Raises: ConfigError for an unknown or missing tracker."""
    for tracker in open_trackers(names, folder, name, config):
        with contextlib.suppress(Exception):  # optional, as in `RunLog`
            tracker.log(0, final_values(rows))
            tracker.close()


def final_values(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of eval.json by the names that trackers know them by."""
    return {f"final/{row['split']}/{row['metric']}": row["value"] for row in rows if row["value"] is not None}


class RunLog:
    """Appends to the run's JSONL files and passes numbers on to the trackers."""

    def __init__(self, folder: Path, trackers: list[Tracker]) -> None:
        self.folder = folder
        self.trackers = trackers
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self.metrics: IO[str] = (folder / "metrics.jsonl").open("a", encoding="utf-8")
            self.events: IO[str] = (folder / "events.jsonl").open("a", encoding="utf-8")

    def step(self, row: dict[str, Any]) -> None:
        with disk_errors(self.folder / "metrics.jsonl"):
            self.metrics.write(json_line(row))
        self._track(row["step"], {f"train/{key}": value for key, value in row.items() if key != "step"})

    def event(self, event: str, **values: Any) -> None:
        with disk_errors(self.folder / "events.jsonl"):
            self.events.write(json_line({"event": event, **values}))
            self.events.flush()

    def evaluation(self, step: int, tokens: int, seconds: float, rows: list[dict[str, Any]]) -> None:
        self.event("evaluation", step=step, tokens=tokens, seconds=seconds, rows=rows)
        self._track(step, {f"{row['split']}/{row['metric']}": row["value"] for row in rows})

    def scored(self, step: int, rows: list[dict[str, Any]]) -> None:
        """The rows of eval.json, for trackers."""
        self._track(step, final_values(rows))

    def flush(self) -> None:
        with disk_errors(self.folder):
            self.metrics.flush()
            self.events.flush()

    def close(self) -> None:
        for tracker in self.trackers:
            try:
                tracker.close()
            except Exception as error:
                self._dropped(tracker, error)
        self.flush()
        self.metrics.close()
        self.events.close()

    def _track(self, step: int, values: dict[str, Any]) -> None:
        numbers = {key: value for key, value in finite(values).items() if isinstance(value, int | float)}
        for tracker in list(self.trackers):
            try:
                tracker.log(step, numbers)
            except Exception as error:  # a tracker is optional: nothing that it does may end a run
                self.trackers.remove(tracker)
                self._dropped(tracker, error)

    def _dropped(self, tracker: Tracker, error: Exception) -> None:
        self.event("tracker-dropped", tracker=type(tracker).__name__, reason=str(error))


def forget_after(folder: Path, step: int) -> None:
    """Drops logged steps and evaluations beyond `step`, so that a resumed run logs each of them once."""
    for name in ("metrics.jsonl", "events.jsonl"):
        path = folder / name
        if path.exists():
            rows = [row for row in iterate_jsonl(path) if row.get("step", -1) <= step]
            write_text(path, "".join(json_line(row) for row in rows))
