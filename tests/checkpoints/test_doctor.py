"""The doctor names what is wrong, says what to do, and changes nothing."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from isoform import machine, storage
from isoform.checkpoints import doctor
from isoform.checkpoints.doctor import Finding, examine
from isoform.checkpoints.forms import save_model
from isoform.checkpoints.state import save_state
from isoform.layers import choice
from isoform.layers.feedforward import Gelu
from isoform.models.bert import Bert
from isoform.models.llama import Llama
from isoform.registry import build_options, lookup
from isoform.text.tokenizers import TextTokenizer, train_tokenizer


@pytest.fixture
def run(tmp_path: Path, training: Any) -> Path:
    """A run folder with two checkpoints, a final model and its logs."""
    trained, folder = training(), tmp_path / "run"
    for _ in range(2):
        trained.update()
        save_state(folder / "checkpoints", trained.model, None, trained.state(), keep=2)
    save_model(folder / "final", trained.model, None)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    return folder


def only(findings: list[Finding], *levels: str) -> list[str]:
    return [finding.what for finding in findings if finding.level in levels]


@pytest.fixture
def plain_machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    facts = {**machine.describe(), "threads": 1, "cores": 1, "memory_bytes": 16 * 10**9}
    monkeypatch.setattr(machine, "describe", lambda: facts)
    monkeypatch.setattr(choice, "fast_bf16", lambda shape: True)
    monkeypatch.setattr(storage, "free_bytes", lambda path: 100 * 10**9)
    return facts


def test_a_good_machine_has_no_warning(plain_machine: dict[str, Any]) -> None:
    findings = examine()
    assert only(findings, "warning", "error") == []
    assert any("bf16" in finding.what for finding in findings)
    assert all(finding.advice for finding in findings if finding.level != "ok")


def test_too_many_threads_little_memory_and_little_room_are_warned_of(
    plain_machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_machine.update(threads=8, memory_bytes=10**9)
    monkeypatch.setattr(storage, "free_bytes", lambda path: 10**8)
    warnings = " | ".join(only(examine(), "warning"))
    assert "8 threads on 1 cores" in warnings
    assert "only 1.0 GB of memory" in warnings
    assert "only 0.10 GB free" in warnings


def test_packages_are_missed_by_their_weight(plain_machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_installed", lambda name: name not in ("scipy", "wandb"))
    findings = examine()
    assert only(findings, "error") == ["required and not installed: scipy"]
    assert [(f.what, f.advice) for f in findings if f.level == "info"] == [
        ("optional and not installed: wandb", "if you need it: pip install 'isoform[track]'")
    ]


def test_a_sound_run_has_no_warning(run: Path) -> None:
    findings = examine(run)
    assert [what for what in only(findings, "warning", "error") if "tokenizer" not in what] == []
    assert sum("whole" in what for what in only(findings, "ok")) == 2
    assert any("loads as gpt2" in what for what in only(findings, "ok"))


def test_everything_wrong_with_a_run_is_found_and_nothing_is_changed(run: Path) -> None:
    (run / "checkpoints" / "step-000002" / "model.safetensors").write_bytes(b"x")
    (run / "checkpoints" / ".step-000003.0123abcd.tmp").mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 2}\n{"ste')
    (run / "optimizer.pt").write_bytes(b"")
    (run / "final" / "config.json").write_text("{}")
    before = sorted(run.rglob("*"))
    findings = examine(run)
    errors, warnings = " | ".join(only(findings, "error")), " | ".join(only(findings, "warning"))
    assert "step-000002/model.safetensors: damaged" in errors
    assert "metrics.jsonl:2: not a line of JSON" in errors
    assert "final/config.json: damaged" in errors
    assert "metrics.jsonl:4: torn by a crash" in warnings
    assert ".step-000003.0123abcd.tmp: left by a process" in warnings
    assert "optimizer.pt: a pickle" in warnings
    assert sorted(run.rglob("*")) == before


def test_a_run_without_a_whole_checkpoint_or_final_model_says_so(run: Path) -> None:
    shutil.rmtree(run / "final")
    for path in (run / "checkpoints").iterdir():
        (path / "manifest.json").unlink()
    findings = examine(run)
    assert any("no whole checkpoint" in what for what in only(findings, "warning"))
    assert any("no final model" in what for what in only(findings, "info"))


def test_a_stranger_s_model_is_looked_at_too(run: Path) -> None:
    model = run / "final"
    (model / "notes.txt").write_text("mine")
    assert any("notes.txt: not in manifest.json" in what for what in only(examine(model), "info"))
    (model / "manifest.json").unlink()
    config = storage.read_json(model / "config.json")
    storage.write_json(model / "config.json", {**config, "id2label": {"0": "LABEL_0", "1": "LABEL_1"}})
    findings = examine(model)
    assert any("damage to its weights cannot be seen" in what for what in only(findings, "info"))
    assert any("labels are called LABEL_0, LABEL_1" in what for what in only(findings, "warning"))
    assert any("no tokenizer.json" in what for what in only(findings, "warning"))


def test_what_is_no_model_and_no_run_is_an_error(tmp_path: Path) -> None:
    assert only(examine(tmp_path), "error")
    assert only(examine(tmp_path / "absent"), "error")
    (tmp_path / "weights.bin").write_bytes(b"")
    assert "a pickle" in only(examine(tmp_path / "weights.bin"), "error")[0]


# ------------------------------------------------------------------------------------------------ folders of families


SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
POSITIONS = {"max_position_embeddings": 40, "vocab_size": 61}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
FAMILIES: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "vocab_size": 61, **IDS},
    "LlamaForCausalLM": {**SIZE, **POSITIONS, **IDS, "num_key_value_heads": 2},
    "BertForMaskedLM": {**SIZE, **POSITIONS},
    "BertModel": {**SIZE, **POSITIONS},
    "BertForPreTraining": {**SIZE, **POSITIONS},
    "RobertaForMaskedLM": {**SIZE, **POSITIONS},
    "DistilBertForMaskedLM": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, **POSITIONS},
    "ModernBertForMaskedLM": {**SIZE, **POSITIONS, "pad_token_id": 0, "local_attention": 4},
    "T5ForConditionalGeneration": {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "vocab_size": 61,
    },
}


def hf_folder(name: str, folder: Path) -> Path:
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**FAMILIES[name]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


def tokenizer() -> TextTokenizer:
    options = build_options(lookup("tokenizer", "wordpiece"), {"vocab_size": 61}, "text.tokenizer")
    return train_tokenizer("wordpiece", options, ["the old harbour of Izmir"])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_of_each_family_is_described_and_compared(name: str, tmp_path: Path) -> None:
    findings = examine(hf_folder(name, tmp_path / "hf"))
    fine = " | ".join(only(findings, "ok"))
    assert only(findings, "error") == []
    assert f"{name}; can be" in fine
    assert "parameters of its parts: embedding 1952" in fine and (
        "blocks 2 x " in fine or "encoder 14624, decoder 22880" in fine
    )
    compared = "hidden states" if name == "BertModel" else "logits"
    assert f"{compared} of {name} in transformers: relative error" in fine


def test_special_ids_and_spare_rows_are_told(tmp_path: Path) -> None:
    words = tokenizer()
    save_model(tmp_path / "m", Bert.tiny(vocab_size=words.vocab_size + 3), words)
    findings = examine(tmp_path / "m")
    assert "special ids: pad 0 ([PAD]), unk 1 ([UNK]), mask 4 ([MASK])" in " | ".join(only(findings, "ok"))
    assert any(f"{words.vocab_size + 3} rows in the embedding: 3 spare" in what for what in only(findings, "info"))
    (tmp_path / "m" / "manifest.json").unlink()
    config = storage.read_json(tmp_path / "m" / "config.json")
    storage.write_json(tmp_path / "m" / "config.json", {**config, "pad_token_id": 2})
    assert "config.json: pad_token_id is 2, the tokenizer's is 0" in only(examine(tmp_path / "m"), "warning")


def test_a_model_that_computes_something_else_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hf_folder("BertForMaskedLM", tmp_path / "hf")
    monkeypatch.setattr(Gelu, "activation", staticmethod(torch.relu))
    errors = only(examine(folder), "error")
    assert len(errors) == 1 and errors[0].startswith("logits of BertForMaskedLM in transformers: relative error")


def test_without_transformers_nothing_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path / "m", Bert.tiny(position="rope"), None)
    assert any("the model has no form in transformers" in what for what in only(examine(tmp_path / "m"), "info"))
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert any("transformers is not installed" in what for what in only(examine(tmp_path / "m"), "info"))


def test_a_mixture_tells_active_parameters_apart(tmp_path: Path) -> None:
    model = Llama.tiny(feedforward={"kind": "moe", "experts": 4, "active": 2})
    save_model(tmp_path, model, None)
    total = sum(parameter.numel() for parameter in model.parameters())
    active = total - 2 * 2 * 3 * 32 * 48
    said = only(examine(tmp_path), "ok")
    assert any(f"loads as llama, {total} parameters, {active} of them active for each token" in what for what in said)
    assert any("logits of MixtralForCausalLM in transformers: relative error" in what for what in said)
