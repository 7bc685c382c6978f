"""Differences, intervals, p-values and verdicts, against formulas done by hand, scipy and statsmodels."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from isoform.chance import generator
from isoform.errors import DataError
from isoform.studies.crossed import (
    SMALLEST_P,
    half_width,
    mean_squares,
    p_value,
    planned,
    seeds_needed,
    smallest_difference,
)
from isoform.studies.scores import MIN_DOCUMENTS, Scores, by_document, load_scores
from isoform.studies.statistics import (
    Comparison,
    compare,
    decide,
    holm,
    interval_over_seeds,
    pseudo_values,
    selection_artefact,
)


class Accuracy:
    name, unit, higher_is_better = "accuracy", "fraction", True
    columns: ClassVar[tuple[str, ...]] = ("correct",)
    mean_column: ClassVar[str | None] = "correct"

    def value(self, sums: Any) -> Any:
        return sums["correct"]


class Error(Accuracy):
    name, higher_is_better = "error", False


class Loss:
    name, unit, higher_is_better = "loss", "nats", False
    columns: ClassVar[tuple[str, ...]] = ("nats", "tokens")
    mean_column: ClassVar[str | None] = None

    def value(self, sums: Any) -> Any:
        return sums["nats"] / sums["tokens"]


class Perplexity(Loss):
    name, unit = "perplexity", "perplexity"

    def value(self, sums: Any) -> Any:
        return np.exp(sums["nats"] / sums["tokens"])


def scores(columns: dict[str, Any], seeds: list[int] | None = None) -> Scores:
    arrays = {name: np.atleast_2d(np.asarray(column, dtype=np.float64)) for name, column in columns.items()}
    num_seeds, num_examples = next(iter(arrays.values())).shape
    return Scores(arrays, [f"e{index}" for index in range(num_examples)], seeds or list(range(num_seeds)))


def right(values: Any, seeds: list[int] | None = None) -> Scores:
    return scores({"correct": values}, seeds)


def drawn(seed: int, num_seeds: int, num_examples: int, rate: float = 0.5) -> Any:
    return (generator("test", seed).random((num_seeds, num_examples)) < rate).astype(float)


# ------------------------------------------------------------------------------------------------ analysis of variance


def test_mean_squares_agree_with_least_squares() -> None:
    table = generator("anova").normal(size=(4, 7)) + np.arange(4)[:, None]
    squares = mean_squares(table)
    rows, columns = np.indices(table.shape)

    def left_over(*factors: Any) -> float:
        design = np.column_stack([np.ones(table.size), *(np.eye(f.max() + 1)[f.ravel()] for f in factors)])
        fitted = design @ np.linalg.lstsq(design, table.ravel(), rcond=None)[0]
        return float(((table.ravel() - fitted) ** 2).sum())

    assert squares.residual == pytest.approx(left_over(rows, columns) / 18)
    assert squares.seed == pytest.approx((left_over(columns) - left_over(rows, columns)) / 3)
    assert squares.example == pytest.approx((left_over(rows) - left_over(rows, columns)) / 6)


def test_many_studies_at_once_are_the_same_as_one_by_one() -> None:
    tables = generator("many").normal(size=(5, 3, 20))
    together = half_width(mean_squares(tables), 0.95)
    assert together == pytest.approx([half_width(mean_squares(table), 0.95) for table in tables])


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
@pytest.mark.parametrize(("seed_spread", "example_spread"), [(0, 0), (0.05, 0), (1, 0), (0, 3), (0.3, 1)])
@pytest.mark.parametrize("num_seeds", [2, 3, 5, 10])
def test_coverage_is_never_below_what_was_promised(
    num_seeds: int, seed_spread: float, example_spread: float, confidence: float
) -> None:
    """Mean squares are drawn from their own distributions, so that only the formula is on trial."""
    rng, studies, num_examples = generator("formula", num_seeds), 20_000, 300
    expected = planned_squares(seed_spread, example_spread, num_seeds, num_examples)
    drawn_squares = dataclasses.replace(
        expected,
        seed=expected.seed * rng.chisquare(num_seeds - 1, studies) / (num_seeds - 1),
        example=expected.example * rng.chisquare(num_examples - 1, studies) / (num_examples - 1),
        residual=expected.residual * np.ones(studies),
    )
    cells = num_seeds * num_examples
    variance = (expected.seed + expected.example - expected.residual) / cells
    covered = np.mean(np.abs(rng.normal(size=studies) * np.sqrt(variance)) <= half_width(drawn_squares, confidence))
    noise = 4 * math.sqrt(confidence * (1 - confidence) / studies)
    assert covered >= confidence - noise
    if num_seeds >= 5 and confidence == 0.95:
        assert covered <= 0.97 + noise


def planned_squares(seed_spread: float, example_spread: float, num_seeds: int, num_examples: int) -> Any:
    table = np.zeros((2, num_examples))
    empty = mean_squares(table)
    components = dataclasses.replace(
        empty, seed=num_examples * seed_spread**2 + 1.0, example=2 * example_spread**2 + 1.0, residual=1.0
    )
    return planned(components, num_seeds)


def test_planned_squares_give_back_the_study_they_came_from() -> None:
    squares = mean_squares(generator("plan").normal(size=(3, 50)) + np.array([[0.0], [2.0], [4.0]]) + np.arange(50))
    again = planned(squares, 3)
    assert (again.seed, again.example, again.residual) == pytest.approx(
        (squares.seed, squares.example, squares.residual)
    )


@given(st.integers(2, 6), st.floats(0, 3), st.floats(0, 3), st.floats(0.001, 100))
@settings(max_examples=40, deadline=None)
def test_p_and_interval_say_the_same(
    num_seeds: int, seed_spread: float, example_spread: float, distance: float
) -> None:
    squares = planned_squares(seed_spread, example_spread, num_seeds, 100)
    p = p_value(distance, squares)
    assert 0 < p <= 1
    if 1e-9 < p < 1:
        assert half_width(squares, 1 - p) == pytest.approx(distance, rel=1e-3)
    assert (p <= 0.05) == (half_width(squares, 0.95) <= distance)


def test_p_reaches_its_ends() -> None:
    squares = planned_squares(0.1, 0.1, 5, 100)
    assert p_value(0.0, squares) == 1.0
    assert p_value(1e-12, squares) == pytest.approx(1.0, abs=1e-6)
    assert p_value(1e250, squares) == SMALLEST_P


@pytest.mark.parametrize("num_seeds", [3, 5, 10])
def test_the_smallest_difference_is_found_four_times_of_five(num_seeds: int) -> None:
    rng, studies, num_examples = generator("power", num_seeds), 20_000, 400
    expected = planned_squares(0.1, 0.5, num_seeds, num_examples)
    draws = dataclasses.replace(expected, seed=expected.seed * rng.chisquare(num_seeds - 1, studies) / (num_seeds - 1))
    variance = (expected.seed + expected.example - expected.residual) / (num_seeds * num_examples)
    estimate = smallest_difference(expected, 0.95) + rng.normal(size=studies) * np.sqrt(variance)
    assert np.mean(estimate > half_width(draws, 0.95)) == pytest.approx(0.8, abs=0.03)


def test_seeds_needed_is_the_first_count_that_would_do() -> None:
    squares = planned_squares(0.5, 0.5, 3, 400)
    needed = seeds_needed(0.6, squares, 0.95)
    assert needed is not None and needed > 3
    assert smallest_difference(planned(squares, needed), 0.95) <= 0.6
    assert smallest_difference(planned(squares, needed - 1), 0.95) > 0.6


def test_no_number_of_seeds_makes_up_for_few_examples() -> None:
    assert seeds_needed(0.01, planned_squares(0.0, 2.0, 5, 50), 0.95) is None
    assert seeds_needed(0.0, planned_squares(0.1, 0.1, 5, 50), 0.95) is None


# -------------------------------------------------------------------------------------------------------- pseudo-values


def test_a_mean_over_examples_falls_apart_into_its_scores() -> None:
    table = generator("mean").random((3, 40))

    class Mean(Loss):
        columns: ClassVar[tuple[str, ...]] = ("nats", "tokens")

    values, shares = pseudo_values(scores({"nats": table, "tokens": np.ones_like(table)}), Mean)
    assert values == pytest.approx(table.mean(axis=1))
    assert shares == pytest.approx(table)


def test_pseudo_values_average_to_the_metric_and_spread_like_the_delta_method() -> None:
    rng = generator("ratio")
    tokens = rng.integers(5, 60, size=(2, 800)).astype(float)
    nats = tokens * rng.gamma(4.0, 0.5, size=tokens.shape)
    values, shares = pseudo_values(scores({"nats": nats, "tokens": tokens}), Perplexity)
    ratio = nats.sum(1, keepdims=True) / tokens.sum(1, keepdims=True)
    assert values == pytest.approx(np.exp(ratio[:, 0]))
    assert shares.mean(axis=1) == pytest.approx(values)
    linear = np.exp(ratio) * (nats - ratio * tokens) / tokens.mean(axis=1, keepdims=True)
    assert shares.std(axis=1) == pytest.approx(linear.std(axis=1), rel=0.02)


def test_an_undefined_metric_is_refused() -> None:
    with pytest.raises(DataError, match="loss: undefined on these 2 examples"):
        pseudo_values(scores({"nats": [1.0, 0.0], "tokens": [2.0, 0.0]}), SafeLoss)
    with pytest.raises(DataError, match="1 example given"):
        pseudo_values(right([[1.0]]), Accuracy)
    with pytest.raises(DataError, match="column correct holds"):
        pseudo_values(right([[1.0, math.nan]]), Accuracy)


class SafeLoss(Loss):
    def value(self, sums: Any) -> Any:
        tokens = np.asarray(sums["tokens"])
        return np.divide(sums["nats"], tokens, out=np.full(np.shape(tokens), np.nan), where=tokens > 0)


# ------------------------------------------------------------------------------------------------------------- compare


def test_second_minus_first_and_the_sign_of_better() -> None:
    worse, better = right(drawn(1, 4, 400, 0.3)), right(drawn(2, 4, 400, 0.6))
    result = compare(worse, better, Accuracy())
    assert result.difference == pytest.approx(result.second - result.first) and result.difference > 0.2
    assert result.low < result.difference < result.high
    assert (result.verdict, result.speaks_of) == ("better", "methods")
    assert compare(better, worse, Accuracy()).verdict == "worse"
    assert compare(worse, better, Error()).verdict == "worse"
    mirrored = compare(better, worse, Accuracy)
    assert (mirrored.low, mirrored.high, mirrored.p) == pytest.approx((-result.high, -result.low, result.p))


def test_without_example_effects_it_is_the_paired_t_over_seeds() -> None:
    """A residual that dominates: MS_example below MS_residual, the seeds' own t is all that is left."""
    rng = generator("seeds")
    first = rng.normal(size=(6, 300))
    second = rng.normal(size=(6, 300)) + rng.normal(size=(6, 1))
    second -= (second - first).mean(axis=0, keepdims=True) - (second - first).mean() - 0.3
    result = compare(scores({"correct": first}), scores({"correct": second}), Accuracy)
    expected = stats.ttest_rel(second.mean(axis=1), first.mean(axis=1))
    interval = expected.confidence_interval(0.95)
    assert (result.low, result.high) == pytest.approx((interval.low, interval.high))
    assert result.p == pytest.approx(expected.pvalue, rel=1e-6)


def test_order_of_examples_and_seeds_does_not_matter() -> None:
    first, second = right(drawn(3, 3, 50), [5, 6, 7]), right(drawn(4, 3, 50, 0.7), [5, 6, 7])
    order, seeds = generator("order").permutation(50), [2, 0, 1]
    moved = Scores({"correct": second.columns["correct"][seeds][:, order]}, [second.ids[i] for i in order], [7, 5, 6])
    assert compare(first, moved, Accuracy) == compare(first, second, Accuracy)


def test_identical_outcomes_say_nothing_or_equivalent() -> None:
    table = drawn(5, 3, 80)
    result = compare(right(table), right(table.copy()), Accuracy)
    assert (result.difference, result.p, result.verdict) == (0.0, 1.0, "cannot-tell")
    assert (result.low, result.high, result.method) == (0.0, 0.0, "identical outcomes")
    assert compare(right(table), right(table), Accuracy, margin=0.01).verdict == "equivalent"
    nats = {"nats": table + 1, "tokens": 3 + 2 * table}
    assert compare(scores(nats), scores(nats), Perplexity).method == "identical outcomes"


def test_the_same_difference_everywhere() -> None:
    zeros, ones = np.zeros((2, 20)), np.ones((2, 20))
    result = compare(right(zeros), right(ones), Accuracy)
    assert (result.verdict, result.low, result.high) == ("better", 1.0, 1.0)
    assert result.p == pytest.approx(0.5**19)
    few = compare(right(zeros[:, :4]), right(ones[:, :4]), Accuracy, margin=2.0)
    assert (few.verdict, few.low, few.high) == ("cannot-tell", None, None)


def test_seeds_that_all_agree_leave_the_chance_of_examples() -> None:
    """Two models without chance of their own, scored once a seed: the interval is the paired t over examples."""
    first, second = drawn(6, 1, 200, 0.4), drawn(7, 1, 200, 0.5)
    result = compare(right(first.repeat(4, 0)), right(second.repeat(4, 0)), Accuracy)
    interval = stats.ttest_rel(second[0], first[0]).confidence_interval(0.95)
    assert (result.low, result.high) == pytest.approx((interval.low, interval.high))


def test_an_arm_with_one_seed_stands_beside_every_seed_of_the_other() -> None:
    baseline, arm = drawn(8, 1, 300, 0.3), drawn(9, 4, 300, 0.6)
    result = compare(right(baseline, [0]), right(arm, [3, 4, 5, 6]), Accuracy)
    repeated = compare(right(baseline.repeat(4, 0)), right(arm), Accuracy)
    assert (result.low, result.high, result.p) == pytest.approx((repeated.low, repeated.high, repeated.p))
    assert (result.speaks_of, result.num_seeds) == ("models", 4)
    assert compare(right(arm), right(baseline, [9]), Accuracy).difference == pytest.approx(-result.difference)


@pytest.mark.parametrize("seed", range(6))
def test_one_seed_right_or_wrong_is_mcnemar(seed: int) -> None:
    first, second = drawn(seed, 1, 60, 0.4)[0], drawn(100 + seed, 1, 60, 0.6)[0]
    result = compare(right(first), right(second), Accuracy)
    table = [[sum((first == a) & (second == b)) for b in (0, 1)] for a in (0, 1)]
    assert result.p == pytest.approx(mcnemar(table, exact=True).pvalue)
    assert (result.method, result.speaks_of, result.seeds_needed) == ("exact McNemar", "models", None)


def test_mcnemar_and_its_interval_never_contradict_each_other() -> None:
    for gains in range(0, 30, 1):
        for losses in range(0, 20, 3):
            if gains == losses == 0:
                continue
            first = np.array([0.0] * gains + [1.0] * losses + [1.0] * 20)
            second = np.array([1.0] * gains + [0.0] * losses + [1.0] * 20)
            result = compare(right(first), right(second), Accuracy)
            assert (result.low > 0 or result.high < 0) == (result.p <= 0.05), (gains, losses)


def test_one_seed_of_any_other_metric_is_the_paired_t() -> None:
    rng = generator("one")
    nats, tokens = rng.gamma(3, size=(1, 90)), np.full((1, 90), 1.0)
    first, second = (
        scores({"nats": nats, "tokens": tokens}),
        scores({"nats": nats + rng.normal(0.1, 0.5, (1, 90)), "tokens": tokens}),
    )
    result = compare(first, second, Loss)
    expected = stats.ttest_rel(second.columns["nats"][0], first.columns["nats"][0])
    assert result.p == pytest.approx(expected.pvalue)
    assert (result.low, result.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert (result.method, result.speaks_of) == ("paired t over examples", "models")


def test_equivalent_where_the_interval_lies_within_the_margin() -> None:
    base = drawn(10, 5, 2000)
    other = np.where(generator("flip").random(base.shape) < 0.02, 1 - base, base)
    first, second = right(base), right(other)
    narrow = compare(first, second, Accuracy, confidence=0.9)
    edge = max(abs(narrow.low), abs(narrow.high))
    assert compare(first, second, Accuracy, margin=edge * 1.001).verdict == "equivalent"
    assert compare(first, second, Accuracy, margin=edge * 0.999).verdict != "equivalent"
    assert compare(first, second, Accuracy, margin=edge * 1.001).p_equivalent == pytest.approx(0.05, rel=0.05)


def test_equivalence_of_two_models_by_the_wider_of_both_intervals() -> None:
    base = drawn(11, 1, 1000)
    other = base.copy()
    other[0, :6] = 1 - other[0, :6]
    assert compare(right(base), right(other), Accuracy, margin=0.02).verdict == "equivalent"
    assert compare(right(base), right(other), Accuracy, margin=0.003).verdict == "cannot-tell"


def test_a_difference_that_is_sure_but_within_the_margin_is_equivalent() -> None:
    rng = generator("sure")
    first = rng.normal(size=(8, 3000))
    second = first + 0.01 + 0.02 * rng.normal(size=first.shape)
    pair = scores({"correct": first}), scores({"correct": second})
    assert compare(*pair, Accuracy).verdict == "better"
    assert compare(*pair, Accuracy, margin=0.05).verdict == "equivalent"


def test_what_does_not_match_is_refused_with_numbers() -> None:
    first = right(drawn(12, 2, 5))
    with pytest.raises(DataError, match="1 of 5 only in the first arm, 0 of 4 only in the second arm, 'e4'"):
        compare(first, right(drawn(13, 2, 4)), Accuracy)
    with pytest.raises(DataError, match=r"seeds \[0, 1\] and \[1, 2\] given"):
        compare(first, right(drawn(13, 2, 5), [1, 2]), Accuracy)


def test_a_comparison_becomes_json() -> None:
    result = compare(right(drawn(14, 3, 60)), right(drawn(15, 3, 60)), Accuracy, margin=0.1)
    again = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert again == result.as_dict()
    assert {"difference", "low", "high", "p", "p_adjusted", "verdict", "seeds_needed", "smallest_difference"} <= set(
        again
    )


# --------------------------------------------------------------------------------------------------- several questions


@pytest.mark.parametrize("num_questions", range(1, 8))
def test_holm_agrees_with_statsmodels(num_questions: int) -> None:
    values = np.round(generator("holm", num_questions).random(num_questions) ** 3, 2).tolist()
    assert holm(values) == pytest.approx(multipletests(values, method="holm")[1])


def test_verdicts_follow_the_adjusted_p() -> None:
    base = compare(right(drawn(16, 4, 400)), right(drawn(17, 4, 400)), Accuracy)
    asked = [dataclasses.replace(base, difference=0.1, p=p) for p in (0.04, 0.01, 0.03)]
    decided = decide(asked, 0.95)
    assert [result.p_adjusted for result in decided] == pytest.approx([0.06, 0.03, 0.06])
    assert [result.verdict for result in decided] == ["cannot-tell", "better", "cannot-tell"]
    assert decide([]) == []
    alone = decide(asked[:1])[0]
    assert (alone.p_adjusted, alone.verdict) == (pytest.approx(0.04), "better")


def test_equivalence_is_adjusted_over_the_questions_that_ask_for_it() -> None:
    base = compare(right(drawn(18, 4, 400)), right(drawn(19, 4, 400)), Accuracy, margin=0.3)
    asked = [dataclasses.replace(base, p=1.0, p_equivalent=value) for value in (0.04, 0.03, None, 0.001)]
    assert [result.verdict for result in decide(asked)] == ["cannot-tell", "cannot-tell", "cannot-tell", "equivalent"]


def test_a_verdict_that_hangs_on_the_selection_is_told() -> None:
    base = compare(right(drawn(20, 3, 60)), right(drawn(21, 3, 60)), Accuracy)
    flips: dict[str, Comparison] = {"last": base, "best-loss": dataclasses.replace(base, verdict="better")}
    message = selection_artefact(flips)
    assert message is not None and "best-loss: better" in message
    assert selection_artefact({"last": base, "best-loss": base}) is None


# ------------------------------------------------------------------------------------------------------ an arm's own


def test_an_arms_interval_holds_seeds_and_examples() -> None:
    table = drawn(22, 5, 400, 0.3)
    mean, low, high, deviation = interval_over_seeds(right(table), Accuracy)
    assert mean == pytest.approx(table.mean())
    assert mean - low == pytest.approx(half_width(mean_squares(table), 0.95))
    assert high - mean == pytest.approx(mean - low)
    assert deviation == pytest.approx(table.mean(axis=1).std(ddof=1))


def test_an_arm_that_is_always_wrong_has_an_interval() -> None:
    mean, low, high, deviation = interval_over_seeds(right(np.zeros((3, 100))), Accuracy)
    assert (mean, low, deviation) == (0.0, 0.0, 0.0)
    assert high == pytest.approx(stats.binomtest(0, 100).proportion_ci(0.95, "wilson").high)
    assert interval_over_seeds(right(drawn(23, 1, 50)), Accuracy)[3] is None
    rare = np.zeros((2, 60))
    rare[:, 0] = 1
    assert interval_over_seeds(right(rare), Accuracy)[1] == 0.0


# ---------------------------------------------------------------------------------------------------- predictions files


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(id: Any, split: str | None = "dev", **stats: Any) -> dict[str, Any]:
    return {"id": id, "split": split, "prediction": "x", "stats": stats}


def test_scores_are_read_from_predictions(tmp_path: Path) -> None:
    one = write(
        tmp_path / "1.jsonl",
        [row("a", nats=1, tokens=2), row("b", nats=3, tokens=4), row("z", "test", nats=0, tokens=1)],
    )
    two = write(tmp_path / "2.jsonl", [row("b", nats=7, tokens=4), row("a", nats=5, tokens=2)])
    read = load_scores({0: one, 1: two}, "dev", Loss)
    assert (read.ids, read.seeds) == (["a", "b"], [0, 1])
    assert read.columns["nats"].tolist() == [[1, 3], [5, 7]]
    assert read.columns["tokens"].tolist() == [[2, 4], [2, 4]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row("a", tokens=2)], r"1.jsonl:1: stats.nats is None"),
        ([row("a", nats=None, tokens=2)], r"stats.nats is None; loss needs a finite number"),
        ([row("a", nats=1, tokens=2), row("a", nats=1, tokens=2)], r"1.jsonl:2: id 'a' stands there twice"),
        ([row("a", "test", nats=1, tokens=2)], r"no row of split 'dev'; splits there: test \(1 rows\)"),
        ([], r"splits there: none"),
    ],
)
def test_predictions_that_cannot_be_used(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_scores({0: write(tmp_path / "1.jsonl", rows)}, "dev", Loss)


def test_seeds_with_other_examples_are_refused(tmp_path: Path) -> None:
    one = write(tmp_path / "1.jsonl", [row("a", correct=1), row("b", correct=0), row("c", correct=0)])
    two = write(tmp_path / "2.jsonl", [row("a", correct=1), row("d", correct=0)])
    with pytest.raises(DataError, match="2 of 3 only in seed 0, 1 of 2 only in seed 7, 'b' for one"):
        load_scores({0: one, 7: two}, "dev", Accuracy)
    with pytest.raises(DataError, match="no such file"):
        load_scores({0: tmp_path / "none.jsonl"}, "dev", Accuracy)


# ------------------------------------------------------------------------------------------------ windows of documents


def windows(seed: int, num_documents: int, num_windows: int) -> Scores:
    """Losses of windows that share their document's difficulty."""
    rng = generator(seed, "windows")
    shape = (1, num_documents, num_windows)
    nats = np.exp(rng.normal(size=(1, num_documents, 1)) + 0.1 * rng.normal(size=shape)).reshape(1, -1)
    ids = [f"d{document}#{window}" for document in range(num_documents) for window in range(num_windows)]
    return Scores({"nats": nats, "tokens": np.ones_like(nats)}, ids, [0])


def test_windows_of_a_document_are_one_example() -> None:
    found = windows(1, 12, 8)
    pooled = by_document(found)
    assert pooled.ids == [f"d{index}" for index in range(12)]
    np.testing.assert_allclose(pooled.columns["nats"], found.columns["nats"].reshape(1, 12, 8).sum(-1))
    mean, low, high, _ = interval_over_seeds(pooled, Loss)
    single_mean, single_low, single_high, _ = interval_over_seeds(found, Loss)
    assert mean == pytest.approx(single_mean)
    assert high - low > 2 * (single_high - single_low)


def test_without_windows_and_with_few_documents_examples_stay() -> None:
    plain = scores({"nats": [[1.0, 2.0]], "tokens": [[1.0, 1.0]]})
    assert by_document(plain) is plain
    few = by_document(windows(1, MIN_DOCUMENTS - 1, 3))
    assert len(few.ids) == 3 * (MIN_DOCUMENTS - 1)
    assert f"windows of only {MIN_DOCUMENTS - 1} documents" in few.notes[0]
    assert compare(few, few, Loss).notes == few.notes
    assert "only 1 document," in by_document(windows(1, 1, 3)).notes[0]
    assert compare(plain, plain, Loss).notes == by_document(windows(1, MIN_DOCUMENTS, 3)).notes == ()


def test_a_document_and_its_repetitions_are_one_example_of_a_share_too() -> None:
    """Ids of equal documents are `id`, `id#2`: the share is still one of all rows."""

    class Share(Accuracy):
        columns: ClassVar[tuple[str, ...]] = ("correct", "examples")

        def value(self, sums: Any) -> Any:
            return sums["correct"] / sums["examples"]

    ids = ["a", "b", "c", "d", "e", "f", "a#2", "b#0#2"]
    correct = np.array([[1.0, 0, 1, 0, 1, 1, 1, 0]])
    found = by_document(Scores({"correct": correct, "examples": np.ones_like(correct)}, ids, [0]))
    assert found.ids == ["a", "b", "c", "d", "e", "f"]
    values, shares = pseudo_values(found, Share)
    assert values[0] == pytest.approx(5 / 8) and shares.mean() == pytest.approx(5 / 8)


def test_windows_are_summed_where_predictions_are_read(tmp_path: Path) -> None:
    rows = [row(f"d{n}#{w}", nats=n, tokens=2) for n in range(MIN_DOCUMENTS) for w in range(3)]
    read = load_scores({0: write(tmp_path / "1.jsonl", rows)}, "dev", Loss)
    assert read.ids == [f"d{n}" for n in range(MIN_DOCUMENTS)] and read.pooled
    assert read.columns["tokens"].tolist() == [[6.0] * MIN_DOCUMENTS]
