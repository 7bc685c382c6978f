"""Terms: what two arms were given, so that a difference can be laid to the method and not to the means."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from isoform.config import Question
from isoform.errors import ConfigError
from isoform.registry import nearest
from isoform.studies.audit_rows import TERMS, Pair, Row, pairs, row, trained
from isoform.studies.layout import Layout

if TYPE_CHECKING:
    from pathlib import Path

    from isoform.studies.audit_probe import Probes

Terms = dict[str, float]

WORDS = {
    "data_tokens": "training tokens",
    "updates": "updates",
    "parameters": "parameters",
    "flops": "training FLOPs",
    "seconds": "seconds of training",
    "tuning_trials": "tuning trials",
}
# Wall times of equal work differ by this much on a busy machine: not worth a line.
SECONDS_NOISE = 0.1
ROUNDING = 1e-9


def planned_terms(layout: Layout, probes: Probes) -> list[Row]:
    """Everything but time, from the plan. Raises: ConfigError for an unknown name under `equal`."""
    for question in layout.study.questions:
        for name in question.equal:
            if name not in WORDS:
                raise ConfigError(
                    f"questions.equal: unknown name {name!r}{nearest(name, WORDS)}; known: {', '.join(WORDS)}"
                )
    terms = {arm: _planned(layout, probes, arm) for arm in trained(layout)}
    return [
        found for pair in pairs(layout) for found in _rows(layout, pair, terms, "planned", set(WORDS) - {"seconds"})
    ]


def made_terms(layout: Layout, folder: Path) -> list[Row]:
    """Time, and updates and tokens where a run stopped early, from the finished runs."""
    from isoform.studies.audit_runs import chains

    terms: dict[str, Terms] = {}
    early = set()
    for arm, runs in chains(layout, folder).items():
        num_seeds = len(layout.seeds)
        terms[arm] = {
            "seconds": sum(run.seconds for run in runs) / num_seeds,
            "updates": sum(run.steps for run in runs) / num_seeds,
            "data_tokens": sum(run.tokens for run in runs) / num_seeds,
        }
        if any(run.steps != run.num_steps for run in runs):
            early.add(arm)
    rows = []
    for pair in pairs(layout):
        rows += _rows(layout, pair, terms, "made", {"seconds", *(WORDS if early & set(pair) else ())})
    return rows


def _planned(layout: Layout, probes: Probes, arm: str) -> Terms:
    from isoform.models.accounting import accounts

    chain = list(probes.chain(arm).values())
    sizes = [accounts(probe.run.model, probe.run.config.text.max_tokens) for probe in chain]
    per_token = [size["flops_forward_per_token"] + size["flops_backward_per_token"] for size in sizes]
    return {
        "data_tokens": sum(probe.planned_tokens for probe in chain),
        "updates": sum(probe.run.num_steps for probe in chain),
        "parameters": sizes[-1]["total"],
        "flops": sum(probe.planned_tokens * flops for probe, flops in zip(chain, per_token, strict=True)),
        "tuning_trials": math.prod(len(values) for values in layout.study.arms[arm].tune.values()),
    }


def _rows(layout: Layout, pair: Pair, terms: Mapping[str, Terms], when: str, looked_at: set[str]) -> list[Row]:
    """A refusal for each named term that is not equal; the other unequal ones in one line."""
    equal = _equal(layout, pair)
    unknown = [arm for arm in pair if arm not in terms]
    if unknown:
        named = ", ".join(name for name in equal if name in looked_at)
        text = f"arm {unknown[0]} was not trained here, so that equal {named} cannot be checked; remove it from `equal`"
        return [row(TERMS, "refuse", text, pair)] if named else []
    first, second = (terms[arm] for arm in pair)
    rows, others = [], []
    for name in WORDS:
        if name not in looked_at or name not in first:
            continue
        difference = relative_difference(first[name], second[name])
        told = f"{WORDS[name]} {_number(first[name])} in {pair[0]} and {_number(second[name])} in {pair[1]}"
        if name in equal and difference > equal[name] + ROUNDING:
            text = f"{when} {told} differ by {difference:.1%}; the question allows {equal[name]:.1%} (equal.{name})"
            rows.append(row(TERMS, "refuse", text, pair))
        elif name not in equal and difference > (SECONDS_NOISE if name == "seconds" else ROUNDING):
            others.append(told)
    if others:
        rows.append(row(TERMS, "inform", f"{when}: {'; '.join(others)}", pair))
    return rows


def relative_difference(first: float, second: float) -> float:
    """|first - second| / the larger of them; 0 where both are 0."""
    largest = max(abs(first), abs(second))
    return abs(first - second) / largest if largest else 0.0


def _equal(layout: Layout, pair: Pair) -> dict[str, float]:
    """What every question of this pair asks to be equal, at the strictest tolerance."""
    questions: list[Question] = [question for question in layout.study.questions if question.pair == pair]
    named = {name for question in questions for name in question.equal}
    return {name: min(q.equal[name] for q in questions if name in q.equal) for name in named}


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) < 1e7 else f"{value:.3g}"
