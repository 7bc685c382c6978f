"""Compiling the kernels: once, kept, and done without where there is no compiler."""

from __future__ import annotations

import pytest
import torch

from isoform import machine
from isoform.layers import fused, kernels


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A process that has not looked for the kernels yet, and an empty cache."""
    monkeypatch.setattr(machine, "cache_folder", lambda: tmp_path)
    kernels.loaded.cache_clear()
    yield tmp_path
    kernels.loaded.cache_clear()


def test_without_a_compiler_plain_torch_does_the_work(fresh, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(kernels.shutil, "which", lambda name: None)
    assert kernels.library() is None
    assert fused.nats(torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64)) is None


def test_they_can_be_switched_off(fresh, monkeypatch):
    monkeypatch.setenv("ISOFORM_NATIVE", "0")
    assert kernels.library() is None and not list(fresh.iterdir())


def test_a_compiler_that_fails_is_asked_once(fresh, monkeypatch):
    asked = []

    def run(command, **options):
        asked.append(command)
        return kernels.subprocess.CompletedProcess(command, 1, "", "no such flag")

    monkeypatch.setenv("CXX", "some-compiler")
    monkeypatch.setattr(kernels.subprocess, "run", run)
    assert kernels.library() is None and len(asked) == len(kernels.EXTRAS)
    kernels.loaded.cache_clear()
    assert kernels.library() is None and len(asked) == len(kernels.EXTRAS)
    assert "no such flag" in next(fresh.rglob("*.failed")).read_text()


def test_what_is_no_plain_tensor_on_a_cpu_is_not_served():
    assert kernels.serves(torch.zeros(2, dtype=torch.float64)) is None
    assert kernels.serves(torch.zeros(2, device="meta")) is None
