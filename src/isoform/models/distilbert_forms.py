"""DistilBERT in Hugging Face: config.json and the names of tensors, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from isoform.models.bert_forms import blocks, decoder, pair, qkv, under, waves
from isoform.models.encoder import HuggingFace, headless, prefixed, stored_names
from isoform.models.gpt2_forms import ACTIVATIONS, activation
from isoform.models.hf_config import check_fields, expect
from isoform.models.names import Place, Table

STEM = "distilbert."
KNOWN = frozenset(
    """
    vocab_size dim n_layers n_heads hidden_dim activation dropout attention_dropout max_position_embeddings
    sinusoidal_pos_embds tie_word_embeddings tie_weights_ pruned_heads qa_dropout seq_classif_dropout
    """.split()  # noqa: SIM905
)


def _write(config: Any) -> dict[str, Any]:
    return {
        "model_type": "distilbert",
        "architectures": ["DistilBertForMaskedLM" if config.head == "masked" else "DistilBertModel"],
        "vocab_size": config.vocab_size,
        "dim": config.width,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "hidden_dim": config.resolved["feedforward_width"],
        "activation": ACTIVATIONS[config.feedforward["kind"]][0],
        "dropout": config.dropout,
        "attention_dropout": config.resolved["attention_dropout"],
        "max_position_embeddings": config.max_positions,
        "sinusoidal_pos_embds": False,
        "initializer_range": 0.02,
        "tie_word_embeddings": config.tied,
    }


def _read(given: Mapping[str, Any]) -> dict[str, Any]:
    check_fields(given, KNOWN)
    # `sinusoidal_pos_embds` says how the table of positions was first filled; it is stored either way.
    expect(given, "pruned_heads", {}, None)
    dropout, attention = given.get("dropout", 0.1), given.get("attention_dropout", 0.1)
    stored = stored_names(given)
    named = "ForMaskedLM" in str(given.get("architectures", "ForMaskedLM"))
    return {
        "vocab_size": given.get("vocab_size", 30522),
        "width": given.get("dim", 768),
        "num_layers": given.get("n_layers", 6),
        "num_heads": given.get("n_heads", 12),
        "feedforward_width": given.get("hidden_dim", 3072),
        "feedforward": {"kind": activation(given, "activation", "gelu")},
        "dropout": dropout,
        "attention_dropout": None if attention == dropout else attention,
        "max_positions": given.get("max_position_embeddings", 512),
        "tied": given.get("tie_word_embeddings", True),
        "head": "masked" if (named if stored is None else any(n.startswith("vocab_") for n in stored)) else "none",
    }


def _table(config: Any) -> Table:
    block = {
        **qkv("attention.{}_lin", ("q", "k", "v"), config.width),
        "attention.out_lin": pair("attention.output"),
        "sa_layer_norm": pair("attention_norm"),
        "ffn.lin1": pair("feedforward.up"),
        "ffn.lin2": pair("feedforward.down"),
        "output_layer_norm": pair("feedforward_norm"),
    }
    return {
        f"{STEM}embeddings.word_embeddings.weight": Place("embedding.weight"),
        f"{STEM}embeddings.position_embeddings.weight": Place("position.embedding.weight", fill=waves(config)),
        f"{STEM}embeddings.position_ids": None,
        **under(f"{STEM}embeddings.LayerNorm", pair("input_norm")),
        **blocks(f"{STEM}transformer.layer.{{}}", block),
        **under("vocab_transform", pair("head.dense")),
        **under("vocab_layer_norm", pair("head.norm")),
        **decoder("vocab_projector", None, config),
    }


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return prefixed(tensors, STEM, ("embeddings.", "transformer."))


DISTILBERT = HuggingFace(
    why_not=lambda config: [] if config.max_positions else ["model without max_positions"],
    write=_write,
    read=_read,
    table=_table,
    renamed=_renamed,
    stored=lambda config, tensors: tensors if config.head == "masked" else headless(tensors, STEM),
)
