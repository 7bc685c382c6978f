from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isoform.contracts import Sequences
from isoform.layers.cache import KVCache


def run(cache: KVCache, history: list[torch.Tensor], lengths: list[int]) -> None:
    """Stores random tokens in both layers; what comes back must be the whole history."""
    new = Sequences(lengths)
    states = torch.randn(new.num_tokens, 2, 4)
    for row, part in enumerate(states.split(lengths)):
        history[row] = torch.cat((history[row], part))
    for layer in range(2):
        keys, values, every = cache.extend(layer, states * (layer + 1), -states, new)
        assert every.lengths == tuple(len(rows) for rows in history)
        assert torch.equal(keys, torch.cat(history) * (layer + 1))
        assert torch.equal(values, -torch.cat(history))
    cache.advance(new)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_what_was_stored_comes_back(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 4))
    cache, history = KVCache(rows, 2), [torch.empty(0, 2, 4) for _ in range(rows)]
    for _ in range(data.draw(st.integers(1, 6))):
        run(cache, history, data.draw(st.lists(st.integers(1, 12), min_size=len(history), max_size=len(history))))
        if data.draw(st.booleans()):
            chosen = data.draw(st.lists(st.integers(0, len(history) - 1), min_size=1, max_size=5))
            cache, history = cache.select(chosen), [history[row] for row in chosen]
            assert cache.lengths == [len(part) for part in history]


def test_copies_of_a_row_part_ways() -> None:
    cache, history = KVCache(1, 2), [torch.empty(0, 2, 4)]
    run(cache, history, [3])
    cache, history = cache.select([0, 0]), [history[0], history[0]]
    run(cache, history, [1, 2])
    run(cache, history, [1, 1])
