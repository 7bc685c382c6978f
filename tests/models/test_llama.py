"""LLaMA, Mistral and Mixtral against transformers: logits, gradients and folders, both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from isoform.checkpoints.folders import load_model
from isoform.checkpoints.forms import save_model
from isoform.errors import CheckpointError, ConfigError
from isoform.models.llama import Llama

LENGTHS = [5, 1, 17, 9, 30]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 12}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
HF: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama tied": {"tie_word_embeddings": True, "num_key_value_heads": 4},
    "llama biases, wide heads, gelu": {"attention_bias": True, "mlp_bias": True, "head_dim": 12, "hidden_act": "gelu"},
    "llama linear": {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 300.0}},
    "llama llama3": {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 20, "rope_theta": 1e4}},
    "llama yarn": {"rope_parameters": {**YARN, "rope_theta": 1e4}},
    "llama yarn, mscale": {
        "rope_parameters": {**YARN, "rope_theta": 1e4, "mscale": 1.0, "mscale_all_dim": 0.8, "beta_fast": 4.0}
    },
    "mistral": {"sliding_window": 6},
    "mixtral": {},
    "mixtral window, three of five": {"sliding_window": 7, "num_local_experts": 5, "num_experts_per_tok": 3},
}
hf_models = pytest.mark.parametrize("kind", HF)


def hf_model(kind: str) -> PreTrainedModel:
    size = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    shape = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 48, "pad_token_id": None}
    options = {**size, **shape, "bos_token_id": None, "eos_token_id": None, **HF[kind]}
    classes = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
        "mixtral": (MixtralConfig, MixtralForCausalLM),
    }
    config_class, model_class = classes[kind.split()[0]]
    torch.manual_seed(0)
    model: PreTrainedModel = model_class(config_class(**options))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return model.eval()


def on_disk(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names of a stored folder: transformers keeps all experts of a layer in two tensors."""
    named = {}
    for name, tensor in values.items():
        stem, _, kind = name.partition("mlp.experts.")
        if not kind:
            named[name.replace("mlp.gate.", "block_sparse_moe.gate.")] = tensor
            continue
        for expert, matrix in enumerate(tensor):
            pieces = {"w2": matrix} if kind == "down_proj" else dict(zip(("w1", "w3"), matrix.chunk(2), strict=True))
            for theirs, piece in pieces.items():
                named[f"{stem}block_sparse_moe.experts.{expert}.{theirs}.weight"] = piece
    return named


@hf_models
@pytest.mark.parametrize("padding", ["left", "right"])
def test_logits_and_gradients_equal_transformers(kind: str, padding: str, make_batch: Any, tmp_path: Path) -> None:
    hf = hf_model(kind)
    hf.save_pretrained(tmp_path)
    ours = load_model(tmp_path).model
    batch, most = make_batch(LENGTHS), max(LENGTHS)
    ids, mask = torch.zeros(len(LENGTHS), most, dtype=torch.int64), torch.zeros(len(LENGTHS), most, dtype=torch.int64)
    for row, tokens in enumerate(batch.tokens.split(LENGTHS)):
        span = slice(0, len(tokens)) if padding == "right" else slice(most - len(tokens), most)
        ids[row, span], mask[row, span] = tokens, 1
    places = (mask.cumsum(dim=1) - 1).clamp(min=0)
    theirs = hf(input_ids=ids, attention_mask=mask, position_ids=places).logits[mask.bool()]
    logits = ours.logits(ours(batch).hidden)
    assert float((logits - theirs).detach().norm() / theirs.detach().norm()) < 1e-5
    torch.testing.assert_close(ours.dense(ids, mask)[mask.bool()], logits)

    weight = torch.randn_like(logits)
    (logits * weight).sum().backward()
    (theirs * weight).sum().backward()
    gradients = on_disk({name: parameter.grad for name, parameter in hf.named_parameters()})
    expected = Llama.state_from_hf(hf.config.to_dict(), gradients)
    for name, parameter in ours.named_parameters():
        error = (parameter.grad - expected[name]).norm() / expected[name].norm()
        assert float(error) < 1e-4, name


@hf_models
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_there_and_back_is_the_same(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    hf = hf_model(kind).to(dtype)
    hf.save_pretrained(tmp_path / "theirs")
    loaded = load_model(tmp_path / "theirs")
    save_model(tmp_path / "ours", loaded.model, None)
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype == dtype
        assert torch.equal(ours[name], tensor), name
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "ours"))
    assert "isoform" not in after
    del after["head_dim"]  # spelt out, where theirs may leave it to the width
    rope = {name: value for name, value in before["rope_parameters"].items() if not name.startswith(("msc", "beta_f"))}
    assert rope.items() <= after["rope_parameters"].items()
    assert {name: before[name] for name in after if name != "rope_parameters"} == {
        name: value for name, value in after.items() if name != "rope_parameters"
    }


EXPORTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama tied, stretched": {"tied": True, "position": {"kind": "rope", "scaling": {"kind": "llama3"}}},
    "mistral": {"window": 5, "dropout": 0.1},
    "mixtral": {"feedforward": {"kind": "moe", "experts": 4, "active": 2, "z_weight": 0.01}},
}


@pytest.mark.parametrize("export", EXPORTS)
def test_transformers_computes_what_we_save(export: str, make_batch: Any, tmp_path: Path) -> None:
    model = Llama.tiny(**EXPORTS[export])
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    save_model(tmp_path, model, None)
    hf, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, local_files_only=True)
    assert type(hf).__name__ == f"{export.split()[0].capitalize()}ForCausalLM"
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    batch = make_batch([30])
    theirs, ours = hf(batch.tokens[None]).logits[0], model.logits(model(batch).hidden)
    assert float((ours - theirs).detach().norm() / theirs.detach().norm()) < 1e-5
    assert load_model(tmp_path).config == model.config


def test_checkpoints_of_the_bare_model_and_old_buffers() -> None:
    hf = hf_model("llama tied")
    config = hf.config.to_dict()
    tensors = {name: tensor for name, tensor in hf.state_dict().items() if name != "lm_head.weight"}
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    bare["layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    expected, got = Llama.state_from_hf(config, tensors), Llama.state_from_hf(config, bare)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    hf_model("mixtral").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.6.w3.weight"
    tensors[name.replace("6.w3", "8.w3")] = tensors.pop(name)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"unknown: .*experts.8.w3.*missing: {name}"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("llama", {"hidden_act": "relu"}, r"hidden_act 'relu' is not known; known: silu"),
        ("llama", {"sliding_window": 8}, r"sliding_window is 8 and is not known for llama"),
        ("llama", {"atention_bias": True}, r"atention_bias is True .* \(did you mean 'attention_bias'\?\)"),
        ("llama", {"rope_interleaved": True}, r"rope_interleaved is True"),
        ("llama", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0\.5, 1\.0 is expected"),
        ("mistral", {"rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor is 0\.5"),
        ("llama", {"quantization_config": {"bits": 4}}, r"quantization_config is .* not known for llama"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, r"'dynamic' turns by the length"),
        ("llama", {"rope_parameters": {"rope_type": "longrope"}}, r"rope_type 'longrope' given; default, linear"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, r"rope_parameters.low_freq_factor is"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "beta": 1}}, r"rope_parameters.beta is"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}, r"factor is 4.0 by rope_scaling and None by"),
        ("llama", {"rope_scaling": {"rope_type": "default", "rope_theta": 5.0}}, r"rope_theta is 5.0 by rope_scaling"),
        ("mixtral", {"router_jitter_noise": 0.1}, r"router_jitter_noise is 0.1"),
    ],
)
def test_fields_that_are_not_ours_are_refused(kind: str, changes: dict[str, Any], message: str) -> None:
    config = {**hf_model(kind).config.to_dict(), **changes}
    with pytest.raises(ConfigError, match=message):
        Llama.from_hf(config)


def test_configs_of_every_generation() -> None:
    old = {"model_type": "llama", "rope_theta": 300.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert Llama.from_hf(old).position == Llama.Config(position={"kind": "rope", "base": 300.0, "scale": 2.0}).position
    assert Llama.from_hf({"model_type": "llama"}).position["base"] == 10_000
    twice = {**old, "rope_parameters": {"rope_type": "linear", "rope_theta": 300.0, "factor": 2.0}}
    assert Llama.from_hf(twice) == Llama.from_hf(old)
    assert Llama.from_hf({"model_type": "mistral"}).window == 4096
    assert Llama.from_hf({"model_type": "mistral", "sliding_window": None}).window is None
    mixtral = Llama.from_hf({"model_type": "mixtral"})
    assert (mixtral.position["base"], mixtral.num_kv_heads, mixtral.feedforward["experts"]) == (1e6, 8, 8)
    smollm = {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}}
    assert Llama.from_hf({"model_type": "llama", **smollm}) == Llama.from_hf({"model_type": "llama"})


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"position": "alibi"}, "position alibi"),
        ({"position": {"kind": "rope", "fraction": 0.5}}, "heads that are turned in part"),
        ({"norm": "layernorm"}, "norm layernorm"),
        ({"feedforward": "gelu"}, "feedforward gelu"),
        ({"feedforward": {"kind": "moe", "softmax": "before"}}, "softmax before the choice"),
        ({"feedforward": {"kind": "moe", "expert": "relu"}}, "experts of kind relu"),
        ({"window": 8, "attention_bias": True}, "attention biases"),
        ({"num_heads": 5, "num_kv_heads": None, "head_width": 8}, "heads that do not share the width"),
    ],
)
def test_models_without_a_form_say_why_and_are_saved_all_the_same(
    options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    model = Llama.tiny(**options)
    form, why = Llama.hf_form(model.config)
    assert form is None
    assert why is not None
    assert reason in why
    save_model(tmp_path, model, None)
    again = load_model(tmp_path)
    assert again.config == model.config
    assert all(torch.equal(tensor, again.model.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_widths_that_are_left_out() -> None:
    def inner(**options: Any) -> int:
        width: int = Llama.Config(**options).resolved()["feedforward_width"]
        return width

    assert inner(width=4096) == 10_944
    assert inner(width=384) == 1024
    assert inner(width=64, feedforward="gelu") == 256
    assert inner(width=384, feedforward="moe") == 1024


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5, "num_kv_heads": None}, r"model.num_heads: 5 given, a divisor of model.width 32"),
        ({"num_kv_heads": 3}, r"model.num_kv_heads: 3 given, a divisor of model.num_heads 4"),
        ({"vocab_size": None}, r"model.vocab_size: missing"),
        ({"feedforward": "moe", "feedforward_bias": True}, r"model.feedforward: experts have no biases"),
        ({"feedforward": {"kind": "moe", "expert": 3}}, r"model.feedforward.expert: given 3"),
        ({"head_width": 7}, r"model.position.fraction: 1.0 of the head width 7"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Llama.tiny(**options)
