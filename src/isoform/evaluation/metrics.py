"""Metrics made from additive statistics of examples, so that they stream, shard, pair and bootstrap.

Each example contributes one number a column: nats, tokens, bytes, correct_tokens, correct, examples, pseudo_nats,
pseudo_tokens. A metric is a function of the columns' sums; it knows nothing of models. One that judges generated
answers makes its own columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from isoform.contracts import Floats, Metric
from isoform.registry import lookup, register


@runtime_checkable
class Judge(Metric, Protocol):
    """A metric of generated answers: `judge` gives the columns of one example, from what was said and expected."""

    def judge(self, said: str, gold: str) -> dict[str, float]: ...


@register("metric", "loss")
class Loss:
    """Mean negative log-likelihood: sum nats / sum tokens. Units: nats per target token."""

    name: ClassVar[str] = "loss"
    higher_is_better: ClassVar[bool] = False
    columns: ClassVar[tuple[str, ...]] = ("nats", "tokens")
    mean_column: ClassVar[str | None] = None
    unit: ClassVar[str] = "nats"

    def value(self, sums: Mapping[str, Any]) -> Any:
        return ratio(sums["nats"], sums["tokens"])


@register("metric", "perplexity")
class Perplexity:
    """exp(sum nats / sum tokens): the number of equally likely tokens that would be as hard to guess."""

    name: ClassVar[str] = "perplexity"
    higher_is_better: ClassVar[bool] = False
    columns: ClassVar[tuple[str, ...]] = ("nats", "tokens")
    mean_column: ClassVar[str | None] = None
    unit: ClassVar[str] = "perplexity"

    def value(self, sums: Mapping[str, Any]) -> Any:
        with np.errstate(over="ignore"):
            return np.exp(ratio(sums["nats"], sums["tokens"]))


@register("metric", "bits_per_byte")
class BitsPerByte:
    """sum nats / (ln 2 x sum bytes): comparable between tokenizers, because bytes of text are nobody's choice."""

    name: ClassVar[str] = "bits_per_byte"
    higher_is_better: ClassVar[bool] = False
    columns: ClassVar[tuple[str, ...]] = ("nats", "bytes")
    mean_column: ClassVar[str | None] = None
    unit: ClassVar[str] = "bits"

    def value(self, sums: Mapping[str, Any]) -> Any:
        return ratio(sums["nats"], sums["bytes"]) / math.log(2)


@register("metric", "token_accuracy")
class TokenAccuracy:
    """Share of target tokens that are the model's first choice, given the true tokens before them."""

    name: ClassVar[str] = "token_accuracy"
    higher_is_better: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = ("correct_tokens", "tokens")
    mean_column: ClassVar[str | None] = None
    unit: ClassVar[str] = "fraction"

    def value(self, sums: Mapping[str, Any]) -> Any:
        return ratio(sums["correct_tokens"], sums["tokens"])


@register("metric", "masked_accuracy")
class MaskedAccuracy(TokenAccuracy):
    """Share of hidden tokens that are the model's first choice, given what was left of the text on both sides."""

    name: ClassVar[str] = "masked_accuracy"


@register("metric", "pseudo_perplexity")
class PseudoPerplexity:
    """exp(-sum over tokens of log p(token | all others) / tokens), each token hidden alone in a pass of its own.

    Source: Salazar et al. 2020, section 2.3. It costs as many passes as a text has tokens, so it is measured only where
    `evaluate.metrics` names it.
    """

    name: ClassVar[str] = "pseudo_perplexity"
    higher_is_better: ClassVar[bool] = False
    columns: ClassVar[tuple[str, ...]] = ("pseudo_nats", "pseudo_tokens")
    mean_column: ClassVar[str | None] = None
    unit: ClassVar[str] = "perplexity"

    def value(self, sums: Mapping[str, Any]) -> Any:
        with np.errstate(over="ignore"):
            return np.exp(ratio(sums["pseudo_nats"], sums["pseudo_tokens"]))


@register("metric", "exact_match")
class ExactMatch:
    """Share of examples whose generated answer equals the expected text, character by character."""

    name: ClassVar[str] = "exact_match"
    higher_is_better: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = ("correct", "examples")
    mean_column: ClassVar[str | None] = "correct"
    unit: ClassVar[str] = "fraction"

    def judge(self, said: str, gold: str) -> dict[str, float]:
        return {"correct": float(said == gold), "examples": 1.0}

    def value(self, sums: Mapping[str, Any]) -> Any:
        return ratio(sums["correct"], sums["examples"])


def ratio(total: Any, count: Any) -> Any:
    """total / count, NaN where there is nothing to count; numbers or arrays of equal shape."""
    total, count = np.asarray(total, dtype=np.float64), np.asarray(count, dtype=np.float64)
    result = np.divide(total, count, out=np.full(np.broadcast(total, count).shape, np.nan), where=count > 0)
    return result if result.ndim else float(result)


def build_metrics(names: Iterable[str], where: str = "evaluate.metrics") -> list[Metric]:
    """The metrics called by these names. Raises: ConfigError with the known names."""
    return [lookup("metric", name, where)() for name in names]


def columns_of(metric: Any, available: Iterable[str]) -> tuple[str, ...]:
    """The columns that a metric reads of those that examples have: `hits.*` stands for all that begin with `hits.`.

    What nothing stands for is named as it is.
    """
    there = list(available)
    found: list[str] = []
    for column in metric.columns:
        stem = column.removesuffix("*")
        found += [name for name in there if name.startswith(stem)] if stem != column else [column]
        found += [column] if stem != column and not any(name.startswith(stem) for name in there) else []
    return tuple(found)


class StreamingMetrics:
    """Sums of the statistics of however many examples, in float64; two halves may be added together."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self.metrics = list(metrics)
        self.sums: dict[str, float] = {}
        self.num_examples = 0

    def add(self, stats: Mapping[str, Any]) -> None:
        """Adds examples: each column `(b,)`, or one number for one example."""
        for column, values in stats.items():
            self.sums[column] = self.sums.get(column, 0.0) + float(np.sum(values, dtype=np.float64))
        self.num_examples += int(np.size(next(iter(stats.values())))) if stats else 0

    def merge(self, other: StreamingMetrics) -> None:
        """Adds what another rank has seen."""
        for column, total in other.sums.items():
            self.sums[column] = self.sums.get(column, 0.0) + total
        self.num_examples += other.num_examples

    def values(self) -> dict[str, float | None]:
        """Metric name -> value; None where there is nothing to measure or the result is not a number."""
        return {metric.name: metric_value(metric, self.sums) for metric in self.metrics}


def metric_value(metric: Metric, sums: Mapping[str, float]) -> float | None:
    """The metric of summed columns, or None where it is not a finite number."""
    if any(column not in sums for column in columns_of(metric, sums)):
        return None
    value = float(metric.value(sums))
    return value if math.isfinite(value) else None


def result_row(metric: Metric, split: str, stats: Mapping[str, Floats], confidence: float = 0.95) -> dict[str, Any]:
    """One row of eval.json from the statistics of all examples, each column `(n,)`.

    `n` counts the examples; `low` and `high` bound the value over examples drawn like these, the model being fixed.
    """
    columns = {column: stats[column] for column in columns_of(metric, stats) if column in stats}
    value = metric_value(metric, {column: math.fsum(values) for column, values in columns.items()})
    low, high = (None, None) if value is None else interval(metric, columns, confidence)
    n = len(next(iter(columns.values()))) if columns else 0
    return {"metric": metric.name, "split": split, "value": value, "n": n, "low": low, "high": high}


def interval(metric: Metric, stats: Mapping[str, Floats], confidence: float) -> tuple[float | None, float | None]:
    """Bounds over examples: Wilson for shares of examples, Student's t on the linearised metric otherwise.

    Linearised: value ~ constant + sum over examples of g . x, g `(columns,)` the metric's gradient at the sums and x an
    example's statistics; its variance is n times the variance of g . x. Perplexity is bounded on the scale of its
    logarithm. (None, None) where one example or fewer was seen.

    Source: Wilson 1927; the delta method for ratios, Cochran 1977, section 6.
    """
    from scipy import special

    names = columns_of(metric, stats)
    columns = np.stack([np.asarray(stats[column], dtype=np.float64) for column in names])
    n = columns.shape[1]
    if n < 2 or not np.isfinite(columns).all():
        return None, None
    tail = 0.5 + confidence / 2
    if metric.mean_column is not None and np.isin(stats[metric.mean_column], (0.0, 1.0)).all():
        return wilson(float(np.sum(stats[metric.mean_column])), n, float(special.ndtri(tail)))
    sums = columns.sum(1)
    log_scale = metric.unit == "perplexity"

    def at(point: Floats) -> float:
        value = float(metric.value(dict(zip(names, point, strict=True))))
        return math.log(value) if log_scale else value

    gradient = np.array([_slope(at, sums, index) for index in range(len(sums))])
    error = math.sqrt(n * np.var(gradient @ columns, ddof=1)) * float(special.stdtrit(n - 1, tail))
    low, high = at(sums) - error, at(sums) + error
    if log_scale:
        low, high = math.exp(low), math.exp(min(high, 700.0))
    # Where a label is never said the slope of a correlation is steep beyond sense: then nothing is known.
    lowest, highest = getattr(metric, "limits", (0.0, 1.0) if metric.unit == "fraction" else (-math.inf, math.inf))
    return max(lowest, low), min(highest, high)


def _slope(function: Any, point: Floats, index: int) -> float:
    """The partial derivative by a central difference; 0 where the coordinate is 0 and cannot be scaled."""
    step = np.zeros_like(point)
    step[index] = 1e-6 * abs(point[index])
    if step[index] == 0.0:
        step[index] = 1e-6
    return float((function(point + step) - function(point - step)) / (2 * step[index]))


def wilson(successes: float, n: int, z: float) -> tuple[float, float]:
    """Wilson's bounds of a proportion: (p + z^2/2n -+ z sqrt(p (1-p)/n + z^2/4n^2)) / (1 + z^2/n)."""
    p = successes / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)
