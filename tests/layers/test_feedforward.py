from __future__ import annotations

import pytest
import torch
from transformers.activations import ACT2FN

from isoform.registry import component, names

# The name of each activation in transformers, and whether it gates.
KINDS = {
    "gelu": ("gelu", False),
    "gelu-tanh": ("gelu_new", False),
    "relu": ("relu", False),
    "relu-squared": ("relu2", False),
    "geglu": ("gelu", True),
    "geglu-tanh": ("gelu_new", True),
    "swiglu": ("silu", True),
}


def test_kinds() -> None:
    assert names("feedforward") == sorted([*KINDS, "moe"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_formula(kind: str, bias: bool) -> None:
    theirs, gated = KINDS[kind]
    cls, config = component("feedforward", {"kind": kind}, "model.feedforward")
    layer = cls(config, 8, 20, bias=bias)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    hidden = torch.randn(5, 8)
    act = ACT2FN[theirs]
    inner = act(layer.gate(hidden)) * layer.up(hidden) if gated else act(layer.up(hidden))
    torch.testing.assert_close(layer(hidden), layer.down(inner), rtol=1e-4, atol=1e-4)
    assert cls.gated is gated
    assert ("up.bias" in dict(layer.named_parameters())) is bias
