"""How a decoder reads what it has said so far: whole at first, then what is new, through a cache where it has one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from isoform.contracts import Batch, Cache, IntArray, Model, Prompt, Sequences

if TYPE_CHECKING:
    import torch

# torch is imported where it is used: see the room's docstring.


@dataclass(slots=True, eq=False)
class Growing:
    """One sequence while it grows. index: by which its row of the cache is found. tokens: prompt and new tokens."""

    index: int
    prompt: Prompt
    limit: int
    tokens: list[int] = field(default_factory=list)

    @property
    def new(self) -> list[int]:
        return self.tokens[len(self.prompt.tokens) :]


def growing(index: int, prompt: Prompt, max_new_tokens: int | None) -> Growing:
    """The prompt before its first new token; at most its own and the given number of new ones."""
    assert len(prompt.tokens), "a prompt has at least one token"
    limit = prompt.max_new_tokens if max_new_tokens is None else min(prompt.max_new_tokens, max_new_tokens)
    return Growing(index, prompt, limit, [int(token) for token in prompt.tokens])


def groups_of(sequences: Sequence[Growing], batch_tokens: int, copies: int = 1) -> Iterator[list[Growing]]:
    """Sequences of like length together, as many as fit with so many copies of each."""

    def read(sequence: Growing) -> int:
        return len(sequence.tokens) + (0 if sequence.prompt.source is None else len(sequence.prompt.source))

    group: list[Growing] = []
    size = 0
    for sequence in sorted(sequences, key=read):
        tokens = copies * (read(sequence) + sequence.limit)
        if group and size + tokens > batch_tokens:
            yield group
            group, size = [], 0
        group.append(sequence)
        size += tokens
    if group:
        yield group


class Reader:
    """Reads what is new of each sequence and returns the logits after its last token.

    Sequences that fit into the context share a cache; those that have outgrown it are read again at every step, the
    last `max_positions` tokens numbered anew.
    """

    def __init__(
        self,
        model: Model,
        device: torch.device | str = "cpu",
        autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        self.model = model
        self.device = device
        self.autocast = autocast
        self.cache: Cache | None = None
        self.cached: list[int] = []
        # index of the sequence in each row of the cache

    def next_logits(self, alive: Sequence[Growing]) -> torch.Tensor:
        """`(b, v)`, at least fp32."""
        import torch

        limit = self.model.max_positions
        keeps = "cache" in self.model.capabilities
        inside = [s for s in alive if keeps and (limit is None or len(s.tokens) <= limit)]
        found: dict[int, torch.Tensor] = {}
        if inside:
            cache = self._cache_of([s.index for s in inside])
            have = list(cache.lengths)
            fresh = [s.tokens[start:] for s, start in zip(inside, have, strict=True)]
            found.update(zip([s.index for s in inside], self._read(inside, fresh, have, cache), strict=True))
        again = [s for s in alive if s.index not in found]
        if again:
            windows = [s.tokens if limit is None else s.tokens[-limit:] for s in again]
            logits = self._read(again, windows, [0] * len(windows), None)
            found.update(zip([s.index for s in again], logits, strict=True))
        return torch.stack([found[s.index] for s in alive])

    def descend(self, parents: Sequence[int], children: Sequence[int]) -> None:
        """From here on each child goes on from what its parent has read; both are indices of sequences."""
        rows = {index: row for row, index in enumerate(self.cached)}
        pairs = [(rows[parent], child) for parent, child in zip(parents, children, strict=True) if parent in rows]
        if self.cache is not None:
            self.cache = self.cache.select([row for row, _ in pairs])
        self.cached = [child for _, child in pairs]

    def _cache_of(self, wanted: list[int]) -> Cache:
        """The cache with a row for each wanted sequence, in this order; those that have ended are dropped."""
        if self.cache is None:
            self.cache = self.model.new_cache(len(wanted))
        elif self.cached != wanted:
            row = {index: row for row, index in enumerate(self.cached)}
            self.cache = self.cache.select([row[index] for index in wanted])
        self.cached = wanted
        return self.cache

    def _read(
        self, sequences: Sequence[Growing], pieces: list[list[int]], starts: list[int], cache: Cache | None
    ) -> torch.Tensor:
        """Logits after the last token of each piece, `(b, v)`; starts: how many tokens stand before each piece."""
        import torch

        batch = _batch(pieces, starts)
        if not any(starts):
            # What lies before a window that has moved on is no longer in its prefix.
            gone = [len(s.tokens) - len(piece) for s, piece in zip(sequences, pieces, strict=True)]
            prefixes = [max(0, s.prompt.prefix - lost) for s, lost in zip(sequences, gone, strict=True)]
            batch.sequences = Sequences(batch.sequences.lengths, prefixes)
            sources = [s.prompt.source for s in sequences if s.prompt.source is not None]
            batch.source = _batch(sources, [0] * len(sources)) if sources else None
        batch = batch.to(self.device)
        last = torch.tensor(np.cumsum(batch.sequences.lengths) - 1, device=self.device)
        with torch.no_grad(), self.autocast():
            output = self.model(batch, cache=cache)
            logits = self.model.logits(output.hidden[last])
        return logits if logits.dtype == torch.float64 else logits.float()


def _batch(pieces: Sequence[list[int] | IntArray], starts: list[int]) -> Batch:
    """The pieces end to end, each numbered from where it starts; no dropout."""
    import torch

    positions = [start + place for piece, start in zip(pieces, starts, strict=True) for place in range(len(piece))]
    return Batch(
        tokens=torch.tensor([int(token) for piece in pieces for token in piece]),
        positions=torch.tensor(positions),
        sequences=Sequences([len(piece) for piece in pieces]),
        sample_keys=torch.zeros(len(pieces), dtype=torch.int64),
    )
