from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from isoform.contracts import IGNORE, Sample
from isoform.objectives import crossentropy
from isoform.objectives.crossentropy import TokenObjective

VOCAB = 11
sequences = st.lists(st.lists(st.tuples(st.integers(0, 10), st.integers(-1, 10)), min_size=1, max_size=6), min_size=1)


def samples_of(rows):
    return [
        Sample(
            str(i),
            np.array([token for token, _ in row], dtype=np.int32),
            np.array([IGNORE if target < 0 else target for _, target in row], dtype=np.int32),
        )
        for i, row in enumerate(rows)
    ]


@given(rows=sequences, chunk=st.sampled_from([1, 3 * VOCAB, 1 << 24]))
@settings(max_examples=30, deadline=None)
def test_loss_and_statistics_equal_torch(token_model, collate, rows, chunk) -> None:
    model = token_model(VOCAB)
    batch = collate(samples_of(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crossentropy, "CHUNK_LOGITS", chunk)
        total = TokenObjective(None, None, 8).loss(model, batch, model(batch))["loss"].total
        stats = TokenObjective(None, None, 8).statistics(model, batch, model(batch))
    z = model.logits(model(batch).hidden)
    expected = functional.cross_entropy(z, batch.targets, ignore_index=IGNORE, reduction="none")
    assert torch.allclose(total, expected.sum(), rtol=1e-12, atol=1e-12)
    lengths = batch.sequences.lengths
    right = (z.argmax(-1) == batch.targets).double()
    asked = (batch.targets != IGNORE).double()
    for name, values in (("nats", expected), ("tokens", asked), ("correct_tokens", right)):
        assert torch.allclose(stats[name], torch.stack([part.sum() for part in values.split(lengths)])), name
    assert TokenObjective(None, None, 8).counts(batch) == {"loss": float((batch.targets != IGNORE).sum())}


def test_logits_are_made_only_where_something_is_asked(token_model, collate) -> None:
    model = token_model(VOCAB)
    batch = collate(samples_of([[(1, 2), (3, -1), (4, -1)], [(5, 6)]]))
    TokenObjective(None, None, 8).loss(model, batch, model(batch))
    assert model.num_logits == 2


def test_weights_multiply_total_and_count(token_model, collate) -> None:
    model = token_model(VOCAB)
    rows = [[(1, 2), (3, -1)], [(5, 6), (1, 1), (2, 2)]]
    whole, first, second = (collate(samples_of(some)) for some in (rows, rows[:1], rows[1:]))
    whole.weights = torch.tensor([3.0, 0.5])
    parts = [
        TokenObjective(None, None, 8).loss(model, batch, model(batch))["loss"].total for batch in (whole, first, second)
    ]
    assert torch.allclose(parts[0], 3 * parts[1] + 0.5 * parts[2])
    assert TokenObjective(None, None, 8).counts(whole) == {"loss": 3 * 1 + 0.5 * 3}


def test_a_batch_that_asks_nothing_has_zero_loss_and_a_gradient(token_model, collate) -> None:
    model = token_model(VOCAB)
    batch = collate(samples_of([[(1, -1), (2, -1)]]))
    total = TokenObjective(None, None, 8).loss(model, batch, model(batch))["loss"].total
    total.backward()
    assert total == 0
    assert model.head.grad is not None and model.embedding.grad is not None


def test_bf16_logits_are_lost_in_fp32(token_model, collate) -> None:
    model = token_model(VOCAB, torch.bfloat16)
    batch = collate(samples_of([[(1, 2), (3, 4)]]))
    assert TokenObjective(None, None, 8).loss(model, batch, model(batch))["loss"].total.dtype == torch.float32
