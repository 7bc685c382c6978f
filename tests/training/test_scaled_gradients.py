"""Scaled gradients, as fp16 needs them, change nothing; kernels are recorded, and kept by what goes on with a run."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from isoform.checkpoints.folders import load_model
from isoform.errors import ConfigError, Stopped
from isoform.layers import choice
from isoform.storage import read_json, write_json
from isoform.training import loop as looping
from isoform.training import run as running
from isoform.training.run import train


class Overflowing(torch.amp.GradScaler):
    """Its first two losses are too large when they are scaled, as they may be in fp16."""

    number = 0

    def scale(self, outputs):
        self.number += 1
        scaled = super().scale(outputs)
        return scaled * float("inf") if self.number <= 2 else scaled


def with_scale(monkeypatch, scaler: torch.amp.GradScaler | None) -> None:
    """Runs get an Accelerator with this scaler, which on a GPU fp16 brings with it."""

    def accelerator(precision: str) -> Accelerator:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        made = Accelerator(cpu=True)
        made.scaler = scaler
        return made

    monkeypatch.setattr(running, "_accelerator", accelerator)


def weights(folder) -> dict[str, torch.Tensor]:
    return load_model(folder / "last").model.state_dict()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_scale_changes_no_update(make, tmp_path, monkeypatch, optimizer):
    config = make({"train": {"optimizer": {"kind": optimizer}, "max_steps": 4}})
    for name, scaler in (("plain", None), ("scaled", torch.amp.GradScaler("cpu", init_scale=1024.0))):
        with_scale(monkeypatch, scaler)
        train(config, tmp_path / name, quiet=True)
    plain, scaled = weights(tmp_path / "plain"), weights(tmp_path / "scaled")
    assert all(torch.allclose(scaled[name], tensor, atol=1e-6) for name, tensor in plain.items())


def test_a_scale_that_is_too_large_shrinks_and_is_kept_by_a_resume(make, tmp_path, monkeypatch):
    scaler = Overflowing("cpu", init_scale=1024.0)
    with_scale(monkeypatch, scaler)
    saved = looping.Loop._save

    def stopping(loop):
        saved(loop)
        raise Stopped("stopped", 130)

    monkeypatch.setattr(looping.Loop, "_save", stopping)
    config = make({"train": {"checkpoint_every_steps": 9}})
    with pytest.raises(Stopped):
        train(config, tmp_path / "run", quiet=True)
    monkeypatch.setattr(looping.Loop, "_save", saved)
    assert scaler.get_scale() == 256.0
    again = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with_scale(monkeypatch, again)
    train(config, tmp_path / "run", resume=True, quiet=True)
    assert again.get_scale() == 256.0
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())


def test_a_run_records_its_kernels_and_is_not_gone_on_with_without_them(make, tmp_path, monkeypatch):
    config, folder = make({"train": {"max_steps": 2}}), tmp_path / "run"
    train(config, folder, quiet=True)
    manifest = read_json(folder / "manifest.json")
    assert manifest["kernels"]["native"] == choice.available()
    kernels = {**manifest["kernels"], "native": choice.TILES}
    monkeypatch.setenv("ISOFORM_NATIVE", "0")
    write_json(folder / "manifest.json", {**manifest, "kernels": kernels})
    train(config, folder, quiet=True)  # it has ended, and is given back as it is
    write_json(folder / "manifest.json", {**manifest, "kernels": kernels, "complete": False})
    with pytest.raises(ConfigError, match="which are not here"):
        train(config, folder, resume=True, quiet=True)
