"""BERT and RoBERTa in Hugging Face: config.json and the names of tensors, both ways."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from isoform.layers.position import sinusoids
from isoform.models.encoder import HuggingFace, headless, prefixed, stored_names
from isoform.models.gpt2_forms import ACTIVATIONS, activation
from isoform.models.hf_config import check_fields, expect
from isoform.models.names import Place, Table

# Ends of their tensors' names before 2019.
OLD_ENDS = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
ENCODER = ("embeddings.", "encoder.", "pooler.")
# Fields of config.json that are read here or concern other heads.
KNOWN = frozenset(
    """
    vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act hidden_dropout_prob
    attention_probs_dropout_prob max_position_embeddings type_vocab_size layer_norm_eps tie_word_embeddings is_decoder
    add_cross_attention position_embedding_type pruned_heads embedding_size classifier_dropout directionality
    pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type
    gradient_checkpointing
    """.split()  # noqa: SIM905
)
# Our head and pooler -> the class of transformers that has both; RoBERTa's has no next-sentence head.
CLASSES = {
    ("none", "none"): "Model",
    ("none", "plain"): "Model",
    ("none", "next-sentence"): "ForNextSentencePrediction",
    ("masked", "none"): "ForMaskedLM",
    ("masked", "plain"): "ForMaskedLM",
    ("masked", "next-sentence"): "ForPreTraining",
}


def why_not(config: Any) -> list[str]:
    """What the config has and transformers' model has not."""
    parts = {name: getattr(config, name)["kind"] for name in ("position", "norm", "feedforward")}
    reasons = {
        f"position {parts['position']}": parts["position"] not in ("learned", "sinusoidal", "none"),
        f"norm {parts['norm']}": parts["norm"] != "layernorm",
        "norm without a bias": not config.norm.get("bias", True),
        f"feedforward {parts['feedforward']}": parts["feedforward"] not in ACTIVATIONS,
        "window": config.window is not None,
        "model without max_positions": config.max_positions is None,
    }
    return [reason for reason, holds in reasons.items() if holds]


def write(config: Any, model_type: str, name: str) -> dict[str, Any]:
    """config.json of a model that `why_not` finds nothing against."""
    return {
        "model_type": model_type,
        "architectures": [name + CLASSES[config.head, config.pooler]],
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.resolved["feedforward_width"],
        "hidden_act": ACTIVATIONS[config.feedforward["kind"]][0],
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.resolved["attention_dropout"],
        "max_position_embeddings": config.max_positions + config.position_offset,
        "type_vocab_size": max(1, config.num_segments),
        "initializer_range": 0.02,
        "layer_norm_eps": config.norm["eps"],
        "tie_word_embeddings": config.tied,
        "is_decoder": False,
        "add_cross_attention": False,
    }


def read(given: Mapping[str, Any], segments: int, required: tuple[str, ...] = ()) -> dict[str, Any]:
    """Our options from their config.json; segments: the number that the family has unless told; required: fields that
    may not be null.
    """
    check_fields(given, KNOWN, required)
    expect(given, "position_embedding_type", "absolute")
    expect(given, "is_decoder", False)
    expect(given, "add_cross_attention", False)
    expect(given, "pruned_heads", {}, None)
    expect(given, "embedding_size", given.get("hidden_size", 768), None)
    dropout = given.get("hidden_dropout_prob", 0.1)
    attention = given.get("attention_probs_dropout_prob", 0.1)
    return {
        "vocab_size": given.get("vocab_size", 30522),
        "width": given.get("hidden_size", 768),
        "num_layers": given.get("num_hidden_layers", 12),
        "num_heads": given.get("num_attention_heads", 12),
        "feedforward_width": given.get("intermediate_size", 3072),
        "feedforward": {"kind": activation(given, "hidden_act", "gelu")},
        "norm": {"kind": "layernorm", "eps": given.get("layer_norm_eps", 1e-12)},
        "dropout": dropout,
        "attention_dropout": None if attention == dropout else attention,
        "max_positions": given.get("max_position_embeddings", 512),
        "num_segments": given.get("type_vocab_size", segments),
        "tied": given.get("tie_word_embeddings", True),
        **_parts(given),
    }


def _parts(given: Mapping[str, Any]) -> dict[str, str]:
    """Head and pooler: those whose tensors are there, or those of the class that config.json names."""
    stored = stored_names(given)
    if stored is None:
        name = next(iter(given.get("architectures") or ["ForMaskedLM"]))
        return {
            "head": "masked" if name.endswith(("ForMaskedLM", "ForPreTraining", "LMHeadModel")) else "none",
            "pooler": "next-sentence"
            if name.endswith(("ForNextSentencePrediction", "ForPreTraining"))
            else ("plain" if name.endswith("Model") else "none"),
        }
    pooler = "plain" if any("pooler." in name for name in stored) else "none"
    return {
        "head": "masked" if any(name.startswith(("cls.predictions.", "lm_head.")) for name in stored) else "none",
        "pooler": "next-sentence" if any(name.startswith("cls.seq_") for name in stored) else pooler,
    }


def renamed(tensors: Mapping[str, Tensor], stem: str) -> dict[str, Tensor]:
    """Names of today behind the stem of the encoder."""
    today = {re.sub("|".join(OLD_ENDS), lambda end: OLD_ENDS[end[0]], name): each for name, each in tensors.items()}
    return prefixed(today, stem, ENCODER)


def stored(config: Any, tensors: dict[str, Tensor], stem: str) -> dict[str, Tensor]:
    """Names as the folder has them: the encoder alone has no stem."""
    if CLASSES[config.head, config.pooler] != "Model":
        return tensors
    return headless(tensors, stem)


# ------------------------------------------------------------------------------------------------------------- tensors


def encoder_table(config: Any, stem: str) -> Table:
    """Their names -> our places, the heads left out."""
    width, segments = config.width, max(1, config.num_segments)
    block = {
        **qkv("attention.self.{}", ("query", "key", "value"), width),
        "attention.output.dense": pair("attention.output"),
        "attention.output.LayerNorm": pair("attention_norm"),
        "intermediate.dense": pair("feedforward.up"),
        "output.dense": pair("feedforward.down"),
        "output.LayerNorm": pair("feedforward_norm"),
    }
    return {
        f"{stem}embeddings.word_embeddings.weight": Place("embedding.weight"),
        f"{stem}embeddings.position_embeddings.weight": Place("position.embedding.weight", fill=waves(config)),
        f"{stem}embeddings.token_type_embeddings.weight": Place(
            "segment_embedding.weight", fill=lambda ours: torch.zeros(segments, width)
        ),
        f"{stem}embeddings.position_ids": None,  # 0, 1, 2, ... in old checkpoints
        f"{stem}embeddings.token_type_ids": None,
        **under(f"{stem}embeddings.LayerNorm", pair("input_norm")),
        **blocks(f"{stem}encoder.layer.{{}}", block),
        **under(f"{stem}pooler.dense", pair("pooler")),
    }


def bert_table(config: Any) -> Table:
    """All of BERT."""
    return {
        **encoder_table(config, "bert."),
        **under("cls.predictions.transform.dense", pair("head.dense")),
        **under("cls.predictions.transform.LayerNorm", pair("head.norm")),
        **decoder("cls.predictions.decoder", "cls.predictions.bias", config),
        **under("cls.seq_relationship", pair("next_sentence")),
    }


def roberta_table(config: Any) -> Table:
    """All of RoBERTa."""
    return {
        **encoder_table(config, "roberta."),
        **under("lm_head.dense", pair("head.dense")),
        **under("lm_head.layer_norm", pair("head.norm")),
        **decoder("lm_head.decoder", "lm_head.bias", config),
    }


def decoder(theirs: str, bias: str | None, config: Any) -> Table:
    """The last matrix of the head and its bias, of which a model with a tied head may store copies.

    bias: the name beside the matrix under which a tied head keeps its bias, if there is one. A head with its own matrix
    uses the bias of the matrix; the other is a left-over, zero.
    """
    if config.head == "none":
        return {}
    own = Place("head.bias")
    if not config.tied:
        left_over = {bias: Place("no_bias", fill=lambda ours: torch.zeros_like(ours["head.bias"]))} if bias else {}
        return {f"{theirs}.weight": Place("head.table.weight"), f"{theirs}.bias": own, **left_over}
    matrix = Place("no_table", fill=lambda ours: ours["embedding.weight"], write_fill=False)
    if bias is None:
        return {f"{theirs}.weight": matrix, f"{theirs}.bias": own}
    copy = Place("no_copy", fill=lambda ours: ours["head.bias"], write_fill=False)
    return {f"{theirs}.weight": matrix, f"{theirs}.bias": copy, bias: own}


def waves(config: Any) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """What stands in the table of a model without learned positions: waves, or zeros."""

    def fill(ours: Mapping[str, Tensor]) -> Tensor:
        rows = (config.max_positions or 1) + config.position_offset
        if config.position["kind"] != "sinusoidal":
            return torch.zeros(rows, config.width)
        return sinusoids(torch.arange(rows), config.width, config.position["base"], config.position["amplitude"])

    return fill


def pair(ours: str) -> dict[str, Place]:
    """Weight and bias."""
    return {kind: Place(f"{ours}.{kind}") for kind in ("weight", "bias")}


def qkv(theirs: str, each: tuple[str, str, str], width: int) -> dict[str, dict[str, Place]]:
    """Three matrices of theirs, and their biases, which are one of ours; `{}` stands for the name of each."""
    return {
        theirs.format(name): {
            kind: replace(place, rows=(at * width, (at + 1) * width)) for kind, place in pair("attention.qkv").items()
        }
        for at, name in enumerate(each)
    }


def under(theirs: str, places: Mapping[str, Place]) -> dict[str, Place | None]:
    """The places behind one of their names."""
    return {f"{theirs}.{kind}": place for kind, place in places.items()}


def blocks(stem: str, parts: Mapping[str, Mapping[str, Place]]) -> dict[str, Place | None]:
    """The places of every block."""
    return {
        f"{stem}.{part}.{kind}": replace(place, name=f"blocks.{{}}.{place.name}")
        for part, places in parts.items()
        for kind, place in places.items()
    }


def _form(model_type: str, name: str, stem: str, table: Callable[[Any], Table], segments: int) -> HuggingFace:
    return HuggingFace(
        why_not=why_not,
        write=lambda config: write(config, model_type, name),
        read=lambda given: read(given, segments),
        table=table,
        renamed=lambda tensors: renamed(tensors, stem),
        stored=lambda config, tensors: stored(config, tensors, stem),
    )


def _read_roberta(given: Mapping[str, Any]) -> dict[str, Any]:
    """RoBERTa's table of positions begins with as many unused rows as the padding token's id says, and one."""
    options = read({"vocab_size": 50265, **given}, 2, ("pad_token_id",))
    padding = given.get("pad_token_id", 1)
    return {**options, "padding_id": padding, "max_positions": options["max_positions"] - padding - 1}


BERT = _form("bert", "Bert", "bert.", bert_table, segments=2)
ROBERTA = replace(
    _form("roberta", "Roberta", "roberta.", roberta_table, segments=2),
    read=_read_roberta,
    write=lambda config: {**write(config, "roberta", "Roberta"), "pad_token_id": config.padding_id},
)
