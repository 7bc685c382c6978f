"""Which samples make up global step s: a pure function of (seed, s) and the data, seekable in constant time.

    epoch, place = divmod(s, steps_per_epoch);   order = permutation keyed by (seed, epoch)
    batch_sequences: samples order[place * B : (place + 1) * B], the last batch of an epoch may be smaller
    batch_tokens:    sample i of the order belongs to batch floor(tokens before it / all tokens * steps_per_epoch)

Ranks and micro-batches only cut a global batch up.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from isoform import chance
from isoform.contracts import Ints
from isoform.errors import DataError


class BatchPlan:
    """The samples of every global step. lengths: planned tokens of each sample `(N,)`.

    Raises: DataError where the corpus is smaller than one batch.
    """

    def __init__(
        self, lengths: Ints, *, seed: int, batch_sequences: int | None = None, batch_tokens: int | None = None
    ) -> None:
        assert (batch_sequences is None) != (batch_tokens is None), "one way to say how large a batch is"
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.seed = seed
        self.batch_sequences = batch_sequences
        self.batch_tokens = batch_tokens
        num, tokens = len(self.lengths), int(self.lengths.sum())
        if batch_sequences is not None:
            if num < batch_sequences:
                raise DataError(
                    f"the training split has {num} sequences, fewer than one batch: lower train.batch_sequences "
                    f"({batch_sequences}) or give more data"
                )
            self.steps_per_epoch = math.ceil(num / batch_sequences)
        else:
            assert batch_tokens is not None
            if tokens < batch_tokens:
                raise DataError(
                    f"the training split has {tokens} tokens, fewer than one batch: lower train.batch_tokens "
                    f"({batch_tokens}) or give more data"
                )
            self.steps_per_epoch = max(1, min(num, round(tokens / batch_tokens)))
        self._epoch = lru_cache(maxsize=2)(self._lay_out)

    def samples(self, step: int) -> tuple[int, Ints]:
        """(epoch, indices of the samples of global step `step`)."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order, starts = self._epoch(epoch)
        return epoch, order[starts[place] : starts[place + 1]]

    def _lay_out(self, epoch: int) -> tuple[Ints, Ints]:
        """The epoch's order `(N,)` and where each batch begins in it `(steps_per_epoch + 1,)`."""
        order = chance.generator(self.seed, "order", epoch).permutation(len(self.lengths))
        steps = np.arange(self.steps_per_epoch + 1)
        if self.batch_sequences is not None:
            return order, np.minimum(steps * self.batch_sequences, len(order))
        before = np.concatenate([[0], np.cumsum(self.lengths[order])])
        starts = np.searchsorted(before, steps * (before[-1] / self.steps_per_epoch), side="left")
        # A sequence longer than a batch would leave its neighbour empty: every batch keeps one sample at least.
        starts = steps + np.maximum.accumulate(starts - steps)
        starts = np.minimum(starts, len(order) - (self.steps_per_epoch - steps))
        starts[-1] = len(order)
        return order, starts


def split_for_ranks(indices: Ints, lengths: Ints, rank: int, world: int) -> Ints:
    """This rank's share of a global batch: dealt out by length, so that ranks have about equal work."""
    if world == 1:
        return indices
    by_length = indices[np.argsort(-lengths, kind="stable")]
    rounds = np.arange(len(by_length)) // world
    seat = np.arange(len(by_length)) % world
    # Every second round runs backwards, so that the first rank does not always get the longer one.
    seat = np.where(rounds % 2 == 1, world - 1 - seat, seat)
    share: Ints = by_length[seat == rank]
    return share


def micro_batches(indices: Ints, lengths: Ints, max_tokens: int) -> list[Ints]:
    """The indices sorted by length and cut so that no group but a single sequence exceeds `max_tokens`."""
    by_length = np.argsort(lengths, kind="stable")
    groups: list[Ints] = []
    start = tokens = 0
    for place, which in enumerate(by_length):
        if place > start and tokens + int(lengths[which]) > max_tokens:
            groups.append(indices[by_length[start:place]])
            start, tokens = place, 0
        tokens += int(lengths[which])
    if len(by_length):
        groups.append(indices[by_length[start:]])
    return groups
