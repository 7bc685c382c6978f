"""Optimiser state follows the parameter's name, never its place."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from isoform.checkpoints.optimizers import optimizer_state_by_name, restore_optimizer
from isoform.errors import CheckpointError


def test_a_permuted_order_of_parameters_is_mapped_by_name(training: Any, equal_tensors: Any) -> None:
    run, other = training().update(3), training()
    for optimizer in other.optimizers:
        for group in optimizer.param_groups:
            group["params"].reverse()
    other.model.load_state_dict(run.weights())
    restore_optimizer(other.optimizers, other.names, optimizer_state_by_name(run.optimizers, run.names))
    other.step = run.step
    assert equal_tensors(other.update(2).weights(), run.update(2).weights())


def test_the_restored_state_shares_no_memory_with_what_was_saved(training: Any) -> None:
    run, other = training().update(), training()
    saved = optimizer_state_by_name(run.optimizers, run.names)
    before = {name: {key: value.clone() for key, value in states.items()} for name, states in saved.items()}
    restore_optimizer(other.optimizers, other.names, saved)
    other.update(2)
    for name, states in saved.items():
        assert all(torch.equal(value, before[name][key]) for key, value in states.items())


@pytest.mark.parametrize("fused", [False, True])
def test_adamw_agrees_with_torch_s_own_restore(fused: bool) -> None:
    weight = torch.nn.Parameter(torch.ones(3, 2))
    first = torch.optim.AdamW([weight], fused=fused)
    weight.grad = torch.full((3, 2), 0.5)
    first.step()
    ours, theirs = torch.optim.AdamW([weight], fused=fused), torch.optim.AdamW([weight], fused=fused)
    restore_optimizer(ours, {"w": weight}, optimizer_state_by_name(first, {"w": weight}))
    theirs.load_state_dict(first.state_dict())
    assert ours.state[weight].keys() == theirs.state[weight].keys()
    for key, value in theirs.state[weight].items():
        assert torch.equal(ours.state[weight][key], value)
        assert ours.state[weight][key].dtype == value.dtype


@pytest.mark.parametrize(
    ("options", "device"), [({}, "cpu"), ({"fused": True}, "meta"), ({"capturable": True}, "meta")]
)
def test_adamw_s_count_of_steps_stays_on_the_host_unless_the_kernel_reads_it(
    options: dict[str, bool], device: str
) -> None:
    weight = torch.nn.Parameter(torch.ones(2, device="meta"))
    optimizer = torch.optim.AdamW([weight])
    optimizer.param_groups[0].update(options)
    saved = {"w": {"step": torch.tensor(3.0), "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}}
    restore_optimizer(optimizer, {"w": weight}, saved)
    assert {key: value.device.type for key, value in optimizer.state[weight].items()} == {
        "step": device,
        "exp_avg": "meta",
        "exp_avg_sq": "meta",
    }


def test_composites_and_wrappers_are_looked_into(training: Any) -> None:
    run = training().update()
    wrapped = SimpleNamespace(optimizers=[SimpleNamespace(optimizer=optimizer) for optimizer in run.optimizers])
    plain = optimizer_state_by_name(run.optimizers, run.names)
    seen = optimizer_state_by_name(wrapped, iter(run.names.items()))
    assert {name: list(states) for name, states in seen.items()} == {name: list(s) for name, s in plain.items()}


def test_before_the_first_step_names_are_there_and_states_are_empty(training: Any) -> None:
    run = training()
    saved = optimizer_state_by_name(run.optimizers, run.names)
    assert saved == {name: {} for name in saved}
    assert saved.keys() == run.names.keys()
    restore_optimizer(run.optimizers, run.names, saved)
    assert all(not optimizer.state for optimizer in run.optimizers)


def test_other_parameters_are_refused_with_the_difference_and_nothing_changes(training: Any) -> None:
    run, other = training().update(), training()
    saved = optimizer_state_by_name(run.optimizers, run.names)
    saved["head.weight"] = saved.pop("embedding.weight")
    with pytest.raises(CheckpointError, match=r"1 missing in it: embedding\.weight; 1 unknown here: head\.weight"):
        restore_optimizer(other.optimizers, other.names, saved)
    assert all(not optimizer.state for optimizer in other.optimizers)


def test_the_state_of_another_optimiser_is_refused(training: Any) -> None:
    run = training().update()
    saved = optimizer_state_by_name(run.optimizers, run.names)
    adamw = torch.optim.AdamW(list(run.names.values()))
    with pytest.raises(CheckpointError, match=r"holds momentum_buffer; AdamW keeps .*another optimiser"):
        restore_optimizer(adamw, run.names, saved)
    assert not adamw.state


def test_a_state_of_another_shape_is_refused(training: Any) -> None:
    run, wider = training().update(), training(vocab_size=14)
    saved = optimizer_state_by_name(run.optimizers, run.names)
    with pytest.raises(CheckpointError, match=r"of embedding\.weight has the shape \(13, 8\), the parameter \(14, 8\)"):
        restore_optimizer(wider.optimizers, wider.names, saved)
