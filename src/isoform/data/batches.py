"""Samples to one ragged batch: everything end to end, nothing padded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from isoform import chance
from isoform.contracts import IGNORE, Batch, Sample, Sequences


def collate(samples: Sequence[Sample], *, filler_to: int | None = None) -> Batch:
    """One batch. filler_to: round the number of tokens up to a multiple of this with one sequence that asks nothing.

    Two streams have as many sequences: where one needs filler, both get some.
    Shapes: tokens, positions, targets (n,); sample_keys (b,).
    """
    sources = [sample.source for sample in samples if sample.source is not None]
    extra, source_extra = _filler(samples, filler_to), _filler(sources, filler_to)
    if sources and filler_to and (extra or source_extra):
        extra, source_extra = extra or filler_to, source_extra or filler_to
    batch = _stream(samples, extra)
    batch.source = _stream(sources, source_extra) if sources else None
    return batch


def _filler(samples: Sequence[Sample], filler_to: int | None) -> int:
    """Tokens that are missing to a multiple of `filler_to`."""
    return -sum(len(sample.tokens) for sample in samples) % filler_to if filler_to else 0


def _stream(samples: Sequence[Sample], extra: int) -> Batch:
    """The samples' own tokens, and `extra` tokens of filler."""
    lengths = [len(sample.tokens) for sample in samples] + [extra] * bool(extra)
    positions = np.concatenate([np.arange(length) for length in lengths])
    targets = None
    if samples[0].targets is not None:
        targets = _join([sample.targets for sample in samples], extra, IGNORE)
    segments = None
    if samples[0].segments is not None:
        segments = _join([sample.segments for sample in samples], extra, 0)
    weights = None
    if any(sample.weight != 1.0 for sample in samples):
        weights = torch.tensor([sample.weight for sample in samples] + [0.0] * bool(extra))
    keys = [chance.key64(sample.id) for sample in samples] + [0] * bool(extra)
    return Batch(
        tokens=_join([sample.tokens for sample in samples], extra, 0),
        positions=torch.from_numpy(positions),
        sequences=Sequences(lengths, [sample.prefix for sample in samples] + [0] * bool(extra)),
        sample_keys=torch.tensor(keys, dtype=torch.int64),
        targets=targets,
        segments=segments,
        labels=_labels(samples),
        weights=weights,
        num_filler=int(bool(extra)),
        num_bytes=sum(sample.num_bytes for sample in samples),
        sample_ids=tuple(sample.id for sample in samples),
    )


def _join(arrays: Sequence[object], extra: int, value: int) -> Tensor:
    joined = np.concatenate([*arrays, np.full(extra, value)], dtype=np.int64, casting="unsafe")  # type: ignore[call-overload]
    return torch.from_numpy(joined)


def _labels(samples: Sequence[Sample]) -> Tensor | None:
    if samples[0].label is None:
        return None
    first = samples[0].label
    return torch.tensor([sample.label for sample in samples], dtype=torch.int64 if isinstance(first, int) else None)
