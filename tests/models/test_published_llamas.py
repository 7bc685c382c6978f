"""The recipes of published decoders have the parameters and configs of the published models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from isoform.config import run_config
from isoform.models.accounting import accounts
from isoform.reading import read_config
from isoform.registry import build_options, lookup

LLAMA_2 = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
LLAMA_3 = {
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}


def stretched(factor: float) -> dict[str, Any]:
    """Positions of Llama 3.1 and 3.2."""
    turns = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, **turns}
    return {"max_position_embeddings": 131072, "rope_parameters": rope}


def shape(layers: int, heads: int, width: int, inner: int) -> dict[str, int]:
    return {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_size": width,
        "intermediate_size": inner,
    }


PUBLISHED: dict[str, tuple[Any, Any]] = {
    "llama-7b": (LlamaForCausalLM, LlamaConfig()),
    "llama-13b": (LlamaForCausalLM, LlamaConfig(**shape(40, 40, 5120, 13824))),
    "llama-33b": (LlamaForCausalLM, LlamaConfig(**shape(60, 52, 6656, 17920))),
    "llama-65b": (LlamaForCausalLM, LlamaConfig(**shape(80, 64, 8192, 22016))),
    "llama-2-7b": (LlamaForCausalLM, LlamaConfig(**LLAMA_2)),
    "llama-2-13b": (LlamaForCausalLM, LlamaConfig(**LLAMA_2, **shape(40, 40, 5120, 13824))),
    "llama-2-70b": (
        LlamaForCausalLM,
        LlamaConfig(**LLAMA_2, **shape(80, 64, 8192, 28672), num_key_value_heads=8),
    ),
    "llama-3-8b": (LlamaForCausalLM, LlamaConfig(**LLAMA_3)),
    "llama-3-70b": (LlamaForCausalLM, LlamaConfig(**{**LLAMA_3, **shape(80, 64, 8192, 28672)})),
    "llama-3.1-8b": (LlamaForCausalLM, LlamaConfig(**{**LLAMA_3, **stretched(8.0)})),
    "llama-3.2-1b": (
        LlamaForCausalLM,
        LlamaConfig(**{**LLAMA_3, **shape(16, 32, 2048, 8192), **stretched(32.0)}, tie_word_embeddings=True),
    ),
    "llama-3.2-3b": (
        LlamaForCausalLM,
        LlamaConfig(**{**LLAMA_3, **shape(28, 24, 3072, 8192), **stretched(32.0)}, tie_word_embeddings=True),
    ),
    "llama-smollm2-135m": (
        LlamaForCausalLM,
        LlamaConfig(
            **shape(30, 9, 576, 1536),
            vocab_size=49152,
            num_key_value_heads=3,
            tie_word_embeddings=True,
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        ),
    ),
    "llama-mistral-7b": (MistralForCausalLM, MistralConfig(max_position_embeddings=8192, rms_norm_eps=1e-5)),
    "mixtral-8x7b": (MixtralForCausalLM, MixtralConfig(max_position_embeddings=32768)),
    "mixtral-8x22b": (
        MixtralForCausalLM,
        MixtralConfig(**shape(56, 48, 6144, 16384), vocab_size=32768, max_position_embeddings=65536),
    ),
}
# What the published models leave to training and to their authors' files.
NOT_SHAPE = ("architectures", "head_dim", "router_aux_loss_coef", "isoform")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_has_the_size_of_its_model(name: str) -> None:
    cls, hf_config = PUBLISHED[name]
    config = run_config(read_config(name))
    options = dict(config.model)
    family = lookup("model", options.pop("family"))
    given = {"vocab_size": config.text.tokenizer["vocab_size"], "max_positions": config.text.max_tokens}
    with torch.device("meta"):
        ours = family(build_options(family, {**given, **options}, "model"), seed=None)
        theirs = cls(hf_config)
    number = sum(parameter.numel() for parameter in theirs.parameters())
    assert sum(parameter.numel() for parameter in ours.parameters()) == number
    assert f"{number / 1e6:.1f} M parameters" in config.about
    form, reason = family.hf_form(ours.config)
    assert reason is None
    expected = hf_config.to_dict()
    alike = [field for field in form if field not in NOT_SHAPE]
    assert {field: form[field] for field in alike} == {field: expected[field] for field in alike}
    if name == "mixtral-8x7b":
        assert round(accounts(ours, 1024)["active"] / 1e8) == 129
