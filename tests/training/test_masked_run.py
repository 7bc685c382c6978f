"""A BERT from scratch guesses masked tokens better and better, and its folder is one of transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

import isoform
from isoform.config import RunConfig, run_config
from isoform.errors import ConfigError
from isoform.evaluation.evaluate import _fixed_sample
from isoform.storage import read_json, read_jsonl
from isoform.training.prepare import prepare
from isoform.training.run import train


def masked(**changes) -> RunConfig:
    values = {
        "name": "tiny",
        "data": {"path": "builtin:python-docs", "splits": {"train": 0.9, "dev": 0.1}, "overlap": "keep"},
        "text": {"tokenizer": {"kind": "wordpiece", "vocab_size": 400}, "max_tokens": 64},
        "model": {"family": "bert", "num_layers": 2, "num_heads": 2, "width": 32, "dropout": 0.0},
        "objective": {"kind": "masked", "whole_words": True},
        "train": {
            "max_steps": 60,
            "batch_tokens": 1024,
            "learning_rate": 0.02,
            "precision": "fp32",
            "optimizer": {"kind": "adamw"},
            "schedule": {"kind": "linear", "warmup_fraction": 0.1},
        },
        **changes,
    }
    return run_config(values)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_masked_language_modelling_from_scratch(family: str, tmp_path) -> None:
    model = {"family": family, "num_layers": 2, "num_heads": 2, "width": 32, "dropout": 0.0}
    folder = train(masked(model=model), tmp_path / "run", quiet=True).folder
    losses = [row["loss"] for row in read_jsonl(folder / "metrics.jsonl")]
    assert np.mean(losses[-10:]) < np.mean(losses[:3]) - 0.5
    rows = {row["metric"]: row["value"] for row in read_json(folder / "eval.json")}
    assert rows["loss"] < losses[0]
    assert 0 < rows["masked_accuracy"] < 1
    ours = isoform.load(folder)
    theirs = AutoModelForMaskedLM.from_pretrained(folder / "final").eval()
    texts = ["The statement is executed.", "An exception is raised where the name is not bound."]
    inputs = AutoTokenizer.from_pretrained(folder / "final")(texts, padding=True, return_tensors="pt")
    mask = inputs["attention_mask"]
    with torch.no_grad():
        expected = theirs(input_ids=inputs["input_ids"], attention_mask=mask).logits
        found = ours.model.dense(inputs["input_ids"], mask)
    torch.testing.assert_close(found, expected * mask[..., None], rtol=1e-4, atol=1e-4)


def test_evaluation_masks_are_fixed_and_training_masks_are_not() -> None:
    prepared = prepare(masked())
    encoded = prepared.datasets["dev"][0]
    draws = [
        prepared.objective.prepare(encoded, np.random.Generator(np.random.Philox(key=seed))).tokens for seed in (1, 2)
    ]
    assert (draws[0] != draws[1]).any()
    first, second = (_fixed_sample(prepared.objective, encoded) for _ in range(2))
    assert (first.tokens == second.tokens).all() and (first.targets == second.targets).all()


@pytest.mark.parametrize(
    ("family", "kind", "message"),
    [
        ("gpt2", "masked", "objective.kind: masked needs a model that is bidirectional; gpt2 is cache, causal"),
        ("bert", "causal", "objective.kind: causal needs a model that is causal; bert is bidirectional"),
        ("modernbert", "answers", "objective.kind: answers needs a model that is causal; modernbert is bidirectional"),
    ],
)
def test_a_family_that_cannot_is_refused_before_any_data_is_read(family: str, kind: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(masked(model={"family": family}, objective={"kind": kind}, data={"path": "absent.txt"}))


def test_an_encoder_is_not_asked_to_write(tmp_path) -> None:
    folder = train(masked(train={"max_steps": 1, "precision": "fp32"}), tmp_path / "run", quiet=True).folder
    with pytest.raises(ConfigError, match="an encoder, which reads a text from both sides and cannot continue one"):
        list(isoform.generate(folder, "The statement"))
    rows = isoform.evaluate(folder / "final", data="builtin:python-docs", metrics=["masked_accuracy"])
    assert rows[0]["metric"] == "masked_accuracy" and rows[0]["n"] > 10
