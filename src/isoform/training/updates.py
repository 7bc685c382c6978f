"""Updates of a prepared run as the loop makes them, one by one and timed: for a plan, a bench, and benchmarks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.profiler import record_function

from isoform.training.feed import Feed
from isoform.training.prepare import Prepared
from isoform.training.step import LossModule, accumulate, set_rates, trained_parameters

# The name under which a profile finds the clipping of gradients.
CLIP = "isoform::clip"


@dataclass(frozen=True)
class Update:
    """One update that was made: what it read, its mean loss, and its time."""

    num_tokens: int
    num_sequences: int
    loss: float
    waited_seconds: float
    # for its data
    seconds: float
    # for everything else

    @property
    def total_seconds(self) -> float:
        return self.waited_seconds + self.seconds


@contextmanager
def restoring(run: Prepared) -> Iterator[None]:
    """Puts the model's weights back at the end of the block."""
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    try:
        yield
    finally:
        run.model.load_state_dict(before)


def updates(run: Prepared, most_steps: int) -> Iterator[Update]:
    """The run's first updates. The weights change: `restoring` puts them back."""
    train = run.config.train
    assert run.batch_plan is not None
    run.model.train()
    module = LossModule(run.model, run.objective)
    names = trained_parameters(run.model, run.objective)
    optimizers = run.optimizer.build(names, train.learning_rate, run.precision)
    feed = Feed(
        run.datasets["train"],
        run.objective,
        run.batch_plan,
        seed=run.config.seed,
        micro_batch_tokens=train.micro_batch_tokens,
        pin=run.device.type == "cuda",
    )
    asked = time.perf_counter()
    for step in feed.ahead(0, min(run.num_steps, most_steps)):
        began = time.perf_counter()
        totals = accumulate(module, step.batches, step.counts, precision=run.precision, device=run.device)
        with record_function(CLIP):
            torch.nn.utils.clip_grad_norm_(list(names.values()), train.clip_norm or float("inf"))
        set_rates(optimizers, run.factor(step.step))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        ended = time.perf_counter()
        lost = sum(total / max(1.0, step.counts[name]) for name, total in totals.items() if name[0] != "_")
        yield Update(step.num_tokens, len(step.sample_ids), lost, began - asked, ended - began)
        asked = time.perf_counter()
