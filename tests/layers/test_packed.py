from __future__ import annotations

import pytest
import torch

from isoform.layers import kernels
from isoform.layers.decoding import Packed

library = kernels.loaded()
pytestmark = pytest.mark.skipif(library is None, reason="no C++ kernels here: no compiler, or it failed")

KINDS = ("fp32", "bf16", "int8")


def rounded(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """The weights as they are after packing."""
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    return {"fp32": weight, "bf16": weight.bfloat16().float(), "int8": (weight / scale).round() * scale}[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(61, 50), (64, 64), (1, 3), (130, 200)])
@pytest.mark.parametrize("bias", [False, True])
def test_products_are_those_of_the_rounded_weights(kernel_way, kind, shape, bias):
    torch.manual_seed(0)
    weight, states = torch.randn(shape), torch.randn(19, shape[1])
    added = torch.randn(shape[0]) if bias else None
    packed = Packed(library, weight, added, kind)
    exact = torch.nn.functional.linear(
        states.double(), rounded(weight, kind).double(), None if added is None else added.double()
    )
    # Activations keep 15 bits or more.
    assert (packed(states) - exact).abs().max() < 1e-4 * exact.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_gives_the_same_bits_alone_in_a_batch_and_with_other_threads(kernel_way, kind):
    torch.manual_seed(0)
    packed, states = Packed(library, torch.randn(70, 90), None, kind), torch.randn(19, 90)
    together = packed(states)
    assert torch.equal(together, torch.cat([packed(states[i : i + 1]) for i in range(19)]))
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(together, packed(states))


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_are_no_trouble(kernel_way, kind):
    weight = torch.zeros(20, 40)
    weight[3] = 1.0
    states = torch.zeros(2, 40)
    states[1] = 2.0
    expected = torch.zeros(2, 20)
    expected[1, 3] = 80.0
    torch.testing.assert_close(Packed(library, weight, None, kind)(states), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_not_hidden(kernel_way, kind, value):
    torch.manual_seed(0)
    weight, states = torch.randn(20, 40), torch.randn(3, 40)
    states[1, 7] = value
    output = Packed(library, weight, None, kind)(states)
    assert output.isfinite().all(dim=1).tolist() == [True, False, True]


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_give_none(kernel_way, kind):
    assert Packed(library, torch.randn(20, 40), None, kind)(torch.empty(0, 40)).shape == (0, 20)
