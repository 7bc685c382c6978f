"""A config.json with a field of another type is refused in one line that names the field and what it must be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from isoform.checkpoints.folders import family_for, load_model
from isoform.checkpoints.tensors import write_tensors
from isoform.errors import CheckpointError, ConfigError
from isoform.registry import lookup

WHOLE, NUMBER = "a whole number above 0 is expected", "a number is expected"
CASES: list[tuple[str, str, Any, str]] = [
    ("llama", "rope_scaling", "linear", 'rope_scaling is "linear", a table such as'),
    ("llama", "rope_parameters", [1], "rope_parameters is [1], a table such as"),
    ("gpt_neox", "rope_parameters", 1, "rope_parameters is 1, a table such as"),
    ("modernbert", "rope_parameters", [1], "rope_parameters is [1], a table such as"),
    ("modernbert", "rope_scaling", "linear", 'rope_scaling is "linear", a table such as'),
    ("modernbert", "rope_parameters", {"full_attention": 5}, "rope_parameters.full_attention is 5, a table such as"),
    ("modernbert", "rope_scaling", {"type": ["linear"]}, 'rope_scaling.type is ["linear"], a name'),
    (
        "modernbert",
        "rope_parameters",
        {"full_attention": {"rope_theta": "1"}},
        'rope_parameters.full_attention.rope_theta is "1", a number',
    ),
    ("llama", "rope_parameters", {"rope_type": "yarn", "factor": "4"}, 'rope_parameters.factor is "4", a number'),
    (
        "llama",
        "rope_scaling",
        {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 0},
        "rope_scaling.original_max_position_embeddings is 0, a whole number above 0, or null, is expected",
    ),
    ("roberta", "pad_token_id", None, "pad_token_id is null, a whole number of at least 0 is expected"),
    ("roberta", "pad_token_id", "1", 'pad_token_id is "1", a whole number of at least 0 is expected'),
    ("roberta", "max_position_embeddings", None, f"max_position_embeddings is null, {WHOLE}"),
    ("bert", "hidden_dropout_prob", "0.1", f'hidden_dropout_prob is "0.1", {NUMBER}'),
    ("bert", "hidden_size", 32.5, f"hidden_size is 32.5, {WHOLE}"),
    ("bert", "architectures", "BertModel", 'architectures is "BertModel", a list of names, or null, is expected'),
    ("bert", "architectures", [5], "architectures is [5], a list of names, or null, is expected"),
    ("xlnet", "n_head", "4", f'n_head is "4", {WHOLE}'),
    ("xlnet", "n_head", 0, f"n_head is 0, {WHOLE}"),
    ("xlnet", "d_model", None, f"d_model is null, {WHOLE}"),
    ("xlnet", "clamp_len", "no", 'clamp_len is "no", a whole number, or null, is expected'),
    ("mixtral", "router_aux_loss_coef", None, f"router_aux_loss_coef is null, {NUMBER}"),
    ("mixtral", "num_experts_per_tok", "2", f'num_experts_per_tok is "2", {WHOLE}'),
    ("modernbert", "classifier_dropout", None, f"classifier_dropout is null, {NUMBER}"),
    ("modernbert", "global_attn_every_n_layers", "x", f'global_attn_every_n_layers is "x", {WHOLE}'),
    ("modernbert", "layer_types", 3, "layer_types is 3, a list of names, or null, is expected"),
    ("distilbert", "seq_classif_dropout", [], f"seq_classif_dropout is [], {NUMBER}"),
    ("gpt2", "n_layer", True, f"n_layer is true, {WHOLE}"),
    ("t5", "tie_word_embeddings", "false", 'tie_word_embeddings is "false", true or false, or null, is expected'),
    ("gpt2", "isoform", [1], "isoform is [1], a table of our own options is expected"),
    *((kind, "id2label", ["a", "b", "c"], 'id2label is ["a"') for kind in ("bert", "roberta", "gpt2", "llama", "t5")),
    ("bert", "id2label", {"first": "a"}, 'id2label is {"first": "a"}, a table such as'),
]


@pytest.mark.parametrize(("model_type", "field", "value", "message"), CASES)
def test_a_field_of_another_type_is_named(model_type: str, field: str, value: Any, message: str) -> None:
    given = {"model_type": model_type, field: value}
    # A classifier's class reads its labels and its own rates too.
    given.setdefault("architectures", [f"{model_type}ForSequenceClassification"])
    with pytest.raises(ConfigError) as caught:
        lookup("model", str(family_for(model_type))).from_hf(given)
    assert str(caught.value).startswith(f"config.json: {message}")
    assert "\n" not in str(caught.value)


def test_the_line_names_the_folder_and_null_stays_where_it_is_a_choice(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "xlnet", "n_head": "4"}))
    write_tensors(tmp_path / "model.safetensors", {"x": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r'^.*: config.json: n_head is "4", a whole number above 0 is expected$'):
        load_model(tmp_path)
    open_fields = {"num_key_value_heads": None, "head_dim": None, "rope_scaling": None, "pad_token_id": None}
    config = lookup("model", "llama").from_hf({"model_type": "llama", **open_fields, "id2label": None})
    assert config.num_kv_heads is None and config.classifier is None
