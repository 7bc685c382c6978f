"""Runs on conversations: a small model learns to answer and to end, and then which of two answers is preferred."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import isoform
from isoform.config import RunConfig, run_config
from isoform.errors import ConfigError, DataError, Stopped
from isoform.models.lora import adapter_state
from isoform.reading import merge
from isoform.serving.predict import predict, read_inputs
from isoform.serving.use import open_model
from isoform.storage import read_json, read_jsonl
from isoform.text.chat import chat_tokens
from isoform.training.feed import Feed
from isoform.training.loop import Loop
from isoform.training.plan import warnings
from isoform.training.prepare import prepare
from isoform.training.run import train
from isoform.training.step import LossModule, accumulate

THINGS = ("sun", "moon", "river", "stone", "bird", "cloud", "tree", "field", "wind", "night")


def answered(thing: str, way: str) -> str:
    return {"twice": f"{thing} {thing}", "once": thing, "not": "no"}[way]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """chat.jsonl in two forms, and pairs.json, in which polite answers are preferred."""
    rows: list[dict[str, Any]] = []
    for at, thing in enumerate(THINGS):
        for way in ("twice", "once", "not"):
            asked = f"Say {thing} {way}."
            if at % 2:
                said = [{"from": "human", "value": asked}, {"from": "gpt", "value": answered(thing, way)}]
            else:
                said = [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": asked},
                    {"role": "assistant", "content": answered(thing, way)},
                    {"role": "user", "content": "Again."},
                    {"role": "assistant", "content": answered(thing, way)},
                ]
            rows.append({"messages": said})
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ways = ("Say", "Name", "Tell me")
    pairs = [
        {"instruction": f"{way} {thing}.", "input": None, "chosen": f"please {thing}", "rejected": f"bah {thing}"}
        for way in ways
        for thing in THINGS
    ]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs, indent=1))
    return tmp_path


def config(folder: Path, **changes: Any) -> RunConfig:
    values = {
        "name": "tiny",
        "data": {"root": str(folder), "path": "chat.jsonl", "splits": {"train": 0.8, "dev": 0.2}, "overlap": "keep"},
        "text": {"tokenizer": {"kind": "bpe", "vocab_size": 320, "special": ["pad", "bos", "eos"]}, "max_tokens": 96},
        "model": {"family": "llama", "num_layers": 2, "num_heads": 2, "width": 32, "feedforward_width": 64},
        "objective": {"kind": "chat"},
        "train": {"max_steps": 40, "batch_sequences": 8, "learning_rate": 0.01, "precision": "fp32"},
        "evaluate": {"max_new_tokens": 12},
    }
    return run_config(merge(values, changes))


PAIRS = {
    "data": {"path": "pairs.json"},
    "objective": {"kind": "preference"},
    "train": {"max_steps": 12, "learning_rate": 0.003, "checkpoint_every_steps": 3},
}
LORA = {"adapter": {"kind": "lora", "rank": 4, "targets": ["query", "value", "up", "down"]}}


def test_answers_are_learnt_and_end_by_themselves(data: Path, tmp_path: Path) -> None:
    select = {"evaluate_every_steps": 20, "select": {"metric": "loss", "split": "dev"}}
    folder = train(config(data, train=select), tmp_path / "run", quiet=True).folder
    losses = [row["loss"] for row in read_jsonl(folder / "metrics.jsonl")]
    assert losses[-1] < losses[0] / 2
    scored = {row["metric"]: row["value"] for row in read_json(folder / "eval.json")}
    assert set(scored) == {"loss", "perplexity", "token_accuracy", "ended"} and scored["ended"] > 0.5
    on_the_way = [row for row in read_jsonl(folder / "events.jsonl") if row["event"] == "evaluation"]
    assert {row["metric"] for event in on_the_way for row in event["rows"]} == {"loss", "perplexity", "token_accuracy"}
    row = next(row for row in read_jsonl(folder / "predictions.jsonl") if row["input"].startswith("Say"))
    assert row["gold"] and row["prediction"] and set(row["stats"]) >= {"nats", "tokens", "ended"}
    assert isoform.predict(folder, [row["input"]])[0]["answer"] == row["prediction"]
    if row["stats"]["ended"]:
        assert "".join(isoform.generate(folder, row["input"], chat=True, max_new_tokens=12)) == row["prediction"]
    theirs = AutoTokenizer.from_pretrained(folder / "final")
    messages = [{"role": "user", "content": row["input"]}]
    ours = chat_tokens(open_model(folder).tokenizer, messages).tolist()
    assert theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == ours
    asked = [{"instruction": "Say", "input": "sun once."}, {"messages": [{"role": "user", "content": row["input"]}]}]
    for at, (one, expected) in enumerate(zip(asked, ("instruction", None), strict=True)):
        (tmp_path / f"new{at}.jsonl").write_text(json.dumps(one) + "\n")
        opened = open_model(folder)
        (answer,) = predict(opened, read_inputs(opened, tmp_path / f"new{at}.jsonl"))
        assert (answer.input == one) if expected else (answer.answer == row["prediction"])
    report = read_json(folder / "manifest.json")["data"]["datasets"]["train"]
    assert report["targets"] > 0 and report["targets_lost"] == report["documents_unasked"] == 0


def test_what_is_lost_is_told_before_the_training(data: Path) -> None:
    run = prepare(config(data, text={"max_tokens": 18}))
    said = "; ".join(warnings(run, [1.0, 0.5]))
    assert "answer tokens of train are cut off (text.max_tokens)" in said
    assert "lose every answer token and are left out; raise text.max_tokens" in said
    assert len(run.datasets["train"]) < run.datasets["train"].report["documents"]
    with pytest.raises(DataError, match="at most 18 fit"):
        prepare(config(data, text={"max_tokens": 18}, data={"long_documents": "refuse"}))
    rows = [{"messages": [{"role": "user", "content": thing}]} for thing in THINGS]
    with pytest.raises(ConfigError, match=r"needs generated answers, .* unless `evaluate.metrics` names it"):
        prepare(config(data, train={"select": {"metric": "ended"}}))
    (data / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"chat\.jsonl:\d+: a conversation without an answer"):
        prepare(config(data))


def gradients(run: Any, micro_batch_tokens: int, step: int) -> dict[str, torch.Tensor]:
    feed = Feed(run.datasets["train"], run.objective, run.batch_plan, seed=0, micro_batch_tokens=micro_batch_tokens)
    share = feed.at(step)
    run.model.zero_grad()
    accumulate(LossModule(run.model, run.objective), share.batches, share.counts, precision="fp32", device=run.device)
    return {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("changes", [{}, PAIRS, {**PAIRS, **LORA}], ids=["chat", "preference", "adapter"])
def test_micro_batches_do_not_change_the_gradient(data: Path, changes: dict[str, Any]) -> None:
    run = prepare(config(data, **changes))
    run.model.double()
    run.objective.helper is None or run.objective.helper.rehearse(None, Path(), None, "fp32", lambda: None)
    draw = torch.Generator().manual_seed(0)
    for tensor in (adapter_state(run.model) or run.model.state_dict()).values():
        tensor += 0.3 * torch.randn(tensor.shape, generator=draw, dtype=tensor.dtype)
    for step in (0, run.batch_plan.steps_per_epoch - 1):  # type: ignore[union-attr]
        whole = gradients(run, 1_000_000, step)
        for size in (1, 97):
            parts = gradients(run, size, step)
            assert whole.keys() == parts.keys() and whole
            scale = max(float(gradient.abs().max()) for gradient in whole.values())
            for name, gradient in whole.items():
                assert float((gradient - parts[name]).abs().max()) <= 1e-12 * scale, name


@pytest.mark.parametrize("changes", [{}, LORA], ids=["whole", "adapter"])
def test_preferences_are_learnt_and_a_resumed_run_ends_bit_equal(
    data: Path, tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = config(data, **PAIRS, **changes)
    whole = train(made, tmp_path / "whole", quiet=True)
    scored = {row["metric"]: row for row in whole.rows}
    assert scored["preference_accuracy"]["value"] > 0.9 and scored["reward_margin"]["low"] > 0
    first, *_, last = read_jsonl(whole.folder / "metrics.jsonl")
    assert first["loss"] == pytest.approx(0.6931, abs=1e-3) and first["preference_accuracy"] == pytest.approx(0.5)
    assert last["loss"] < 0.68 and last["reward_margin"] > 0
    row = read_jsonl(whole.folder / "predictions.jsonl")[0]
    assert row["gold"].startswith("please") and row["rejected"].startswith("bah")
    if changes:
        with pytest.raises(ConfigError, match="its adapter off, and weights of 8 bits have it merged"):
            isoform.evaluate(whole.folder, int8=True)
    original = Loop._update

    def update(self: Loop, step: Any) -> Any:
        if step.step + 1 == 7:
            signal.raise_signal(signal.SIGINT)
        return original(self, step)

    monkeypatch.setattr(Loop, "_update", update)
    with pytest.raises(Stopped):
        train(made, tmp_path / "parts", quiet=True)
    monkeypatch.setattr(Loop, "_update", original)
    parts = train(made, tmp_path / "parts", resume=True, quiet=True)
    name = "adapter_model.safetensors" if changes else "model.safetensors"
    ours, theirs = (load_file(run.folder / "final" / name) for run in (whole, parts))
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    assert [row["value"] for row in whole.rows] == [row["value"] for row in parts.rows]
    saved = {path.suffix for path in (whole.folder / "final").iterdir() if "model" in path.name}
    assert saved == {".safetensors"}


def test_a_study_compares_before_with_after(data: Path, tmp_path: Path) -> None:
    base = config(data).model_dump(mode="json", exclude={"name", "about", "seed", "track"})
    start = train(config(data, train={"max_steps": 2}), tmp_path / "start", quiet=True).folder
    base |= {"model": {"from": str(start / "final")}, "text": {"tokenizer": {"kind": "from-model"}, "max_tokens": 96}}
    study = {
        "name": "chat",
        "base": base,
        "stages": {"sft": {"train": {"max_steps": 6}, "adapter": LORA["adapter"]}},
        "arms": {"as-it-is": {"stages": []}, "lora": {"stages": ["sft"]}},
        "seeds": 2,
        "compare": {"metric": "loss", "split": "dev"},
        "questions": [{"pair": ["as-it-is", "lora"]}],
    }
    results = isoform.study(study, out=tmp_path / "study")
    (question,) = results["questions"]
    assert question["num_seeds"] == 2 and question["second"] < question["first"], "six updates lower the loss"
    assert not [row for row in results["audit"] if row["level"] == "refuse"]


def test_a_study_prefers_after_it_has_learned_to_answer(data: Path, tmp_path: Path) -> None:
    """Two adapters one after the other: the reference of the second is the base with the first one merged in."""
    base = config(data).model_dump(mode="json", exclude={"name", "about", "seed", "track", "data"})
    start = train(config(data, train={"max_steps": 2}), tmp_path / "start", quiet=True).folder
    base |= {"model": {"from": str(start / "final")}, "text": {"max_tokens": 96}, **LORA}
    pairs = {"root": str(data), "path": "pairs.json", "splits": {"train": 0.8, "dev": 0.2}, "overlap": "keep"}
    rows = [{**row, "output": row["chosen"]} for row in json.loads((data / "pairs.json").read_text())]
    (data / "pairs.json").write_text(json.dumps(rows))
    study = {
        "name": "preference",
        "base": {**base, "data": pairs},
        "stages": {
            "sft": {"objective": {"kind": "chat"}, "train": {"max_steps": 3}},
            "prefer": {"objective": {"kind": "preference"}, "train": {"max_steps": 3}},
        },
        "arms": {"preferred": {"stages": ["prefer"]}, "sft-preferred": {"stages": ["sft", "prefer"]}},
        "seeds": 2,
        "compare": {"metric": "preference_accuracy", "split": "dev"},
        "questions": [{"pair": ["preferred", "sft-preferred"]}],
    }
    results = isoform.study(study, out=tmp_path / "study")
    assert not [row for row in results["audit"] if row["level"] == "refuse"]
    # Both stages hold out the same instructions, though one reads the answers of another column.
    kept = [
        {row["input"] for row in read_jsonl(folder / "predictions.jsonl")}
        for folder in sorted((tmp_path / "study" / "stages").glob("*-seed0-*"))
    ]
    assert len(kept) == 3 and kept[0] == kept[1] == kept[2] != set()
    chained = next(row for row in results["arms"] if row["name"] == "sft-preferred")["runs"][0]
    losses = [row["loss"] for row in read_jsonl(tmp_path / "study" / chained["final"] / "metrics.jsonl")]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
