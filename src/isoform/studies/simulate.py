"""Simulated studies whose truth is known, to measure how often the statistics are right.

A latent score of arm k, seed s, example i is the sum of normal draws

    x[k, s, i] = shift[k] + spread seed[k, s] + difficulty[i] + taste[k, i] + noise[k, s, i]

where `seed` and `noise` may be correlated between the arms (a shared first stage) and `taste` is what an arm is
better at. An answer is right where x > 0; a loss in nats is exp(x / 2), skewed as real losses are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from isoform.studies.crossed import MeanSquares, mean_squares_from_means

if TYPE_CHECKING:
    import numpy.typing as npt

    from isoform.contracts import Floats

    Singles = npt.NDArray[np.float32]

SHARED_CORRELATION = 0.8
SPREADS = {"none": 0.0, "small": 0.03, "medium": 0.1, "large": 0.3}


@dataclass(frozen=True)
class Setting:
    """What kind of study is simulated.

    rate: share of right answers of the first arm, or None for losses in nats. spread: standard deviation of the seeds'
    effects on the latent score (whose own is 1): at a rate of 0.3, 0.1 is 3.5 points of accuracy. shared: the arms
    start from one pretraining for each seed. shift: what the second arm is better by; taste: the arms are good at
    different examples. A/A: shift 0 and taste False.
    """

    rate: float | None
    spread: float
    shared: bool = False
    shift: float = 0.0
    taste: bool = False

    @property
    def deviation(self) -> float:
        """Standard deviation of the latent score over everything."""
        return float(np.sqrt(1 + self.spread**2))

    @property
    def location(self) -> float:
        return 0.0 if self.rate is None else float(stats.norm.ppf(self.rate)) * self.deviation

    @property
    def truth(self) -> float:
        """The difference that a study of endless seeds and examples would see, second minus first."""
        if self.rate is None:
            return float(np.exp(self.deviation**2 / 8) * (np.exp(self.shift / 2) - 1))
        second, first = stats.norm.cdf(np.array([self.location + self.shift, self.location]) / self.deviation)
        return float(second - first)


class Draws:
    """The normal draws of k studies, S seeds, N examples; settings are read off the same draws, to save time."""

    def __init__(self, num_studies: int, num_seeds: int, num_examples: int, rng: np.random.Generator) -> None:
        k, s, n = num_studies, num_seeds, num_examples

        def normal(*shape: int) -> Singles:
            return rng.standard_normal(shape, dtype=np.float32)

        self.difficulty = normal(k, 1, 1, n) * np.float32(np.sqrt(0.5))
        self.taste = normal(k, 2, 1, n) * np.float32(0.5)
        self.noise = normal(k, 2, s, n)
        self.common_noise = normal(k, 1, s, n)
        self.seed = normal(k, 2, s)
        self.common_seed = normal(k, 1, s)
        self._latents: dict[tuple[bool, bool, bool], Singles] = {}

    def latents(self, shared: bool, taste: bool, nats: bool) -> Singles:
        """Latent scores without shift and seed effect: `(k, 2, S, N)`, variance 1; as exp(x / 2) for nats."""
        if (shared, taste, nats) not in self._latents:
            self._latents.clear()
            noise = _mixed(self.noise, self.common_noise, shared)
            if taste:
                latent = self.difficulty + self.taste + noise * np.float32(0.5)
            else:
                latent = self.difficulty + noise * np.float32(np.sqrt(0.5))
            self._latents[shared, taste, nats] = np.exp(latent * np.float32(0.5)) if nats else latent
        return self._latents[shared, taste, nats]

    def study(self, setting: Setting) -> tuple[Floats, MeanSquares]:
        """The difference of means `(k,)` and the analysis of variance of the paired differences."""
        return summarise(self.differences(setting))

    def differences(self, setting: Setting) -> Singles:
        """Paired differences of outcomes, second arm minus first: `(k, S, N)`."""
        outcomes = self.outcomes(setting)
        return np.asarray(outcomes[:, 1] - outcomes[:, 0], dtype=np.float32)

    def outcomes(self, setting: Setting) -> Any:
        """0 and 1, or nats, of both arms: `(k, 2, S, N)`."""
        shifts = np.array([setting.location, setting.location + setting.shift], np.float32)[:, None]
        offset = (shifts + np.float32(setting.spread) * _mixed(self.seed, self.common_seed, setting.shared))[..., None]
        if setting.rate is None:
            return self.latents(setting.shared, setting.taste, nats=True) * np.exp(offset * np.float32(0.5))
        return (self.latents(setting.shared, setting.taste, nats=False) > -offset).view(np.int8)


def summarise(differences: Singles) -> tuple[Floats, MeanSquares]:
    """Means `(k,)` and mean squares of `(k, S, N)`, in single precision where it does not matter."""
    num_studies, num_seeds, num_examples = differences.shape
    seed_means = (differences @ np.ones(num_examples, np.float32)).astype(np.float64) / num_examples
    example_means = (np.ones(num_seeds, np.float32) @ differences).astype(np.float64) / num_seeds
    flat = differences.reshape(num_studies, -1)
    square = np.einsum("kn,kn->k", flat, flat).astype(np.float64) / flat.shape[1]
    return seed_means.mean(axis=-1), mean_squares_from_means(seed_means, example_means, square)


def _mixed(own: Singles, common: Singles, shared: bool) -> Singles:
    if not shared:
        return own
    return own * np.float32(np.sqrt(1 - SHARED_CORRELATION)) + common * np.float32(np.sqrt(SHARED_CORRELATION))
