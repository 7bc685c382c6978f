"""What the audit says: one row a finding, one `pass` row for a check that found nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from isoform.studies.layout import Layout

Level = Literal["refuse", "warn", "inform", "pass"]
Row = dict[str, Any]
# {"check", "level", "message", "pair": [first, second] or None}
Pair = tuple[str, str]

DEAD = "dead option"
UNUSED = "unused part"
FUTURE = "the past sees the future"
OVERLAP = "overlap between splits"
ANSWERS = "pretraining text contains the questions' answers"
SELECTION = "selection on the split that is compared"
TEST = "test scored more than once"
TERMS = "unequal terms"
SCHEDULE = "schedule"
EDGE = "best at an edge"
ARTEFACT = "selection artefact"
DIVERGED = "diverged or non-finite run"
DAMAGED = "damaged checkpoint"
WINDOWS = "windows of few documents"
ONE_SEED = "one seed"
LEFT_OUT = "arms left out"
# Of results that no study planned.
OTHER_DATA = "other data in the compared split"
UNKNOWN = "no manifest"


def row(check: str, level: Level, message: str, pair: Pair | None = None) -> Row:
    return {"check": check, "level": level, "message": message, "pair": None if pair is None else list(pair)}


def or_pass(check: str, rows: list[Row], looked_at: str) -> list[Row]:
    """The rows, or the one that says what was looked at in vain."""
    return rows or [row(check, "pass", looked_at)]


def pairs(layout: Layout) -> list[Pair]:
    """The pairs that the questions compare, each once; without questions, the first arm and every other."""
    asked = [question.pair for question in layout.study.questions]
    if not asked:
        first, *others = layout.study.arms
        asked = [(first, other) for other in others]
    return list(dict.fromkeys(asked))


def trained(layout: Layout) -> list[str]:
    """The arms that isoform trains: not those whose results come from elsewhere, nor a model as it is."""
    return [name for name, arm in layout.arms() if arm.results is None and arm.stages]


def stepped(layout: Layout) -> list[str]:
    """Those of them that are trained step by step, and not fitted in one go."""
    return [name for name in trained(layout) if not fitted(layout, name)]


def fitted(layout: Layout, arm: str) -> bool:
    """Whether a stage of the arm is a classical model, fitted in one go: it has no updates, rates or probe steps."""
    from isoform.training.prepare import fits

    return any(fits(run.config) for run in layout.chain(arm, layout.seeds[0]) if run.parent is None)


def names(arms: Iterable[str]) -> str:
    """`arm a`, `arms a, b`."""
    known = list(dict.fromkeys(arms))
    return f"arm{'s' if len(known) > 1 else ''} {', '.join(known)}"
