"""BERT and RoBERTa: what holds for every variant, and parity with transformers."""

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
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaModel,
)

from isoform.contracts import Batch, Sequences
from isoform.errors import CheckpointError, ConfigError
from isoform.layers import ragged
from isoform.models.bert import Bert, Roberta
from isoform.registry import lookup

LENGTHS = [5, 1, 17, 9, 30]
VARIANTS: dict[str, dict[str, Any]] = {
    "learned": {},
    "none": {"position": "none"},
    "sinusoidal": {"position": "sinusoidal"},
    "rope": {"position": "rope"},
    "alibi": {"position": "alibi"},
    "window": {"window": 4, "position": "rope"},
    "rmsnorm, swiglu, untied": {"norm": "rmsnorm", "feedforward": "swiglu", "tied": False},
    "no segments": {"num_segments": 0},
}
variants = pytest.mark.parametrize("variant", VARIANTS)


def tiny(variant: str, cls: type[Bert] = Bert, **changes: Any) -> Bert:
    """A model whose every parameter is random and large enough to matter."""
    model = cls.tiny(**VARIANTS[variant], **changes)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def one(batch: Batch, row: int) -> tuple[Batch, slice]:
    """One sequence of a batch, and where it stood."""
    first, length = ragged.starts(batch.sequences)[row], batch.sequences.lengths[row]
    span = slice(first, first + length)
    keys, segments = batch.sample_keys[row : row + 1], batch.segments
    alone = Batch(batch.tokens[span], batch.positions[span], Sequences([length]), keys, dropout_key=batch.dropout_key)
    alone.segments = None if segments is None else segments[span]
    return alone, span


# ------------------------------------------------------------------------------------------------- every variant


@variants
@pytest.mark.parametrize("cls", [Bert, Roberta])
def test_a_sequence_does_not_know_its_batch(variant: str, cls: type[Bert], make_batch: Any) -> None:
    model, batch = tiny(variant, cls, attention_dropout=0.2).double(), make_batch(LENGTHS, dropout_key=5)
    if model.config.num_segments > 1:
        batch.segments = torch.arange(sum(LENGTHS)) % 2
    hidden = model(batch).hidden
    for row in range(len(LENGTHS)):
        alone, span = one(batch, row)
        torch.testing.assert_close(model(alone).hidden, hidden[span], rtol=1e-9, atol=1e-9)


@variants
def test_every_token_sees_both_sides_and_no_farther_than_its_window(variant: str, make_batch: Any) -> None:
    model, batch = tiny(variant, num_layers=1), make_batch([21])
    hidden = model(batch).hidden
    changed = batch.tokens.clone()
    changed[10] = (changed[10] + 1) % 61
    after = model(Batch(changed, batch.positions, batch.sequences, batch.sample_keys)).hidden
    moved = (after != hidden).any(dim=1).nonzero().flatten().tolist()
    assert moved == (list(range(21)) if model.config.window is None else [8, 9, 10, 11, 12])


@variants
@pytest.mark.parametrize("cls", [Bert, Roberta])
def test_every_parameter_gets_a_gradient(variant: str, cls: type[Bert], make_batch: Any) -> None:
    model, batch = tiny(variant, cls, pooler="plain"), make_batch(LENGTHS)
    hidden = model(batch).hidden
    (model.logits(hidden).logsumexp(-1).sum() + model.pooled(hidden, batch.sequences).square().sum()).backward()
    assert [name for name, parameter in model.named_parameters() if not parameter.grad.abs().sum() > 0] == []


def test_order_matters_but_without_positions(make_batch: Any) -> None:
    batch = make_batch([12])
    back = Batch(batch.tokens.flip(0), batch.positions, batch.sequences, batch.sample_keys)
    for kind in ("learned", "sinusoidal", "rope", "alibi", "none"):
        model = tiny(kind).double()
        same = torch.allclose(model(batch).hidden, model(back).hidden.flip(0))
        # ALiBi alone is a distance, which a mirror does not change.
        assert same == (kind in ("none", "alibi")), kind


def test_dropout_is_a_function_of_the_key(make_batch: Any) -> None:
    model, batch = tiny("learned", dropout=0.3), make_batch(LENGTHS, dropout_key=7)
    hidden = model(batch).hidden
    assert torch.equal(model(batch).hidden, hidden)
    for key in (None, 8):
        batch.dropout_key = key
        assert not torch.allclose(model(batch).hidden, hidden)


def test_layers_on_request(make_batch: Any) -> None:
    model, batch = Bert.tiny(), make_batch(LENGTHS)
    output = model(batch, all_layers=True)
    assert model(batch).layers is None
    assert output.layers is not None
    assert [tuple(layer.shape) for layer in output.layers] == [(62, 32)] * 3
    assert torch.equal(output.layers[-1], output.hidden)


def test_first_values_are_those_of_the_paper() -> None:
    model = Bert(Bert.Config(num_layers=2, width=64, num_heads=4, vocab_size=300, max_positions=64))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.2), name
        else:
            assert set(parameter.tolist()) == {0.0 if name.endswith("bias") else 1.0}, name


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (Bert, {"num_heads": 5}, r"model.num_heads: 5 given, a divisor of model.width 32"),
        (Bert, {"vocab_size": None}, r"model.vocab_size: missing"),
        (
            Bert,
            {"position": "ropes"},
            r"model.position.kind: 'ropes' is not a known position",
        ),
    ],
)
def test_refusals(cls: type[Bert], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cls.tiny(**options)


def test_what_an_encoder_cannot_do_is_refused_with_the_reason(make_batch: Any) -> None:
    model = Bert.tiny(head="none")
    with pytest.raises(ConfigError, match=r"model.head: none: .* without a head that guesses tokens"):
        model.logits(model(make_batch([3])).hidden)
    with pytest.raises(ConfigError, match="reads a text from both sides and cannot continue one"):
        model.new_cache(1)
    for cls in (Bert, Roberta):
        with pytest.raises(ConfigError, match=r"model.max_positions: 48 learned positions, a sequence of 49 tokens"):
            cls.tiny()(make_batch([3, 49]))
    assert Bert.tiny(position="rope")(make_batch([49])).hidden.shape == (49, 32)


# --------------------------------------------------------------------------------------------------------- parity


SIZE = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80}
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
}
hf_models = pytest.mark.parametrize("kind", HF)


def hf_model(kind: str) -> PreTrainedModel:
    cls, changes = HF[kind]
    config_class = RobertaConfig if kind.startswith("roberta") else BertConfig
    torch.manual_seed(0)
    model = cls(config_class(**{**SIZE, "max_position_embeddings": 48, **changes}))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    for name, parameter in model.named_parameters():
        if "untied" in kind and name in ("cls.predictions.bias", "lm_head.bias"):
            parameter.data.zero_()  # a left-over that transformers stores and never adds
    return model.eval()


def stored(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors as a file of `save_pretrained` holds them."""
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def loaded(config: dict[str, Any], tensors: dict[str, Tensor]) -> Bert:
    cls = lookup("model", config["model_type"])
    model: Bert = cls(cls.from_hf({**config, "tensor_names": list(tensors)}), seed=None)
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
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


@hf_models
def test_outputs_and_gradients_equal_transformers(kind: str, make_batch: Any) -> None:
    hf = hf_model(kind)
    ours = loaded(hf.config.to_dict(), stored(hf))
    batch, padding = make_batch(LENGTHS), hf.config.pad_token_id
    batch.tokens[batch.tokens == padding] = 7
    if ours.config.num_segments > 1:
        batch.segments = torch.arange(sum(LENGTHS)) % ours.config.num_segments
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
    if ours.config.pooler == "plain":
        pairs.append((ours.pooled(hidden, batch.sequences), output.pooler_output))
    elif ours.next_sentence is not None:
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
    assert form == {name: config[name] for name in form}
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
        ("bert", {"pruned_heads": {"0": [1]}}, "pruned_heads is"),
    ],
)
def test_fields_that_matter_and_are_not_ours_are_refused(kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lookup("model", kind).from_hf({**hf_model(kind).config.to_dict(), **changes})


@pytest.mark.parametrize("cls", [Bert, Roberta])
@pytest.mark.parametrize("variant", ["sinusoidal", "none", "no segments"])
def test_fixed_parts_are_written_into_tables_and_read_again(variant: str, cls: type[Bert]) -> None:
    model = tiny(variant, cls)
    form, _ = model.hf_form(model.config)
    assert form is not None
    back = cls(cls.from_hf(form), seed=None)
    assert back.config == model.config
    back.load_state_dict(cls.state_from_hf(form, model.state_to_hf()))
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("variant", ["rope", "alibi", "window", "rmsnorm, swiglu, untied"])
def test_without_a_form_the_reason_is_said(variant: str) -> None:
    form, reason = Bert.hf_form(Bert.tiny(**VARIANTS[variant]).config)
    assert form is None
    assert reason is not None and reason.startswith("bert in transformers has no ")
    with pytest.raises(ConfigError, match="no Hugging Face form"):
        Bert.tiny(**VARIANTS[variant]).state_to_hf()
