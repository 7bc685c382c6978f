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

    def bounds(self, value: float, error: float) -> tuple[float, float]:
        return around_logarithm(value, error)


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

    def weights(self, sums: Mapping[str, Any]) -> dict[str, float]:
        return {"tokens": 1.0}


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

    def bounds(self, value: float, error: float) -> tuple[float, float]:
        return around_logarithm(value, error)


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
    """Metrics of however many examples, with intervals, from sums that do not grow; two halves may be added together.

    Kept of the examples' columns x `(k,)`: the sums of x and of the products (x - c)(x - c)^T `(k, k)`, in float64; c
    `(k,)`: the first examples' means, without which numbers far from 0 would lose their spread in rounding.
    """

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self.metrics = list(metrics)
        self.names: tuple[str, ...] = ()
        self.num_examples = 0
        self._sums = np.zeros(0)
        self._centre = np.zeros(0)
        self._products = np.zeros((0, 0))
        self._binary = np.zeros(0, dtype=bool)
        # columns that were never anything but 0 and 1

    @property
    def sums(self) -> dict[str, float]:
        return dict(zip(self.names, self._sums.tolist(), strict=True))

    def add(self, stats: Mapping[str, Any]) -> None:
        """Adds examples: each column `(b,)`, or one number for one example.

        The first examples say which columns there are; one that others lack is no number from there on.
        """
        columns = {name: np.atleast_1d(np.asarray(values, dtype=np.float64)) for name, values in stats.items()}
        number = len(next(iter(columns.values()), ()))
        if number == 0:
            return
        if not self.names:
            means = [math.fsum(values) / number for values in columns.values()]
            self._start(tuple(columns), np.array([mean if math.isfinite(mean) else 0.0 for mean in means]))
        absent = np.full(number, np.nan)
        table = np.stack([columns.get(name, absent) for name in self.names])  # (k, b)
        self._sums = np.array([math.fsum(values) for values in np.column_stack([self._sums, table])])
        with np.errstate(invalid="ignore"):
            spread = table - self._centre[:, None]
            self._products = self._products + spread @ spread.T
        self._binary = self._binary & np.isin(table, (0.0, 1.0)).all(axis=1)
        self.num_examples += number

    def merge(self, other: StreamingMetrics) -> None:
        """Adds what another rank has seen, of the same columns."""
        if not self.names:
            self._start(other.names, other._centre)
        places = [other.names.index(name) for name in self.names] if other.names else []
        if places:
            self._sums = self._sums + other._sums[places]
            self._products = self._products + other._about(self._centre, places)
            self._binary = self._binary & other._binary[places]
        self.num_examples += other.num_examples

    def _about(self, centre: Floats, places: list[int]) -> Floats:
        """The sums of products of some columns about another centre `(k,)`."""
        shift = self._centre[places] - centre
        about = np.outer(self._sums[places] - self.num_examples * self._centre[places], shift)
        moved: Floats = self._products[np.ix_(places, places)] + about + about.T
        return moved + self.num_examples * np.outer(shift, shift)

    def _start(self, names: tuple[str, ...], centre: Floats) -> None:
        self.names, self._centre = names, centre
        self._sums, self._products = np.zeros(len(names)), np.zeros((len(names), len(names)))
        self._binary = np.ones(len(names), dtype=bool)

    def values(self) -> dict[str, float | None]:
        """Metric name -> value; None where there is nothing to measure or the result is not a number."""
        return {metric.name: metric_value(metric, self.sums) for metric in self.metrics}

    def rows(self, split: str, confidence: float = 0.95) -> list[dict[str, Any]]:
        """A row of eval.json for each metric.

        `n` counts the examples; `low` and `high` bound the value over examples drawn like these, the model being fixed.
        """
        rows = []
        for metric in self.metrics:
            value = metric_value(metric, self.sums)
            low, high = (None, None) if value is None else self.interval(metric, confidence)
            n = self.num_examples if set(columns_of(metric, self.names)) & set(self.names) else 0
            rows.append({"metric": metric.name, "split": split, "value": value, "n": n, "low": low, "high": high})
        return rows

    def interval(self, metric: Metric, confidence: float) -> tuple[float | None, float | None]:
        """Bounds over examples: Wilson for shares of examples, Student's t on the linearised metric otherwise.

        Linearised: value ~ constant + sum over examples of g . x, g `(k,)` the metric's gradient at the sums; its
        variance is n times the variance of g . x. Perplexity is bounded on the scale of its logarithm, a correlation on
        that of its inverse hyperbolic tangent. Where nothing varies in what was seen, as at the end of a metric's
        range, that is no proof that nothing would: there Wilson's bounds stand (`_unvarying`). (None, None) where one
        example or fewer was seen, or the examples do not say how much the metric varies.

        Source: Wilson 1927; the delta method for ratios, Cochran 1977, section 6; Fisher 1921 for correlations.
        """
        from scipy import special

        names, n = columns_of(metric, self.names), self.num_examples
        places = [self.names.index(name) for name in names]
        sums = self._sums[places]
        if n < 2 or not np.isfinite(sums).all():
            return None, None
        tail = 0.5 + confidence / 2
        if metric.mean_column is not None and self._binary[self.names.index(metric.mean_column)]:
            return wilson(self.sums[metric.mean_column], n, float(special.ndtri(tail)))
        lowest, highest = getattr(metric, "limits", (0.0, 1.0) if metric.unit == "fraction" else (-math.inf, math.inf))
        value = float(metric.value(dict(zip(names, sums, strict=True))))
        if hasattr(metric, "at_share") and min(abs(value - lowest), abs(value - highest)) < 1e-12:
            return self._unvarying(metric, value, places, float(special.ndtri(tail)))
        slopes = getattr(metric, "slopes", None)
        gradient = _slopes(metric, names, sums) if slopes is None else _vector(slopes(self.sums), names)
        centre = self._centre[places]
        total = float(gradient @ (sums - n * centre))
        variance = float(gradient @ self._products[np.ix_(places, places)] @ gradient) - total**2 / n
        error = math.sqrt(n * max(variance, 0.0) / (n - 1)) * float(special.stdtrit(n - 1, tail))
        if not (math.isfinite(variance) and math.isfinite(error)):
            return None, None
        if error < 1e-6 and metric.unit == "fraction":  # no more than what numeric slopes are off
            return self._unvarying(metric, value, places, float(special.ndtri(tail)))
        low, high = getattr(metric, "bounds", _around)(value, error)
        # Where a label is never said the slope of a correlation is steep beyond sense: then nothing is known.
        return max(lowest, low), min(highest, high)

    def _unvarying(self, metric: Metric, value: float, places: list[int], z: float) -> tuple[float, float]:
        """Wilson's bounds of a share of m examples: of m right ones m / (m + z^2) to 1.

        m: the examples, or where some weigh more than others (`weights`: a long sentence, a rare label) so many equal
        ones as would vary as much, (sum w)^2 / sum w^2. Of a correlation, what `at_share` makes of that share.
        """
        names, n, sums = [self.names[place] for place in places], self.num_examples, self._sums[places]
        weights = np.zeros(len(names))
        if (given := getattr(metric, "weights", None)) is not None:
            weights = _vector(given(dict(zip(names, sums, strict=True))), names)
        total, middle = float(weights @ sums), float(weights @ self._centre[places])
        about = float(weights @ self._products[np.ix_(places, places)] @ weights)
        squares = about + 2 * middle * (total - n * middle) + n * middle**2
        effective = total**2 / squares if squares > 0 else float(n)
        if metric.unit == "fraction":
            low, high = wilson(value * effective, effective, z)
            return min(low, value), max(high, value)
        correlation: Any = metric
        reached = correlation.at_share(dict(zip(names, sums, strict=True)), wilson(effective, effective, z)[0])
        return (reached, value) if value > 0 else (value, -reached)


def metric_value(metric: Metric, sums: Mapping[str, float]) -> float | None:
    """The metric of summed columns, or None where it is not a finite number."""
    if any(column not in sums for column in columns_of(metric, sums)):
        return None
    value = float(metric.value(sums))
    return value if math.isfinite(value) else None


def _slopes(metric: Metric, names: tuple[str, ...], point: Floats) -> Floats:
    """The metric's partial derivatives by central differences; 0 where a coordinate is 0 and cannot be scaled."""

    def at(place: Floats) -> float:
        return float(metric.value(dict(zip(names, place, strict=True))))

    slopes = np.zeros_like(point)
    for index, coordinate in enumerate(point):
        step = np.zeros_like(point)
        step[index] = 1e-6 * abs(coordinate) or 1e-6
        slopes[index] = (at(point + step) - at(point - step)) / (2 * step[index])
    return slopes


def _vector(by_column: Mapping[str, float], names: Iterable[str]) -> Floats:
    return np.array([by_column.get(name, 0.0) for name in names], dtype=np.float64)


def _around(value: float, error: float) -> tuple[float, float]:
    return value - error, value + error


def around_logarithm(value: float, error: float) -> tuple[float, float]:
    """Bounds on the scale of the logarithm: value / e^(error / value) and value x e^(error / value)."""
    middle, half = math.log(value), error / value
    return math.exp(middle - half), math.exp(min(middle + half, 700.0))


def wilson(successes: float, n: float, z: float) -> tuple[float, float]:
    """Wilson's bounds of a proportion: (p + z^2/2n -+ z sqrt(p (1-p)/n + z^2/4n^2)) / (1 + z^2/n)."""
    p = successes / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)
