"""Metrics of classifiers from additive counts equal those of scikit-learn and scipy, alone and in halves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr
from sklearn import metrics as oracle

from isoform.evaluation.metrics import StreamingMetrics, build_metrics, columns_of, wilson
from isoform.objectives.classify import METRICS

AVERAGED = ("precision", "recall", "f1")


def columns(gold: np.ndarray, said: np.ndarray, num_labels: int) -> dict[str, np.ndarray]:
    """Statistics of examples from 0-or-1 tables `(n, c)`."""
    table = {"correct": (gold == said).all(axis=1).astype(float), "examples": np.ones(len(gold))}
    for at in range(num_labels):
        table |= {f"gold.{at}": gold[:, at], f"predicted.{at}": said[:, at], f"hits.{at}": gold[:, at] * said[:, at]}
    return table


def result_row(metric, split, stats):
    stream = StreamingMetrics([metric])
    stream.add(stats)
    return stream.rows(split)[0]


def value(name: str, table: dict[str, np.ndarray]) -> float:
    return result_row(build_metrics([name])[0], "dev", table)["value"]


@given(st.integers(2, 12), st.integers(2, 40), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_single_labels(num_labels: int, n: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    gold, said = draw.integers(num_labels, size=n), draw.integers(num_labels, size=n)
    said = np.where(draw.random(n) < 0.5, gold, said)
    table = columns(np.eye(num_labels)[gold], np.eye(num_labels)[said], num_labels)
    assert value("accuracy", table) == pytest.approx(oracle.accuracy_score(gold, said))
    several = len({*gold, *said}) > 1  # scikit-learn warns of one
    assert value("mcc", table) == pytest.approx(oracle.matthews_corrcoef(gold, said) if several else 0.0)
    for average in ("macro", "weighted"):
        expected = oracle.precision_recall_fscore_support(gold, said, average=average, zero_division=0)
        found = [value(f"{average}_{score}", table) for score in AVERAGED]
        assert found == pytest.approx(list(expected[:3]))


@given(st.integers(2, 5), st.integers(2, 40), st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_several_labels(num_labels: int, n: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    gold, said = (draw.integers(2, size=(n, num_labels)).astype(float) for _ in range(2))
    gold[0] = 1.0  # scikit-learn averages over labels that are nowhere, too
    table = columns(gold, said, num_labels)
    assert value("accuracy", table) == pytest.approx(oracle.accuracy_score(gold, said))
    for average in ("macro", "weighted"):
        expected = oracle.precision_recall_fscore_support(gold, said, average=average, zero_division=0)
        assert [value(f"{average}_{score}", table) for score in AVERAGED] == pytest.approx(list(expected[:3]))


def numbers(said: np.ndarray, expected: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "squared_error": (said - expected) ** 2,
        "absolute_error": abs(said - expected),
        "said": said,
        "expected": expected,
        "said_squared": said**2,
        "expected_squared": expected**2,
        "product": said * expected,
        "examples": np.ones(len(said)),
    }


def test_numbers() -> None:
    draw = np.random.default_rng(0)
    expected = draw.normal(size=50)
    said = expected + draw.normal(size=50)
    table = numbers(said, expected)
    assert value("mse", table) == pytest.approx(oracle.mean_squared_error(expected, said))
    assert value("mae", table) == pytest.approx(oracle.mean_absolute_error(expected, said))
    assert value("pearson", table) == pytest.approx(pearsonr(expected, said).statistic)


def test_an_interval_holds_the_value_and_arrays_are_as_their_rows() -> None:
    draw = np.random.default_rng(1)
    gold, said = draw.integers(3, size=(2, 200))
    table = columns(np.eye(3)[gold], np.eye(3)[said], 3)
    for name in ("macro_f1", "mcc", "weighted_precision"):
        metric = build_metrics([name])[0]
        row = result_row(metric, "dev", table)
        assert row["low"] < row["value"] < row["high"]
        without = {column: table[column].sum() - table[column] for column in columns_of(metric, table)}
        many = metric.value(without)
        one = metric.value({column: values[7] for column, values in without.items()})
        assert many.shape == (200,) and many[7] == pytest.approx(one)


def test_where_one_label_is_always_said_an_interval_stays_within_the_metric() -> None:
    gold = np.arange(30) % 2
    table = columns(np.eye(2)[gold], np.eye(2)[np.ones(30, dtype=int)], 2)
    row = result_row(build_metrics(["mcc"])[0], "dev", table)
    assert (row["value"], row["low"], row["high"]) == (0.0, -1.0, 1.0)


LIMITS = ("value", "low", "high")
PEARSON = build_metrics(["pearson"])[0]


@pytest.mark.parametrize(("middle", "spread"), [(0.0, 1.0), (2000.0, 1.5), (3.0, 1e-3), (1e4, 1e-1), (-5e5, 1.0)])
def test_a_correlation_of_numbers_far_from_zero_has_an_interval(middle: float, spread: float) -> None:
    draw = np.random.default_rng(3)
    expected = draw.normal(middle, spread, 200)
    said = expected + draw.normal(0, spread, 200)
    theirs = pearsonr(said, expected)
    row = result_row(PEARSON, "dev", numbers(said, expected))
    assert row["value"] == pytest.approx(theirs.statistic, abs=1e-4)
    # Fisher's width holds for a normal distribution; ours follows from the examples.
    low, high = theirs.confidence_interval()
    assert (row["low"], row["high"]) == pytest.approx((low, high), abs=0.035)


def test_a_correlation_varies_as_resampling_says() -> None:
    draw = np.random.default_rng(4)
    expected = draw.standard_t(6, size=400) + 300
    said = expected + draw.normal(size=400) * (1 + abs(expected - 300))
    row = result_row(PEARSON, "dev", numbers(said, expected))
    drawn = draw.integers(400, size=(4000, 400))
    found = [np.corrcoef(said[each], expected[each])[0, 1] for each in drawn]
    assert (row["low"], row["high"]) == pytest.approx(tuple(np.quantile(found, [0.025, 0.975])), abs=0.03)
    halves = [StreamingMetrics([PEARSON]) for _ in range(2)]
    for half, chosen in zip(halves, (slice(0, 150), slice(150, 400)), strict=True):
        half.add(numbers(said[chosen], expected[chosen]))
    halves[0].merge(halves[1])
    merged = halves[0].rows("dev")[0]
    assert [merged[key] for key in LIMITS] == pytest.approx([row[key] for key in LIMITS], rel=1e-6)


def test_numbers_that_never_vary_have_no_correlation_and_two_examples_prove_none() -> None:
    row = result_row(PEARSON, "dev", numbers(np.full(50, 0.1), np.random.default_rng(0).normal(size=50)))
    assert (row["value"], row["low"], row["high"]) == (None, None, None)
    row = result_row(PEARSON, "dev", numbers(np.array([1.0, 2.0]), np.array([3.0, 5.0])))
    assert (row["value"], row["low"], row["high"]) == (1.0, -1.0, 1.0)


def test_a_perfect_score_of_few_examples_is_bounded_as_accuracy_is() -> None:
    gold = np.arange(12) % 2
    table = columns(np.eye(2)[gold], np.eye(2)[gold], 2)
    all_wrong = columns(np.eye(2)[gold], np.eye(2)[1 - gold], 2)
    accuracy = result_row(build_metrics(["accuracy"])[0], "dev", table)
    assert accuracy["low"] == pytest.approx(12 / (12 + 1.959964**2))
    for average in ("macro", "weighted"):
        for score in AVERAGED:
            row = result_row(build_metrics([f"{average}_{score}"])[0], "dev", table)
            assert (row["value"], row["low"], row["high"]) == (1.0, pytest.approx(accuracy["low"]), 1.0)
            wrong = result_row(build_metrics([f"{average}_{score}"])[0], "dev", all_wrong)
            assert (wrong["value"], wrong["low"], wrong["high"]) == (0.0, 0.0, pytest.approx(1 - accuracy["low"]))
    row = result_row(build_metrics(["mcc"])[0], "dev", table)
    assert (row["value"], row["low"], row["high"]) == (1.0, pytest.approx(2 * accuracy["low"] - 1), 1.0)


def test_a_rare_label_widens_a_perfect_macro_average() -> None:
    gold = np.zeros(40, dtype=int)
    gold[0] = 1
    table = columns(np.eye(2)[gold], np.eye(2)[gold], 2)
    macro, weighted = (result_row(build_metrics([f"{kind}_recall"])[0], "dev", table) for kind in ("macro", "weighted"))
    # One example is half of the score: as much is known as from 4 / (1/1 + 1/39) equal ones.
    effective = 4 / (1 + 1 / 39)
    assert macro["low"] == pytest.approx(effective / (effective + 1.959964**2))
    assert weighted["low"] == pytest.approx(40 / (40 + 1.959964**2))
    nothing = columns(np.zeros((10, 2)), np.ones((10, 2)), 2)  # no text has a label, every one was said
    row = result_row(build_metrics(["macro_f1"])[0], "dev", nothing)
    assert (row["value"], row["low"], row["high"]) == (0.0, 0.0, pytest.approx(1 - 10 / (10 + 1.959964**2)))


def test_a_label_that_is_always_said_does_not_settle_macro_recall() -> None:
    """Each label's recall is 0 or 1, so that no example moves the mean; five more might."""
    gold = np.arange(6) % 2
    table = columns(np.eye(2)[gold], np.eye(2)[np.ones(6, dtype=int)], 2)
    row = result_row(build_metrics(["macro_recall"])[0], "dev", table)
    assert (row["value"], row["low"], row["high"]) == pytest.approx((0.5, *wilson(3, 6, 1.959964)))


def test_a_label_beyond_nine_keeps_its_place() -> None:
    gold = np.arange(12)
    table = columns(np.eye(12)[gold], np.eye(12)[gold], 12)
    assert value("mcc", table) == pytest.approx(1.0)


def test_every_metric_of_the_objective_is_known_and_says_what_is_missing() -> None:
    averages = {f"{average}_{score}" for average in ("macro", "weighted") for score in AVERAGED}
    assert averages <= set(METRICS["single-label"]) & set(METRICS["multi-label"])
    for names in METRICS.values():
        for metric in build_metrics(names):
            assert result_row(metric, "dev", {})["value"] is None
