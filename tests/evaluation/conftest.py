"""A model small enough to check by hand: causal, with positions, with a cache, in any precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from isoform.contracts import Batch, Output

DECAY = 0.7


class RunningCache:
    def __init__(self, states: list[Tensor | None], lengths: list[int]) -> None:
        self.states = states
        self.lengths = lengths

    def select(self, rows: Sequence[int]) -> RunningCache:
        return RunningCache([self.states[row] for row in rows], [self.lengths[row] for row in rows])


class RunningModel(nn.Module):
    """hidden_t = 0.7 hidden_t-1 + embedding(token_t) + position_t: sees all that came before, and nothing else."""

    capabilities = frozenset({"causal", "cache"})

    def __init__(self, vocab_size: int, max_positions: int | None, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.config = SimpleNamespace(vocab_size=vocab_size)
        self.max_positions = max_positions
        self.embedding = nn.Parameter(torch.randn(vocab_size, 8, generator=generator, dtype=torch.float64).to(dtype))
        self.positions = torch.randn(512, 8, generator=generator, dtype=torch.float64).to(dtype) * 0.3
        self.head = nn.Parameter(torch.randn(vocab_size, 8, generator=generator, dtype=torch.float64).to(dtype))
        self.num_read = 0

    def new_cache(self, num_sequences: int) -> RunningCache:
        return RunningCache([None] * num_sequences, [0] * num_sequences)

    def forward(self, batch: Batch, *, cache: RunningCache | None = None, all_layers: bool = False) -> Output:
        self.num_read += len(batch.tokens)
        if self.max_positions is not None:
            assert int(batch.positions.max()) < self.max_positions
        inputs = self.embedding[batch.tokens] + self.positions[batch.positions]
        hidden: list[Tensor] = []
        start = 0
        for row, length in enumerate(batch.sequences.lengths):
            state = cache.states[row] if cache is not None else None
            for index in range(start, start + length):
                state = inputs[index] if state is None else DECAY * state + inputs[index]
                hidden.append(state)
            if cache is not None:
                cache.states[row] = state
                cache.lengths[row] += length
            start += length
        return Output(torch.stack(hidden))

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.head.T


@pytest.fixture(scope="session")
def running_model() -> Callable[..., RunningModel]:
    return RunningModel
