"""A folder comes back as it was, is one of transformers wherever it can be, and is not trusted before it is checked.

Oracle: transformers (`GPT2LMHeadModel`, `AutoModelForCausalLM`, `AutoTokenizer`).
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    ModernBertConfig,
    ModernBertForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from isoform import registry, storage
from isoform.checkpoints import tensors
from isoform.checkpoints.folders import load_model
from isoform.checkpoints.forms import save_model
from isoform.checkpoints.sources import PICKLES
from isoform.errors import CheckpointError
from isoform.models.gpt2 import GPT2
from isoform.registry import build_options, lookup
from isoform.text.tokenizers import TextTokenizer, train_tokenizer

TEXT = "The harbour of Izmir lies on the Aegean; its clock tower was built in 1901."


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    options = build_options(lookup("tokenizer", "char"), {"special": ["pad", "unk", "bos", "eos"]}, "text.tokenizer")
    return train_tokenizer("char", options, [TEXT])


@pytest.fixture
def model(tokenizer: TextTokenizer) -> GPT2:
    return GPT2.tiny(vocab_size=tokenizer.vocab_size, max_positions=128)


@pytest.fixture
def saved(tmp_path: Path, model: GPT2, tokenizer: TextTokenizer) -> Path:
    save_model(tmp_path / "saved", model, tokenizer, extra={"labels": ["no", "yes"]})
    return tmp_path / "saved"


def hf_gpt2(dtype: torch.dtype = torch.float32) -> GPT2LMHeadModel:
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 29, "n_positions": 24}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=1)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms begin at 0 and 1, where a swap would not show
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def on_disk(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def unsealed(folder: Path) -> Path:
    """The folder without its manifest, as a stranger's would be, so that edits reach the checks behind the hashes."""
    (folder / "manifest.json").unlink(missing_ok=True)
    return folder


def edited(path: Path, **changes: Any) -> None:
    value = {**storage.read_json(path), **changes}
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not None}))


# ---------------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize(
    "options", [{}, {"position": {"kind": "rope"}}, {"position": {"kind": "alibi"}}, {"tied": False}]
)
def test_a_saved_model_comes_back_exactly(
    tmp_path: Path, tokenizer: TextTokenizer, equal_tensors: Any, options: dict[str, Any]
) -> None:
    model = GPT2.tiny(vocab_size=tokenizer.vocab_size, **options)
    save_model(tmp_path / "m", model, tokenizer, extra={"labels": ["no", "yes"]})
    loaded = load_model(tmp_path / "m")
    assert equal_tensors(dict(loaded.model.state_dict()), dict(model.state_dict()))
    assert (loaded.family, loaded.config) == ("gpt2", model.config)
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.fingerprint() == tokenizer.fingerprint()
    assert loaded.info["extra"] == {"labels": ["no", "yes"]}
    assert loaded.info["verified"]
    assert not loaded.model.training


def test_a_saved_large_model_comes_back_from_its_shards(tmp_path: Path, model: GPT2, equal_tensors: Any) -> None:
    save_model(tmp_path / "m", model, None, max_shard_bytes=20_000)
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) > 2
    assert equal_tensors(dict(load_model(tmp_path / "m").model.state_dict()), dict(model.state_dict()))
    AutoModelForCausalLM.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard", ["5GB", "8KB"])
def test_a_folder_of_transformers_comes_back_equal_on_disk(
    tmp_path: Path, equal_tensors: Any, dtype: torch.dtype, shard: str
) -> None:
    hf_gpt2(dtype).save_pretrained(tmp_path / "hf", max_shard_size=shard)
    loaded = load_model(tmp_path / "hf")
    assert loaded.tokenizer is None
    assert "no tokenizer.json" in loaded.info["tokenizer"]
    assert not loaded.info["verified"]
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {dtype}
    save_model(tmp_path / "back", loaded.model, loaded.tokenizer)
    assert equal_tensors(on_disk(tmp_path / "back"), on_disk(tmp_path / "hf"))


def test_slow_reading_is_told(tmp_path: Path, model: GPT2, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    save_model(tmp_path / "m", model, None)
    load_model(tmp_path / "m")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(tensors, "PATIENCE_SECONDS", -1)
    load_model(tmp_path / "m")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("checking m: 0 of 0 MB") and any(line.startswith("checking m: done") for line in lines)
    assert any(line.startswith("reading m: 0 of ") for line in lines) and lines[-1].startswith("reading m: done")


def test_a_dtype_may_be_asked_for(tmp_path: Path) -> None:
    hf_gpt2(torch.bfloat16).save_pretrained(tmp_path / "hf")
    loaded = load_model(tmp_path / "hf", dtype=torch.float32)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "rope"])
def test_transformers_loads_what_we_save_and_gives_our_logits(
    tmp_path: Path, tokenizer: TextTokenizer, position: str
) -> None:
    model = GPT2.tiny(vocab_size=tokenizer.vocab_size, max_positions=128, position={"kind": position}).eval()
    if model.hf_form(model.config)[0] is None:
        pytest.skip(f"no Hugging Face form for {position} positions: {model.hf_form(model.config)[1]}")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.Generator().manual_seed(len(name))
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.05)
    save_model(tmp_path / "m", model, tokenizer)

    theirs, their_tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "m"),
        AutoTokenizer.from_pretrained(tmp_path / "m"),
    )
    ids = their_tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert ids == tokenizer.encode(TEXT).tolist()
    with torch.no_grad():
        ours = model.dense(torch.tensor([ids]))
        torch.testing.assert_close(theirs(torch.tensor([ids])).logits, ours, rtol=1e-4, atol=1e-5)
    for role in ("pad", "bos", "eos"):
        expected = tokenizer.special_ids[role]
        assert getattr(their_tokenizer, f"{role}_token_id") == expected
        assert getattr(theirs.config, f"{role}_token_id") == expected
        assert getattr(theirs.generation_config, f"{role}_token_id") == expected
    assert theirs.generation_config.max_length == 128


def test_what_was_loaded_is_saved_as_it_was(tmp_path: Path, saved: Path, equal_tensors: Any) -> None:
    (saved / "manifest.json").unlink()
    settings = {**storage.read_json(saved / "generation_config.json"), "temperature": 0.7, "top_k": 40}
    storage.write_json(saved / "generation_config.json", settings)
    load_model(saved).save(tmp_path / "again")
    assert storage.read_json(tmp_path / "again" / "generation_config.json") == settings
    again = load_model(tmp_path / "again")
    assert again.info["extra"] == {"labels": ["no", "yes"]} and again.info["verified"]
    assert equal_tensors(again.model.state_dict(), load_model(saved).model.state_dict())


def test_precisions_and_special_ids_of_a_folder_without_a_tokenizer_are_kept(tmp_path: Path) -> None:
    sizes = {"vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    half = T5ForConditionalGeneration(T5Config(**sizes)).half()
    for name, parameter in half.named_parameters():
        if name.endswith(".wo.weight"):  # which transformers keeps in float32
            parameter.data = parameter.data.float()
    half.save_pretrained(tmp_path / "half")
    load_model(tmp_path / "half").save(tmp_path / "half again")
    before, after = (tensors.read_model(tmp_path / name) for name in ("half", "half again"))
    assert {tensor.dtype for tensor in before.values()} == {torch.float16, torch.float32}
    assert {name: tensor.dtype for name, tensor in before.items()} == {n: tensor.dtype for n, tensor in after.items()}
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())

    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    modern = ModernBertForMaskedLM(ModernBertConfig(**sizes, num_attention_heads=4, local_attention=8, **ids))
    modern.save_pretrained(tmp_path / "modern")
    load_model(tmp_path / "modern").save(tmp_path / "modern again")
    config = ModernBertForMaskedLM.from_pretrained(tmp_path / "modern again").config
    assert {name: getattr(config, name) for name in ids} == ids


def test_without_a_hugging_face_form_the_folder_is_native_and_says_why(
    tmp_path: Path, model: GPT2, monkeypatch: pytest.MonkeyPatch, equal_tensors: Any
) -> None:
    monkeypatch.setattr(GPT2, "hf_form", staticmethod(lambda config: (None, "no such form")))
    save_model(tmp_path / "m", model, None)
    assert storage.read_json(tmp_path / "m" / "config.json")["model_type"] == "isoform-gpt2"
    assert storage.read_json(tmp_path / "m" / "isoform.json")["native_because"] == "no such form"
    assert equal_tensors(on_disk(tmp_path / "m"), dict(model.state_dict()))
    assert equal_tensors(dict(load_model(tmp_path / "m").model.state_dict()), dict(model.state_dict()))
    (unsealed(tmp_path / "m") / "isoform.json").unlink()
    with pytest.raises(CheckpointError, match=r"isoform\.json: missing; a folder of type 'isoform-gpt2' needs it"):
        load_model(tmp_path / "m")


def test_saving_over_the_folder_that_was_loaded_keeps_the_weights(saved: Path, model: GPT2, equal_tensors: Any) -> None:
    loaded = load_model(saved)
    save_model(saved, loaded.model, loaded.tokenizer)
    assert equal_tensors(dict(load_model(saved).model.state_dict()), dict(model.state_dict()))


def test_a_run_folder_means_its_final_model(tmp_path: Path, saved: Path) -> None:
    shutil.copytree(saved, tmp_path / "run" / "final")
    assert load_model(str(tmp_path / "run")).info["path"] == str(tmp_path / "run" / "final")


# ---------------------------------------------------------------------------------------------------------- refusals


def refused(path: Any, match: str) -> str:
    with pytest.raises(CheckpointError, match=match) as caught:
        load_model(path)
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_paths_that_are_no_model_say_what_is_expected(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "no such folder")
    refused(tmp_path, "this is no model folder and no run folder")
    (tmp_path / "run" / "checkpoints" / "step-000500").mkdir(parents=True)
    refused(tmp_path / "run", r"the run has not ended; its newest checkpoint is .*step-000500")
    (tmp_path / "notes.txt").write_text("x")
    refused(tmp_path / "notes.txt", "a model folder, a run folder, a .gguf file, pkg:NAME or hf:owner/name")
    refused("model.gguf", "folder")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "isoform.json"])
def test_a_damaged_file_is_named(saved: Path, name: str) -> None:
    data = bytearray((saved / name).read_bytes())
    data[len(data) // 2] ^= 1
    (saved / name).write_bytes(data)
    refused(saved, rf"{name}: damaged or edited: its SHA-256 is not the one in manifest\.json")
    (saved / name).unlink()
    refused(saved, name)


class Canary:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "epoch.ckpt", "model.pkl"])
def test_pickles_are_refused_and_never_opened(tmp_path: Path, saved: Path, name: str) -> None:
    canary = tmp_path / "canary"
    (unsealed(saved) / name).write_bytes(pickle.dumps(Canary(canary)))
    (saved / "rng_state.npy").write_bytes(pickle.dumps(Canary(canary)))
    load_model(saved)
    (saved / "model.safetensors").unlink()
    refused(saved, "a pickle, which can run code when it is opened; only .safetensors is read")
    refused(saved / name, "a pickle")
    (saved / "model.safetensors").write_bytes((saved / name).read_bytes())
    refused(saved, r"model\.safetensors: damaged or no safetensors file")
    assert not canary.exists()
    pickle.loads((saved / name).read_bytes())
    assert canary.is_dir(), "the canary itself must be alive"
    assert (saved / name).suffix in PICKLES


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_remote_code_is_refused(saved: Path, name: str) -> None:
    edited(unsealed(saved) / name, auto_map={"AutoModel": "evil.Model"})
    refused(saved, rf"{name}: `auto_map` asks for code")


def test_an_unknown_model_type_names_those_that_are_known(tmp_path: Path) -> None:
    hf_gpt2().save_pretrained(tmp_path / "hf")
    edited(tmp_path / "hf" / "config.json", model_type="gpt3")
    refused(tmp_path / "hf", r"model_type 'gpt3' is not known \(did you mean 'gpt2'\?\); known: .*gpt2")
    edited(tmp_path / "hf" / "config.json", model_type=["gpt2"])
    refused(tmp_path / "hf", "is not known")
    edited(tmp_path / "hf" / "config.json", model_type="gpt2", scale_attn_by_inverse_layer_idx=True)
    refused(tmp_path / "hf", r"hf: config\.json: scale_attn_by_inverse_layer_idx is True")


def test_unknown_missing_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    hf_gpt2().save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    whole = load_file(file)
    name = "transformer.h.1.ln_2.weight"

    save_file({key: tensor for key, tensor in whole.items() if key != name}, file, metadata={"format": "pt"})
    assert "missing" in refused(tmp_path / "hf", r"1\.")
    save_file({**whole, "transformer.h.1.adapter": torch.ones(1)}, file, metadata={"format": "pt"})
    refused(tmp_path / "hf", r"unknown.*adapter|adapter.*unknown")
    save_file({**whole, name: torch.ones(17)}, file, metadata={"format": "pt"})
    refused(tmp_path / "hf", r"has the shape \(17,\), \(16,\) is expected")


def test_tokenizer_and_model_must_belong_together(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    rows = tokenizer.vocab_size
    save_model(tmp_path / "padded", GPT2.tiny(vocab_size=rows + 3), tokenizer)
    load_model(tmp_path / "padded")
    save_model(tmp_path / "short", GPT2.tiny(vocab_size=rows - 1), tokenizer)
    refused(tmp_path / "short", f"the tokenizer has the id {rows - 1}, the model has rows for ids 0 to {rows - 2}")


def test_a_broken_tokenizer_file_is_an_error_of_the_folder(saved: Path) -> None:
    (unsealed(saved) / "tokenizer.json").write_text("{}")
    refused(saved, r"tokenizer\.json")


def test_an_edited_isoform_json_is_named(saved: Path) -> None:
    edited(unsealed(saved) / "isoform.json", config={"widht": 32})
    refused(saved, r"isoform\.json: config\.widht: unknown key \(did you mean 'width'\?\)")


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000])
def test_a_config_that_is_no_object_is_refused(saved: Path, content: str) -> None:
    (unsealed(saved) / "config.json").write_text(content)
    refused(saved, r"config\.json: ")


def test_no_weights_at_all(saved: Path) -> None:
    (unsealed(saved) / "model.safetensors").unlink()
    refused(saved, r"model\.safetensors: missing; the folder has a config\.json but no weights")


# -------------------------------------------------------------------------------------------------- the hub, by proxy


def test_a_hub_name_goes_to_the_hub_s_client_with_its_revision(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot_download(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repository, revision))
        assert not any(pattern.endswith(PICKLES) for pattern in allow_patterns)
        return str(saved)

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    assert load_model("hf:owner/name@abc123").family == "gpt2"
    load_model("hf:owner/name")
    assert asked == [("owner/name", "abc123"), ("owner/name", None)]


def test_a_hub_that_is_out_of_reach_or_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **options: Any) -> str:
        raise RuntimeError("no route to host\nTraceback ...")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=fails))
    refused("hf:owner/name", "hf:owner/name: not in the local cache and not fetched: no route to host")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused("hf:owner/name", r"huggingface_hub is not installed; pip install 'isoform\[hf\]'")


def test_a_variant_of_a_family_does_not_take_over_its_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own folder comes back as the variant, one of transformers as the family, whichever name comes first."""
    Variant = type("Variant", (GPT2,), {})
    monkeypatch.setitem(registry._classes, ("model", "a-variant"), Variant)
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=8, vocab_size=11)).save_pretrained(tmp_path)
    assert load_model(tmp_path).family == "gpt2"
    save_model(tmp_path / "own", Variant.tiny(), None)
    assert load_model(tmp_path / "own").family == "a-variant"
