"""An XLNet from scratch guesses tokens in random orders better and better, and its folder is one of transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModel

import isoform
from isoform.config import run_config
from isoform.errors import ConfigError
from isoform.storage import read_json, read_jsonl
from isoform.training.run import train


def values(**changes):
    return {
        "name": "tiny",
        "data": {"path": "builtin:python-docs", "splits": {"train": 0.9, "dev": 0.1}, "overlap": "keep"},
        "text": {"tokenizer": {"kind": "wordpiece", "vocab_size": 400}, "max_tokens": 64},
        "model": {"family": "xlnet", "num_layers": 2, "num_heads": 2, "width": 32, "dropout": 0.1},
        "objective": {"kind": "permutation"},
        "train": {
            "max_steps": 60,
            "batch_tokens": 1024,
            "learning_rate": 0.02,
            "precision": "fp32",
            "optimizer": {"kind": "adamw"},
            "schedule": {"kind": "linear", "warmup_fraction": 0.1},
        },
        "evaluate": {"max_examples": 60},
        **changes,
    }


def test_permutation_language_modelling_from_scratch(tmp_path) -> None:
    folder = train(run_config(values()), tmp_path / "run", quiet=True).folder
    losses = [row["loss"] for row in read_jsonl(folder / "metrics.jsonl")]
    assert np.mean(losses[-10:]) < np.mean(losses[:3]) - 0.5
    rows = {row["metric"]: row["value"] for row in read_json(folder / "eval.json")}
    assert rows["loss"] < losses[0]
    manifest = read_json(folder / "manifest.json")
    # There is one segment, so nothing tells two apart.
    assert all("segment" in name for name in manifest["unused_parameters"])
    ours, theirs = isoform.load(folder), AutoModel.from_pretrained(folder / "final").eval()
    ids = torch.tensor([ours.tokenizer.encode("The statement is executed.").tolist()])
    with torch.no_grad():
        hidden = ours.model.logits(theirs(ids).last_hidden_state)
        torch.testing.assert_close(ours.model.dense(ids), hidden, rtol=1e-4, atol=1e-4)


def test_what_it_has_learned_is_fine_tuned_to_labels(tmp_path) -> None:
    short = values()["train"] | {"max_steps": 3}
    run = train(run_config(values(train=short)), tmp_path / "run", quiet=True)
    data = {
        "path": "builtin:movie-snippets",
        "splits": {"train": 0.8, "dev": 0.2},
        "overlap": "keep",
        "max_documents": 80,
    }
    changed = values(data=data, objective={"kind": "classify"}, train=short, evaluate={})
    tuned = train(run_config(changed), tmp_path / "tuned", start=run.folder / "final", quiet=True)
    assert isoform.predict(tuned.folder, ["a wonderful film"])[0]["label"] in ("pos", "neg")


def test_families_of_one_stream_are_refused(tmp_path) -> None:
    bert = {"family": "bert", "num_layers": 1, "num_heads": 2, "width": 32}
    with pytest.raises(ConfigError, match=r"permutation needs a model that is two-stream; .* families that can: xlnet"):
        train(run_config(values(model=bert)), tmp_path / "run", quiet=True)
