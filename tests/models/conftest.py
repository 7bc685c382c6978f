from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from isoform.contracts import Batch, Sequences
from isoform.layers import ragged

MakeBatch = Callable[..., Batch]


@pytest.fixture
def make_batch() -> MakeBatch:
    """A ragged batch of random tokens with the given lengths."""

    def make(lengths: Sequence[int], *, vocab: int = 61, dropout_key: int | None = None, seed: int = 0) -> Batch:
        sequences = Sequences(lengths)
        generator = torch.Generator().manual_seed(seed)
        return Batch(
            tokens=torch.randint(0, vocab, (sequences.num_tokens,), generator=generator),
            positions=ragged.places(sequences, torch.device("cpu")),
            sequences=sequences,
            sample_keys=torch.arange(len(lengths)) * 7919 + 13,
            dropout_key=dropout_key,
        )

    return make
