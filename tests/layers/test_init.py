from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from isoform.layers.init import initialize, linear, normal, served
from isoform.training.optimizers import AdamWOptions, adamw


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


def both(layer: nn.Module, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the layer makes in inference mode, and what its weights as they are make."""
    with torch.autocast("cpu", torch.bfloat16):
        with torch.inference_mode():
            quick = layer(hidden)
        return quick.clone(), nn.functional.linear(hidden, layer.weight, layer.bias).detach()


@pytest.mark.parametrize("gradient_first", [False, True])
def test_a_weight_that_an_optimizer_has_changed_is_read_as_it_is(gradient_first: bool) -> None:
    layer, hidden = linear(8, 6, bias=True), torch.randn(5, 8)
    initialize(layer, 0, num_layers=None)
    optimizer = adamw(dict(layer.named_parameters()), 0.1, AdamWOptions())
    before, _ = both(layer, hidden)
    for _ in range(2):
        layer(hidden).sum().backward()
        if gradient_first:
            both(layer, hidden)
        optimizer.step()
        after, expected = both(layer, hidden)
        assert torch.equal(after, expected) and not torch.equal(after, before)


def test_a_served_model_converts_its_weights_once_and_shares_them() -> None:
    layer, hidden = linear(8, 6, bias=True), torch.randn(5, 8)
    initialize(layer, 0, num_layers=None)
    quick = served(layer)
    assert quick.weight is layer.weight and layer.converted is None
    assert torch.equal(*both(quick, hidden))
    kept = quick.converted[torch.bfloat16]
    assert torch.equal(*both(quick, hidden)) and quick.converted[torch.bfloat16] is kept
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quick(hidden), layer(hidden))
    with torch.inference_mode():
        assert torch.equal(quick(hidden), layer(hidden))
    with torch.autocast("cpu", torch.bfloat16):
        quick(hidden).sum().backward()  # what inference made is no hindrance
    assert layer.weight.grad is not None and set(quick.state_dict()) == {"weight", "bias"}
