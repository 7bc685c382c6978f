"""Metrics of classifiers from additive counts: those of the confusion matrix that a metric needs, label by label.

Of each label K an example has the columns `gold.K`, `predicted.K` and `hits.K` (both), each 0 or 1; their sums over
examples are support t_K, number of times said p_K, and number of times rightly said h_K.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from isoform.evaluation.metrics import ratio
from isoform.registry import register

LABEL_COLUMNS = ("gold.*", "predicted.*", "hits.*")
# Bins of confidence; the objective `classify` makes their columns.
BINS = 15


@register("metric", "accuracy")
class Accuracy:
    """Share of examples whose label is right; of several labels, whose labels are all right."""

    name: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = ("correct", "examples")
    mean_column: ClassVar[str | None] = "correct"
    unit: ClassVar[str] = "fraction"

    def value(self, sums: Mapping[str, Any]) -> Any:
        return ratio(sums["correct"], sums["examples"])


class ByLabel:
    """A score of each label, averaged over those that are there: evenly, or by how often they are.

        macro = mean over K of score_K        weighted = sum over K of t_K score_K / sum of t_K

    Labels that are neither meant nor said are left out; a score without a denominator is 0.
    Source: scikit-learn 1.5, `precision_recall_fscore_support`. Differs: nothing.
    """

    higher_is_better: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = LABEL_COLUMNS
    mean_column: ClassVar[str | None] = None
    unit: ClassVar[str] = "fraction"
    score: ClassVar[str]
    weighted: ClassVar[bool] = False

    def value(self, sums: Mapping[str, Any]) -> Any:
        gold, predicted, hits = label_sums(sums)
        denominator = {"precision": predicted, "recall": gold, "f1": (gold + predicted) / 2}[self.score]
        scores = np.divide(hits, denominator, out=np.zeros_like(hits), where=denominator > 0)
        weights = gold if self.weighted else ((gold + predicted) > 0).astype(np.float64)
        return ratio((scores * weights).sum(axis=0), weights.sum(axis=0))

    def weights(self, sums: Mapping[str, Any]) -> dict[str, float]:
        """Of an example with the label K: 1, or 1 / t_K where labels count evenly, however rare they are."""
        there = {name: float(total) for name, total in sums.items() if name.startswith("gold.") and total > 0}
        return {name: 1.0 if self.weighted else 1 / total for name, total in there.items()}


@register("metric", "macro_precision")
class MacroPrecision(ByLabel):
    """Mean over labels of h_K / p_K: how many of those said are right."""

    name: ClassVar[str] = "macro_precision"
    score: ClassVar[str] = "precision"


@register("metric", "macro_recall")
class MacroRecall(ByLabel):
    """Mean over labels of h_K / t_K: how many of those that there are were found."""

    name: ClassVar[str] = "macro_recall"
    score: ClassVar[str] = "recall"


@register("metric", "macro_f1")
class MacroF1(ByLabel):
    """Mean over labels of 2 h_K / (p_K + t_K)."""

    name: ClassVar[str] = "macro_f1"
    score: ClassVar[str] = "f1"


@register("metric", "weighted_precision")
class WeightedPrecision(ByLabel):
    """Mean over labels of h_K / p_K, weighted by t_K."""

    name: ClassVar[str] = "weighted_precision"
    score: ClassVar[str] = "precision"
    weighted: ClassVar[bool] = True


@register("metric", "weighted_recall")
class WeightedRecall(ByLabel):
    """Mean over labels of h_K / t_K, weighted by t_K: of one label a text, the accuracy."""

    name: ClassVar[str] = "weighted_recall"
    score: ClassVar[str] = "recall"
    weighted: ClassVar[bool] = True


@register("metric", "weighted_f1")
class WeightedF1(ByLabel):
    """Mean over labels of 2 h_K / (p_K + t_K), weighted by t_K."""

    name: ClassVar[str] = "weighted_f1"
    score: ClassVar[str] = "f1"
    weighted: ClassVar[bool] = True


@register("metric", "mcc")
class Mcc:
    """Correlation of what was said with what is so, from -1 to 1; 0 is chance, whatever the shares of the labels.

        mcc = (n sum h - sum p t) / sqrt((n^2 - sum p^2) (n^2 - sum t^2)),   0 where all are said, or are, the same

    Source: Gorodkin 2004; scikit-learn `matthews_corrcoef`. Differs: nothing.
    """

    name: ClassVar[str] = "mcc"
    higher_is_better: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = LABEL_COLUMNS
    mean_column: ClassVar[str | None] = None
    unit: ClassVar[str] = "number"
    limits: ClassVar[tuple[float, float]] = (-1.0, 1.0)
    # of `objective.task`; where a text may have several labels the formula means nothing
    task: ClassVar[str] = "single-label"

    def value(self, sums: Mapping[str, Any]) -> Any:
        gold, predicted, hits = label_sums(sums)
        n = gold.sum(axis=0)
        covariance = n * hits.sum(axis=0) - (predicted * gold).sum(axis=0)
        spread = (n**2 - (predicted**2).sum(axis=0)) * (n**2 - (gold**2).sum(axis=0))
        spread = np.sqrt(np.maximum(spread, 0))
        result = np.divide(covariance, spread, out=np.zeros_like(spread), where=spread > 0)
        return np.where(n > 0, result, np.nan) if np.ndim(result) else float(result if n > 0 else np.nan)

    def at_share(self, sums: Mapping[str, Any], share: float) -> float:
        """Where such a share of the labels is right, beyond what would be by chance: (share - s) / (1 - s)."""
        gold, _, _ = label_sums(sums)
        chance = float((gold**2).sum() / gold.sum() ** 2)
        return (share - chance) / (1 - chance)


@register("metric", "calibration_error")
class CalibrationError:
    """By how much confidence and accuracy differ: sum over bins of |sum of confidence - sum of right answers| / n.

    15 bins of equal width; confidence is the probability of the label that was said.
    Source: Guo et al. 2017, section 2, equation 3 (ECE). Differs: nothing.
    """

    name: ClassVar[str] = "calibration_error"
    higher_is_better: ClassVar[bool] = False
    columns: ClassVar[tuple[str, ...]] = (*(f"gap.{at}" for at in range(BINS)), "examples")
    mean_column: ClassVar[str | None] = None
    unit: ClassVar[str] = "number"
    limits: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def value(self, sums: Mapping[str, Any]) -> Any:
        return ratio(sum(np.abs(sums[f"gap.{at}"]) for at in range(BINS)), sums["examples"])


@register("metric", "mse")
class SquaredError:
    """Mean of (said - expected)^2."""

    name: ClassVar[str] = "mse"
    higher_is_better: ClassVar[bool] = False
    columns: ClassVar[tuple[str, ...]] = ("squared_error", "examples")
    mean_column: ClassVar[str | None] = "squared_error"
    unit: ClassVar[str] = "number"
    limits: ClassVar[tuple[float, float]] = (0.0, math.inf)

    def value(self, sums: Mapping[str, Any]) -> Any:
        return ratio(sums["squared_error"], sums["examples"])


@register("metric", "mae")
class AbsoluteError:
    """Mean of |said - expected|."""

    name: ClassVar[str] = "mae"
    higher_is_better: ClassVar[bool] = False
    columns: ClassVar[tuple[str, ...]] = ("absolute_error", "examples")
    mean_column: ClassVar[str | None] = "absolute_error"
    unit: ClassVar[str] = "number"
    limits: ClassVar[tuple[float, float]] = (0.0, math.inf)

    def value(self, sums: Mapping[str, Any]) -> Any:
        return ratio(sums["absolute_error"], sums["examples"])


@register("metric", "pearson")
class Pearson:
    """Pearson's correlation of the numbers said with those expected; no number where one of the two never varies."""

    name: ClassVar[str] = "pearson"
    higher_is_better: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = (
        "said",
        "expected",
        "said_squared",
        "expected_squared",
        "product",
        "examples",
    )
    mean_column: ClassVar[str | None] = None
    unit: ClassVar[str] = "number"
    limits: ClassVar[tuple[float, float]] = (-1.0, 1.0)

    def value(self, sums: Mapping[str, Any]) -> Any:
        n, x, y = (np.asarray(sums[name], dtype=np.float64) for name in ("examples", "said", "expected"))
        spreads = _spread(n, x, sums["said_squared"]) * _spread(n, y, sums["expected_squared"])
        return np.clip(ratio(n * sums["product"] - x * y, np.sqrt(spreads)), -1.0, 1.0)

    def slopes(self, sums: Mapping[str, Any]) -> dict[str, float]:
        """The partial derivatives: a numeric step of a sum of squares would leave the formula's domain.

        r = c / sqrt(u v), c = n sum xy - sum x sum y, u = n sum x^2 - (sum x)^2, v likewise:
        dr = dc / sqrt(u v) - r/2 (du / u + dv / v).
        """
        n, x, y = (float(sums[name]) for name in ("examples", "said", "expected"))
        squares, others, product = (float(sums[name]) for name in ("said_squared", "expected_squared", "product"))
        u, v = float(_spread(n, x, squares)), float(_spread(n, y, others))
        scale, r = math.sqrt(u * v), float(self.value(sums))
        return {
            "said": r * x / u - y / scale,
            "expected": r * y / v - x / scale,
            "said_squared": -r * n / (2 * u),
            "expected_squared": -r * n / (2 * v),
            "product": n / scale,
            "examples": product / scale - r / 2 * (squares / u + others / v),
        }

    def bounds(self, value: float, error: float) -> tuple[float, float]:
        """tanh(atanh(r) -+ error / (1 - r^2)): a correlation's error is even on this scale only (Fisher 1921)."""
        middle, half = math.atanh(value), error / (1 - value**2)
        return math.tanh(middle - half), math.tanh(middle + half)

    def at_share(self, sums: Mapping[str, Any], share: float) -> float:
        """Where such a share of the numbers is right and the others have nothing to do with what was expected.

        A line goes through any two points: of two examples nothing is known.
        """
        return share if sums["examples"] > 2 else -1.0


def _spread(n: Any, total: Any, squares: Any) -> Any:
    """n sum x^2 - (sum x)^2, 0 where it is no more than the rounding of the two."""
    most = n * np.asarray(squares, dtype=np.float64)
    spread = most - np.asarray(total, dtype=np.float64) ** 2
    return np.where(spread > 16 * np.finfo(np.float64).eps * most, spread, 0.0)


def label_sums(sums: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """t, p and h, each `(c, ...)`, in the order of the labels."""
    numbers = sorted(int(name.removeprefix("gold.")) for name in sums if name.startswith("gold."))

    def stacked(column: str) -> Any:
        return np.stack([np.asarray(sums[f"{column}.{at}"], dtype=np.float64) for at in numbers])

    return stacked("gold"), stacked("predicted"), stacked("hits")
