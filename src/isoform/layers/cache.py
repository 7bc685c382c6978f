"""Keys and values of the tokens so far, for decoding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from isoform.contracts import Sequences
from isoform.layers import ragged


class KVCache:
    """For each layer keys and values `(b, capacity, g, k)`, of which row r holds the first `lengths[r]` tokens.

    A forward pass calls `extend` once in each layer and `advance` at its end. Capacity doubles when it is full.
    """

    def __init__(self, num_sequences: int, num_layers: int) -> None:
        self.lengths = [0] * num_sequences
        self.keys: list[Tensor | None] = [None] * num_layers
        self.values: list[Tensor | None] = [None] * num_layers

    def extend(self, layer: int, key: Tensor, value: Tensor, new: Sequences) -> tuple[Tensor, Tensor, Sequences]:
        """Stores key and value `(n, g, k)` of the new tokens; all of them, old and new, as `(m, g, k)`."""
        every = self._every(new)
        device = key.device
        if "cache" not in every.derived:
            capacity = self._capacity(layer, max(every.lengths))
            old = torch.tensor(self.lengths, device=device)
            rows, all_rows = ragged.rows(new, device), ragged.rows(every, device)
            write = rows * capacity + old[rows] + ragged.places(new, device)
            every.derived["cache"] = capacity, write, all_rows * capacity + ragged.places(every, device)
        capacity, write_index, read_index = every.derived["cache"]
        stored = []
        for store, states in ((self.keys, key), (self.values, value)):
            kept = self._grown(store[layer], states, capacity)
            kept.view(-1, *states.shape[1:]).index_copy_(0, write_index, states.detach())
            store[layer] = kept
            stored.append(kept.view(-1, *states.shape[1:]).index_select(0, read_index))
        return stored[0], stored[1], every

    def reserve(self, need: int, shape: tuple[int, int], dtype: torch.dtype) -> int:
        """Room for `need` tokens of every sequence in all layers, made where there is none; the capacity.

        shape, dtype: (g, k) and precision of keys and values, where none are stored yet.
        """
        capacity = self._capacity(0, need)
        for layer, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            like = torch.empty(0, *shape, dtype=dtype)
            self.keys[layer], self.values[layer] = self._grown(key, like, capacity), self._grown(value, like, capacity)
        return capacity

    def advance(self, new: Sequences) -> None:
        """The tokens of this pass count as stored."""
        self.lengths = [old + more for old, more in zip(self.lengths, new.lengths, strict=True)]

    def select(self, rows: Sequence[int]) -> KVCache:
        """The cache of some of the sequences, in the order given; a row may be taken more than once."""
        chosen = KVCache(0, len(self.keys))
        chosen.lengths = [self.lengths[row] for row in rows]
        for layer, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            if key is not None and value is not None:
                index = torch.tensor(list(rows), dtype=torch.int64, device=key.device)
                chosen.keys[layer], chosen.values[layer] = key.index_select(0, index), value.index_select(0, index)
        return chosen

    def _every(self, new: Sequences) -> Sequences:
        """The sequences with their new tokens, one object for all layers of a pass."""
        key = ("every", tuple(self.lengths))
        if key not in new.derived:
            new.derived[key] = Sequences([old + more for old, more in zip(self.lengths, new.lengths, strict=True)])
        every: Sequences = new.derived[key]
        return every

    def _capacity(self, layer: int, need: int) -> int:
        stored = self.keys[layer]
        capacity = 0 if stored is None else stored.shape[1]
        return capacity if capacity >= need else max(need, 2 * capacity, 16)

    def _grown(self, stored: Tensor | None, states: Tensor, capacity: int) -> Tensor:
        if stored is not None and stored.shape[1] == capacity:
            return stored
        grown = states.new_zeros(len(self.lengths), capacity, *states.shape[1:])
        if stored is not None:
            grown[:, : stored.shape[1]] = stored
        return grown


class CrossCache:
    """Keys and values of the encoder's states `(m, g, k)` in each layer of a decoder, made once for a source.

    sequences: the sources, one a row; None before the first pass.
    """

    def __init__(self, num_layers: int) -> None:
        self.sequences: Sequences | None = None
        self.keys: list[Tensor | None] = [None] * num_layers
        self.values: list[Tensor | None] = [None] * num_layers
        self.rows: tuple[int, ...] | None = None

    def select(self, rows: Sequence[int]) -> CrossCache:
        """The sources of some of the rows, in the order given; where that changes no row, the same object."""
        if self.sequences is None:
            return self
        # Beams of one source change places all the time, and read the same states afterwards.
        origin = self.rows or tuple(range(len(self.sequences)))
        chosen_rows = tuple(origin[row] for row in rows)
        if chosen_rows == origin:
            return self
        device = next(key.device for key in self.keys if key is not None)
        first, lengths = ragged.starts(self.sequences), self.sequences.lengths
        index = torch.cat([torch.arange(first[row], first[row] + lengths[row]) for row in rows]).to(device)
        chosen = CrossCache(len(self.keys))
        chosen.sequences = Sequences([lengths[row] for row in rows])
        chosen.keys = [None if key is None else key.index_select(0, index) for key in self.keys]
        chosen.values = [None if value is None else value.index_select(0, index) for value in self.values]
        chosen.rows = chosen_rows
        return chosen


class EncoderDecoderCache:
    """What an encoder-decoder keeps while it decodes: its own tokens, and the source."""

    def __init__(self, own: KVCache, source: CrossCache) -> None:
        self.own, self.source = own, source

    @property
    def lengths(self) -> list[int]:
        """Decoder tokens stored of each sequence."""
        return self.own.lengths

    def select(self, rows: Sequence[int]) -> EncoderDecoderCache:
        """The cache of some of the sequences, in the order given; a row may be taken more than once."""
        return EncoderDecoderCache(self.own.select(rows), self.source.select(rows))
