"""LLaMA's forms in Hugging Face: `llama`, `mistral` for a window, `mixtral` for a mixture of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from isoform.errors import ConfigError
from isoform.models.hf_config import check_fields, expect, rope_parameters, rope_position
from isoform.models.names import Place, Table

# Ours -> theirs; the first is written, all are read.
ACTIVATIONS = {"swiglu": ("silu", "swish"), "geglu": ("gelu", "gelu_python")}
# What transformers takes where a config.json says nothing.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_dropout": 0.0,
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": 10_000.0,
    },
}
_LATER = {
    **{name: value for name, value in DEFAULTS["llama"].items() if name not in ("attention_bias", "mlp_bias")},
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
DEFAULTS["mistral"] = {**_LATER, "sliding_window": 4096}
DEFAULTS["mixtral"] = {
    **_LATER,
    "sliding_window": None,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "router_aux_loss_coef": 0.001,
}
ROPE_FIELDS = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")


def choose(config: Any) -> tuple[str | None, str | None]:
    """(model_type, None) where Hugging Face has a form for the model, else (None, the reason)."""
    position, norm, feedforward = config.position, config.norm["kind"], config.feedforward
    mixture = feedforward["kind"] == "moe"
    model_type = "mixtral" if mixture else "llama" if config.window is None else "mistral"
    reasons = {
        f"position {position['kind']}": position["kind"] != "rope",
        "heads that are turned in part": position.get("fraction", 1) != 1,
        f"norm {norm}": norm != "rmsnorm",
        f"feedforward {feedforward['kind']}": not mixture and feedforward["kind"] not in ACTIVATIONS,
        f"experts of kind {feedforward.get('expert')}": mixture and feedforward["expert"] not in ACTIVATIONS,
        "softmax before the choice of experts": mixture and feedforward["softmax"] == "before",
        "attention biases": config.attention_bias and model_type != "llama",
        "feed-forward biases": config.feedforward_bias and model_type != "llama",
        "no max_positions": config.max_positions is None,
        "heads that do not share the width": config.width % config.num_heads != 0,
    }
    broken = [reason for reason, holds in reasons.items() if holds]
    if broken:
        return None, f"{model_type} in transformers has not: {', '.join(broken)}"
    return model_type, None


def write_config(config: Any, model_type: str) -> dict[str, Any]:
    """config.json of a form that `choose` chose."""
    whole, feedforward = config.resolved(), config.feedforward
    form = {
        "model_type": model_type,
        "architectures": [f"{model_type.capitalize()}ForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": whole["feedforward_width"],
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": whole["num_kv_heads"],
        "head_dim": whole["head_width"],
        "hidden_act": ACTIVATIONS[feedforward.get("expert", feedforward["kind"])][0],
        "max_position_embeddings": config.max_positions,
        "initializer_range": 0.02,
        "rms_norm_eps": config.norm["eps"],
        "rope_parameters": rope_parameters(config.position),
        "attention_dropout": config.attention_dropout,
        "tie_word_embeddings": config.tied,
    }
    if model_type == "llama":
        return {**form, "attention_bias": config.attention_bias, "mlp_bias": config.feedforward_bias}
    form["sliding_window"] = config.window
    if model_type == "mixtral":
        form["num_local_experts"] = feedforward["experts"]
        form["num_experts_per_tok"] = feedforward["active"]
        # Theirs counts each choice of a token, ours each token.
        form["router_aux_loss_coef"] = feedforward["balance_weight"] / feedforward["active"]
    return form


def read_config(given: Mapping[str, Any]) -> dict[str, Any]:
    """Our options from their config.json. Raises: ConfigError naming the field that our model cannot follow."""
    model_type = given["model_type"]
    defaults = DEFAULTS[model_type]
    check_fields(given, [*defaults, *ROPE_FIELDS])
    expect(given, "rope_interleaved", False, None)
    expect(given, "router_jitter_noise", 0.0, None)
    # A null is a choice of its own: no window, as many key heads as heads.
    values = {name: given.get(name, default) for name, default in defaults.items()}
    longest = values["max_position_embeddings"]
    kind = _kind(values["hidden_act"])
    position = rope_position(given, base=defaults["rope_theta"], fraction=1.0, max_positions=longest)
    # transformers turns whole heads here, whatever the field says.
    expect({"partial_rotary_factor": position["fraction"]}, "partial_rotary_factor", 1.0, None)
    return {
        "vocab_size": values["vocab_size"],
        "width": values["hidden_size"],
        "feedforward_width": values["intermediate_size"],
        "num_layers": values["num_hidden_layers"],
        "num_heads": values["num_attention_heads"],
        "num_kv_heads": values["num_key_value_heads"],
        "head_width": values["head_dim"],
        "max_positions": longest,
        "norm": {"kind": "rmsnorm", "eps": values["rms_norm_eps"]},
        "position": position,
        "feedforward": _mixture(values, kind) if model_type == "mixtral" else {"kind": kind},
        "attention_dropout": values["attention_dropout"],
        "tied": values["tie_word_embeddings"],
        "attention_bias": values.get("attention_bias", False),
        "feedforward_bias": values.get("mlp_bias", False),
        "window": values.get("sliding_window"),
    }


def _kind(activation: Any) -> str:
    for ours, theirs in ACTIVATIONS.items():
        if activation in theirs:
            return ours
    known = ", ".join(name for theirs in ACTIVATIONS.values() for name in theirs)
    raise ConfigError(f"config.json: hidden_act {activation!r} is not known; known: {known}")


def _mixture(values: Mapping[str, Any], kind: str) -> dict[str, Any]:
    active = values["num_experts_per_tok"]
    return {
        "kind": "moe",
        "experts": values["num_local_experts"],
        "active": active,
        "expert": kind,
        "balance_weight": values["router_aux_loss_coef"] * active,
        "z_weight": 0.0,
    }


# ------------------------------------------------------------------------------------------------------------- tensors


def table(config: Any, model_type: str) -> Table:
    """Their names -> our places."""
    whole, block, layer = config.resolved(), "blocks.{}", "model.layers.{}"
    queries = config.num_heads * whole["head_width"]
    keys = whole["num_kv_heads"] * whole["head_width"]
    ends = {"q": (0, queries), "k": (queries, queries + keys), "v": (queries + keys, queries + 2 * keys)}
    kinds = ["weight", "bias"] if config.attention_bias else ["weight"]
    attention: dict[str, Place | None] = {
        f"{layer}.self_attn.{name}_proj.{kind}": Place(f"{block}.attention.qkv.{kind}", rows=rows)
        for name, rows in ends.items()
        for kind in kinds
    }
    for kind in kinds:
        attention[f"{layer}.self_attn.o_proj.{kind}"] = Place(f"{block}.attention.output.{kind}")
    return {
        "model.embed_tokens.weight": Place("embedding.weight"),
        f"{layer}.input_layernorm.weight": Place(f"{block}.attention_norm.weight"),
        f"{layer}.post_attention_layernorm.weight": Place(f"{block}.feedforward_norm.weight"),
        **attention,
        f"{layer}.self_attn.rotary_emb.inv_freq": None,  # the angles, in old checkpoints
        **(_experts(config.feedforward["experts"]) if model_type == "mixtral" else _feedforward(config)),
        "model.norm.weight": Place("final_norm.weight"),
        "lm_head.weight": Place("head.weight", fill=lambda ours: ours["embedding.weight"], write_fill=False),
    }


def _feedforward(config: Any) -> dict[str, Place | None]:
    return {
        f"model.layers.{{}}.mlp.{name}_proj.{kind}": Place(f"blocks.{{}}.feedforward.{name}.{kind}")
        for name in ("gate", "up", "down")
        for kind in (["weight", "bias"] if config.feedforward_bias else ["weight"])
    }


def _experts(experts: int) -> dict[str, Place | None]:
    """One matrix for each expert on disk, one `(e, ..)` for all in memory."""
    stem = "model.layers.{}.block_sparse_moe"
    places: dict[str, Place | None] = {f"{stem}.gate.weight": Place("blocks.{}.feedforward.router.weight")}
    for ours, theirs in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
        for expert in range(experts):
            places[f"{stem}.experts.{expert}.{theirs}.weight"] = Place(
                f"blocks.{{}}.feedforward.{ours}.weight",
                read=lambda tensor: tensor[None],
                write=lambda tensor: tensor[0],
                rows=(expert, expert + 1),
            )
    return places


def with_prefix(tensors: Mapping[str, Tensor], model_type: str) -> dict[str, Tensor]:
    """The names that the tables know, for checkpoints of the bare model."""
    if any(name.startswith("model.") for name in tensors):
        return dict(tensors)
    return {name if name == "lm_head.weight" else f"model.{name}": tensor for name, tensor in tensors.items()}
