"""T5's form in Hugging Face: config.json and the names of its tensors, of the first version and of v1.1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from isoform.errors import ConfigError
from isoform.models.hf_config import check_fields, expect
from isoform.models.names import Place, Table

# Ours -> theirs; the first is written, all are read. There `gated-gelu` means the form with tanh.
ACTIVATIONS = {
    "relu": ("relu",),
    "gelu": ("gelu", "gelu_python"),
    "gelu-tanh": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
    "relu-squared": ("relu2",),
    "geglu-tanh": ("gated-gelu", "gated-gelu_new", "gated-gelu_pytorch_tanh"),
    "geglu": ("gated-gelu_python",),
    "swiglu": ("gated-silu", "gated-swish"),
}


# Fields of config.json that are followed, or that follow from others.
_READ = """
classifier_dropout d_ff d_kv d_model dense_act_fn dropout_rate feed_forward_proj initializer_factor is_decoder
is_encoder_decoder is_gated_act layer_norm_epsilon n_positions num_decoder_layers num_heads num_layers output_past
relative_attention_max_distance relative_attention_num_buckets scale_decoder_outputs tie_word_embeddings vocab_size
"""
READ = frozenset(_READ.split())


def write_config(config: Any) -> tuple[dict[str, Any] | None, str | None]:
    """(config.json, None), or (None, the reason why there is none)."""
    kind = config.feedforward["kind"]
    if kind not in ACTIVATIONS:
        return None, f"t5 in transformers has no feedforward {kind}"
    return {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": config.width,
        "d_kv": config.key_width,
        "d_ff": config.feedforward_width or 4 * config.width,
        "num_layers": config.num_layers,
        "num_decoder_layers": config.num_decoder_layers or config.num_layers,
        "num_heads": config.num_heads,
        "relative_attention_num_buckets": config.num_buckets,
        "relative_attention_max_distance": config.max_distance,
        "dropout_rate": config.dropout,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_factor": 1.0,
        "feed_forward_proj": ACTIVATIONS[kind][0],
        "tie_word_embeddings": config.tied,
        # transformers 4 goes by the line above, transformers 5 by this one
        "scale_decoder_outputs": config.scaled,
    }, None


def read_config(given: Mapping[str, Any]) -> dict[str, Any]:
    """Our options from their config.json. Raises: ConfigError naming the field that our model cannot follow."""
    check_fields(given, READ)
    expect(given, "is_encoder_decoder", True)
    expect(given, "is_decoder", False)
    # transformers 5 calls every head tied and tells v1.1 by this field; before, `tie_word_embeddings` told both.
    tied = given.get("tie_word_embeddings", True) is not False
    scaled = bool(given.get("scale_decoder_outputs", tied))
    # Its own v1.1 has the embedding for a head; published ones have a head among their tensors.
    own_head = "lm_head.weight" in given.get("tensor_names", ["lm_head.weight"])
    layers = given.get("num_layers", 6)
    return {
        "vocab_size": given.get("vocab_size", 32128),
        "width": given.get("d_model", 512),
        "head_width": given.get("d_kv", 64),
        "feedforward_width": given.get("d_ff", 2048),
        "num_layers": layers,
        "num_decoder_layers": given.get("num_decoder_layers") or layers,
        "num_heads": given.get("num_heads", 8),
        "num_buckets": given.get("relative_attention_num_buckets", 32),
        "max_distance": given.get("relative_attention_max_distance", 128),
        "dropout": given.get("dropout_rate", 0.1),
        "start_id": given.get("decoder_start_token_id"),
        "norm_eps": given.get("layer_norm_epsilon", 1e-6),
        "feedforward": {"kind": _activation(given.get("feed_forward_proj", "relu"))},
        "tied": (tied and scaled) or not own_head,
        "scale_logits": scaled,
    }


def _activation(name: str) -> str:
    for ours, theirs in ACTIVATIONS.items():
        if name in theirs:
            return ours
    known = ", ".join(name for theirs in ACTIVATIONS.values() for name in theirs)
    raise ConfigError(f"config.json: feed_forward_proj {name!r} is not known; known: {known}")


def table(config: Any) -> Table:
    """Their names -> our places, every layer spelled out: encoder and decoder may differ in depth."""
    places: dict[str, Place | None] = {
        "shared.weight": Place("embedding.weight"),
        "encoder.embed_tokens.weight": Place("encoder.embedding.weight", fill=_embedding, write_fill=False),
        "decoder.embed_tokens.weight": Place("decoder.embedding.weight", fill=_embedding, write_fill=False),
        "lm_head.weight": Place("head.weight", fill=_embedding, write_fill=False),
        # in old checkpoints; cross-attention has no positions
        "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": None,
    }
    for stack, num_layers in (
        ("encoder", config.num_layers),
        ("decoder", config.num_decoder_layers or config.num_layers),
    ):
        scores = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        places[scores] = Place(f"{stack}.position.embedding.weight")
        places[f"{stack}.final_layer_norm.weight"] = Place(f"{stack}.final_norm.weight")
        for layer in range(num_layers):
            for theirs, place in _block(config, f"{stack}.blocks.{layer}", decoder=stack == "decoder").items():
                places[f"{stack}.block.{layer}.layer.{theirs}.weight"] = place
    return places


def _block(config: Any, ours: str, *, decoder: bool) -> dict[str, Place]:
    inner = config.num_heads * config.key_width
    rows = [(start * inner, (start + 1) * inner) for start in range(3)]
    places = {
        f"0.SelfAttention.{part}": Place(f"{ours}.attention.qkv.weight", rows=rows["qkv".index(part)]) for part in "qkv"
    }
    places["0.SelfAttention.o"] = Place(f"{ours}.attention.output.weight")
    places["0.layer_norm"] = Place(f"{ours}.attention_norm.weight")
    if decoder:
        cross = f"{ours}.cross_attention"
        places["1.EncDecAttention.q"] = Place(f"{cross}.query.weight")
        places |= {
            f"1.EncDecAttention.{part}": Place(f"{cross}.key_value.weight", rows=rows["kv".index(part)])
            for part in "kv"
        }
        places["1.EncDecAttention.o"] = Place(f"{cross}.output.weight")
        places["1.layer_norm"] = Place(f"{ours}.cross_attention_norm.weight")
    last = 2 if decoder else 1
    gated = ACTIVATIONS[config.feedforward["kind"]][0].startswith("gated")
    inner_names = {"wi_0": "gate", "wi_1": "up", "wo": "down"} if gated else {"wi": "up", "wo": "down"}
    for theirs, part in inner_names.items():
        places[f"{last}.DenseReluDense.{theirs}"] = Place(f"{ours}.feedforward.{part}.weight")
    places[f"{last}.layer_norm"] = Place(f"{ours}.feedforward_norm.weight")
    return places


def _embedding(ours: Mapping[str, Tensor]) -> Tensor:
    return ours["embedding.weight"]
