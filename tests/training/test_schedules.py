"""Learning rates: closed forms, no rise after the peak, agreement with transformers where it has the same schedule."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from isoform.errors import ConfigError
from isoform.registry import component, names


def schedule(kind: str, **options: object):
    cls, checked = component("schedule", {"kind": kind, **options}, "train.schedule")
    return cls(checked)


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(names("schedule")), num_steps=st.integers(2, 400), warmup=st.floats(0, 0.7))
def test_rises_to_one_then_never_rises_again(kind, num_steps, warmup):
    chosen = schedule(kind, warmup_fraction=warmup)
    factors = [chosen.factor(step, num_steps) for step in range(num_steps)]
    assert all(0 <= factor <= 1 + 1e-12 for factor in factors)
    assert factors[0] > 0
    steps = chosen.options.warmup(num_steps)
    assert all(math.isclose(factors[step], (step + 1) / steps) for step in range(steps))
    rest = factors[max(0, steps - 1) :]
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(rest))


def test_decay_ends_at_the_floor_on_the_last_step():
    for kind in ("linear", "cosine", "wsd"):
        chosen = schedule(kind, warmup_steps=10, final_fraction=0.2)
        assert chosen.factor(99, 100) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("kind", "reference"), [("linear", get_linear_schedule_with_warmup), ("cosine", get_cosine_schedule_with_warmup)]
)
def test_decay_has_the_form_of_transformers(kind, reference):
    """Theirs reaches zero one step after the last, ours on it; the curves are the same function of progress."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = reference(optimizer, num_warmup_steps=0, num_training_steps=50)
    expected = [theirs.lr_lambdas[0](step) for step in range(51)]
    chosen = schedule(kind, final_fraction=0.0)
    assert [chosen.factor(step, 51) for step in range(51)] == pytest.approx(expected)


def test_inverse_square_root_is_continuous_at_the_end_of_warmup():
    chosen = schedule("inverse-sqrt", warmup_steps=100)
    assert chosen.factor(99, 1000) == pytest.approx(1.0)
    assert chosen.factor(399, 1000) == pytest.approx(0.5)


def test_wsd_is_flat_until_its_decay():
    chosen = schedule("wsd", decay_fraction=0.25)
    assert [chosen.factor(step, 100) for step in (0, 40, 74)] == [1.0, 1.0, 1.0]
    assert chosen.factor(75, 100) < 1.0
    assert chosen.factor(99, 100) == pytest.approx(0.0)


def test_warmup_that_does_not_end_is_refused():
    with pytest.raises(ConfigError, match="warm-up of 1000 steps does not end within the run's 230 steps"):
        schedule("inverse-sqrt", warmup_steps=1000).options.warmup(230)


def test_two_ways_to_say_warmup_are_refused():
    with pytest.raises(ConfigError, match="keep one"):
        schedule("linear", warmup_steps=10, warmup_fraction=0.1)
