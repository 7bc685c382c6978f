"""Tiny runs on generated text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from isoform.config import RunConfig, run_config
from isoform.reading import merge


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("ISOFORM_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder with lines.txt (documents of unlike lengths) and pairs.tsv (questions and answers)."""
    words = ["sun", "moon", "river", "stone", "bird", "cloud", "tree", "field", "wind", "night"]
    lines = [" ".join(words[(i * k) % 10] for k in range(1, 3 + i % 9)) + "." for i in range(48)]
    (tmp_path / "lines.txt").write_text("\n".join(dict.fromkeys(lines)) + "\n")
    pairs = [f"What is {words[i % 10]} {i}?\t{words[(i * 3) % 10]}" for i in range(40)]
    (tmp_path / "pairs.tsv").write_text("\n".join(pairs) + "\n")
    return tmp_path


@pytest.fixture
def make(corpus: Path):
    """A checked config of a tiny causal run, with changes."""

    def build(changes: dict[str, Any] | None = None) -> RunConfig:
        values = {
            "name": "tiny",
            "data": {"root": str(corpus), "path": "lines.txt", "splits": {"train": 0.8, "dev": 0.2}, "overlap": "keep"},
            "text": {"tokenizer": {"kind": "char"}, "max_tokens": 32},
            "model": {"family": "gpt2", "num_layers": 2, "num_heads": 2, "width": 16, "dropout": 0.1},
            "objective": {"kind": "causal"},
            "train": {
                "max_steps": 12,
                "batch_sequences": 8,
                "learning_rate": 0.003,
                "precision": "fp32",
                "checkpoint_every_steps": 3,
                "evaluate_every_steps": 4,
                "select": {"metric": "loss", "split": "dev"},
            },
        }
        return run_config(merge(values, changes or {}))

    return build
