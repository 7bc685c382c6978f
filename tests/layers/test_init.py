from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from isoform.layers.init import initialize, linear, normal


class Arm(nn.Module):
    def __init__(self, width: int, *, extra: bool = False) -> None:
        super().__init__()
        if extra:
            self.gate = linear(width, width, bias=True)
        self.up = linear(width, 4 * width, bias=True)
        self.down = linear(4 * width, width, bias=False)
        self.norm = nn.LayerNorm(width)


def test_table() -> None:
    arm = Arm(128)
    initialize(arm, 0, num_layers=8)
    assert arm.up.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert arm.down.weight.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.02)
    assert torch.equal(arm.norm.weight, torch.ones(128))
    assert not arm.norm.bias.any()
    assert not arm.up.bias.any()


def test_equal_names_and_shapes_have_equal_values_whatever_else_there_is() -> None:
    plain, more = Arm(16), Arm(16, extra=True)
    initialize(plain, 3, num_layers=2)
    torch.manual_seed(99)
    initialize(more, 3, num_layers=2)
    theirs = more.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in plain.state_dict().items())
    other = Arm(16)
    initialize(other, 4, num_layers=2)
    assert not torch.equal(other.up.weight, plain.up.weight)
    assert not torch.equal(plain.up.weight.flatten()[:64], plain.down.weight.flatten()[:64])


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    initialize(Arm(8), 1, num_layers=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_values_do_not_drift() -> None:
    """The first draws of one parameter, so that a changed key or generator is seen."""
    drawn = normal(torch.Size([3]), 0, "embedding.weight")
    torch.testing.assert_close(drawn, torch.tensor([-0.9310627, -0.7897388, 0.5678439]), rtol=1e-6, atol=1e-6)


def test_in_inference_mode_a_weight_is_converted_once_and_again_where_it_has_changed() -> None:
    layer, hidden = linear(8, 6, bias=True), torch.randn(5, 8)
    initialize(layer, 0, num_layers=None)

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            with torch.inference_mode():
                quick = layer(hidden)
            return quick.clone(), nn.functional.linear(hidden, layer.weight, layer.bias).detach()

    assert torch.equal(*both())
    kept = layer._converted
    assert torch.equal(*both()) and layer._converted is kept
    with torch.no_grad():
        layer.weight.mul_(2)
    assert torch.equal(*both()) and layer._converted is not kept
    layer.weight.data = torch.randn(6, 8)
    assert torch.equal(*both())
    with torch.inference_mode():
        assert torch.equal(layer(hidden), nn.functional.linear(hidden, layer.weight, layer.bias))
    layer(hidden).sum().backward()  # what inference made is no hindrance
    assert layer.weight.grad is not None and set(layer.state_dict()) == {"weight", "bias"}
