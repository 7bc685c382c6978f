from __future__ import annotations

import copy

import pytest
import torch

from isoform.evaluation.generate import reading
from isoform.layers import kernels
from isoform.layers.quantized import Int8Linear, in_int8
from isoform.models.llama import Llama


@pytest.fixture(params=[False, True], ids=["torch", "kernels"], autouse=True)
def ways(request):
    before = kernels.switched_on()
    kernels.switch(request.param)
    yield
    kernels.switch(before)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_layer_is_within_the_steps_of_eight_bits(autocast):
    torch.manual_seed(0)
    layer, hidden = torch.nn.Linear(96, 40), torch.randn(3, 7, 96)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, plain = Int8Linear(layer)(hidden), layer(hidden)
    assert ours.dtype == plain.dtype and ours.shape == plain.shape
    assert (ours.float() - plain.float()).square().mean().sqrt() < 0.02 * plain.float().std()


def test_rows_of_zeros_and_outliers_keep_to_themselves():
    torch.manual_seed(0)
    layer, hidden = torch.nn.Linear(16, 8), torch.randn(3, 16)
    hidden[0], hidden[2, 3] = 0.0, 1e4
    quantized = Int8Linear(layer)
    torch.testing.assert_close(quantized(hidden)[0], layer.bias)
    assert torch.equal(quantized(hidden)[1], quantized(hidden[1:2])[0])


def test_a_model_shares_what_is_not_quantized():
    model = Llama.tiny()
    quantized = in_int8(model)
    assert quantized.embedding.weight is model.embedding.weight
    assert isinstance(quantized.blocks[0].attention.qkv, Int8Linear)
    assert isinstance(model.blocks[0].attention.qkv, torch.nn.Linear)


def test_no_rows_give_none():
    assert Int8Linear(torch.nn.Linear(64, 8))(torch.empty(0, 64)).shape == (0, 8)


def test_what_is_in_eight_bits_may_be_copied_and_stays_what_it_is():
    torch.manual_seed(0)
    layer, hidden = Int8Linear(torch.nn.Linear(16, 8)), torch.randn(3, 16)
    assert torch.equal(copy.deepcopy(layer)(hidden), layer(hidden))
    mixture = Llama.tiny(feedforward={"kind": "moe", "experts": 2, "active": 1})
    quantized = in_int8(mixture)
    assert in_int8(quantized) is quantized
    once = reading(mixture, int8=True)
    assert reading(once, int8=True) is once
