"""The variance of a mean over crossed seeds x examples, and the intervals, p-values and power that follow from it.

Every seed is scored on every example, and both are samples: the seeds of all seeds that might have been used, the
examples of all that might have been asked. A score (or a paired difference of two scores) is

    y[s, i] = mean + seed[s] + example[i] + residual[s, i]

and what a study says must hold for other seeds and other examples. `docs/calibration.md` holds what was measured.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import optimize, special

if TYPE_CHECKING:
    from isoform.contracts import Floats

# With two seeds and few examples the seeds' means may coincide by chance, and the interval would shrink to nothing.
# So it is never narrower than this fraction of the interval over examples alone. Measured in `docs/calibration.md`:
# 0 gives too many false verdicts at two seeds, 1 makes intervals wider than need be from five seeds on.
FLOOR_FRACTION = 0.5
POWER = 0.8
MAX_SEEDS = 1000
SMALLEST_P = 1e-100


@dataclass(frozen=True)
class MeanSquares:
    """The analysis of variance of crossed seeds x examples, of one study `()` or of many `(k,)`.

    Symbols: seed, example, residual: mean squares with S - 1, N - 1 and (S - 1)(N - 1) degrees of freedom; their
    expectations are N v_seed + v_residual, S v_example + v_residual and v_residual. With one seed, `seed` is nan and
    `residual` 0: what the seeds would add cannot be seen.
    Units: the square of the score's unit.
    """

    seed: Any
    example: Any
    residual: Any
    num_seeds: int
    num_examples: int

    @property
    def components(self) -> tuple[Any, Any, Any]:
        """Variances of seed, example and residual; a negative estimate is 0."""
        seed = np.maximum(self.seed - self.residual, 0) / self.num_examples
        example = np.maximum(self.example - self.residual, 0) / self.num_seeds
        return seed, example, self.residual


def mean_squares(scores: Floats) -> MeanSquares:
    """The analysis of variance of one score for each seed and example.

    Shapes: scores `(..., S, N)` with N >= 2.
    """
    centred = scores - scores.mean(axis=(-2, -1), keepdims=True)
    square = np.mean(centred * centred, axis=(-2, -1))
    return mean_squares_from_means(centred.mean(axis=-1), centred.mean(axis=-2), square)


def mean_squares_from_means(seed_means: Floats, example_means: Floats, square: Any) -> MeanSquares:
    """The same from marginal means, so that many studies need not be held at once.

    Shapes: seed_means `(..., S)`, example_means `(..., N)`, square (mean of the squared scores) `(...)`.
    """
    num_seeds, num_examples = seed_means.shape[-1], example_means.shape[-1]
    grand = seed_means.mean(axis=-1)
    seed = num_examples * np.sum((seed_means - grand[..., None]) ** 2, axis=-1)
    example = num_seeds * np.sum((example_means - grand[..., None]) ** 2, axis=-1)
    if num_seeds == 1:
        return MeanSquares(np.full_like(grand, np.nan), example / (num_examples - 1), 0 * grand, 1, num_examples)
    residual = np.maximum(num_seeds * num_examples * (square - grand**2) - seed - example, 0)
    return MeanSquares(
        seed / (num_seeds - 1),
        example / (num_examples - 1),
        residual / ((num_seeds - 1) * (num_examples - 1)),
        num_seeds,
        num_examples,
    )


def half_width(squares: MeanSquares, confidence: float) -> Any:
    """Half the width of the confidence interval of the mean: each source of chance with its own t, added as squares.

        h^2 = t[S-1]^2 MS_seed / (S N)  +  t[N-1]^2 max(MS_example - MS_residual, 0) / (S N)

    and at least FLOOR_FRACTION of t[N-1] sqrt(max(MS_example, MS_residual) / (S N)).
    One seed: t[N-1] sqrt(MS_example / N).

    Source: modified large-sample intervals for sums of variances (Graybill and Wang 1980; MOVER, Zou and Donner 2008).
    Differs: the usual sum of both terms with one t of S - 1 degrees of freedom is far too wide where the examples
    matter most, and Satterthwaite's degrees of freedom are too many when seeds are few.
    """
    return _half_width(squares, (1 - confidence) / 2)


def _half_width(squares: MeanSquares, tail: float) -> Any:
    cells = squares.num_seeds * squares.num_examples
    t_example = t_quantile(tail, squares.num_examples - 1)
    over_examples = t_example * np.sqrt(np.maximum(squares.example, squares.residual) / cells)
    if squares.num_seeds == 1:
        return over_examples
    from_seeds = t_quantile(tail, squares.num_seeds - 1) * np.sqrt(squares.seed / cells)
    from_examples = t_example * np.sqrt(np.maximum(squares.example - squares.residual, 0) / cells)
    return np.maximum(np.hypot(from_seeds, from_examples), FLOOR_FRACTION * over_examples)


def t_quantile(tail: float, degrees: Any) -> Any:
    """What Student's t exceeds with probability `tail`."""
    return -special.stdtrit(degrees, tail)


def p_value(distance: float, squares: MeanSquares) -> float:
    """The two-sided p: one minus the confidence at which the interval just reaches a point that far from its centre."""

    def excess(log_p: float) -> float:
        return float(_half_width(squares, np.exp(log_p) / 2)) - distance

    if distance <= 0 or excess(0.0) >= 0:
        return 1.0
    if excess(np.log(SMALLEST_P)) <= 0:
        return SMALLEST_P
    return float(np.exp(optimize.brentq(excess, np.log(SMALLEST_P), 0.0, xtol=1e-12)))


def smallest_difference(squares: MeanSquares, confidence: float) -> float:
    """The true difference that such a study would find with 80 % power."""
    return float(_half_width(squares, (1 - confidence) / 2) + _half_width(squares, 1 - POWER))


def seeds_needed(distance: float, squares: MeanSquares, confidence: float) -> int | None:
    """How many seeds would find a true difference that large with 80 % power; None: not even `MAX_SEEDS` would."""
    if squares.num_seeds == 1 or not distance > 0:
        return None
    counts = range(2, MAX_SEEDS + 1)
    index = bisect_left(
        counts, True, key=lambda count: smallest_difference(planned(squares, count), confidence) <= distance
    )
    return counts[index] if index < len(counts) else None


def planned(squares: MeanSquares, num_seeds: int) -> MeanSquares:
    """The mean squares to be expected of the same study with another number of seeds."""
    seed, example, residual = squares.components
    num_examples = squares.num_examples
    return MeanSquares(
        num_examples * seed + residual, num_seeds * example + residual, residual, num_seeds, num_examples
    )
