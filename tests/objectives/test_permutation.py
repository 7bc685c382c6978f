"""Permutation language modelling: what is guessed, in which order, and a loss that belongs to the second stream."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isoform.contracts import IGNORE, Encoded
from isoform.data.batches import collate
from isoform.errors import ConfigError
from isoform.models.xlnet import XLNet
from isoform.objectives.permutation import Permutation

SPECIAL = {"unk": 0, "pad": 1, "mask": 2, "cls": 3, "sep": 4}
PLAIN: Any = SimpleNamespace(special_ids=SPECIAL, vocab_size=50)


def build(max_tokens: int = 64, **options: Any) -> Permutation:
    return Permutation(Permutation.Config(**options), PLAIN, max_tokens)


def encoded(ids: list[int], name: str = "d") -> Encoded:
    return Encoded(name, {"text": np.asarray(ids, dtype=np.int32)}, 9)


@given(
    ids=st.lists(st.integers(5, 49), min_size=1, max_size=80),
    fraction=st.floats(0.05, 0.95),
    seed=st.integers(0, 1000),
    edges=st.sampled_from([None, True, False]),
)
@settings(max_examples=150, deadline=None)
def test_a_random_share_is_guessed_one_after_another(
    ids: list[int], fraction: float, seed: int, edges: bool | None
) -> None:
    objective = build(fraction=fraction, edges=edges)
    before, after = ([3], [4]) if edges is not False else ([], [])
    sample = objective.prepare(encoded(ids), np.random.default_rng(seed))
    window = ids[: objective.window_tokens]
    assert sample.tokens.tolist() == [*before, *window, *after]
    assert objective.planned_tokens({"text": np.array([len(ids)])})[0] == len(sample.tokens) <= 64
    assert sample.targets is not None and sample.ranks is not None
    asked = sample.targets != IGNORE
    assert (sample.targets[asked] == sample.tokens[asked]).all()
    # Each asked place has a rank of its own, from 1 on; something is always known.
    assert sorted(sample.ranks[asked].tolist()) == list(range(1, int(asked.sum()) + 1))
    assert not sample.ranks[~asked].any()
    assert not asked.all()
    expected = max(1, round(fraction * len(window)))
    assert asked.sum() == min(expected, len(sample.tokens) - 1)
    assert not asked[: len(before)].any() and not asked[len(sample.tokens) - len(after) :].any()


def test_the_order_is_not_that_of_the_text() -> None:
    objective, places = build(fraction=0.5), np.zeros(40)
    for seed in range(600):
        ranks = objective.prepare(encoded([9] * 40), np.random.default_rng(seed)).ranks
        assert ranks is not None
        places += ranks[1:-1] == 1
    assert places.min() > 0
    assert abs(np.average(np.arange(40), weights=places) - 19.5) < 2


def test_the_loss_is_that_of_the_guesses_alone() -> None:
    model, objective = XLNet.tiny(), build(fraction=0.3)
    draw = np.random.default_rng(0)
    samples = [
        objective.prepare(encoded(draw.integers(5, 50, length).tolist(), str(length)), np.random.default_rng(length))
        for length in (3, 20, 11)
    ]
    batch = collate(samples, filler_to=16)
    assert batch.ranks is not None and batch.targets is not None
    output = model(batch)
    loss = objective.loss(model, batch, output)["loss"].total
    assert output.second is not None
    asked = batch.targets != IGNORE
    assert torch.equal(asked, batch.ranks > 0)
    logits = model.logits(output.second[asked])
    expected = torch.nn.functional.cross_entropy(logits, batch.targets[asked], reduction="sum")
    torch.testing.assert_close(loss, expected)
    statistics = objective.statistics(model, batch, output)
    torch.testing.assert_close(statistics["nats"].sum(), loss.detach().double(), rtol=1e-5, atol=1e-5)
    assert int(statistics["tokens"].sum()) == int(asked.sum()) == objective.counts(batch)["loss"]


def test_room_for_a_guess_and_something_known() -> None:
    with pytest.raises(ConfigError, match=r"text.max_tokens: 3 given, permutation needs room for 2 of text"):
        build(max_tokens=3)
