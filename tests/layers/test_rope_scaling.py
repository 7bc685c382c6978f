"""The angles of every scaling against those of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from isoform.errors import ConfigError
from isoform.layers.position import Rope
from isoform.registry import component


def rope(**options: Any) -> Rope:
    cls, config = component("position", {"kind": "rope", **options}, "model.position")
    made: Rope = cls(config, width=512, num_heads=4, head_width=128, max_positions=None)
    return made


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (
            {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
            {"kind": "llama3"},
        ),
        (
            {"low_freq_factor": 0.5, "high_freq_factor": 9.0, "original_max_position_embeddings": 300},
            {"kind": "llama3", "low_turns": 0.5, "high_turns": 9.0, "original_positions": 300},
        ),
        ({"original_max_position_embeddings": 2048}, {"kind": "yarn"}),
        (
            {"original_max_position_embeddings": 500, "beta_fast": 8, "beta_slow": 2, "attention_factor": 0.7},
            {"kind": "yarn", "original_positions": 500, "fast_turns": 8, "slow_turns": 2, "attention_factor": 0.7},
        ),
        (
            {"original_max_position_embeddings": 40, "truncate": False},
            {"kind": "yarn", "original_positions": 40, "rounded": False},
        ),
    ],
)
@pytest.mark.parametrize("base", [10_000.0, 500_000.0])
@pytest.mark.parametrize("factor", [1.0, 6.5])
def test_angles_are_those_of_transformers(
    theirs: dict[str, Any], ours: dict[str, Any], base: float, factor: float
) -> None:
    parameters = {"rope_type": ours["kind"], "rope_theta": base, "factor": factor, **theirs}
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, rope_parameters=parameters)
    expected, amplitude = ROPE_INIT_FUNCTIONS[ours["kind"]](config, torch.device("cpu"))
    position = rope(base=base, scaling={**ours, "factor": factor})
    torch.testing.assert_close(position.inverse_frequencies(torch.device("cpu")), expected, rtol=1e-5, atol=0)
    cos, sin = position.waves(torch.arange(3), torch.float32)
    torch.testing.assert_close(cos[:, 0], (torch.arange(3)[:, None] * expected).cos() * amplitude)
    torch.testing.assert_close(sin[:, 0], (torch.arange(3)[:, None] * expected).sin() * amplitude)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 2.0, "scaling": {"kind": "yarn"}}, r"`scale` and `scaling` are both given"),
        ({"scaling": {"kind": "yarm"}}, r"model.position.scaling: .*yarm"),
        ({"scaling": {"kind": "llama3", "factor": 0.5}}, r"model.position.scaling.llama3.factor: given 0.5"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rope(**options)
