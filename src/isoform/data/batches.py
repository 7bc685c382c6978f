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

    Shapes: tokens, positions, targets (n,); sample_keys (b,).
    """
    lengths = [len(sample.tokens) for sample in samples]
    extra = -sum(lengths) % filler_to if filler_to else 0
    lengths += [extra] if extra else []
    positions = np.concatenate([np.arange(length) for length in lengths])
    targets = None
    if samples[0].targets is not None:
        targets = _join([sample.targets for sample in samples], extra, IGNORE)
    segments = None
    if samples[0].segments is not None:
        segments = _join([sample.segments for sample in samples], extra, 0)
    sources = [sample.source for sample in samples if sample.source is not None]
    weights = None
    if any(sample.weight != 1.0 for sample in samples):
        weights = torch.tensor([sample.weight for sample in samples] + [0.0] * bool(extra))
    keys = [chance.key64(sample.id) for sample in samples] + [0] * bool(extra)
    return Batch(
        tokens=_join([sample.tokens for sample in samples], extra, 0),
        positions=torch.from_numpy(positions),
        sequences=Sequences(lengths),
        sample_keys=torch.tensor(keys, dtype=torch.int64),
        targets=targets,
        segments=segments,
        labels=_labels(samples),
        weights=weights,
        source=collate(sources, filler_to=filler_to) if sources else None,
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
