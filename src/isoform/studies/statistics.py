"""What may be said of two arms: the difference of a metric, its interval, its p, and the verdict.

Scores of both arms are paired by seed and by example. Each metric is spread over the examples by the jackknife (a
mean over examples falls apart into its own scores), so that one analysis of variance over crossed seeds x examples
serves accuracy, loss per token, perplexity and F1 alike; `crossed` holds it, `docs/calibration.md` what was measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy import stats

from isoform.errors import DataError
from isoform.evaluation.metrics import columns_of
from isoform.studies.crossed import SMALLEST_P, half_width, mean_squares, p_value, seeds_needed, smallest_difference
from isoform.studies.scores import Scores, same_examples

if TYPE_CHECKING:
    from isoform.contracts import Floats, Metric

Verdict = Literal["better", "worse", "equivalent", "cannot-tell"]

# What rounding leaves of a variance that is zero, as a fraction of the scores' own size.
ROUNDING = 1e-9


# -------------------------------------------------------------------------------------------------- a metric's spread


def pseudo_values(scores: Scores, metric: Any) -> tuple[Floats, Floats]:
    """Each seed's value of the metric, and each example's share in it: what the value would lose without it.

        pseudo[i] = N value - (N - 1) value without i, moved so that their mean is the value

    For a mean over examples these are the examples' own scores, where each example is one row of predictions.
    Shapes: values `(S,)`, pseudo-values `(S, N)`.
    Source: the jackknife, Tukey 1958; Efron and Tibshirani 1993, section 11.
    Raises: DataError where the metric is undefined, also without one of the examples.
    """
    metric = _instance(metric)
    num_examples = len(scores.ids)
    if num_examples < 2:
        raise DataError(f"{metric.name}: {num_examples} example given; expected at least 2")
    names = columns_of(metric, scores.columns)
    for name in names:
        if not np.isfinite(scores.columns[name]).all():
            raise DataError(f"{metric.name}: column {name} holds a value that is not a finite number; expected numbers")
    if metric.mean_column is not None and not scores.pooled:
        column = scores.columns[metric.mean_column]
        return column.mean(axis=1), column
    sums = {name: scores.columns[name].sum(axis=1, keepdims=True) for name in names}
    values = np.asarray(metric.value(sums), dtype=np.float64)
    without = np.asarray(metric.value({name: sums[name] - scores.columns[name] for name in names}))
    if not (np.isfinite(values).all() and np.isfinite(without).all()):
        raise DataError(
            f"{metric.name}: undefined on these {num_examples} examples, or without one of them; expected more"
        )
    shares = (num_examples - 1) * (values - without)
    return values[:, 0], values + shares - shares.mean(axis=1, keepdims=True)


def _instance(metric: Any) -> Metric:
    built: Metric = metric() if isinstance(metric, type) else metric
    return built


# -------------------------------------------------------------------------------------------------------- comparisons


@dataclass(frozen=True)
class Comparison:
    """Second minus first, with what may be said about it.

    low, high: the interval at `confidence`, None where the study is too small to give one. p: that no difference at
    all would look like this; p_adjusted: after Holm over the questions of a study (`decide`). p_equivalent: two
    one-sided tests against `margin`. smallest_difference: what the study would have seen with 80 % power;
    seeds_needed: for the difference that was seen, None where no number of seeds would do or one seed says nothing
    of it. variance: of one paired difference, by seed, example and residual. speaks_of: "methods", or "models" where
    an arm has one seed. first, second: the arms' values, means over seeds. notes: what to hold against the interval.
    """

    metric: str
    higher_is_better: bool
    first: float
    second: float
    difference: float
    low: float | None
    high: float | None
    p: float
    verdict: Verdict
    confidence: float
    margin: float | None
    p_equivalent: float | None
    smallest_difference: float | None
    seeds_needed: int | None
    num_seeds: int
    num_examples: int
    method: str
    speaks_of: Literal["methods", "models"]
    variance: Mapping[str, float | None]
    p_adjusted: float | None = None
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**dataclasses.asdict(self), "notes": list(self.notes)}


def compare(
    first: Scores, second: Scores, metric: Any, *, confidence: float = 0.95, margin: float | None = None
) -> Comparison:
    """Second minus first, paired by seed and example.

    Several seeds: crossed seeds x examples (`crossed.half_width`). One seed: exact McNemar for 0/1 scores, the paired
    t over examples for others. An arm with one seed stands for itself beside every seed of the other.
    Equivalent: the interval at 1 - 2 (1 - confidence) lies within -margin .. margin.

    Source: McNemar 1947; Schuirmann 1987 (two one-sided tests).
    Raises: DataError where examples or seeds do not match, with their numbers, or the metric is undefined.
    """
    metric = _instance(metric)
    first_values, first_shares = pseudo_values(first, metric)
    second_values, second_shares = pseudo_values(_aligned(second, first), metric)
    differences = second_shares - first_shares
    num_seeds, num_examples = differences.shape
    result = Comparison(
        metric=metric.name,
        higher_is_better=metric.higher_is_better,
        first=float(first_values.mean()),
        second=float(second_values.mean()),
        difference=float(second_values.mean() - first_values.mean()),
        low=None,
        high=None,
        p=1.0,
        verdict="cannot-tell",
        confidence=confidence,
        margin=margin,
        p_equivalent=None,
        smallest_difference=None,
        seeds_needed=None,
        num_seeds=num_seeds,
        num_examples=num_examples,
        method="",
        speaks_of="models" if 1 in (len(first.seeds), len(second.seeds)) else "methods",
        variance={"seed": None, "example": 0.0, "residual": None},
        notes=tuple(dict.fromkeys(note for scores in (first, second) for note in scores.notes)),
    )
    scale = max(np.abs(first_shares).max(), np.abs(second_shares).max())
    if np.ptp(differences) <= ROUNDING * scale:
        found = _without_variance(result, scale)
    elif num_seeds == 1 and _zero_one(first_shares) and _zero_one(second_shares):
        found = _mcnemar(result, differences[0])
    else:
        found = _crossed(result, differences)
    return dataclasses.replace(found, verdict=_verdict(found, found.p, found.p_equivalent, 1 - confidence))


def _aligned(second: Scores, first: Scores) -> Scores:
    """The second arm's columns in the order of the first's seeds and examples."""
    same_examples(first.ids, second.ids, "the first arm", "the second arm")
    seeds = second.seeds
    if len(first.seeds) > 1 and len(second.seeds) > 1:
        if set(first.seeds) != set(second.seeds):
            raise DataError(f"seeds {first.seeds} and {second.seeds} given; expected the same seeds in both arms")
        seeds = first.seeds
    rows = [second.seeds.index(seed) for seed in seeds]
    place = {id: index for index, id in enumerate(second.ids)}
    order = [place[id] for id in first.ids]
    return Scores({name: column[rows][:, order] for name, column in second.columns.items()}, first.ids, seeds)


def _crossed(result: Comparison, differences: Floats) -> Comparison:
    squares = mean_squares(differences)
    half = float(half_width(squares, result.confidence))
    distance = abs(result.difference)
    seed, example, residual = (float(part) for part in squares.components)
    single = result.num_seeds == 1
    return dataclasses.replace(
        result,
        low=result.difference - half,
        high=result.difference + half,
        p=p_value(distance, squares),
        p_equivalent=None if result.margin is None else _one_sided(result.margin - distance, squares),
        smallest_difference=smallest_difference(squares, result.confidence),
        seeds_needed=seeds_needed(distance, squares, result.confidence),
        method="paired t over examples" if single else "crossed seeds x examples",
        variance={"seed": None if single else seed, "example": example, "residual": None if single else residual},
    )


def _one_sided(room: float, squares: Any) -> float:
    """p of the difference being at the margin or beyond, `room` away."""
    return p_value(room, squares) / 2 if room > 0 else 1 - p_value(-room, squares) / 2


def _mcnemar(result: Comparison, differences: Floats) -> Comparison:
    """One seed, right or wrong: only the examples on which the arms disagree say anything.

    Under no difference the gains are Binomial(gains + losses, 1/2). The interval is the wider, on each side, of the
    exact one for the share of gains among the disagreements and the paired t, so that it agrees with p and also
    allows for chance in how many disagree.
    """
    gains, losses = int((differences > 0).sum()), int((differences < 0).sum())
    low, high = _mcnemar_interval(gains, losses, result.num_examples, 1 - result.confidence)
    found = _crossed(result, differences[None])
    assert found.low is not None and found.high is not None
    p_equivalent = None
    if result.margin is not None:
        alpha = 1 - result.confidence
        exact = _mcnemar_interval(gains, losses, result.num_examples, 2 * alpha)
        inside = max(abs(bound) for bound in exact) < result.margin
        # The exact interval only vetoes: how far inside the margin the difference lies, the t over examples says.
        p_equivalent = max(found.p_equivalent or 0.0, 0.0 if inside else np.nextafter(alpha, 1))
    return dataclasses.replace(
        found,
        low=min(low, found.low),
        high=max(high, found.high),
        p=float(stats.binomtest(gains, gains + losses, 0.5).pvalue),
        p_equivalent=p_equivalent,
        method="exact McNemar",
    )


def _mcnemar_interval(gains: int, losses: int, num_examples: int, alpha: float) -> tuple[float, float]:
    """Clopper and Pearson's interval of the share of gains, as a difference of the two arms' rates."""
    disagreements = gains + losses
    share = stats.binomtest(gains, disagreements).proportion_ci(1 - alpha, method="exact")
    return (2 * share.low - 1) * disagreements / num_examples, (2 * share.high - 1) * disagreements / num_examples


def _zero_one(values: Floats) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())


def _without_variance(result: Comparison, scale: float) -> Comparison:
    """Every pair differs by the same amount, or by nothing: a sign test over examples is all that can be done."""
    difference = 0.0 if abs(result.difference) <= ROUNDING * scale else result.difference
    p = 1.0 if difference == 0 else max(0.5 ** (result.num_examples - 1), SMALLEST_P)
    known = difference == 0 or p <= 1 - result.confidence
    inside = result.margin is not None and known and abs(difference) < result.margin
    return dataclasses.replace(
        result,
        difference=difference,
        low=difference if known else None,
        high=difference if known else None,
        p=p,
        p_equivalent=None if result.margin is None else (0.0 if inside else 1.0),
        method="identical outcomes" if difference == 0 else "sign test over examples",
    )


def _verdict(result: Comparison, p: float, p_equivalent: float | None, alpha: float) -> Verdict:
    """Within a margin that does not matter comes first: a difference may be sure and still not matter."""
    if p_equivalent is not None and p_equivalent <= alpha:
        return "equivalent"
    if p > alpha or result.difference == 0:
        return "cannot-tell"
    return "better" if (result.difference > 0) == result.higher_is_better else "worse"


# --------------------------------------------------------------------------------------------------- several questions


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: the chance of one false verdict or more in the family stays below alpha.

        adjusted[(j)] = max over k <= j of min(1, (m - k + 1) p[(k)])        p[(1)] <= ... <= p[(m)]

    Source: Holm 1979.
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def decide(
    comparisons: Sequence[Comparison], confidence: float = 0.95, *, unasked: int = 0, unasked_margins: int = 0
) -> list[Comparison]:
    """The same comparisons with `p_adjusted` over all of them, and the verdicts that follow from it.

    Equivalence is adjusted in the same way, over the questions that have a margin.
    unasked, unasked_margins: further questions of the study, and those of them with a margin, which are still to be
        answered: they count as if nothing were found, so that an answer of today stands when they are.
    """
    adjusted = holm([*(comparison.p for comparison in comparisons), *[1.0] * unasked])
    asked = [index for index, comparison in enumerate(comparisons) if comparison.p_equivalent is not None]
    padded = holm([*(comparisons[index].p_equivalent or 0.0 for index in asked), *[1.0] * unasked_margins])
    equivalent = dict(zip(asked, padded, strict=False))
    decided = []
    for index, comparison in enumerate(comparisons):
        verdict = _verdict(comparison, adjusted[index], equivalent.get(index), 1 - confidence)
        decided.append(dataclasses.replace(comparison, p_adjusted=adjusted[index], verdict=verdict))
    return decided


def selection_artefact(verdicts_by_selection: Mapping[str, Comparison]) -> str | None:
    """What to say where the verdict hangs on which checkpoint was kept (last, best-loss, best-metric), else None."""
    verdicts = {name: comparison.verdict for name, comparison in verdicts_by_selection.items()}
    if len(set(verdicts.values())) < 2:
        return None
    told = ", ".join(f"{name}: {verdict}" for name, verdict in verdicts.items())
    return f"the verdict depends on how the checkpoint was selected ({told})"


# ------------------------------------------------------------------------------------------------------ an arm's own


def interval_over_seeds(
    scores: Scores, metric: Any, *, confidence: float = 0.95
) -> tuple[float, float | None, float | None, float | None]:
    """An arm's mean over seeds, its interval over other seeds and other examples, and the seeds' standard deviation.

    Where all 0/1 scores are equal, Wilson's interval over the examples. Bounds of fractions stay within 0 .. 1.
    """
    metric = _instance(metric)
    values, shares = pseudo_values(scores, metric)
    mean, deviation = float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else None
    if np.ptp(shares) > ROUNDING * np.abs(shares).max():
        half = float(half_width(mean_squares(shares), confidence))
        low, high = mean - half, mean + half
    elif _zero_one(shares):
        bounds = stats.binomtest(round(mean * len(scores.ids)), len(scores.ids)).proportion_ci(
            confidence, method="wilson"
        )
        low, high = float(bounds.low), float(bounds.high)
    else:
        low = high = mean
    if metric.unit == "fraction":
        low, high = max(low, 0.0), min(high, 1.0)
    return mean, low, high, deviation
