"""The GPT-2 family: what holds for every variant, and parity with transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel

from isoform.errors import CheckpointError, ConfigError
from isoform.models.gpt2 import GPT2

LENGTHS = [5, 1, 17, 9, 30]


def test_parameters_of_the_published_character_model() -> None:
    size = {"num_layers": 4, "num_heads": 8, "width": 256, "vocab_size": 256, "max_positions": 128, "tied": False}
    learned = GPT2(GPT2.Config(**size))
    rope = GPT2(GPT2.Config(**size, position="rope"))
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in (learned, rope)]
    assert counts == [3_323_392, 3_290_624]
    theirs = rope.state_dict()
    assert {name for name in learned.state_dict() if name not in theirs} == {"position.embedding.weight"}
    assert all(torch.equal(theirs[name], tensor) for name, tensor in learned.state_dict().items() if name in theirs)


def test_config_spells_out_its_parts() -> None:
    config = GPT2.Config(position="rope", norm={"kind": "layernorm", "bias": False})
    assert config.position == {"kind": "rope", "base": 10_000.0, "fraction": 1.0, "scale": 1.0, "scaling": None}
    assert config.norm == {"kind": "layernorm", "eps": 1e-5, "bias": False}
    assert GPT2.Config(**config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, r"model.num_heads: 5 given, a divisor of model.width 32"),
        ({"num_kv_heads": 3}, r"model.num_kv_heads: 3 given, a divisor of model.num_heads 4"),
        ({"vocab_size": None}, r"model.vocab_size: missing"),
        ({"position": "ropes"}, r"model.position.kind: 'ropes' is not a known position \(did you mean 'rope'\?\)"),
        ({"position": {"kind": "rope", "bass": 1}}, r"model.position.bass: unknown key"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GPT2.tiny(**options)


def test_a_sequence_longer_than_the_table_is_refused(make_batch: Any) -> None:
    with pytest.raises(ConfigError, match=r"model.max_positions: 48 learned positions, a sequence of 49 tokens given"):
        GPT2.tiny()(make_batch([3, 49]))
    assert GPT2.tiny(position="rope")(make_batch([49])).hidden.shape == (49, 32)


# --------------------------------------------------------------------------------------------------------- parity


def hf_model(kind: str, **changes: Any) -> PreTrainedModel:
    ids = {"bos_token_id": None, "eos_token_id": None}
    torch.manual_seed(0)
    if kind.startswith("gpt2"):
        size = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48}
        model: PreTrainedModel = GPT2LMHeadModel(GPT2Config(**{**size, **ids, **changes}))
    else:
        shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80}
        size = {"vocab_size": 61, "max_position_embeddings": 48, "use_parallel_residual": False, **shape}
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**{**size, **ids, **changes}))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return model.eval()


HF: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt2 exact gelu, inner width": {"activation_function": "gelu", "n_inner": 48},
    "gpt2 untied": {"tie_word_embeddings": False},
    "neox": {},
    "neox tied, whole head, relu": {
        "tie_word_embeddings": True,
        "hidden_act": "relu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 1.0},
    },
}
hf_models = pytest.mark.parametrize("kind", HF)


def stored(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors as a file of `save_pretrained` holds them."""
    head = "lm_head.weight" if model.config.model_type == "gpt2" else "embed_out.weight"
    tensors = {head if name == "lm_head.weight" else name: tensor for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors[head]
    return tensors


def loaded(config: dict[str, Any], tensors: dict[str, Tensor]) -> GPT2:
    model = GPT2(GPT2.from_hf(config), seed=None)
    model.load_state_dict(GPT2.state_from_hf(config, tensors))
    return model


@hf_models
@pytest.mark.parametrize("padding", ["left", "right"])
def test_logits_and_gradients_equal_transformers(kind: str, padding: str, make_batch: Any) -> None:
    hf = hf_model(kind, **HF[kind])
    ours = loaded(hf.config.to_dict(), stored(hf))
    batch = make_batch(LENGTHS)
    most = max(LENGTHS)
    ids, mask = torch.zeros(len(LENGTHS), most, dtype=torch.int64), torch.zeros(len(LENGTHS), most, dtype=torch.int64)
    for row, tokens in enumerate(batch.tokens.split(LENGTHS)):
        span = slice(0, len(tokens)) if padding == "right" else slice(most - len(tokens), most)
        ids[row, span], mask[row, span] = tokens, 1
    places = (mask.cumsum(dim=1) - 1).clamp(min=0)
    theirs = hf(input_ids=ids, attention_mask=mask, position_ids=places).logits[mask.bool()]
    logits = ours.logits(ours(batch).hidden)
    assert float((logits - theirs).detach().norm() / theirs.detach().norm()) < 1e-5
    dense = ours.dense(ids, mask)
    assert torch.equal(dense[mask.bool()], logits)
    assert not dense[~mask.bool()].any()

    weight = torch.randn_like(logits)
    (logits * weight).sum().backward()
    (theirs * weight).sum().backward()
    gradients = {name: parameter.grad for name, parameter in hf.named_parameters()}
    if "lm_head.weight" in gradients and hf.config.model_type != "gpt2":
        gradients["embed_out.weight"] = gradients.pop("lm_head.weight")
    expected = GPT2.state_from_hf(hf.config.to_dict(), gradients)
    for name, parameter in ours.named_parameters():
        error = (parameter.grad - expected[name]).norm() / expected[name].norm()
        assert float(error) < 1e-4, name


@hf_models
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back(kind: str, dtype: torch.dtype) -> None:
    hf = hf_model(kind, **HF[kind]).to(dtype)
    tensors, config = stored(hf), hf.config.to_dict()
    model = loaded(config, tensors).to(dtype)
    back = model.state_to_hf()
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert back[name].is_contiguous()
        assert torch.equal(back[name], tensor), name
    form = GPT2.to_hf(model.config)
    assert "isoform" not in form
    assert {name: config[name] for name in form if name not in ("architectures", "n_inner")} == {
        name: form[name] for name in form if name not in ("architectures", "n_inner")
    }
    assert form["architectures"] == [type(hf).__name__]
    assert form.get("n_inner") in (None, config.get("n_inner"))


def test_checkpoints_of_the_bare_model_and_old_buffers() -> None:
    for kind in ("gpt2", "neox"):
        hf = hf_model(kind)
        tensors = stored(hf)
        bare = {name.removeprefix("transformer.").removeprefix("gpt_neox."): tensor for name, tensor in tensors.items()}
        for layer in range(2):
            stem = f"h.{layer}.attn" if kind == "gpt2" else f"layers.{layer}.attention"
            bare[f"{stem}.bias"] = torch.ones(1, 1, 48, 48).tril()
            bare[f"{stem}.masked_bias"] = torch.tensor(-1e4)
        config = hf.config.to_dict()
        expected = GPT2.state_from_hf(config, tensors)
        got = GPT2.state_from_hf(config, bare)
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_a_stored_copy_of_a_tied_head_is_dropped_and_another_refused() -> None:
    hf = hf_model("gpt2")
    tensors, config = stored(hf), hf.config.to_dict()
    copy = {**tensors, "lm_head.weight": tensors["transformer.wte.weight"].clone()}
    assert GPT2.state_from_hf(config, copy).keys() == GPT2.state_from_hf(config, tensors).keys()
    copy["lm_head.weight"] = copy["lm_head.weight"] + 1
    with pytest.raises(CheckpointError, match=r"lm_head.weight: holds values"):
        GPT2.state_from_hf(config, copy)


def test_unknown_and_missing_tensors_are_named() -> None:
    hf = hf_model("gpt2")
    tensors, config = stored(hf), hf.config.to_dict()
    del tensors["transformer.h.1.ln_2.bias"]
    tensors["transformer.h.2.ln_1.weight"] = torch.ones(32)
    message = (
        r"unknown: transformer.h.2.ln_1.weight \(did you mean 'transformer.h.1.ln_2.bias'\?\); "
        r"tensors missing: transformer.h.1.ln_2.bias"
    )
    with pytest.raises(CheckpointError, match=message):
        GPT2.state_from_hf(config, tensors)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ("gpt2", {"activation_function": "mish"}, "activation_function 'mish' is not known"),
        ("gpt2", {"attention_sinks": 4}, "attention_sinks is 4 and is not known for gpt2"),
        ("neox", {"sliding_window": 8}, "sliding_window is 8 and is not known for gpt_neox"),
        ("neox", {"use_parallel_residual": True}, "use_parallel_residual is True"),
        ("neox", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope_type 'longrope'"),
    ],
)
def test_forms_that_are_not_ours_are_refused(kind: str, changes: dict[str, Any], message: str) -> None:
    config = {**hf_model(kind).config.to_dict(), **changes}
    with pytest.raises(ConfigError, match=message):
        GPT2.from_hf(config)


def test_the_default_of_gpt_neox_is_parallel_and_refused() -> None:
    with pytest.raises(ConfigError, match="use_parallel_residual"):
        GPT2.from_hf({"model_type": "gpt_neox"})


EXPORTS: dict[str, dict[str, Any]] = {
    "learned": {},
    "sinusoidal": {"position": "sinusoidal"},
    "none, no bias": {"position": "none", "bias": False, "norm": {"kind": "layernorm", "bias": False}},
    "rope, squared relu": {"position": "rope", "feedforward": "relu-squared", "embedding_dropout": 0.1},
    "rope, stretched": {"position": {"kind": "rope", "scaling": {"kind": "yarn", "original_positions": 12}}},
    "rope, no bias, untied, scaled": {"position": {"kind": "rope", "scale": 2.0}, "bias": False, "tied": False},
}


@pytest.mark.parametrize("export", EXPORTS)
def test_transformers_computes_what_we_export(export: str, make_batch: Any) -> None:
    model = GPT2.tiny(**EXPORTS[export])
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    form, tensors = GPT2.to_hf(model.config), model.state_to_hf()
    classes = {"gpt2": (GPT2Config, GPT2LMHeadModel), "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM)}
    config_class, model_class = classes[form["model_type"]]
    hf = model_class(config_class(**{**form, "bos_token_id": None, "eos_token_id": None})).eval()
    named = {name.replace("embed_out", "lm_head"): tensor for name, tensor in tensors.items()}
    lost = hf.load_state_dict(named, strict=False)
    assert lost.unexpected_keys == []
    assert lost.missing_keys == (["lm_head.weight"] if model.config.tied else [])
    batch = make_batch([30])
    theirs, ours = hf(batch.tokens[None]).logits[0], model.logits(model(batch).hidden)
    assert float((ours - theirs).detach().norm() / theirs.detach().norm()) < 1e-5
    again = loaded(form, tensors)
    assert again.config.resolved() == model.config.resolved()
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_what_a_fixed_table_cannot_hold_is_refused() -> None:
    model = GPT2.tiny(position="sinusoidal")
    form, tensors = GPT2.to_hf(model.config), model.state_to_hf()
    tensors["transformer.wpe.weight"][3, 4] += 0.1
    with pytest.raises(CheckpointError, match=r"transformer.wpe.weight: holds values.*position.embedding.weight"):
        GPT2.state_from_hf(form, tensors)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"position": "alibi"}, "position alibi"),
        ({"num_kv_heads": 2}, "grouped heads"),
        ({"window": 8}, "a window"),
        ({"feedforward": "swiglu"}, "feedforward swiglu"),
        ({"norm": "rmsnorm"}, "norm rmsnorm"),
        ({"norm_first": False}, "norm_first false"),
    ],
)
def test_models_without_a_form_say_why(options: dict[str, Any], reason: str) -> None:
    config = GPT2.tiny(**options).config
    form, why = GPT2.hf_form(config)
    assert form is None
    assert why is not None
    assert reason in why
    with pytest.raises(ConfigError, match=reason):
        GPT2.to_hf(config)
