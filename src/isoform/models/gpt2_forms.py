"""GPT-2's two forms in Hugging Face: `gpt2`, and `gpt_neox` with sequential residuals for rotary positions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from isoform.errors import ConfigError
from isoform.layers.position import sinusoids
from isoform.models.hf_config import check_fields, rope_parameters, rope_position
from isoform.models.names import Place, Table, same, transposed

# Ours -> theirs; the first is written, all are read.
ACTIVATIONS = {
    "gelu-tanh": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
    "gelu": ("gelu", "gelu_python"),
    "relu": ("relu",),
    "relu-squared": ("relu2",),
}
# Fields of config.json that are followed, refused by name, or concern other heads and nothing that is computed here.
_READ_GPT2 = """
activation_function add_cross_attention attn_pdrop embd_pdrop layer_norm_epsilon n_ctx n_embd n_head n_inner n_layer
n_positions predict_special_tokens reorder_and_upcast_attn resid_pdrop scale_attn_by_inverse_layer_idx
scale_attn_weights summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
tie_word_embeddings vocab_size
"""
_READ_NEOX = """
attention_bias attention_dropout classifier_dropout hidden_act hidden_dropout hidden_size intermediate_size
layer_norm_eps max_position_embeddings num_attention_heads num_hidden_layers partial_rotary_factor rope_parameters
rope_scaling rope_theta rotary_emb_base rotary_pct tie_word_embeddings use_parallel_residual vocab_size
"""


def choose(config: Any) -> tuple[str | None, str | None]:
    """(model_type, None) where Hugging Face has a form for the model, else (None, the reason)."""
    position, norm, feedforward = (part["kind"] for part in (config.position, config.norm, config.feedforward))
    reasons = {
        f"position {position}": position in ("alibi", "t5"),
        f"norm {norm}": norm != "layernorm",
        f"feedforward {feedforward}": feedforward not in ACTIVATIONS,
        "grouped heads": config.num_kv_heads not in (None, config.num_heads),
        "a window": config.window is not None,
        "norm_first false": not config.norm_first,
        "no max_positions": config.max_positions is None,
    }
    broken = [reason for reason, holds in reasons.items() if holds]
    if broken:
        return None, f"neither gpt2 nor gpt_neox in transformers has {', '.join(broken)}"
    return ("gpt_neox" if position == "rope" else "gpt2"), None


def write_config(config: Any, model_type: str) -> dict[str, Any]:
    """config.json of a form that `choose` chose."""
    activation, rates = ACTIVATIONS[config.feedforward["kind"]][0], config.rates
    if model_type == "gpt2":
        return {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "vocab_size": config.vocab_size,
            "n_positions": config.max_positions,
            "n_embd": config.width,
            "n_layer": config.num_layers,
            "n_head": config.num_heads,
            "n_inner": config.feedforward_width,
            "activation_function": activation,
            "embd_pdrop": rates["embedding"],
            "resid_pdrop": rates["residual"],
            "attn_pdrop": rates["attention"],
            "layer_norm_epsilon": config.norm["eps"],
            "initializer_range": 0.02,
            "tie_word_embeddings": config.tied,
        }
    return {
        "model_type": "gpt_neox",
        "architectures": ["GPTNeoXForCausalLM"],
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_positions,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.feedforward_width or 4 * config.width,
        "hidden_act": activation,
        "hidden_dropout": rates["residual"],
        "attention_dropout": rates["attention"],
        "layer_norm_eps": config.norm["eps"],
        "initializer_range": 0.02,
        "use_parallel_residual": False,
        "attention_bias": True,
        "rope_parameters": {
            **rope_parameters(config.position),
            "partial_rotary_factor": config.position["fraction"],
        },
        "tie_word_embeddings": config.tied,
    }


def read_config(given: Mapping[str, Any]) -> dict[str, Any]:
    """Our options from their config.json. Raises: ConfigError naming the field that our model cannot follow."""
    return _read_gpt2(given) if given["model_type"] == "gpt2" else _read_neox(given)


def _read_gpt2(given: Mapping[str, Any]) -> dict[str, Any]:
    check_fields(given, _READ_GPT2.split())
    _refuse(given, "scale_attn_weights", True)
    _refuse(given, "scale_attn_by_inverse_layer_idx", False)
    _refuse(given, "add_cross_attention", False)
    return {
        "vocab_size": given.get("vocab_size", 50257),
        "max_positions": given.get("n_positions", given.get("n_ctx", 1024)),
        "width": given.get("n_embd", 768),
        "num_layers": given.get("n_layer", 12),
        "num_heads": given.get("n_head", 12),
        "feedforward_width": given.get("n_inner"),
        "feedforward": {"kind": activation(given, "activation_function", "gelu_new")},
        "norm": {"kind": "layernorm", "eps": given.get("layer_norm_epsilon", 1e-5)},
        "position": {"kind": "learned"},
        "tied": given.get("tie_word_embeddings", True),
        **_rates(given.get("embd_pdrop", 0.1), given.get("resid_pdrop", 0.1), given.get("attn_pdrop", 0.1)),
    }


def _read_neox(given: Mapping[str, Any]) -> dict[str, Any]:
    check_fields(given, _READ_NEOX.split())
    _refuse(given, "use_parallel_residual", False, default=True)
    _refuse(given, "attention_bias", True)
    fraction = given.get("rotary_pct", 0.25)
    longest = given.get("max_position_embeddings", 2048)
    width, heads = given.get("hidden_size", 6144), given.get("num_attention_heads", 64)
    hidden = given.get("hidden_dropout", 0.0)
    return {
        "vocab_size": given.get("vocab_size", 50432),
        "max_positions": longest,
        "width": width,
        "num_layers": given.get("num_hidden_layers", 44),
        "num_heads": heads,
        "feedforward_width": given.get("intermediate_size", 24576),
        "feedforward": {"kind": activation(given, "hidden_act", "gelu")},
        "norm": {"kind": "layernorm", "eps": given.get("layer_norm_eps", 1e-5)},
        "position": rope_position(given, base=10_000, fraction=fraction, max_positions=longest),
        "tied": given.get("tie_word_embeddings", False),
        **_rates(hidden, hidden, given.get("attention_dropout", 0.0)),
    }


def _refuse(given: Mapping[str, Any], field: str, expected: bool, default: bool | None = None) -> None:
    value = given.get(field, expected if default is None else default)
    if value != expected:
        raise ConfigError(f"config.json: {field} is {value}, {expected} is expected: this model has no such form here")


def activation(given: Mapping[str, Any], field: str, default: str) -> str:
    """Our kind of feed-forward layer for the activation that config.json names. Raises: ConfigError."""
    name = given.get(field, default)
    for ours, theirs in ACTIVATIONS.items():
        if name in theirs:
            return ours
    known = ", ".join(name for theirs in ACTIVATIONS.values() for name in theirs)
    raise ConfigError(f"config.json: {field} {name!r} is not known; known: {known}")


def _rates(embedding: float, residual: float, attention: float) -> dict[str, float]:
    if embedding == residual == attention:
        return {"dropout": residual}
    return {
        "dropout": residual,
        "embedding_dropout": embedding,
        "residual_dropout": residual,
        "attention_dropout": attention,
    }


# ------------------------------------------------------------------------------------------------------------- tensors


def table(config: Any, model_type: str) -> Table:
    """Their names -> our places."""
    return _gpt2_table(config) if model_type == "gpt2" else _neox_table(config)


def _gpt2_table(config: Any) -> Table:
    width, inner = config.width, config.feedforward_width or 4 * config.width
    block = {
        "ln_1": _norm("attention_norm", width),
        "ln_2": _norm("feedforward_norm", width),
        "attn.c_attn": _matrix("attention.qkv", 3 * width, transposed, transposed),
        "attn.c_proj": _matrix("attention.output", width, transposed, transposed),
        "mlp.c_fc": _matrix("feedforward.up", inner, transposed, transposed),
        "mlp.c_proj": _matrix("feedforward.down", width, transposed, transposed),
    }
    return {
        "transformer.wte.weight": Place("embedding.weight"),
        "transformer.wpe.weight": Place("position.embedding.weight", fill=_position_table(config)),
        **_blocks("transformer.h.{}", block),
        "transformer.h.{}.attn.bias": None,  # the causal mask, in old checkpoints
        "transformer.h.{}.attn.masked_bias": None,
        **_pair("transformer.ln_f", "final_norm", width),
        "lm_head.weight": Place("head.weight", fill=_embedding, write_fill=False),
    }


def _neox_table(config: Any) -> Table:
    width, inner, heads = config.width, config.feedforward_width or 4 * config.width, config.num_heads

    def read(tensor: Tensor) -> Tensor:
        """Rows (h, 3, k) -> rows (3, h, k)."""
        return tensor.reshape(heads, 3, -1, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)

    def write(tensor: Tensor) -> Tensor:
        """Rows (3, h, k) -> rows (h, 3, k)."""
        return tensor.reshape(3, heads, -1, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)

    block = {
        "input_layernorm": _norm("attention_norm", width),
        "post_attention_layernorm": _norm("feedforward_norm", width),
        "attention.query_key_value": {
            "weight": Place("attention.qkv.weight", read, write),
            "bias": Place("attention.qkv.bias", read, write, _zeros(3 * width)),
        },
        "attention.dense": _matrix("attention.output", width),
        "mlp.dense_h_to_4h": _matrix("feedforward.up", inner),
        "mlp.dense_4h_to_h": _matrix("feedforward.down", width),
    }
    return {
        "gpt_neox.embed_in.weight": Place("embedding.weight"),
        **_blocks("gpt_neox.layers.{}", block),
        "gpt_neox.layers.{}.attention.bias": None,  # the causal mask and the angles, in old checkpoints
        "gpt_neox.layers.{}.attention.masked_bias": None,
        "gpt_neox.layers.{}.attention.rotary_emb.inv_freq": None,
        **_pair("gpt_neox.final_layer_norm", "final_norm", width),
        "embed_out.weight": Place("head.weight", fill=_embedding, write_fill=False),
    }


def with_prefix(tensors: Mapping[str, Tensor], model_type: str) -> dict[str, Tensor]:
    """The names that the tables know, for checkpoints of the bare model and for the head's other name."""
    stem = "transformer." if model_type == "gpt2" else "gpt_neox."
    heads = {"lm_head.weight", "embed_out.weight"}
    head = "lm_head.weight" if model_type == "gpt2" else "embed_out.weight"
    bare = not any(name.startswith(stem) for name in tensors)
    return {head if name in heads else (stem + name if bare else name): tensor for name, tensor in tensors.items()}


def _blocks(stem: str, parts: Mapping[str, Mapping[str, Place]]) -> dict[str, Place | None]:
    return {
        f"{stem}.{part}.{kind}": replace(place, name=f"blocks.{{}}.{place.name}")
        for part, places in parts.items()
        for kind, place in places.items()
    }


def _pair(theirs: str, ours: str, width: int) -> dict[str, Place | None]:
    return {f"{theirs}.{kind}": place for kind, place in _norm(ours, width).items()}


def _norm(ours: str, width: int) -> dict[str, Place]:
    return {"weight": Place(f"{ours}.weight"), "bias": Place(f"{ours}.bias", fill=_zeros(width))}


def _matrix(
    ours: str, rows: int, read: Callable[[Tensor], Tensor] = same, write: Callable[[Tensor], Tensor] = same
) -> dict[str, Place]:
    return {"weight": Place(f"{ours}.weight", read, write), "bias": Place(f"{ours}.bias", fill=_zeros(rows))}


def _zeros(size: int) -> Callable[[Mapping[str, Tensor]], Tensor]:
    return lambda ours: torch.zeros(size)


def _position_table(config: Any) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """What stands where a model without a learned table is written as `gpt2`: waves, or zeros."""
    shape = config.max_positions, config.width
    if config.position["kind"] != "sinusoidal":
        return lambda ours: torch.zeros(shape)
    base, amplitude = config.position["base"], config.position["amplitude"]
    return lambda ours: sinusoids(torch.arange(shape[0]), shape[1], base, amplitude)


def _embedding(ours: Mapping[str, Tensor]) -> Tensor:
    return ours["embedding.weight"]
