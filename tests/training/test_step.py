"""Accumulation: any micro-batch gives the gradient of the whole batch, in every objective."""

from __future__ import annotations

from threading import current_thread

import pytest
import torch
from accelerate import Accelerator

from isoform.training.feed import Feed
from isoform.training.prepare import prepare
from isoform.training.step import LossModule, accumulate

OBJECTIVES = {
    "causal": {"objective": {"kind": "causal"}},
    "spans": {"objective": {"kind": "span-corruption"}},
    "answers": {
        "objective": {"kind": "answers"},
        "data": {"path": None, "train": "pairs.tsv", "columns": ["question", "answer"]},
        "text": {"max_tokens": 48},
        "train": {"select": {"metric": "last"}},
    },
}


def gradients(run, micro_batch_tokens: int, step: int, world: int = 1) -> tuple[dict[str, torch.Tensor], float]:
    """Summed over ranks as a reducing wrapper would: each rank's gradient, with counts of all."""
    module = LossModule(run.model, run.objective)
    shares = [
        Feed(
            run.datasets["train"],
            run.objective,
            run.batch_plan,
            seed=0,
            micro_batch_tokens=micro_batch_tokens,
            rank=rank,
            world=world,
        ).at(step)
        for rank in range(world)
    ]
    counts = {name: sum(share.counts[name] for share in shares) for name in shares[0].counts}
    run.model.zero_grad()
    total = 0.0
    for share in shares:
        totals = accumulate(module, share.batches, counts, precision="fp32", device=run.device)
        total += sum(totals.values())
    return {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}, total


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("micro_batch_tokens", "world"), [(1, 1), (40, 1), (97, 1), (40, 2), (1_000_000, 3)])
def test_micro_batches_and_ranks_do_not_change_the_gradient(make, objective, micro_batch_tokens, world):
    """Relative difference at most 1e-12 in fp64, dropout on, the last incomplete batch of the epoch included."""
    run = prepare(make(OBJECTIVES[objective]))
    run.model.double()
    last = run.batch_plan.steps_per_epoch - 1
    for step in (0, last):
        whole, whole_loss = gradients(run, 1_000_000, step)
        parts, parts_loss = gradients(run, micro_batch_tokens, step, world)
        assert parts_loss == pytest.approx(whole_loss, rel=1e-12)
        scale = max(float(gradient.abs().max()) for gradient in whole.values())
        assert whole.keys() == parts.keys()
        for name, gradient in whole.items():
            assert float((gradient - parts[name]).abs().max()) <= 1e-12 * scale, name


def test_agrees_with_accelerates_own_accumulation_where_that_is_exact(make):
    """Equal numbers of targets in every micro-batch: there the mean of means that `accumulate()` takes is right."""
    run = prepare(make({"train": {"batch_sequences": 4}}))
    run.model.double()
    share = Feed(run.datasets["train"], run.objective, run.batch_plan, seed=0, micro_batch_tokens=1).at(0)
    batches = [share.batches[0]] * 4
    module = LossModule(run.model, run.objective)
    counts = {"loss": 4 * run.objective.counts(batches[0])["loss"]}
    accumulate(module, batches, counts, precision="fp32", device=run.device)
    ours = {name: p.grad.clone() for name, p in run.model.named_parameters()}
    run.model.zero_grad()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    prepared = accelerator.prepare(module)
    for batch in batches:
        with accelerator.accumulate(prepared):
            part = prepared(batch)["loss"]
            accelerator.backward(part.total / run.objective.counts(batch)["loss"])
    for name, parameter in run.model.named_parameters():
        torch.testing.assert_close(parameter.grad, ours[name], rtol=1e-10, atol=1e-14)


def test_a_mean_of_means_would_be_seen(make):
    """The check above can fail: averaging micro-batches of unlike size gives another gradient."""
    run = prepare(make())
    run.model.double()
    whole, _ = gradients(run, 1_000_000, 0)
    share = Feed(run.datasets["train"], run.objective, run.batch_plan, seed=0, micro_batch_tokens=40).at(0)
    module = LossModule(run.model, run.objective)
    run.model.zero_grad()
    for batch in share.batches:
        part = module(batch)["loss"]
        (part.total / run.objective.counts(batch)["loss"] / len(share.batches)).backward()
    name = "embedding.weight"
    wrong = dict(run.model.named_parameters())[name].grad
    assert float((wrong - whole[name]).abs().max()) > 1e-4 * float(whole[name].abs().max())


def test_batches_for_a_gpu_are_pinned_where_they_are_prepared(make, monkeypatch):
    run = prepare(make())
    threads = set()
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: threads.add(current_thread().name) or tensor)
    options = {"seed": 0, "micro_batch_tokens": 40}
    given = run.datasets["train"], run.objective, run.batch_plan
    list(Feed(*given, **options).ahead(0, 2))
    assert not threads
    assert len(list(Feed(*given, **options, pin=True).ahead(0, 2))) == 2
    assert threads == {"isoform-feed_0"}
