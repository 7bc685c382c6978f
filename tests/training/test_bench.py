"""The bench tells numbers that fit together, leaves the weights alone, and knows whose work each operation is."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from isoform.errors import ConfigError
from isoform.training import bench as benching
from isoform.training.bench import GROUPS, bench, group_of, matrix_shapes
from isoform.training.prepare import prepare
from isoform.training.updates import restoring, updates


@pytest.fixture
def measured(make, monkeypatch):
    monkeypatch.setattr(benching, "COPIED_BYTES", 1 << 16)
    return bench(make({"model": {"dropout": 0.0}}), 0.0)


def test_the_numbers_fit_together(measured):
    step, model = measured["step"], measured["model"]
    assert sum(measured["shares"].values()) == pytest.approx(1)
    assert set(measured["shares"]) == set(GROUPS) and min(measured["shares"].values()) >= 0
    assert measured["flops_per_token"] == model["flops_forward_per_token"] + model["flops_backward_per_token"]
    assert step["gflops"] == pytest.approx(step["tokens_per_second"] * measured["flops_per_token"] / 1e9)
    assert step["tokens_per_second"] == pytest.approx(step["tokens"] / step["seconds"])
    assert step["fraction_of_ceiling"] == pytest.approx(step["gflops"] / measured["ceilings"]["fp32_gflops"])
    assert step["steps"] == benching.LEAST_STEPS and measured["precision"] == "fp32"
    assert measured["kernels"]["native"] in ("plain", "compiled", "tiles") and measured["kernels"]["why"]
    assert measured["peak_memory_bytes"] > 0 and all(rate > 0 for rate in measured["ceilings"].values())


def test_products_and_the_optimiser_are_seen(measured):
    for group in ("matrix products", "attention", "norms and elementwise", "loss", "optimiser"):
        assert measured["shares"][group] > 0, group


def test_an_operation_belongs_to_whoever_called_it():
    step = SimpleNamespace(name="Optimizer.step#AdamW.step", cpu_parent=None)
    backward = SimpleNamespace(name="autograd::engine::evaluate_function: MmBackward0", cpu_parent=None)
    attention = SimpleNamespace(name="_AttentionBackward", cpu_parent=None)
    cases = [
        ("aten::mm", None, "matrix products"),
        ("aten::mm", backward, "matrix products"),
        ("aten::mm", step, "optimiser"),
        ("aten::gelu", None, "norms and elementwise"),
        ("_NormBackward", None, "norms and elementwise"),
        ("_Drop", None, "norms and elementwise"),
        ("_LinearBackward", None, "matrix products"),
        ("mkldnn::_linear_pointwise", None, "matrix products"),
        ("aten::bmm", attention, "attention"),
        ("aten::_log_softmax", None, "loss"),
        ("autograd::engine::evaluate_function: MmBackward0", None, "other"),
    ]
    for name, parent, expected in cases:
        assert group_of(SimpleNamespace(name=name, cpu_parent=parent)) == expected, name


def test_every_matrix_that_tokens_meet_is_timed(make):
    run = prepare(make())
    shapes = matrix_shapes(run.model)
    assert shapes[(run.tokenizer.vocab_size, 16)] == 1, "the tied head"
    assert sum(shapes.values()) == 1 + sum(isinstance(layer, torch.nn.Linear) for layer in run.model.modules())


def test_weights_are_what_they_were(make):
    run = prepare(make())
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    with restoring(run):
        made = list(updates(run, 3))
        assert any(not torch.equal(tensor, before[name]) for name, tensor in run.model.state_dict().items())
    assert len(made) == 3 and made[2].loss < made[0].loss + 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.model.state_dict().items())


def test_what_has_no_steps_is_refused(make):
    with pytest.raises(ConfigError, match="more than 2 are needed"):
        bench(make({"train": {"max_steps": 2}}), 0.0)
