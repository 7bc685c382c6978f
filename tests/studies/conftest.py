"""A tiny study: what its tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

TRAIN = {"batch_sequences": 8, "learning_rate": 0.01, "precision": "fp32"}


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    """Two arms that share a pretraining, and one without it."""
    words = ["sun", "moon", "river", "stone", "bird", "cloud", "tree", "field", "wind", "night"]
    lines = [" ".join(words[(i * k) % 10] for k in range(1, 3 + i % 9)) + "." for i in range(60)]
    (tmp_path / "lines.txt").write_text("\n".join(dict.fromkeys(lines)) + "\n")
    for name, ask, number in (("pairs.tsv", "What", 60), ("dev.tsv", "Who", 20)):
        rows = (f"{ask} is {words[i % 10]} {i}?\t{words[(i * 3) % 10]}\n" for i in range(number))
        (tmp_path / name).write_text("".join(rows))
    pairs = {"train": "pairs.tsv", "dev": "dev.tsv", "columns": ["question", "answer"]}
    finetune = {
        "data": {**pairs, "holdout": 12, "overlap": "keep"},
        "objective": {"kind": "answers"},
        "train": {**TRAIN, "max_steps": 6, "evaluate_every_steps": 3, "select": {"metric": "loss", "split": "holdout"}},
        "evaluate": {"splits": ["dev"], "max_new_tokens": 6},
    }
    return {
        "name": "tiny",
        "base": {
            "data": {"root": str(tmp_path)},
            "text": {"tokenizer": {"kind": "char"}, "train_on": ["lines.txt"], "max_tokens": 48},
            "model": {"family": "gpt2", "num_layers": 1, "num_heads": 2, "width": 16, "dropout": 0.0},
        },
        "stages": {
            "pretrain": {
                "data": {"train": "lines.txt"},
                "objective": {"kind": "causal"},
                "train": {**TRAIN, "max_steps": 4},
            },
            "finetune": finetune,
        },
        "arms": {
            "scratch": {"stages": ["finetune"]},
            "pretrained": {"stages": ["pretrain", "finetune"]},
            "faster": {"stages": ["pretrain", "finetune"], "finetune": {"train": {"learning_rate": 0.03}}},
        },
        "seeds": 2,
        "compare": {"metric": "loss", "split": "dev"},
        "questions": [{"pair": ["scratch", "pretrained"]}, {"pair": ["pretrained", "faster"]}],
    }
