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

    All streams have as many sequences: where one needs filler, all get some.
    Shapes: tokens, positions, targets (n,); sample_keys (b,).
    """
    sources = [sample.source for sample in samples if sample.source is not None]
    rivals = [sample.rival for sample in samples if sample.rival is not None]
    extras = [_filler(stream, filler_to) for stream in (samples, sources, rivals)]
    if filler_to and any(extras):
        extras = [extra or filler_to for extra in extras]
    batch = _stream(samples, extras[0])
    batch.source = _stream(sources, extras[1]) if sources else None
    batch.rival = _stream(rivals, extras[2]) if rivals else None
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
    ranks = None
    if samples[0].ranks is not None:
        ranks = _join([sample.ranks for sample in samples], extra, 0)
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
        ranks=ranks,
    )


def _join(arrays: Sequence[object], extra: int, value: int) -> Tensor:
    joined = np.concatenate([*arrays, np.full(extra, value)], dtype=np.int64, casting="unsafe")  # type: ignore[call-overload]
    return torch.from_numpy(joined)


def _labels(samples: Sequence[Sample]) -> Tensor | None:
    if samples[0].label is None:
        return None
    first = samples[0].label
    return torch.tensor([sample.label for sample in samples], dtype=torch.int64 if isinstance(first, int) else None)
