"""The cells of the calibration: simulated studies, judged by the code that judges real ones (see `calibration.py`)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from scipy import stats

from isoform.chance import generator
from isoform.registry import lookup
from isoform.storage import read_json
from isoform.studies import crossed
from isoform.studies.crossed import MeanSquares, half_width
from isoform.studies.scores import Scores, load_scores
from isoform.studies.simulate import SPREADS, Draws, Setting, summarise
from isoform.studies.statistics import Comparison, compare, pseudo_values

NUM_SEEDS = (2, 3, 5, 10)
NUM_EXAMPLES = (200, 500, 1000, 5000)
RATES = (0.05, 0.3, 0.9, None)
SHIFT = 0.2
CONFIDENCE = 0.95
CHUNK = 1_000_000


# ------------------------------------------------------------------------------------------------------ what was tried


def t_quantile(degrees: Any) -> Any:
    return crossed.t_quantile((1 - CONFIDENCE) / 2, degrees)


def plain_sum(squares: MeanSquares) -> Any:
    """The sum of both variances (MS_seed + max(MS_example - MS_residual, 0)) / (S N)."""
    cells = squares.num_seeds * squares.num_examples
    return (squares.seed + np.maximum(squares.example - squares.residual, 0)) / cells


def one_t(squares: MeanSquares) -> Any:
    return t_quantile(squares.num_seeds - 1) * np.sqrt(plain_sum(squares))


def satterthwaite(squares: MeanSquares) -> Any:
    cells, total = squares.num_seeds * squares.num_examples, plain_sum(squares)
    examples = np.maximum(squares.example - squares.residual, 0) / cells
    spread = (squares.seed / cells) ** 2 / (squares.num_seeds - 1) + examples**2 / (squares.num_examples - 1)
    degrees = np.clip(total**2 / np.maximum(spread, 1e-300), squares.num_seeds - 1, 1e9)
    return t_quantile(degrees) * np.sqrt(total)


def examples_alone(squares: MeanSquares) -> Any:
    cells = squares.num_seeds * squares.num_examples
    return t_quantile(squares.num_examples - 1) * np.sqrt(squares.example / cells)


def seeds_alone(squares: MeanSquares) -> Any:
    return t_quantile(squares.num_seeds - 1) * np.sqrt(squares.seed / (squares.num_seeds * squares.num_examples))


def squares_added(floor: float) -> Callable[[MeanSquares], Any]:
    def method(squares: MeanSquares) -> Any:
        cells = squares.num_seeds * squares.num_examples
        t_example = t_quantile(squares.num_examples - 1)
        examples = t_example * np.sqrt(np.maximum(squares.example - squares.residual, 0) / cells)
        least = floor * t_example * np.sqrt(np.maximum(squares.example, squares.residual) / cells)
        return np.maximum(np.hypot(seeds_alone(squares), examples), least)

    return method


IN_USE = "**in use**: each part's own t, squares added, floor 0.5"
METHODS: dict[str, Callable[[MeanSquares], Any]] = {
    "examples alone (paired t on seed averages): ignores the seeds": examples_alone,
    "seeds alone (paired t on the seeds' metrics): ignores the examples": seeds_alone,
    "sum of both variances, t with S-1 degrees of freedom": one_t,
    "sum of both variances, Satterthwaite's degrees of freedom": satterthwaite,
    "each part's own t, squares added, no floor": squares_added(0.0),
    IN_USE: lambda squares: half_width(squares, CONFIDENCE),
    "each part's own t, squares added, floor 1": squares_added(1.0),
}


# ------------------------------------------------------------------------------------------------------------ the grid


@dataclass
class Tally:
    """What happened in the studies of one cell, by method."""

    studies: int = 0
    covered: dict[str, int] = field(default_factory=dict)
    width: float = 0.0
    total: float = 0.0
    square: float = 0.0

    def add(self, estimate: Any, squares: MeanSquares, truth: float) -> None:
        self.studies += len(estimate)
        self.total += float((estimate - truth).sum())
        self.square += float(((estimate - truth) ** 2).sum())
        for name, method in METHODS.items():
            half = method(squares)
            self.covered[name] = self.covered.get(name, 0) + int((np.abs(estimate - truth) <= half).sum())
            if name == IN_USE:
                self.width += float(half.sum())

    def coverage(self, method: str = IN_USE) -> float:
        return self.covered[method] / self.studies

    @property
    def relative_width(self) -> float:
        """Mean width over that of somebody who knows the true variance of the estimate."""
        deviation = np.sqrt(self.square / self.studies - (self.total / self.studies) ** 2)
        return float(self.width / self.studies / (stats.norm.isf((1 - CONFIDENCE) / 2) * deviation))


def settings() -> list[Setting]:
    """Same methods (A/A), equally good methods with different strengths, and a real effect; in the order of `Draws`."""
    kinds = ((0.0, False), (0.0, True), (SHIFT, True))
    combinations = itertools.product((False, True), kinds, RATES, SPREADS.values())
    return [Setting(rate, spread, shared, shift, taste) for shared, (shift, taste), rate, spread in combinations]


Cell = tuple[int, int, Setting]


def run_chunk(task: tuple[int, int, int, int]) -> dict[Cell, Tally]:
    num_seeds, num_examples, chunk, num_studies = task
    draws = Draws(num_studies, num_seeds, num_examples, generator("calibration", num_seeds, num_examples, chunk))
    tallies = {}
    for setting in settings():
        tally = tallies[num_seeds, num_examples, setting] = Tally()
        tally.add(*draws.study(setting), setting.truth)
    return tallies


def run_grid(num_studies: int, sizes: Iterable[int], pool: Executor) -> dict[Cell, Tally]:
    tasks = []
    for num_examples, num_seeds in itertools.product(sizes, NUM_SEEDS):
        size = max(1, CHUNK // (num_seeds * num_examples))
        starts = range(0, num_studies, size)
        tasks += [(num_seeds, num_examples, start, min(size, num_studies - start)) for start in starts]
    grid: dict[Cell, Tally] = {}
    for tallies in pool.map(run_chunk, tasks):
        for cell, tally in tallies.items():
            merge(grid.setdefault(cell, Tally()), tally)
    return grid


def merge(into: Tally, other: Tally) -> None:
    into.studies += other.studies
    into.width += other.width
    into.total += other.total
    into.square += other.square
    for name, count in other.covered.items():
        into.covered[name] = into.covered.get(name, 0) + count


# ------------------------------------------------------------------------------------------------ metrics not means


class Ratio:
    """Loss in nats per token; perplexity, its exponential; F1 of a rare class."""

    columns: ClassVar[tuple[str, ...]] = ("nats", "tokens")
    mean_column: ClassVar[str | None] = None
    higher_is_better: ClassVar[bool] = False
    unit: ClassVar[str] = "nats"
    name = "loss per token"

    def value(self, sums: Any) -> Any:
        return sums["nats"] / sums["tokens"]


class Perplexity(Ratio):
    name = "perplexity"

    def value(self, sums: Any) -> Any:
        return np.exp(sums["nats"] / sums["tokens"])


class F1(Ratio):
    name = "F1"
    columns = ("hits", "misses", "alarms")

    def value(self, sums: Any) -> Any:
        return 2 * sums["hits"] / (2 * sums["hits"] + sums["misses"] + sums["alarms"])


POSITIVE = 0.3
LENGTH_TREND = 0.5  # longer examples are harder, so that the ratio is not the mean of ratios


def ratio_columns(metric: Ratio, draws: Draws, setting: Setting, rng: np.random.Generator) -> dict[str, Any]:
    """The statistics of both arms: each column `(k, 2, S, N)`."""
    outcomes = draws.outcomes(setting).astype(np.float64)
    if isinstance(metric, F1):
        positive = rng.random(draws.difficulty.shape) < POSITIVE
        wrong = 1 - outcomes
        return {"hits": positive * outcomes, "misses": positive * wrong, "alarms": (1 - positive) * wrong}
    noise = rng.standard_normal(draws.difficulty.shape)
    tokens = np.exp(3 + LENGTH_TREND * draws.difficulty + 0.5 * noise) + 0 * outcomes
    return {"nats": outcomes * tokens, "tokens": tokens}


def ratio_truth(metric: Ratio, setting: Setting) -> float:
    """Second minus first for endless examples, averaged over seeds (Gauss and Hermite)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    values = []
    for shift in (0.0, setting.shift):
        latent = setting.location + shift + setting.spread * nodes
        if isinstance(metric, F1):
            right = stats.norm.cdf(latent)
            value = metric.value(
                {"hits": POSITIVE * right, "misses": POSITIVE * (1 - right), "alarms": 0.7 * (1 - right)}
            )
        else:
            value = metric.value({"nats": np.exp(latent / 2 + 1 / 8 + LENGTH_TREND / 4), "tokens": 1.0})
        values.append(float(weights @ value / weights.sum()))
    return values[1] - values[0]


def ratio_differences(metric: Ratio, draws: Draws, setting: Setting, rng: np.random.Generator) -> Any:
    """Paired differences of jackknife pseudo-values `(k, S, N)`."""
    columns = ratio_columns(metric, draws, setting, rng)
    shape = next(iter(columns.values())).shape
    flat = {name: column.reshape(-1, shape[-1]) for name, column in columns.items()}
    _, shares = pseudo_values(Scores(flat, [""] * shape[-1], []), metric)
    shares = shares.reshape(shape)
    return shares[:, 1] - shares[:, 0]


def bootstrap_half_widths(differences: Any, rng: np.random.Generator, num_resamples: int = 300) -> tuple[Any, Any]:
    """Studentised bootstrap over seeds x examples of one study `(S, N)`: what the bounds lie below and above."""
    num_seeds, num_examples = differences.shape
    seeds = rng.integers(num_seeds, size=(num_resamples, num_seeds, 1))
    examples = rng.integers(num_examples, size=(num_resamples, 1, num_examples))
    estimate, squares = summarise(differences.astype(np.float32)[seeds, examples])
    centre, own = summarise(differences[None].astype(np.float32))
    deviations = np.sqrt(np.maximum(plain_sum(squares), 1e-12 * plain_sum(own)))
    low, high = np.quantile((estimate - centre) / deviations, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return high * np.sqrt(plain_sum(own))[0], -low * np.sqrt(plain_sum(own))[0]


def run_ratio(task: tuple[type[Ratio], int, int, Setting, int, int]) -> tuple[float, float, float]:
    """Coverage in use, its mean width over the oracle's, coverage of the studentised bootstrap."""
    kind, num_seeds, num_examples, setting, num_studies, num_bootstrapped = task
    metric, truth = kind(), ratio_truth(kind(), setting)
    rng = generator("ratio", kind.name, num_seeds, num_examples, repr(setting))
    errors, halves, boot = [], [], []
    size = max(1, CHUNK // (num_seeds * num_examples))
    for start in range(0, num_studies, size):
        draws = Draws(min(size, num_studies - start), num_seeds, num_examples, rng)
        differences = ratio_differences(metric, draws, setting, rng)
        errors.append(differences.mean(axis=(1, 2)) - truth)
        halves.append(half_width(crossed.mean_squares(differences), CONFIDENCE))
        for error, study in zip(errors[-1], differences, strict=True):
            if len(boot) < num_bootstrapped:
                below, above = bootstrap_half_widths(study, rng)
                boot.append(-above <= error <= below)
    error, half = np.concatenate(errors), np.concatenate(halves)
    width = half.mean() / (stats.norm.isf((1 - CONFIDENCE) / 2) * error.std())
    return float(np.mean(np.abs(error) <= half)), float(width), float(np.mean(boot)) if boot else float("nan")


# ------------------------------------------------------------------------------------- one seed, equivalence, power


class Right:
    """Share of right answers."""

    name, unit = "accuracy", "fraction"
    columns = ("right",)
    mean_column = "right"
    higher_is_better = True

    def value(self, sums: Any) -> Any:
        raise NotImplementedError


def run_one_seed(task: tuple[int, Setting, int]) -> tuple[float, float]:
    """Share of p <= 0.05, and of intervals over examples that hold the difference of these two models."""
    num_examples, setting, num_studies = task
    rng = generator("one seed", num_examples, repr(setting))
    ids = [str(index) for index in range(num_examples)]
    told, covered = 0, 0
    for _ in range(num_studies):
        draws = Draws(1, 1, num_examples, rng)
        first, second = (Scores({"right": arm.astype(np.float64)}, ids, [0]) for arm in draws.outcomes(setting)[0])
        result = compare(first, second, Right)
        told += result.p <= 1 - CONFIDENCE
        covered += result.low is not None and result.low <= setting.truth <= result.high
    return told / num_studies, covered / num_studies


def run_margin(task: tuple[int, int, Setting, int]) -> tuple[float, float, float]:
    """False `equivalent` where the truth is at the margin; power at what the variance model promises 80 % for."""
    num_seeds, num_examples, setting, num_studies = task
    rng = generator("margin", num_seeds, num_examples, repr(setting))
    estimates, halves, wide, promised = [], [], [], []
    size = max(1, CHUNK // (num_seeds * num_examples))
    for start in range(0, num_studies, size):
        estimate, squares = Draws(min(size, num_studies - start), num_seeds, num_examples, rng).study(setting)
        estimates.append(estimate - setting.truth)
        halves.append(half_width(squares, 2 * CONFIDENCE - 1))
        wide.append(half_width(squares, CONFIDENCE))
        promised.append(np.mean(squares.components, axis=1))
    error, half, full = (np.concatenate(parts) for parts in (estimates, halves, wide))
    false = np.mean(np.abs(error + abs(setting.truth)) + half < abs(setting.truth))
    seed, example, residual = np.mean(promised, axis=0)
    expected = MeanSquares(
        num_examples * seed + residual, num_seeds * example + residual, residual, num_seeds, num_examples
    )
    smallest = crossed.smallest_difference(expected, CONFIDENCE)
    return float(false), float(np.mean(np.abs(error + smallest) > full)), smallest


# ------------------------------------------------------------------------------------------------------- real A/A pairs


@dataclass(frozen=True)
class RealPairs:
    """What came of one real arm compared with itself; `false` is None where it has too few seeds."""

    arm: str
    num_seeds: int
    num_examples: int
    num_pairs: int
    false: float | None


def real_pairs(folder: Path, num_pairs: int) -> Iterable[RealPairs]:
    """Each arm against itself: its seeds fall into two random halves, and a random half of the examples is scored."""
    results = read_json(folder / "results.json")
    metric, split = lookup("metric", results["compare"]["metric"]), results["compare"]["split"]
    for arm in results["arms"]:
        paths = {run["seed"]: folder / run["final"] / "predictions.jsonl" for run in arm["runs"]}
        if len(paths) < 4:
            yield RealPairs(arm["name"], len(paths), 0, 0, None)
            continue
        scores = load_scores(paths, split, metric)
        false = np.mean([aa_pair(scores, metric, index).p <= 1 - CONFIDENCE for index in range(num_pairs)])
        yield RealPairs(arm["name"], len(paths), len(scores.ids), num_pairs, float(false))


def aa_pair(scores: Scores, metric: Any, index: int) -> Comparison:
    """Two pseudo-arms from one arm's seeds, on half of its examples."""
    rng = generator("real pairs", index)
    side, half = len(scores.seeds) // 2, max(2, len(scores.ids) // 2)
    seeds = rng.permutation(len(scores.seeds))
    chosen = np.sort(rng.permutation(len(scores.ids))[:half])

    def pseudo_arm(rows: Any) -> Scores:
        columns = {name: column[rows][:, chosen] for name, column in scores.columns.items()}
        return Scores(columns, [scores.ids[place] for place in chosen], list(range(side)))

    return compare(pseudo_arm(seeds[:side]), pseudo_arm(seeds[side : 2 * side]), metric)
