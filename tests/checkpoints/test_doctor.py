"""The doctor names what is wrong, says what to do, and changes nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from isoform import machine, storage
from isoform.checkpoints import doctor
from isoform.checkpoints.doctor import Finding, examine
from isoform.checkpoints.folders import save_model
from isoform.checkpoints.state import save_state


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
    monkeypatch.setattr(machine, "fast_bf16", lambda: True)
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
