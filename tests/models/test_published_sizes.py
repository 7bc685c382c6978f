"""The recipes of published sizes have the parameters of the published models. Oracle: transformers' own configs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
    XLNetConfig,
    XLNetLMHeadModel,
)

from isoform.config import run_config
from isoform.reading import read_config
from isoform.registry import build_options, lookup

LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
ROBERTA = {"max_position_embeddings": 514, "type_vocab_size": 1}
PUBLISHED: dict[str, tuple[Any, Any]] = {
    "bert-base": (BertForMaskedLM, BertConfig()),
    "bert-large": (BertForMaskedLM, BertConfig(**LARGE)),
    "roberta-base": (RobertaForMaskedLM, RobertaConfig(**ROBERTA)),
    "roberta-large": (RobertaForMaskedLM, RobertaConfig(**ROBERTA, **LARGE)),
    "distilbert-base": (DistilBertForMaskedLM, DistilBertConfig()),
    "modernbert-base": (ModernBertForMaskedLM, ModernBertConfig()),
    "modernbert-large": (
        ModernBertForMaskedLM,
        ModernBertConfig(hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, intermediate_size=2624),
    ),
    "xlnet-base": (XLNetLMHeadModel, XLNetConfig(d_model=768, n_layer=12, n_head=12, d_inner=3072)),
    "xlnet-large": (XLNetLMHeadModel, XLNetConfig()),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_has_the_size_of_its_model(name: str) -> None:
    cls, hf_config = PUBLISHED[name]
    config = run_config(read_config(name))
    options = dict(config.model)
    family = lookup("model", options.pop("family"))
    given = {"vocab_size": config.text.tokenizer["vocab_size"]}
    if "max_positions" in family.Config.model_fields:
        given["max_positions"] = config.text.max_tokens
    # BERT segments (2) are those of a second sentence; RoBERTa's padding is the token 1.
    padding = {"padding_id": 1} if name.startswith("roberta") else {}
    with torch.device("meta"):
        ours = family(build_options(family, {**given, **padding, **options}, "model"), seed=None)
        theirs = cls(hf_config)
    number = sum(parameter.numel() for parameter in theirs.parameters())
    assert sum(parameter.numel() for parameter in ours.parameters()) == number
    assert f"{number / 1e6:.1f} M parameters" in config.about
    form, reason = family.hf_form(ours.config)
    assert reason is None
    expected = hf_config.to_dict()
    alike = [field for field in form if field not in ("architectures", "layer_norm_eps")]
    assert {field: form[field] for field in alike} == {field: expected[field] for field in alike}
