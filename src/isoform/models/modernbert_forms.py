"""ModernBERT in Hugging Face: config.json and the names of tensors, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from isoform.errors import ConfigError
from isoform.models.bert_forms import blocks, decoder, under
from isoform.models.encoder import HuggingFace, headless, prefixed, stored_names
from isoform.models.hf_config import check_fields, expect
from isoform.models.names import Place, Table

STEM = "model."
GLOBAL, LOCAL = "full_attention", "sliding_attention"
KNOWN = frozenset(
    """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings layer_types
    local_attention rope_parameters rope_scaling global_rope_theta local_rope_theta global_attn_every_n_layers norm_eps
    layer_norm_eps embedding_dropout attention_dropout mlp_dropout hidden_activation classifier_activation decoder_bias
    attention_bias mlp_bias norm_bias classifier_bias classifier_dropout classifier_pooling cls_token_id
    deterministic_flash_attn gradient_checkpointing initializer_cutoff_factor position_embedding_type reference_compile
    repad_logits_with_grad sparse_prediction sparse_pred_ignore_index tie_word_embeddings
    """.split()  # noqa: SIM905
)
BIASES = ("attention_bias", "mlp_bias", "norm_bias", "classifier_bias")


def _write(config: Any) -> dict[str, Any]:
    bases = {GLOBAL: config.global_base, LOCAL: config.local_base}
    return {
        "model_type": "modernbert",
        "architectures": ["ModernBertForMaskedLM" if config.head == "masked" else "ModernBertModel"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.inner_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.max_positions,
        "layer_types": _layer_types(config.num_layers, config.global_every),
        "local_attention": config.local_window,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": base} for kind, base in bases.items()},
        "norm_eps": config.norm_eps,
        "embedding_dropout": config.embedding_dropout,
        "attention_dropout": config.attention_dropout,
        "mlp_dropout": config.feedforward_dropout,
        "hidden_activation": "gelu",
        "classifier_activation": "gelu",
        "decoder_bias": True,
        **dict.fromkeys(BIASES, False),
        "initializer_range": 0.02,
        "tie_word_embeddings": config.tied,
    }


def _read(given: Mapping[str, Any]) -> dict[str, Any]:
    check_fields(given, KNOWN, required=("classifier_dropout",))
    for field in BIASES:
        expect(given, field, False)
    for field in ("hidden_activation", "classifier_activation"):
        expect(given, field, "gelu", "gelu_python")
    expect(given, "decoder_bias", True)
    stored, architectures = stored_names(given), str(given.get("architectures", "ForMaskedLM"))
    masked = "ForMaskedLM" in architectures if stored is None else any(n.startswith("decoder.") for n in stored)
    return {
        "vocab_size": given.get("vocab_size", 50368),
        "width": given.get("hidden_size", 768),
        "feedforward_width": given.get("intermediate_size", 1152),
        "num_layers": given.get("num_hidden_layers", 22),
        "num_heads": given.get("num_attention_heads", 12),
        "max_positions": given.get("max_position_embeddings", 8192),
        "global_every": _global_every(given),
        "local_window": given.get("local_attention", 128),
        "global_base": _base(given, GLOBAL, "global_rope_theta", 160_000.0),
        "local_base": _base(given, LOCAL, "local_rope_theta", 10_000.0),
        "norm_eps": given.get("norm_eps", 1e-5),
        "embedding_dropout": given.get("embedding_dropout", 0.0),
        "attention_dropout": given.get("attention_dropout", 0.0),
        "feedforward_dropout": given.get("mlp_dropout", 0.0),
        "head": "masked" if masked else "none",
        "tied": given.get("tie_word_embeddings", True),
    }


def _layer_types(num_layers: int, every: int) -> list[str]:
    return [LOCAL if layer % every else GLOBAL for layer in range(num_layers)]


def _global_every(given: Mapping[str, Any]) -> int:
    """How many layers there are to each global one, from either form of the field. Raises: ConfigError."""
    types = given.get("layer_types")
    if types is None:
        return int(given.get("global_attn_every_n_layers", 3))
    every = next((layer for layer in range(1, len(types)) if types[layer] == GLOBAL), len(types))
    if len(types) != given.get("num_hidden_layers", 22) or types != _layer_types(len(types), every):
        raise ConfigError(
            f"config.json: layer_types: {GLOBAL} in the first layer and in every n-th from it is expected, "
            f"{LOCAL} in the others, one for each of num_hidden_layers"
        )
    return every


def _base(given: Mapping[str, Any], kind: str, old: str, default: float) -> float:
    """RoPE's base in one kind of layer. Raises: ConfigError where the angles are scaled or it is no number."""
    rope = {**((given.get("rope_parameters") or {}).get(kind) or {}), **(given.get("rope_scaling") or {})}
    scalings = {rope.get("rope_type", "default"), rope.get("type", "default")} - {"default"}
    if scalings:
        raise ConfigError(f"config.json: rope_parameters.{kind}.rope_type is {scalings.pop()!r}, 'default' is expected")
    base = rope.get("rope_theta", given.get(old, default))
    if base is None and kind == LOCAL:  # in old folders null stood for the base of the other layers
        return _base(given, GLOBAL, "global_rope_theta", 160_000.0)
    if type(base) not in (int, float):
        raise ConfigError(f"config.json: {old} or rope_parameters.{kind}.rope_theta: {base!r}, a number is expected")
    return float(base)


# ------------------------------------------------------------------------------------------------------------- tensors


def _table(config: Any) -> Table:
    def weight(ours: str) -> dict[str, Place]:
        return {"weight": Place(f"{ours}.weight")}

    block = {
        "attn_norm": weight("attention_norm"),
        "attn.Wqkv": weight("attention.qkv"),
        "attn.Wo": weight("attention.output"),
        "mlp_norm": weight("feedforward_norm"),
        "mlp.Wi": weight("feedforward.inner"),
        "mlp.Wo": weight("feedforward.down"),
    }
    return {
        **under(f"{STEM}embeddings.tok_embeddings", weight("embedding")),
        **under(f"{STEM}embeddings.norm", weight("input_norm")),
        **blocks(f"{STEM}layers.{{}}", block),
        **under(f"{STEM}final_norm", weight("final_norm")),
        **under("head.dense", weight("head.dense")),
        **under("head.norm", weight("head.norm")),
        **decoder("decoder", None, config),
    }


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return prefixed(tensors, STEM, ("embeddings.", "layers.", "final_norm."))


MODERNBERT = HuggingFace(
    why_not=lambda config: [] if config.max_positions else ["model without max_positions"],
    write=_write,
    read=_read,
    table=_table,
    renamed=_renamed,
    stored=lambda config, tensors: tensors if config.head == "masked" else headless(tensors, STEM),
)
