"""Terms: what two arms were given, so that a difference can be laid to the method and not to the means."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from isoform.config import Question
from isoform.errors import ConfigError
from isoform.registry import nearest
from isoform.studies.audit_rows import TERMS, Pair, Row, pairs, row, stepped, trained
from isoform.studies.layout import Layout
from isoform.studies.wording import percent_text

if TYPE_CHECKING:
    from pathlib import Path

    from isoform.studies.audit_probe import Probes
    from isoform.studies.audit_runs import Finished

Terms = dict[str, float]

WORDS = {
    # Every token that the model reads in training; those that are lost upon are fewer where a question is only read.
    "data_tokens": "tokens read",
    "target_tokens": "target tokens",
    "updates": "updates",
    "parameters": "parameters",
    "flops": "training FLOPs",
    "seconds": "seconds of training",
    "tuning_trials": "tuning trials",
}
# Known of finished runs alone.
ONLY_MADE = {"seconds", "target_tokens"}
# Wall times of equal work differ by this much on a busy machine: not worth a line.
SECONDS_NOISE = 0.1
ROUNDING = 1e-9


def planned_terms(layout: Layout, probes: Probes) -> list[Row]:
    """Everything but time and target tokens, from the plan. Raises: ConfigError for an unknown name under `equal`."""
    for question in layout.study.questions:
        for name in question.equal:
            if name not in WORDS:
                raise ConfigError(
                    f"questions.equal: unknown name {name!r}{nearest(name, WORDS)}; known: {', '.join(WORDS)}"
                )
    probed = stepped(layout)
    terms = {
        arm: _planned(layout, probes, arm) if arm in probed else _planned_fit(layout, probes, arm)
        for arm in trained(layout)
    }
    return [found for pair in pairs(layout) for found in _rows(layout, pair, terms, "planned", set(WORDS) - ONLY_MADE)]


def made_terms(layout: Layout, folder: Path) -> list[Row]:
    """Time and target tokens, and updates and tokens read where a run stopped early, from the finished runs."""
    from isoform.studies.audit_runs import chains

    made = chains(layout, folder)
    terms: dict[str, Terms] = {}
    for arm, runs in made.items():
        num_seeds = len(layout.seeds)
        terms[arm] = {
            "seconds": sum(run.seconds for run in runs) / num_seeds,
            "updates": sum(run.steps for run in runs) / num_seeds,
            "target_tokens": sum(run.tokens for run in runs) / num_seeds,
        }
    early = {arm for arm, runs in made.items() if any(run.steps != run.num_steps for run in runs)}
    rows = []
    for pair in pairs(layout):
        cut = bool(early & set(pair))
        if cut:
            for arm in set(pair) & set(stepped(layout)):
                terms[arm].setdefault("data_tokens", _tokens_read(layout, arm, made[arm]))
        rows += _rows(layout, pair, terms, "made", {*ONLY_MADE, *(WORDS if cut else ())})
    return rows


def _tokens_read(layout: Layout, arm: str, runs: list[Finished]) -> float:
    """The plan's tokens for the updates that were made, a mean over seeds: the same unit as before training."""
    from isoform.studies.audit_probe import Probes

    with Probes(layout) as probes:
        per_step = {stage: probe.planned_tokens / probe.run.num_steps for stage, probe in probes.chain(arm).items()}
    return sum(run.steps * per_step[run.run.stage] for run in runs) / len(layout.seeds)


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


def _planned_fit(layout: Layout, probes: Probes, arm: str) -> Terms:
    """Of a model that is fitted in one go: how many settings are tried; its size follows from the texts."""
    from isoform.training.classical import grid

    (probe,) = probes.chain(arm).values()
    settings = math.prod(map(len, grid(probe.run).values()))
    return {
        "updates": 0,
        "tuning_trials": settings * math.prod(len(values) for values in layout.study.arms[arm].tune.values()),
    }


def _rows(layout: Layout, pair: Pair, terms: Mapping[str, Terms], when: str, looked_at: set[str]) -> list[Row]:
    """A refusal for each named term that is not equal, one line for the named ones that are, one for what differs."""
    equal = _equal(layout, pair)
    unknown = [arm for arm in pair if arm not in terms]
    if unknown:
        named = ", ".join(name for name in WORDS if name in equal and name in looked_at)
        text = f"arm {unknown[0]} was not trained here, so that equal {named} cannot be checked; remove it from `equal`"
        return [row(TERMS, "refuse", text, pair)] if named else []
    first, second = (terms[arm] for arm in pair)
    rows: list[Row] = []
    held, others = [], []
    for name in WORDS:
        if name not in looked_at or (name not in first and name not in second):
            continue
        if name not in first or name not in second:
            if name in equal:
                arm = pair[name in first]
                text = f"{WORDS[name]} mean nothing for arm {arm}, which is fitted in one go; remove equal.{name}"
                rows.append(row(TERMS, "refuse", text, pair))
            continue
        difference = relative_difference(first[name], second[name])
        told = told_apart(name, (first[name], second[name]), pair)
        if name in equal and difference > equal[name] + ROUNDING:
            text = f"{when} {told} differ by {difference:.1%}; the question allows {equal[name]:.1%} (equal.{name})"
            rows.append(row(TERMS, "refuse", text, pair))
        elif name in equal:
            held.append(f"{WORDS[name]} (within {percent_text(equal[name])})" if equal[name] else WORDS[name])
        elif difference > (SECONDS_NOISE if name == "seconds" else ROUNDING):
            others.append(told)
    if held:
        trained_so = ", as trained" if when == "made" else ""
        rows.append(row(TERMS, "pass", f"equal as asked{trained_so}: {', '.join(held)}", pair))
    if others:
        rows.append(row(TERMS, "inform", f"{when}: {'; '.join(others)}", pair))
    return rows


def told_apart(name: str, values: tuple[float, float], pair: Pair) -> str:
    """`updates 120 in scratch and 400 in pretrained`."""
    return f"{WORDS[name]} {_number(values[0])} in {pair[0]} and {_number(values[1])} in {pair[1]}"


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
