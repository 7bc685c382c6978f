from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isoform.registry import component


@settings(max_examples=20, deadline=None)
@given(shift=st.floats(-10, 10), size=st.floats(0.01, 100))
def test_what_norms_do_not_see(shift: float, size: float) -> None:
    hidden = torch.randn(6, 16, dtype=torch.float64)
    for kind, changed in (("layernorm", hidden * size + shift), ("rmsnorm", hidden * size)):
        cls, config = component("norm", {"kind": kind, "eps": 1e-12}, "model.norm")
        norm = cls(config, 16).double()
        for name, parameter in norm.named_parameters():
            torch.nn.init.constant_(parameter, 0.0 if name == "bias" else 1.0)
        torch.testing.assert_close(norm(changed), norm(hidden), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norm(hidden).pow(2).mean(-1), torch.ones(6, dtype=torch.float64))


def test_bias_can_be_left_out() -> None:
    cls, config = component("norm", {"kind": "layernorm", "bias": False}, "model.norm")
    assert [name for name, _ in cls(config, 4).named_parameters()] == ["weight"]


def test_rmsnorm_takes_the_mean_in_float32() -> None:
    cls, config = component("norm", {"kind": "rmsnorm"}, "model.norm")
    norm = cls(config, 256)
    torch.nn.init.ones_(norm.weight)
    hidden = (torch.randn(8, 256) * 100).bfloat16()
    expected = hidden.float() / hidden.float().pow(2).mean(-1, keepdim=True).add(1e-6).sqrt()
    torch.testing.assert_close(norm.bfloat16()(hidden).float(), expected, rtol=0.01, atol=0.01)
