"""Every encoder family has the values and gradients of its model in transformers, and its tensors there and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertModel,
    ModernBertConfig,
    ModernBertForMaskedLM,
    ModernBertModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaModel,
)

from isoform.contracts import Batch, Sequences
from isoform.errors import CheckpointError, ConfigError
from isoform.layers import ragged
from isoform.models.bert import Bert
from isoform.registry import lookup

LENGTHS = [5, 1, 17, 9, 30]
BASE = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80}
HF: dict[str, tuple[type[PreTrainedModel], dict[str, Any]]] = {
    "bert": (BertForMaskedLM, {}),
    "bert, relu, three segments, eps": (
        BertForMaskedLM,
        {"hidden_act": "relu", "type_vocab_size": 3, "layer_norm_eps": 1e-3},
    ),
    "bert untied": (BertForMaskedLM, {"tie_word_embeddings": False}),
    "bert encoder": (BertModel, {}),
    "bert pretraining": (BertForPreTraining, {"hidden_act": "gelu_new"}),
    "bert next sentence": (BertForNextSentencePrediction, {}),
    "roberta": (RobertaForMaskedLM, {"type_vocab_size": 1}),
    "roberta, padding 5, relu": (RobertaForMaskedLM, {"pad_token_id": 5, "hidden_act": "relu", "type_vocab_size": 1}),
    "roberta untied": (RobertaForMaskedLM, {"tie_word_embeddings": False}),
    "roberta encoder": (RobertaModel, {}),
    "distilbert": (DistilBertForMaskedLM, {}),
    "distilbert untied, relu": (DistilBertForMaskedLM, {"tie_word_embeddings": False, "activation": "relu"}),
    "distilbert, waves": (DistilBertForMaskedLM, {"sinusoidal_pos_embds": True}),
    "distilbert encoder": (DistilBertModel, {}),
    "modernbert": (ModernBertForMaskedLM, {}),
    "modernbert, odd window, every second, bases": (
        ModernBertForMaskedLM,
        {
            "local_attention": 5,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 500.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
            },
        },
    ),
    "modernbert untied, all global": (
        ModernBertForMaskedLM,
        {"tie_word_embeddings": False, "layer_types": ["full_attention"] * 4},
    ),
    "modernbert encoder": (ModernBertModel, {}),
}
hf_models = pytest.mark.parametrize("kind", HF)


SIZES: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "bert": (BertConfig, BASE),
    "roberta": (RobertaConfig, BASE),
    "distilbert": (DistilBertConfig, {"vocab_size": 61, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 80}),
    "modernbert": (ModernBertConfig, {**BASE, "num_hidden_layers": 4, "local_attention": 8, "pad_token_id": 0}),
}


def hf_model(kind: str) -> PreTrainedModel:
    cls, changes = HF[kind]
    config_class, sizes = SIZES[kind.split()[0].rstrip(",")]
    torch.manual_seed(0)
    model = cls(config_class(**{**sizes, "max_position_embeddings": 48, **changes}))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    for name, parameter in model.named_parameters():
        if "untied" in kind and name in ("cls.predictions.bias", "lm_head.bias"):
            parameter.data.zero_()  # a left-over that transformers stores and never adds
    return model.eval()


def one(batch: Batch, row: int) -> tuple[Batch, slice]:
    """One sequence of a batch, and where it stood."""
    first, length = ragged.starts(batch.sequences)[row], batch.sequences.lengths[row]
    span = slice(first, first + length)
    keys, segments = batch.sample_keys[row : row + 1], batch.segments
    alone = Batch(batch.tokens[span], batch.positions[span], Sequences([length]), keys, dropout_key=batch.dropout_key)
    alone.segments = None if segments is None else segments[span]
    return alone, span


def stored(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors as a file of `save_pretrained` holds them."""
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def loaded(config: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    cls = lookup("model", config["model_type"])
    model = cls(cls.from_hf({**config, "tensor_names": list(tensors)}), seed=None)
    model.load_state_dict(cls.state_from_hf(config, tensors))
    return model


def padded(batch: Batch, padding: int) -> dict[str, Tensor]:
    lengths = batch.sequences.lengths
    shape = len(lengths), max(lengths)
    ids, mask = torch.full(shape, padding), torch.zeros(shape, dtype=torch.int64)
    types = torch.zeros(shape, dtype=torch.int64)
    for row, length in enumerate(lengths):
        alone, _ = one(batch, row)
        ids[row, :length], mask[row, :length] = alone.tokens, 1
        if alone.segments is not None:
            types[row, :length] = alone.segments
    inputs = {"input_ids": ids, "attention_mask": mask}
    return inputs if batch.segments is None else {**inputs, "token_type_ids": types}


@hf_models
def test_outputs_and_gradients_equal_transformers(kind: str, make_batch: Any) -> None:
    hf = hf_model(kind)
    ours = loaded(hf.config.to_dict(), stored(hf))
    batch, padding = make_batch(LENGTHS), hf.config.pad_token_id
    batch.tokens[batch.tokens == padding] = 7
    num_segments, pooler = (getattr(ours.config, field, None) for field in ("num_segments", "pooler"))
    if num_segments:
        batch.segments = torch.arange(sum(LENGTHS)) % num_segments
    inputs = padded(batch, padding)
    real = inputs["attention_mask"].bool()
    output, hidden = hf(**inputs, output_hidden_states=True), ours(batch).hidden
    pairs = [(hidden, output.hidden_states[-1][real])]
    if ours.head is not None:
        logits = output.prediction_logits if "pretraining" in kind else output.logits
        pairs.append((ours.logits(hidden), logits[real]))
        dense = ours.dense(**inputs)
        assert torch.equal(dense[real], pairs[-1][0])
        assert not dense[~real].any()
    if pooler == "plain":
        pairs.append((ours.pooled(hidden, batch.sequences), output.pooler_output))
    elif pooler == "next-sentence":
        scores = output.seq_relationship_logits if "pretraining" in kind else output.logits
        pairs.append((ours.next_sentence(ours.pooled(hidden, batch.sequences)), scores))
    for mine, theirs in pairs:
        assert float((mine - theirs).detach().norm() / theirs.detach().norm()) < 1e-5

    weights = [torch.randn_like(mine) for mine, _ in pairs]
    sum((mine * weight).sum() for (mine, _), weight in zip(pairs, weights, strict=True)).backward()
    sum((theirs * weight).sum() for (_, theirs), weight in zip(pairs, weights, strict=True)).backward()
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in hf.named_parameters()
    }
    expected = type(ours).state_from_hf(hf.config.to_dict(), gradients)
    for name, parameter in ours.named_parameters():
        error = (parameter.grad - expected[name]).norm() / expected[name].norm()
        assert float(error) < 1e-4, name


@hf_models
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back(kind: str, dtype: torch.dtype) -> None:
    hf = hf_model(kind).to(dtype)
    tensors, config = stored(hf), {**hf.config.to_dict(), "architectures": [type(hf).__name__]}
    model = loaded(config, tensors).to(dtype)
    back = model.state_to_hf()
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert back[name].is_contiguous()
        assert torch.equal(back[name], tensor), name
    form, reason = model.hf_form(model.config)
    assert reason is None
    not_said = {"sinusoidal_pos_embds"}  # how a table was first filled
    assert {k: v for k, v in form.items() if k not in not_said} == {k: config[k] for k in form if k not in not_said}
    assert type(model).from_hf(form) == model.config


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_old_names_and_buffers_are_understood(kind: str) -> None:
    hf = hf_model(kind)
    config, tensors = hf.config.to_dict(), stored(hf)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }
    old[f"{kind}.embeddings.position_ids"] = torch.arange(48)[None]
    decoder = "cls.predictions.decoder" if kind == "bert" else "lm_head.decoder"
    bias = "cls.predictions.bias" if kind == "bert" else "lm_head.bias"
    old[f"{decoder}.weight"] = tensors[f"{kind}.embeddings.word_embeddings.weight"].clone()
    old[f"{decoder}.bias"] = tensors[bias].clone()
    cls = lookup("model", kind)
    expected = cls.state_from_hf(config, tensors)
    for given in (old, {name.removeprefix(f"{kind}."): tensor for name, tensor in old.items()}):
        got = cls.state_from_hf(config, given)
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    old[f"{decoder}.weight"] += 1
    with pytest.raises(CheckpointError, match=r"decoder.weight: holds values that this model has no parameter for"):
        cls.state_from_hf(config, old)


@pytest.mark.parametrize(
    ("renamed", "message"),
    [
        (
            "bert.encoder.layer.1.attention.self.querry.weight",
            r"did you mean 'bert.encoder.layer.1.attention.self.query",
        ),
        ("cls.predictions.transform.weight", r"did you mean 'cls.predictions.transform.dense.weight'"),
        ("classifier.weight", r"unknown: classifier.weight"),
    ],
)
def test_a_renamed_tensor_is_named_with_what_it_should_be(renamed: str, message: str) -> None:
    hf = hf_model("bert")
    tensors, right = stored(hf), "bert.encoder.layer.1.attention.self.query.weight"
    if renamed.startswith("cls"):
        right = "cls.predictions.transform.dense.weight"
    tensors[renamed] = tensors.pop(right)
    with pytest.raises(CheckpointError, match=message) as caught:
        Bert.state_from_hf(hf.config.to_dict(), tensors)
    assert f"missing: {right}" in str(caught.value)


def test_a_misshapen_part_is_named() -> None:
    hf = hf_model("bert")
    name = "bert.encoder.layer.0.attention.self.key.weight"
    for shape in ((31, 32), (32, 31)):
        with pytest.raises(CheckpointError, match=rf"{name}: has the shape \({shape[0]}, {shape[1]}\), \(32, 32\) is"):
            Bert.state_from_hf(hf.config.to_dict(), {**stored(hf), name: torch.ones(shape)})
    with pytest.raises(
        CheckpointError, match=r"word_embeddings.weight: has the shape \(61, 32\), \(70, 32\) .* vocab_size"
    ):
        Bert.state_from_hf({**hf.config.to_dict(), "vocab_size": 70}, stored(hf))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (
            "bert",
            {"position_embedding_type": "relative_key"},
            "position_embedding_type is 'relative_key'",
        ),
        ("bert", {"hidden_act": "mish"}, "hidden_act 'mish' is not known"),
        ("bert", {"is_decoder": True}, "is_decoder is True"),
        ("roberta", {"add_cross_attention": True}, "add_cross_attention is True"),
        ("distilbert", {"activation": "mish"}, "activation 'mish' is not known"),
        ("modernbert", {"norm_bias": True}, "norm_bias is True"),
        ("modernbert", {"hidden_activation": "silu"}, "hidden_activation is 'silu'"),
        (
            "modernbert",
            {"rope_parameters": {"full_attention": {"rope_theta": None}}},
            "global_rope_theta or .*: None, a number is expected",
        ),
        ("modernbert", {"layer_types": ["sliding_attention"] * 4}, "layer_types: full_attention in the first layer"),
        ("modernbert", {"rope_scaling": {"type": "linear"}}, "rope_parameters.full_attention.rope_type is 'linear'"),
        ("bert", {"pruned_heads": {"0": [1]}}, "pruned_heads is"),
        ("bert", {"rope_theta": 1e4}, "rope_theta is 10000.0 and is not known for bert"),
        (
            "distilbert",
            {"dropuot": 0.2},
            r"dropuot is 0.2 and is not known for distilbert \(did you mean 'dropout'\?\)",
        ),
    ],
)
def test_fields_that_matter_and_are_not_ours_are_refused(kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lookup("model", kind).from_hf({**hf_model(kind).config.to_dict(), **changes})
