"""Curves: the learning rate as it is planned, the loss as it went."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import TYPE_CHECKING

from isoform.storage import iterate_jsonl
from isoform.studies.audit_rows import DIVERGED, SCHEDULE, Row, names, row, stepped
from isoform.studies.audit_runs import by_stage, logged_losses, seeds_of
from isoform.studies.layout import Layout

if TYPE_CHECKING:
    from isoform.studies.audit_probe import Probes

ROUNDING = 1e-9
# A loss jumps where it is this many (robust) deviations above the steps before it and half of the progress is lost.
SPIKE_DEVIATIONS = 8
SPIKE_WINDOW = 20
SPIKE_FARTHER = 3
MAX_START_STEPS = 10
MAD_TO_DEVIATION = 1.4826


# ------------------------------------------------------------------------------------------------------- learning rates


def schedules(layout: Layout, probes: Probes) -> list[Row]:
    """Every distinct complaint about a planned rate, with the arms and the stage."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for arm in stepped(layout):
        for stage, probe in probes.chain(arm).items():
            if complaint := rate_complaint(probe.rates):
                found[stage, complaint].append(arm)
    return [
        row(SCHEDULE, "warn", f"stage {stage} of {names(arms)}: {complaint}; see {stage}.train.schedule")
        for (stage, complaint), arms in found.items()
    ]


def rate_complaint(rates: Sequence[float]) -> str | None:
    """What is odd about planned rates, one a step: still warming up, rising again, or never falling."""
    if len(rates) < 2:
        return None
    peak = max(rates)
    place = next(step for step, rate in enumerate(rates) if rate >= peak * (1 - ROUNDING))
    if place == len(rates) - 1:
        return f"the warm-up has not ended by the last of {len(rates)} steps"
    for step in range(place + 1, len(rates)):
        if rates[step] > rates[step - 1] * (1 + ROUNDING):
            return f"the learning rate rises again after its peak, at step {step + 1} of {len(rates)}"
    if rates[-1] >= peak * (1 - ROUNDING):
        return "the learning rate never falls"
    return None


# --------------------------------------------------------------------------------------------------------------- losses


def diverged(run_folder: Path) -> bool:
    """Whether a run's loss was not finite, or is higher at its end than at its start.

    Start: the mean of the first tenth of the logged steps, at most ten; end: of the last tenth. Higher: by more than
    two standard errors of that difference, where there are enough steps to tell.
    """
    if any(event.get("event") == "non-finite" for event in iterate_jsonl(run_folder / "events.jsonl")):
        return True
    losses = logged_losses(run_folder)
    return any(loss is None for loss in losses) or rose([loss for loss in losses if loss is not None])


def rose(losses: Sequence[float]) -> bool:
    """Whether the last tenth is above the start, beyond noise."""
    if len(losses) < 2:
        return False
    tenth = max(1, len(losses) // 10)
    start, end = losses[: min(tenth, MAX_START_STEPS)], losses[-tenth:]
    noise = math.sqrt(sum(stdev(part) ** 2 / len(part) for part in (start, end) if len(part) > 1))
    return fmean(end) > fmean(start) + 2 * noise


def spikes(losses: Sequence[float]) -> list[int]:
    """Steps (from 0) at which the loss jumps up by more than half of what it had come down, far out of its noise.

    Batches of few sequences now and then have a loss far from the others', which is no jump of the model's: a jump is
    also several times as far as any step before it went.
    """
    found = []
    start = fmean(losses[: max(1, min(len(losses) // 10, MAX_START_STEPS))]) if losses else 0.0
    for step in range(SPIKE_WINDOW // 2, len(losses)):
        before = losses[max(0, step - SPIKE_WINDOW) : step]
        middle = median(before)
        deviation = MAD_TO_DEVIATION * median(abs(loss - middle) for loss in before)
        farthest = SPIKE_FARTHER * (max(before) - middle)
        if losses[step] - middle > max(SPIKE_DEVIATIONS * deviation, farthest, (start - middle) / 2, ROUNDING):
            found.append(step)
    return found


def losses_that_rose(layout: Layout, folder: Path) -> list[Row]:
    """Runs that diverged, and runs whose loss jumps."""
    rule = "excluded by compare.exclude_diverged" if layout.study.compare.exclude_diverged else "kept in the comparison"
    rows = []
    for where, runs in by_stage(layout, folder):
        lost = [finished for finished in runs if diverged(finished.folder)]
        if lost:
            text = f"{where}: {seeds_of(lost)} ended above its first loss or not finite; {rule}, as was set beforehand"
            rows.append(row(DIVERGED, "warn", f"{text}; lower train.learning_rate or lengthen the warm-up"))
        jumping = {f: s for f in runs if f not in lost and (s := spikes([x for x in f.losses if x is not None]))}
        if jumping:
            first = next(iter(jumping.values()))[0] + 1
            text = f"{where}: the loss of {seeds_of(jumping)} jumps up, first at logged step {first}"
            rows.append(row(DIVERGED, "warn", f"{text}; lower train.learning_rate or train.clip_norm"))
    return rows
