"""Two programs that do the same work, in turn: each repetition of each side is a process of its own.

    ratio = (rate of ours) / (rate of theirs) of one round, the median over rounds; above 1 ours is faster

A process tells how many units it did in how many seconds, its largest memory, and what it can be checked by (a loss,
labels, tokens). What happens before the timed part, such as loading and the first steps, is not in the seconds.
"""

from __future__ import annotations

import gzip
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OURS = "ours"
# The unit of a work that is done once, and of which the time is told.
WHOLE = "whole"


@dataclass(frozen=True)
class Setting:
    """How large the work is, and where its data are."""

    quick: bool = False
    # tiny sizes and made-up data, to try the programs themselves
    root: str | None = None
    # the folder with the data

    def data(self, *parts: str) -> Path:
        """A file of the data folder. Raises: SystemExit with what is expected."""
        path = Path(self.root or ".", *parts)
        if self.root is None or not path.exists():
            raise SystemExit(f"{path}: not there; --root FOLDER names the folder that holds {'/'.join(parts)}")
        return path


@dataclass(frozen=True)
class Done:
    """What a side did: so many units in so many seconds, and by what it can be checked."""

    count: float
    seconds: float
    checks: dict[str, Any] = field(default_factory=dict)


Side = Callable[[Path, Setting], Done]
# Ours and theirs -> whether they did the same, and in words.
Check = Callable[[Mapping[str, Any], Mapping[str, Any]], tuple[bool, str]]


@dataclass(frozen=True)
class Work:
    """Something that several programs do; the first side is ours."""

    name: str
    group: str
    # a letter, as it is asked for by `--only`
    about: str
    unit: str
    # WHOLE: the time of all of it is told, not a rate
    prepare: Callable[[Path, Setting], None]
    # writes what all sides start from
    sides: Mapping[str, Side]
    check: Check
    together: bool = False
    # whether one process, named as ours, runs all sides in turns; `Done.checks["rows"]` then holds what it measured


@dataclass(frozen=True)
class Fact:
    """Something about ours alone: processes, each by its name, and a line that says what they found."""

    name: str
    group: str
    about: str
    prepare: Callable[[Path, Setting], None]
    sides: Mapping[str, Side]
    tell: Callable[[Mapping[str, Mapping[str, Any]]], str]
    # the report of each process -> what the page says


@dataclass(frozen=True)
class Measured:
    """One side against ours, over the rounds."""

    work: Work
    theirs: str
    our_rates: list[float]
    their_rates: list[float]
    our_bytes: int
    their_bytes: int
    agrees: bool
    told: str

    @property
    def ratios(self) -> list[float]:
        return [ours / theirs for ours, theirs in zip(self.our_rates, self.their_rates, strict=True)]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)


def measure(work: Work, setting: Setting, rounds: int, say: Callable[[str], None]) -> list[Measured]:
    """Every side in every round, the first of a round being another each time. Raises: RuntimeError of a side."""
    names = list(work.sides)
    reports: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        say(f"{work.name}: making what all {len(names)} sides start from")
        run_child(work, "prepare", Path(folder), setting)
        for number in range(rounds):
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                say(f"{work.name}, round {number + 1} of {rounds}: {name} begins")
                report = run_child(work, name, Path(folder), setting)
                reports[name].append(report)
                say(f"{work.name}, round {number + 1} of {rounds}: {name} {speed(work, rate(report))}")
    return [_against(work, name, reports) for name in names if name != OURS]


def measure_together(work: Work, setting: Setting, say: Callable[[str], None]) -> list[Measured]:
    """One process that runs both sides in turns, update by update: a row for each that it tells of."""
    with tempfile.TemporaryDirectory() as folder:
        report = run_child(work, OURS, Path(folder), setting)
    rows = report["checks"]["rows"]
    say(f"{work.name}: {len(rows)} comparisons in one process")
    return [
        Measured(work, row["theirs"], row["our_rates"], row["their_rates"], report["peak_bytes"], 0, True, row["told"])
        for row in rows
    ]


def establish(fact: Fact, setting: Setting, say: Callable[[str], None]) -> str:
    """What the page says of a fact. Raises: RuntimeError of a process."""
    with tempfile.TemporaryDirectory() as folder:
        run_child(fact, "prepare", Path(folder), setting)
        reports = {name: run_child(fact, name, Path(folder), setting) for name in fact.sides}
    told = fact.tell(reports)
    say(f"{fact.name}: {told}")
    return told


def speed(work: Work, rate: float) -> str:
    """A rate as it is told: units a second, or the seconds of the whole."""
    return f"{1 / rate:,.1f} s" if work.unit == WHOLE else f"{rate:,.1f} {work.unit}/s"


def rate(report: Mapping[str, Any]) -> float:
    return float(report["count"] / report["seconds"])


def _against(work: Work, name: str, reports: Mapping[str, list[dict[str, Any]]]) -> Measured:
    ours, theirs = reports[OURS], reports[name]
    found = [work.check(mine["checks"], other["checks"]) for mine, other in zip(ours, theirs, strict=True)]
    return Measured(
        work,
        name,
        [rate(report) for report in ours],
        [rate(report) for report in theirs],
        max(report["peak_bytes"] for report in ours),
        max(report["peak_bytes"] for report in theirs),
        all(agrees for agrees, _ in found),
        next((told for agrees, told in found if not agrees), found[-1][1]),
    )


# -------------------------------------------------------------------------------------------------- a process of a side


def run_child(work: Work | Fact, side: str, folder: Path, setting: Setting) -> dict[str, Any]:
    """What a side says of itself, in a fresh process that works alone. Raises: RuntimeError with its last lines."""
    words = [sys.executable, "-m", "benchmarks.child", work.name, side, str(folder)]
    words += ["--quick"] if setting.quick else []
    words += ["--root", setting.root] if setting.root is not None else []
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent)
    if done.returncode != 0:
        last = "\n".join(done.stderr.strip().splitlines()[-15:])
        raise RuntimeError(f"{work.name}, {side}: ended with {done.returncode}\n{last}")
    report: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return report


def tell(done: Done) -> None:
    """The one line that `run_child` reads."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak_bytes = peak if sys.platform == "darwin" else peak * 1024
    print(json.dumps({**done.__dict__, "peak_bytes": peak_bytes}), flush=True)


def builtin(name: str) -> list[dict[str, str]]:
    """The documents of a set that comes with isoform."""
    from isoform.data import builtin as sets

    with gzip.open(sets.path(name), "rt", encoding="utf-8") as file:
        return [json.loads(row) for row in file]


def same_environment(threads: int) -> None:
    """Threads, and how they wait, the same for every side; read by torch when it is loaded."""
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


# --------------------------------------------------------------------------------------------------------------- checks


def near(name: str, tolerance: float) -> Check:
    """A number that may differ by so much, relative to theirs."""

    def check(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[bool, str]:
        gap = abs(ours[name] / theirs[name] - 1)
        return gap <= tolerance, f"{name} {ours[name]:.4f} and {theirs[name]:.4f}"

    return check


def equal_share(name: str, least: float) -> Check:
    """Lists of which at least this share of places must be equal; with 0, as in another precision, it is told alone."""

    def check(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[bool, str]:
        pairs = list(zip(ours[name], theirs[name], strict=True))
        share = sum(first == second for first, second in pairs) / len(pairs)
        asked = "" if least else ", of which none is asked"
        return share >= least, f"{100 * share:.2f} % of {len(pairs):,} {name} equal{asked}"

    return check
