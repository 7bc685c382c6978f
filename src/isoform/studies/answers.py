"""Predictions side by side: a sample in which disagreements come first, and how often the arms of a pair agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from isoform.chance import key64
from isoform.studies.records import Records, Results
from isoform.studies.wording import clean, is_number, plain_text, shorten

MAX_ARMS = 5
MAX_EXAMPLES = 24
MAX_CHARACTERS = 280

Predictions = dict[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Answer:
    """One arm's answer to one example; `right` is None where the metric does not judge single answers."""

    arm: str
    text: str
    right: bool | None
    num_right: int
    num_seeds: int


@dataclass(frozen=True)
class Example:
    input: str
    gold: str
    answers: list[Answer]


@dataclass(frozen=True)
class Agreement:
    """How often two arms were right together, over all seeds and examples of a pair."""

    first: str
    second: str
    both: int
    only_first: int
    only_second: int
    neither: int
    same_text: int

    @property
    def total(self) -> int:
        return self.both + self.only_first + self.only_second + self.neither


@dataclass(frozen=True)
class Answers:
    arms: list[str]
    seed: Any
    split: str
    num_examples: int
    num_disagreements: int
    num_hidden_arms: int
    judged: bool
    examples: list[Example]
    agreements: list[Agreement]


def read_answers(records: Records) -> Answers | None:
    """The sample and the agreement table, or None where no predictions were kept."""
    results = records.results
    compare = results.get("compare") or {}
    metric, split = str(compare.get("metric") or ""), compare.get("split")
    chosen = _chosen_arms(results)
    by_arm = {name: kept for name, runs in chosen.items() if (kept := _read_runs(records, runs, split))}
    if split is None:
        split = _keep_last_split(by_arm)
    if not by_arm:
        return None
    first_seed = {name: seeds[0][1] for name, seeds in by_arm.items()}
    shared = [key for key in next(iter(first_seed.values())) if all(key in rows for rows in first_seed.values())]
    if not shared:
        return None
    ranked = sorted(shared, key=lambda key: (_rank(key, first_seed, metric), key64("sample", key)))
    num_disagreements = sum(_rank(key, first_seed, metric) <= 1 for key in shared)
    examples = [_example(key, by_arm, metric) for key in _mixed(ranked, num_disagreements)]
    return Answers(
        arms=list(by_arm),
        seed=next(iter(by_arm.values()))[0][0],
        split=str(split or ""),
        num_examples=len(shared),
        num_disagreements=num_disagreements,
        num_hidden_arms=len(results.get("arms") or ()) - len(by_arm),
        judged=any(answer.right is not None for example in examples for answer in example.answers),
        examples=examples,
        agreements=_agreements(results, by_arm, metric),
    )


def _chosen_arms(results: Results) -> dict[str, list[Mapping[str, Any]]]:
    """The arms of the questions first, as many as fit beside each other, in the study's order."""
    arms = {str(arm.get("name") or ""): arm.get("runs") or [] for arm in results.get("arms") or ()}
    asked = [name for question in results.get("questions") or () for name in question.get("pair") or ()]
    chosen = set([name for name in dict.fromkeys([*asked, *arms]) if name in arms][:MAX_ARMS])
    return {name: runs for name, runs in arms.items() if name in chosen}


def _read_runs(records: Records, runs: Sequence[Mapping[str, Any]], split: str | None) -> list[tuple[Any, Predictions]]:
    kept = [(run.get("seed"), records.prediction_rows(str(run["final"]), split)) for run in runs if run.get("final")]
    return [(seed, rows) for seed, rows in kept if rows]


def _keep_last_split(by_arm: Mapping[str, list[tuple[Any, Predictions]]]) -> Any:
    """Where no split is compared, the one that was scored last, alone."""
    every = [rows for seeds in by_arm.values() for _, rows in seeds]
    last = next((row.get("split") for rows in every for row in reversed(rows.values())), None)
    for rows in every:
        for key in [key for key, row in rows.items() if row.get("split") != last]:
            del rows[key]
    return last


def is_right(row: Mapping[str, Any], metric: str) -> bool | None:
    """Whether the answer counts as right: by the example's statistics, else by equality with the expected text."""
    stats = row.get("stats")
    stats = stats if isinstance(stats, dict) else {}
    for name in (metric, "correct", "exact_match", "accuracy"):
        inner = stats.get(name)
        value = inner.get("correct") if isinstance(inner, dict) else inner
        if is_number(value) or isinstance(value, bool):
            return bool(value >= 0.5)
    gold = row.get("gold")
    return None if gold is None else bool(row.get("prediction") == gold)


def _rank(key: str, rows: Mapping[str, Predictions], metric: str) -> int:
    """0: some arms right, some wrong; 1: different answers; 2: the same or all right."""
    rights = {is_right(predictions[key], metric) for predictions in rows.values()}
    if len(rights) > 1:
        return 0
    texts = {str(predictions[key].get("prediction")) for predictions in rows.values()}
    return 1 if len(texts) > 1 else 2


def _mixed(ranked: Sequence[str], num_disagreements: int) -> list[str]:
    """Disagreements first; where there are examples of agreement, a quarter of the sample is theirs."""
    agreeing = list(ranked[num_disagreements:])
    room = MAX_EXAMPLES - min(len(agreeing), MAX_EXAMPLES // 4)
    shown = list(ranked[: min(num_disagreements, room)])
    return shown + agreeing[: MAX_EXAMPLES - len(shown)]


def _example(key: str, by_arm: Mapping[str, list[tuple[Any, Predictions]]], metric: str) -> Example:
    answers = []
    for name, seeds in by_arm.items():
        rights = [is_right(rows[key], metric) for _, rows in seeds if key in rows]
        text = shorten(clean(plain_text(seeds[0][1][key].get("prediction"))), MAX_CHARACTERS)
        answers.append(Answer(name, text, rights[0], sum(right is True for right in rights), len(rights)))
    row = next(iter(by_arm.values()))[0][1][key]
    gold = "" if row.get("gold") is None else shorten(clean(plain_text(row["gold"])), MAX_CHARACTERS)
    return Example(shorten(clean(plain_text(row.get("input") or "")), MAX_CHARACTERS), gold, answers)


def _agreements(results: Results, by_arm: Mapping[str, list[tuple[Any, Predictions]]], metric: str) -> list[Agreement]:
    pairs = dict.fromkeys(tuple(question.get("pair") or ()) for question in results.get("questions") or ())
    return [
        counted
        for pair in pairs
        if len(pair) == 2 and pair[0] in by_arm and pair[1] in by_arm
        if (counted := _agreement(pair[0], pair[1], by_arm, metric)).total
    ]


def _agreement(first: str, second: str, by_arm: Mapping[str, list[tuple[Any, Predictions]]], metric: str) -> Agreement:
    counts = {(True, True): 0, (True, False): 0, (False, True): 0, (False, False): 0}
    same_text = 0
    other = dict(by_arm[second])
    for seed, rows in by_arm[first]:
        for key, row in rows.items():
            beside = other.get(seed, {}).get(key)
            if beside is None:
                continue
            left, right = is_right(row, metric), is_right(beside, metric)
            if left is not None and right is not None:
                counts[left, right] += 1
                same_text += row.get("prediction") == beside.get("prediction")
    both, only_first, only_second, neither = counts.values()
    return Agreement(first, second, both, only_first, only_second, neither, same_text)
