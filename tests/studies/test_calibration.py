"""The fast version of `docs/calibration.md`: simulated studies whose truth is known, judged by the code in use."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from isoform.chance import generator
from isoform.studies import crossed
from isoform.studies.crossed import MeanSquares, half_width, mean_squares, t_quantile
from isoform.studies.simulate import SPREADS, Draws, Setting, summarise

NUM_STUDIES = 2_000
NUM_EXAMPLES = 200
SAME, DIFFERENT, EFFECT = (0.0, False), (0.0, True), (0.2, True)
SETTINGS = [
    Setting(rate, SPREADS[spread], shared, *kind)
    for rate, spread, shared, kind in itertools.product(
        (0.05, 0.3, None), ("none", "medium", "large"), (False, True), (SAME, DIFFERENT, EFFECT)
    )
]
Method = Callable[[MeanSquares], Any]


def in_use(squares: MeanSquares) -> Any:
    return half_width(squares, 0.95)


@pytest.fixture(scope="module")
def studies() -> Callable[[int], dict[Setting, tuple[Any, MeanSquares]]]:
    """Number of seeds -> each setting's estimates and mean squares, simulated once."""

    @functools.cache
    def simulated(num_seeds: int) -> dict[Setting, tuple[Any, MeanSquares]]:
        draws = Draws(NUM_STUDIES, num_seeds, NUM_EXAMPLES, generator("fast calibration", num_seeds))
        return {setting: draws.study(setting) for setting in SETTINGS}

    return simulated


def complaints(simulated: dict[Setting, tuple[Any, MeanSquares]], method: Method) -> list[str]:
    """The cells outside of what is claimed by more than chance in so many studies allows."""
    found = []
    for setting, (estimate, squares) in simulated.items():
        coverage = float(np.mean(np.abs(estimate - setting.truth) <= method(squares)))
        least = 0.94 if setting.shift == 0 else 0.93  # no effect: one minus the false verdicts
        if coverage < least - chance(least):
            found.append(f"{coverage:.3f} < {least}: {setting}")
        if squares.num_seeds >= 5 and coverage > 0.97 + chance(0.97):
            found.append(f"{coverage:.3f} > 0.97: {setting}")
    return found


def chance(share: float) -> float:
    return 3.5 * math.sqrt(share * (1 - share) / NUM_STUDIES)


@pytest.mark.parametrize("num_seeds", [2, 5])
def test_what_is_claimed_holds(studies: Any, num_seeds: int) -> None:
    assert complaints(studies(num_seeds), in_use) == []


def without_seeds(squares: MeanSquares) -> Any:
    cells = squares.num_seeds * squares.num_examples
    return t_quantile(0.025, squares.num_examples - 1) * np.sqrt(squares.example / cells)


def without_examples(squares: MeanSquares) -> Any:
    cells = squares.num_seeds * squares.num_examples
    return t_quantile(0.025, squares.num_seeds - 1) * np.sqrt(squares.seed / cells)


def with_one_t(squares: MeanSquares) -> Any:
    total = squares.seed + np.maximum(squares.example - squares.residual, 0)
    return t_quantile(0.025, squares.num_seeds - 1) * np.sqrt(total / (squares.num_seeds * squares.num_examples))


@pytest.mark.parametrize("wrong", [without_seeds, without_examples, with_one_t])
def test_a_wrong_formula_is_noticed(studies: Any, wrong: Method) -> None:
    assert complaints(studies(5), wrong)


def test_no_floor_is_noticed_with_two_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few right answers, the arms alike: the two seeds often differ by the same count, and the seeds' t is endless."""
    setting = Setting(0.05, 0.0, shared=True)
    draws = Draws(8_000, 2, 200, generator("floor"))
    estimate, squares = draws.study(setting)
    assert np.mean(np.abs(estimate) > in_use(squares)) <= 0.06
    monkeypatch.setattr(crossed, "FLOOR_FRACTION", 0.0)
    assert np.mean(np.abs(estimate) > in_use(squares)) > 0.06


# ----------------------------------------------------------------------------------------------- simulated studies


@pytest.mark.parametrize(
    "setting", [Setting(0.3, 0.1, True, 0.2, True), Setting(None, 0.3, False, 0.2, True), Setting(0.9, 0.3)]
)
def test_the_simulated_truth_is_true(setting: Setting) -> None:
    estimate, _ = Draws(4_000, 3, 200, generator("truth")).study(setting)
    assert estimate.mean() == pytest.approx(setting.truth, abs=4 * estimate.std() / math.sqrt(len(estimate)))


def test_the_first_arm_is_right_as_often_as_was_asked() -> None:
    outcomes = Draws(500, 4, 200, generator("rate")).outcomes(Setting(0.05, 0.3, shift=0.2, taste=True))
    assert outcomes[:, 0].mean() == pytest.approx(0.05, abs=0.01)
    assert outcomes[:, 1].mean() > 0.06


def test_summaries_agree_with_the_analysis_of_variance() -> None:
    differences = Draws(6, 3, 50, generator("summary")).differences(Setting(None, 0.1))
    estimate, squares = summarise(differences)
    exact = mean_squares(differences.astype(np.float64))
    assert estimate == pytest.approx(differences.mean(axis=(1, 2)), abs=1e-6)
    for name in ("seed", "example", "residual"):
        assert getattr(squares, name) == pytest.approx(getattr(exact, name), rel=1e-4)


def test_a_shared_first_stage_brings_the_arms_together() -> None:
    draws = Draws(200, 3, 200, generator("shared"))
    alone, shared = (draws.study(Setting(0.3, 0.3, shared))[0].std() for shared in (False, True))
    assert shared < 0.7 * alone
