"""XLNet in Hugging Face: config.json and the names of tensors, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from isoform.models.bert_forms import blocks, pair, under
from isoform.models.encoder import HuggingFace, headless, prefixed, stored_names
from isoform.models.gpt2_forms import ACTIVATIONS, activation
from isoform.models.heads import Shape
from isoform.models.hf_config import check_fields, expect
from isoform.models.names import Place, Table

STEM = "transformer."
# Fields of config.json that are read here, refused by name, or concern other heads and memories of earlier texts.
KNOWN = frozenset(
    """
    vocab_size n_token d_model n_layer n_head d_inner d_head ff_activation attn_type layer_norm_eps dropout mem_len
    reuse_len use_mems_eval use_mems_train use_mems bi_data clamp_len same_length summary_type summary_use_proj
    summary_activation summary_last_dropout start_n_top end_n_top tie_word_embeddings untie_r init init_range init_std
    hidden_size num_hidden_layers num_attention_heads
    """.split()  # noqa: SIM905
)
CLASSIFIER = Shape(
    names={"dense": "sequence_summary.summary", "scores": "logits_proj"},
    poolings=("last",),
    activation=torch.tanh,
    dropout=lambda config: 0.1,
    dropout_field="summary_last_dropout",
    stored_dropout=lambda given: float(given.get("summary_last_dropout", 0.1)),
    tokens=Shape(names={"scores": "classifier"}, poolings=("none",)),
)


def _why_not(config: Any) -> list[str]:
    kind = config.feedforward["kind"]
    return [] if kind in ACTIVATIONS else [f"feedforward {kind}"]


def _write(config: Any) -> dict[str, Any]:
    return {
        "model_type": "xlnet",
        "architectures": ["XLNetLMHeadModel" if config.head == "tokens" else "XLNetModel"],
        "vocab_size": config.vocab_size,
        "d_model": config.width,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "d_head": config.width // config.num_heads,
        "d_inner": config.resolved["feedforward_width"],
        "ff_activation": ACTIVATIONS[config.feedforward["kind"]][0],
        "attn_type": "bi",
        "bi_data": False,
        "clamp_len": config.max_distance or -1,
        "layer_norm_eps": config.norm_eps,
        "dropout": config.dropout,
        "initializer_range": 0.02,
        "tie_word_embeddings": config.tied,
    }


def _read(given: Mapping[str, Any]) -> dict[str, Any]:
    check_fields(given, KNOWN)
    expect(given, "attn_type", "bi")
    expect(given, "bi_data", False)
    expect(given, "same_length", False)
    expect(given, "untie_r", True)
    expect(given, "summary_type", "last")
    expect(given, "summary_use_proj", True)
    expect(given, "summary_activation", "tanh")
    width, num_heads = given.get("d_model", 1024), given.get("n_head", 16)
    expect(given, "d_head", width // num_heads, None)
    clamp = given.get("clamp_len") or -1
    stored = stored_names(given)
    return {
        "vocab_size": given.get("vocab_size", given.get("n_token", 32000)),
        "width": width,
        "num_layers": given.get("n_layer", 24),
        "num_heads": num_heads,
        "feedforward_width": given.get("d_inner", 4096),
        "feedforward": {"kind": activation(given, "ff_activation", "gelu")},
        "max_distance": clamp if clamp > 0 else None,
        "norm_eps": given.get("layer_norm_eps", 1e-12),
        "dropout": given.get("dropout", 0.1),
        "head": "none" if stored is not None and not any(name.startswith("lm_loss.") for name in stored) else "tokens",
        "tied": given.get("tie_word_embeddings", True),
    }


# ------------------------------------------------------------------------------------------------------------- tensors


def _table(config: Any) -> Table:
    """Their names -> our places; there projections are `(d, h, k)`, inputs first, the last one outputs first."""
    width, shape = config.width, (config.width, config.num_heads, config.width // config.num_heads)

    def turned(name: str, rows: tuple[int, int] | None = None) -> Place:
        return Place(name, _turned, partial(_unturned, shape), rows=rows)

    attention: dict[str, Place] = {
        letter: turned("attention.qkv.weight", (at * width, (at + 1) * width)) for at, letter in enumerate("qkv")
    }
    attention |= {
        "r": turned("attention.position.weight"),
        "o": Place("attention.output.weight", lambda tensor: tensor.flatten(1), lambda matrix: matrix.reshape(shape)),
        "r_w_bias": Place("attention.content_bias"),
        "r_r_bias": Place("attention.position_bias"),
        "r_s_bias": Place("attention.segment_bias"),
        "seg_embed": Place("attention.segment_embedding"),
    }
    parts: Mapping[str, Mapping[str, Place]] = {
        "rel_attn": attention,
        "rel_attn.layer_norm": pair("attention_norm"),
        "ff.layer_1": pair("feedforward.up"),
        "ff.layer_2": pair("feedforward.down"),
        "ff.layer_norm": pair("feedforward_norm"),
    }
    return {
        f"{STEM}word_embedding.weight": Place("embedding.weight"),
        f"{STEM}mask_emb": Place("mask_vector", lambda tensor: tensor[0], lambda vector: vector[None]),
        **blocks(f"{STEM}layer.{{}}", parts),
        **under("lm_loss", {"weight": _matrix(config), "bias": Place("head.bias")}),
    }


def _matrix(config: Any) -> Place:
    if config.tied:
        return Place("no_table", fill=_embedding, write_fill=False)
    return Place("head.table.weight")


def _embedding(ours: Mapping[str, Tensor]) -> Tensor:
    return ours["embedding.weight"]


def _turned(tensor: Tensor) -> Tensor:
    """`(d, h, k)` -> `(h k, d)`."""
    return tensor.flatten(1).t().contiguous()


def _unturned(shape: tuple[int, int, int], matrix: Tensor) -> Tensor:
    """`(h k, d)` -> `(d, h, k)`."""
    return matrix.t().reshape(shape).contiguous()


def _stored(config: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors if config.head == "tokens" else headless(tensors, STEM)


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return prefixed(tensors, STEM, ("word_embedding.", "mask_emb", "layer."))


XLNET = HuggingFace(why_not=_why_not, write=_write, read=_read, table=_table, renamed=_renamed, stored=_stored)
