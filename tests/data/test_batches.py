"""Samples end to end: nothing lost, nothing added but one filler that asks for nothing."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isoform.chance import key64
from isoform.contracts import IGNORE, Batch, Sample
from isoform.data.batches import collate


def sample(number: int, length: int, **more: object) -> Sample:
    rng = np.random.default_rng(number)
    tokens, targets = rng.integers(0, 99, (2, length)).astype(np.int32)
    return Sample(f"s{number}", tokens, targets, num_bytes=length, **more)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=8), filler=st.sampled_from([None, 1, 8, 64]))
def test_samples_come_back(lengths: list[int], filler: int | None) -> None:
    samples = [sample(number, length) for number, length in enumerate(lengths)]
    batch = collate(samples, filler_to=filler)
    assert batch.tokens.dtype == batch.positions.dtype == torch.int64
    assert len(batch.tokens) == batch.sequences.num_tokens == len(batch.positions)
    assert filler is None or len(batch.tokens) % filler == 0
    assert batch.num_filler == len(batch.sequences) - len(samples) <= 1
    assert batch.sample_keys.tolist()[: len(samples)] == [key64(one.id) for one in samples]
    assert batch.sample_ids == tuple(one.id for one in samples)
    assert batch.num_bytes == sum(lengths)
    assert batch.targets is not None
    start = 0
    for one in samples:
        end = start + len(one.tokens)
        assert batch.tokens[start:end].tolist() == one.tokens.tolist()
        assert batch.targets[start:end].tolist() == one.targets.tolist()  # type: ignore[union-attr]
        assert batch.positions[start:end].tolist() == list(range(end - start))
        start = end
    assert (batch.targets[start:] == IGNORE).all()


def test_labels_weights_segments_and_sources() -> None:
    inner = sample(9, 3)
    samples = [
        sample(0, 2, label=1, weight=0.5, segments=np.array([0, 1]), source=inner),
        sample(1, 3, label=0, segments=np.array([1, 1, 0]), source=sample(8, 2)),
    ]
    batch = collate(samples, filler_to=8)
    assert batch.labels is not None and batch.labels.tolist() == [1, 0]
    assert batch.weights is not None and batch.weights.tolist() == [0.5, 1.0, 0.0]
    assert batch.segments is not None and batch.segments.tolist() == [0, 1, 1, 1, 0, 0, 0, 0]
    assert batch.source is not None and batch.source.tokens[:3].tolist() == inner.tokens.tolist()
    numbers = collate([sample(0, 2, label=(0.0, 1.5)), sample(1, 2, label=(1.0, 0.0))])
    assert numbers.labels is not None and numbers.labels.tolist() == [[0.0, 1.5], [1.0, 0.0]]
    bare = collate([Sample("a", np.array([1, 2], dtype=np.int32))])
    assert bare.targets is None and bare.labels is None and bare.weights is None and bare.source is None


@pytest.mark.parametrize(
    ("targets", "sources"), [([5, 7], [8, 8]), ([8, 8], [5, 6]), ([8, 8], [16, 8]), ([3, 4], [2, 9])]
)
def test_two_streams_have_as_many_sequences_whichever_needs_filler(targets: list[int], sources: list[int]) -> None:
    def made(length: int) -> np.ndarray:
        return np.arange(length, dtype=np.int32)

    samples = [
        Sample(f"s{i}", made(t), made(t), source=Sample(f"s{i}", made(s)), prefix=i)
        for i, (t, s) in enumerate(zip(targets, sources, strict=True))
    ]
    batch = collate(samples, filler_to=8)
    assert batch.source is not None
    assert len(batch.tokens) % 8 == len(batch.source.tokens) % 8 == 0
    assert len(batch.sequences) == len(batch.source.sequences)
    assert batch.num_filler == batch.source.num_filler
    assert batch.sequences.prefixes == (0, 1, *[0] * batch.num_filler)
    assert batch.to("cpu").sequences.prefixes == batch.sequences.prefixes
    assert batch.num_tokens == len(batch.tokens) + len(batch.source.tokens)
    assert batch.longest_tokens >= max(sample.num_tokens for sample in samples)
    assert batch.targets is not None
    assert (batch.targets[sum(targets) :] == IGNORE).all()


@pytest.mark.parametrize("filler", [None, 1, 8])
def test_rivals_stand_in_a_stream_of_their_own_beside_their_samples(filler: int | None) -> None:
    samples = [sample(number, 2 + number, rival=sample(number + 9, 5 - number)) for number in range(3)]
    batch = collate(samples, filler_to=filler)
    assert batch.rival is not None and batch.source is None
    assert batch.streams == (batch, batch.rival)
    assert len(batch.rival.sequences) == len(batch.sequences) == 3 + batch.num_filler
    assert batch.rival.sequences.lengths[:3] == (5, 4, 3)
    joined = np.concatenate([one.rival.targets for one in samples])  # type: ignore[union-attr]
    assert batch.rival.targets is not None and batch.rival.targets[: len(joined)].tolist() == joined.tolist()
    assert (batch.rival.targets[len(joined) :] == IGNORE).all()
    assert batch.num_tokens == len(batch.tokens) + len(batch.rival.tokens)
    assert [one.num_tokens for one in samples] == [7, 7, 7]
    moved = batch.to("cpu")
    assert moved.rival is not None and moved.rival.tokens.tolist() == batch.rival.tokens.tolist()
    if not batch.num_filler:
        assert batch.longest_tokens == 7


def test_batches_go_to_a_gpu_from_pinned_memory_and_without_waiting(monkeypatch):
    """Neither is here: what is asked of torch is, of every tensor of every stream."""
    tensor_fields = {field.name for field in dataclasses.fields(Batch) if "Tensor" in str(field.type)}
    source = Sample("a", np.arange(3, dtype=np.int32), segments=np.zeros(3, dtype=np.int32))
    sample = Sample(
        "a",
        np.arange(4, dtype=np.int32),
        targets=np.arange(4, dtype=np.int32),
        segments=np.zeros(4, dtype=np.int32),
        ranks=np.zeros(4, dtype=np.int32),
        label=1,
        weight=0.5,
        source=source,
        rival=source,
    )
    batch = collate([sample])
    values = [getattr(stream, name) for stream in batch.streams for name in tensor_fields]
    there = sorted(id(value) for value in values if value is not None)
    assert all(getattr(batch, name) is not None for name in tensor_fields)
    asked = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: asked.append(id(tensor)) or tensor)
    pinned = batch.pinned()
    assert sorted(asked) == there and pinned.tokens is batch.tokens
    moves = []
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, **how: moves.append((device, how)) or tensor)
    pinned.to("cuda")
    assert moves == [("cuda", {"non_blocking": True})] * len(asked)
