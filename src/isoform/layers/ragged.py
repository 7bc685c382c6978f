"""Index tensors of a ragged batch: which sequence a token belongs to, where sequences start and end.

Each is made once for a batch and kept in `Sequences.derived`, because every layer asks for it again.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor

from isoform.contracts import Sequences


def derived(sequences: Sequences, name: str, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
    """The tensor called `name`, made on the first call and moved to `device`."""
    key = (name, str(device))
    if key not in sequences.derived:
        made = make()
        made = made.pin_memory() if device.type == "cuda" and made.device.type == "cpu" else made
        sequences.derived[key] = made.to(device, non_blocking=True)
    tensor: Tensor = sequences.derived[key]
    return tensor


def starts(sequences: Sequences) -> list[int]:
    """Index of each sequence's first token, `(b,)` as host integers."""
    return [0, *accumulate(sequences.lengths)][: len(sequences)]


def bounds(sequences: Sequences, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """`(b + 1,)`: where each sequence begins, and the end of the last."""

    def make() -> Tensor:
        return torch.tensor([*starts(sequences), sequences.num_tokens], dtype=dtype)

    return derived(sequences, f"bounds {dtype}", device, make)


def rows(sequences: Sequences, device: torch.device) -> Tensor:
    """`(n,)` the number of the sequence that each token belongs to."""

    def make() -> Tensor:
        lengths = torch.tensor(sequences.lengths, dtype=torch.int64)
        return torch.repeat_interleave(torch.arange(len(sequences)), lengths)

    return derived(sequences, "rows", device, make)


def places(sequences: Sequences, device: torch.device) -> Tensor:
    """`(n,)` each token's index in its own sequence, from 0."""

    def make() -> Tensor:
        first = torch.tensor(starts(sequences), dtype=torch.int64)
        return torch.arange(sequences.num_tokens) - first[rows(sequences, torch.device("cpu"))]

    return derived(sequences, "places", device, make)


def last_tokens(sequences: Sequences, device: torch.device) -> Tensor:
    """`(b,)` index of each sequence's last token."""
    return derived(sequences, "last", device, lambda: torch.tensor(list(accumulate(sequences.lengths))) - 1)
