"""The micro-batches of every global step, prepared one step ahead in a thread.

What a step contains is a pure function of (seed, step) and the data; ranks and micro-batch size only cut it up, so
the thread can change nothing but the time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from isoform import chance
from isoform.contracts import IGNORE, Batch, Objective, Sample
from isoform.data.batches import collate
from isoform.data.corpus import Dataset
from isoform.data.plan import BatchPlan, micro_batches, split_for_ranks

# oneDNN builds and keeps a kernel for each new number of rows, which costs more than the few tokens that it takes to
# make them alike.
FRIENDLY_TOKENS = 64


@dataclass(frozen=True)
class GlobalStep:
    """This rank's share of one optimiser update."""

    step: int
    epoch: int
    batches: list[Batch]
    counts: dict[str, float]
    # loss part -> what it is divided by, this rank's share
    sample_ids: tuple[str, ...]
    num_tokens: int
    # read by the model, filler not counted


class Feed:
    """Prepares samples, cuts them into micro-batches, and counts their targets."""

    def __init__(
        self,
        dataset: Dataset,
        objective: Objective,
        plan: BatchPlan,
        *,
        seed: int,
        micro_batch_tokens: int,
        rank: int = 0,
        world: int = 1,
        pin: bool = False,
    ) -> None:
        """rank, world: whose share, of how many. pin: whether batches go to a GPU, which copies from pinned memory."""
        self.dataset = dataset
        self.objective = objective
        self.plan = plan
        self.seed = seed
        self.micro_batch_tokens = micro_batch_tokens
        self.rank = rank
        self.world = world
        self.pin = pin

    def at(self, step: int) -> GlobalStep:
        """This rank's share of global step `step`."""
        epoch, chosen = self.plan.samples(step)
        lengths = self.plan.lengths[chosen]
        mine = split_for_ranks(np.arange(len(chosen)), lengths, self.rank, self.world)
        if len(mine):
            samples = [self._prepare(int(index), epoch) for index in chosen[mine]]
        else:
            # A last batch smaller than the number of ranks: this rank joins in with a sample that asks for nothing.
            samples = [_silent(self._prepare(int(chosen[0]), epoch))]
        sizes = np.array([sample.num_tokens for sample in samples])
        groups = micro_batches(np.arange(len(samples)), sizes, self.micro_batch_tokens)
        friendly = min(FRIENDLY_TOKENS, _longest(samples))
        batches = [collate([samples[i] for i in group], filler_to=friendly) for group in groups]
        dropout_key = chance.key64(self.seed, "dropout", step)
        counts: dict[str, float] = {}
        for batch in batches:
            for stream in batch.streams:
                stream.dropout_key = dropout_key
            for name, count in self.objective.counts(batch).items():
                counts[name] = counts.get(name, 0.0) + count
        if self.pin:
            batches = [batch.pinned() for batch in batches]
        return GlobalStep(step, epoch, batches, counts, tuple(sample.id for sample in samples), int(sizes.sum()))

    def ahead(self, start: int, stop: int) -> Iterator[GlobalStep]:
        """Steps start .. stop-1 in order, the next one being prepared while the caller computes."""
        if start >= stop:
            return
        with ThreadPoolExecutor(1, thread_name_prefix="isoform-feed") as pool:
            upcoming, size = pool.submit(self.at, start), self.micro_batch_tokens
            for step in range(start, stop):
                # Cut anew where memory has run out in the meantime.
                current = upcoming.result() if size == self.micro_batch_tokens else self.at(step)
                size = self.micro_batch_tokens
                if step + 1 < stop:
                    upcoming = pool.submit(self.at, step + 1)
                yield current

    def _prepare(self, index: int, epoch: int) -> Sample:
        encoded = self.dataset[index]
        return self.objective.prepare(encoded, chance.generator(self.seed, "prepare", epoch, encoded.id))


def _longest(samples: list[Sample]) -> int:
    """The most tokens that one sequence has; of several streams, in the one that has least."""
    streams = [samples, *([getattr(s, name) for s in samples if getattr(s, name)] for name in ("source", "rival"))]
    return min(max(len(sample.tokens) for sample in stream) for stream in streams if stream)


def _silent(sample: Sample) -> Sample:
    targets = None if sample.targets is None else np.full_like(sample.targets, IGNORE)
    return dataclasses.replace(sample, targets=targets, weight=0.0)
