from __future__ import annotations

import math
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from sklearn.metrics import accuracy_score
from statsmodels.stats.proportion import proportion_confint

from isoform.errors import ConfigError
from isoform.evaluation.metrics import StreamingMetrics, build_metrics, metric_value, wilson

NAMES = ["loss", "perplexity", "bits_per_byte", "token_accuracy", "exact_match"]


def examples(n: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 30, size=n).astype(float)
    return {
        "nats": tokens * rng.gamma(2.0, 1.0, size=n),
        "tokens": tokens,
        "bytes": tokens * 3 + rng.integers(0, 5, size=n),
        "correct_tokens": rng.binomial(tokens.astype(int), 0.6).astype(float),
        "correct": rng.integers(0, 2, size=n).astype(float),
        "examples": np.ones(n),
    }


def result_row(metric, split, stats):
    stream = StreamingMetrics([metric])
    stream.add(stats)
    return stream.rows(split)[0]


def interval(metric, stats, confidence):
    stream = StreamingMetrics([metric])
    stream.add(stats)
    return stream.interval(metric, confidence)


def test_values_are_the_formulas() -> None:
    x = examples(50)
    stream = StreamingMetrics(build_metrics(NAMES))
    stream.add(x)
    values = stream.values()
    loss = x["nats"].sum() / x["tokens"].sum()
    assert values["loss"] == pytest.approx(loss, rel=1e-12)
    assert values["perplexity"] == pytest.approx(math.exp(loss), rel=1e-12)
    assert values["bits_per_byte"] == pytest.approx(x["nats"].sum() / math.log(2) / x["bytes"].sum(), rel=1e-12)
    assert values["exact_match"] == pytest.approx(accuracy_score(np.ones(50), x["correct"]))
    assert values["token_accuracy"] == pytest.approx(np.average(x["correct_tokens"] / x["tokens"], weights=x["tokens"]))


def test_a_uniform_model_has_the_vocabulary_as_perplexity() -> None:
    stream = StreamingMetrics(build_metrics(["perplexity"]))
    stream.add({"nats": np.array([3, 5]) * math.log(71), "tokens": np.array([3, 5])})
    assert stream.values()["perplexity"] == pytest.approx(71)


@given(cuts=st.lists(st.integers(0, 40), max_size=5))
@settings(max_examples=30, deadline=None)
def test_streaming_in_any_pieces_and_merging_is_the_same(cuts) -> None:
    x, metrics = examples(40), build_metrics(NAMES)
    whole, left, right = StreamingMetrics(metrics), StreamingMetrics(metrics), StreamingMetrics(metrics)
    whole.add(x)
    edges = [0, *sorted(cuts), 40]
    for number, (first, end) in enumerate(pairwise(edges)):
        (left if number % 2 else right).add({name: column[first:end] for name, column in x.items()})
    left.merge(right)
    assert left.num_examples == whole.num_examples == 40
    for name, value in whole.values().items():
        assert left.values()[name] == pytest.approx(value, rel=1e-12)
    for row, expected in zip(left.rows("dev"), whole.rows("dev"), strict=True):
        assert [row["low"], row["high"], row["n"]] == pytest.approx([expected["low"], expected["high"], 40], rel=1e-9)


def test_value_works_on_bootstrap_replicates() -> None:
    x = examples(30)
    draws = np.random.default_rng(1).integers(30, size=(7, 30))
    for metric in build_metrics(NAMES):
        sums = {name: x[name][draws].sum(1) for name in metric.columns}
        values = metric.value(sums)
        assert values.shape == (7,)
        for row in range(7):
            assert values[row] == pytest.approx(metric.value({name: column[row] for name, column in sums.items()}))


def test_nothing_to_measure_is_null() -> None:
    for metric in build_metrics(NAMES):
        assert metric_value(metric, {}) is None
        assert metric_value(metric, dict.fromkeys(metric.columns, 0.0)) is None
        assert result_row(metric, "dev", {}) == {
            "metric": metric.name,
            "split": "dev",
            "value": None,
            "n": 0,
            "low": None,
            "high": None,
        }
    (loss,) = build_metrics(["loss"])
    row = result_row(loss, "dev", {"nats": np.array([1.0, math.nan]), "tokens": np.ones(2)})
    assert (row["value"], row["low"], row["n"]) == (None, None, 2)
    row = result_row(loss, "dev", {"nats": np.array([2.0]), "tokens": np.array([4.0])})
    assert (row["value"], row["low"], row["high"]) == (0.5, None, None)


@given(n=st.integers(2, 400), share=st.floats(0, 1), confidence=st.sampled_from([0.8, 0.95, 0.99]))
@settings(max_examples=40, deadline=None)
def test_shares_have_wilson_bounds(n, share, confidence) -> None:
    right = np.zeros(n)
    right[: round(share * n)] = 1
    (metric,) = build_metrics(["exact_match"])
    low, high = interval(metric, {"correct": right, "examples": np.ones(n)}, confidence)
    expected = proportion_confint(right.sum(), n, alpha=1 - confidence, method="wilson")
    assert (low, high) == pytest.approx(expected, abs=1e-9)
    assert wilson(0, 10, 1.96)[0] == 0.0 and wilson(10, 10, 1.96)[1] == 1.0


def test_equal_counts_give_the_t_interval_of_the_mean() -> None:
    x = np.random.default_rng(2).normal(3, 1, size=25)
    (loss,) = build_metrics(["loss"])
    low, high = interval(loss, {"nats": x * 4, "tokens": np.full(25, 4.0)}, 0.95)
    expected = scipy_stats.t.interval(0.95, 24, loc=x.mean(), scale=x.std(ddof=1) / 5)
    assert (low, high) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["loss", "perplexity", "bits_per_byte", "token_accuracy"])
def test_ratio_intervals_cover_what_they_promise(name) -> None:
    """1,000 samples of 200 examples from a large population; 95 % intervals cover its value 92 to 98 % of the time."""
    population = examples(200_000, seed=9)
    (metric,) = build_metrics([name])
    truth = metric.value({column: population[column].sum() for column in metric.columns})
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(1000):
        chosen = rng.integers(200_000, size=200)
        low, high = interval(metric, {column: population[column][chosen] for column in metric.columns}, 0.95)
        covered += low <= truth <= high
    assert 920 <= covered <= 980


def test_unknown_metrics_are_named() -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.metrics: 'exactmatch'.*did you mean 'exact_match'"):
        build_metrics(["exactmatch"])


def test_metrics_are_looked_up_without_torch() -> None:
    code = "from isoform.registry import names; print(names('metric')); import sys; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "exact_match" in done.stdout
