"""The order of samples: a pure function of (seed, step), every sample once an epoch, whatever the ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isoform.data.plan import BatchPlan, micro_batches, split_for_ranks
from isoform.errors import DataError

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=60)


def plan_of(lengths: list[int], size: int, by_tokens: bool, seed: int = 0) -> BatchPlan:
    values = np.array(lengths)
    if by_tokens:
        return BatchPlan(values, seed=seed, batch_tokens=min(size, int(values.sum())))
    return BatchPlan(values, seed=seed, batch_sequences=min(size, len(lengths)))


@settings(max_examples=150, deadline=None)
@given(lengths=LENGTHS, size=st.integers(1, 80), by_tokens=st.booleans(), seed=st.integers(0, 3))
def test_every_sample_once_an_epoch(lengths: list[int], size: int, by_tokens: bool, seed: int) -> None:
    plan = plan_of(lengths, size, by_tokens, seed)
    for epoch in range(2):
        steps = [plan.samples(epoch * plan.steps_per_epoch + place) for place in range(plan.steps_per_epoch)]
        assert {number for number, _ in steps} == {epoch}
        assert all(len(indices) for _, indices in steps)
        assert sorted(np.concatenate([indices for _, indices in steps]).tolist()) == list(range(len(lengths)))


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, size=st.integers(1, 80), by_tokens=st.booleans(), step=st.integers(0, 200))
def test_a_step_can_be_sought(lengths: list[int], size: int, by_tokens: bool, step: int) -> None:
    walked = plan_of(lengths, size, by_tokens)
    for earlier in range(step):
        walked.samples(earlier)
    sought = plan_of(lengths, size, by_tokens).samples(step)
    assert walked.samples(step)[0] == sought[0]
    assert walked.samples(step)[1].tolist() == sought[1].tolist()


def test_sizes_of_batches() -> None:
    plan = plan_of([1] * 10, 4, by_tokens=False)
    assert [len(plan.samples(step)[1]) for step in range(3)] == [4, 4, 2]
    even = BatchPlan(np.full(1000, 10), seed=0, batch_tokens=500)
    sizes = [10 * len(even.samples(step)[1]) for step in range(even.steps_per_epoch)]
    assert even.steps_per_epoch == 20 and set(sizes) == {500}
    uneven = BatchPlan(np.random.default_rng(0).integers(1, 40, 2000), seed=0, batch_tokens=400)
    tokens = [int(uneven.lengths[uneven.samples(step)[1]].sum()) for step in range(uneven.steps_per_epoch)]
    assert max(abs(number - 400) for number in tokens) <= 45


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    plan = plan_of([1] * 50, 50, by_tokens=False)
    other = plan_of([1] * 50, 50, by_tokens=False, seed=1)
    orders = [plan.samples(0)[1], plan.samples(1)[1], other.samples(0)[1], np.arange(50)]
    assert len({tuple(order.tolist()) for order in orders}) == 4


@pytest.mark.parametrize(
    ("options", "field"), [({"batch_sequences": 5}, "sequences"), ({"batch_tokens": 50}, "tokens")]
)
def test_a_corpus_smaller_than_a_batch(options: dict[str, Any], field: str) -> None:
    with pytest.raises(DataError, match=f"lower train.batch_{field}"):
        BatchPlan(np.array([3, 4, 5, 6]), seed=0, **options)


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS, world=st.integers(1, 9), budget=st.integers(1, 120))
def test_ranks_and_micro_batches_only_cut_up(lengths: list[int], world: int, budget: int) -> None:
    values = np.array(lengths)
    indices = np.random.default_rng(1).permutation(len(lengths))
    shares = [split_for_ranks(indices, values[indices], rank, world) for rank in range(world)]
    assert sorted(np.concatenate(shares).tolist()) == sorted(indices.tolist())
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    loads = [int(values[share].sum()) for share in shares]
    assert max(loads) - min(loads) <= 2 * max(lengths)
    for share in shares:
        groups = micro_batches(share, values[share], budget)
        assert sorted(index for group in groups for index in group.tolist()) == sorted(share.tolist())
        assert all(len(group) == 1 or values[group].sum() <= budget for group in groups)
