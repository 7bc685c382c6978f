"""A whole run: what stands in its folder, what may be resumed, and that a resume changes nothing."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import isoform
from isoform.config import run_config
from isoform.errors import ConfigError, DataError, LockedError, NonFiniteError, Stopped
from isoform.storage import locked, read_json, read_jsonl, write_json
from isoform.training import logs
from isoform.training import run as run_module
from isoform.training.guards import Interrupts
from isoform.training.loop import Loop
from isoform.training.prepare import prepare
from isoform.training.run import score_as_is, train


def weights(folder):
    return load_file(folder / "final" / "model.safetensors")


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_folder_explains_itself(make, tmp_path):
    result = train(make(), tmp_path / "run", quiet=True)
    folder = result.folder
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["train"]["optimizer"]["beta2"] == 0.95, "the defaults of components are spelled out"
    assert config["model"]["vocab_size"] > 10
    manifest = read_json(folder / "manifest.json")
    assert manifest["complete"] and manifest["steps"] == 12
    assert manifest["fingerprints"].keys() == {"config", "data", "tokenizer"}
    steps = read_jsonl(folder / "metrics.jsonl")
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert steps[0].keys() >= {"loss", "lr", "grad_norm", "tokens", "tokens_per_second"}
    assert {row["metric"] for row in read_json(folder / "eval.json")} >= {"loss", "perplexity", "bits_per_byte"}
    assert len(read_jsonl(folder / "predictions.jsonl")) == read_json(folder / "eval.json")[0]["n"]
    again = run_config_of(folder, make)
    assert prepare(again).resolved == prepare(make()).resolved, "config.yaml reads back as the same run"


def run_config_of(folder, make):
    return isoform.config.run_config(yaml.safe_load((folder / "config.yaml").read_text()))


def test_the_logged_loss_falls_and_is_the_mean_over_targets(make, tmp_path):
    result = train(make({"train": {"max_steps": 60, "learning_rate": 0.01}}), tmp_path / "run", quiet=True)
    losses = [row["loss"] for row in read_jsonl(result.folder / "metrics.jsonl")]
    run = prepare(make())
    assert losses[0] == pytest.approx(math.log(run.tokenizer.vocab_size), rel=0.05), "an untrained model is uniform"
    assert losses[-1] < 0.7 * losses[0]


def test_transformers_loads_the_final_folder_with_equal_logits_and_ids(make, tmp_path):
    result = train(make(), tmp_path / "run", quiet=True)
    theirs = AutoModelForCausalLM.from_pretrained(result.folder / "final").eval()
    tokenizer = AutoTokenizer.from_pretrained(result.folder / "final")
    ours = isoform.load(result.folder)
    ids = tokenizer("bird tree sun.", add_special_tokens=False, return_tensors="pt").input_ids
    assert ids[0].tolist() == ours.tokenizer.encode("bird tree sun.").tolist()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours.model.dense(ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("stop", [1, 4, 7, 11])
def test_stopped_after_any_step_and_resumed_ends_bit_equal(make, tmp_path, monkeypatch, optimizer, stop):
    """A stop in the middle of an epoch, at evaluations, before the end; dropout, decay and warm-up are on."""
    config = make(
        {
            "train": {
                "optimizer": {"kind": optimizer, "weight_decay": 0.1},
                "schedule": {"kind": "linear", "warmup_steps": 3},
            }
        }
    )
    whole = train(config, tmp_path / "whole", quiet=True)
    stop_after(monkeypatch, stop)
    with pytest.raises(Stopped) as stopped:
        train(config, tmp_path / "parts", quiet=True)
    assert stopped.value.exit_code == 130
    monkeypatch.undo()
    os.environ["ISOFORM_CACHE"] = str(tmp_path / "cache")
    parts = train(config, tmp_path / "parts", resume=True, quiet=True)
    assert same(weights(whole.folder), weights(parts.folder))
    assert [row["loss"] for row in read_jsonl(whole.folder / "metrics.jsonl")] == [
        row["loss"] for row in read_jsonl(parts.folder / "metrics.jsonl")
    ]
    assert [(r["metric"], r["value"]) for r in whole.rows] == [(r["metric"], r["value"]) for r in parts.rows]


def stop_after(monkeypatch, stop: int) -> None:
    """Ctrl-C arrives during step `stop`."""
    original = Loop._update

    def update(self, step):
        if step.step + 1 == stop:
            signal.raise_signal(signal.SIGINT)
        return original(self, step)

    monkeypatch.setattr(Loop, "_update", update)


def test_forgetting_the_optimiser_state_would_be_seen(make, tmp_path, monkeypatch):
    """The check above can fail."""
    whole = train(make(), tmp_path / "whole", quiet=True)
    stop_after(monkeypatch, 5)
    with pytest.raises(Stopped):
        train(make(), tmp_path / "parts", quiet=True)
    monkeypatch.undo()
    monkeypatch.setenv("ISOFORM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("isoform.training.loop.restore_optimizer", lambda *args: None)
    parts = train(make(), tmp_path / "parts", resume=True, quiet=True)
    assert not same(weights(whole.folder), weights(parts.folder))


def test_saving_logging_and_evaluating_more_often_changes_nothing(make, tmp_path):
    plain = {"train": {"select": {"metric": "last"}, "evaluate_every_steps": None, "checkpoint_every_steps": 100}}
    busy = {"train": {"select": {"metric": "last"}, "evaluate_every_steps": 1, "checkpoint_every_steps": 1}}
    first = train(make(plain), tmp_path / "plain", quiet=True)
    second = train(make(busy), tmp_path / "busy", quiet=True)
    assert same(weights(first.folder), weights(second.folder))


def test_the_best_checkpoint_is_the_best_by_its_metric(make, tmp_path):
    config = make(
        {"train": {"max_steps": 40, "learning_rate": 0.05, "evaluate_every_steps": 5, "schedule": {"kind": "constant"}}}
    )
    result = train(config, tmp_path / "run", quiet=True)
    events = [row for row in read_jsonl(result.folder / "events.jsonl") if row["event"] == "evaluation"]
    values = {event["step"]: next(r["value"] for r in event["rows"] if r["metric"] == "loss") for event in events}
    selections = read_json(result.folder / "selections.json")
    best = min(values, key=values.get)
    assert selections["final"] == "best-loss"
    assert selections["selections"]["best-loss"]["step"] == best
    loss = next(row["value"] for row in result.rows if row["metric"] == "loss")
    assert loss == pytest.approx(values[best], rel=1e-6)


def test_early_stopping(make, tmp_path):
    config = make(
        {"train": {"max_steps": 400, "learning_rate": 1.0, "evaluate_every_steps": 2, "patience": 3, "clip_norm": None}}
    )
    result = train(config, tmp_path / "run", quiet=True)
    assert result.manifest["steps"] < 400


def test_a_non_finite_loss_stops_before_the_update(make, tmp_path, monkeypatch):
    original = Loop._update

    def poisoned(self, step):
        if step.step == 6:
            with torch.no_grad():
                self.run.model.embedding.weight[:] = float("nan")
        return original(self, step)

    monkeypatch.setattr(Loop, "_update", poisoned)
    with pytest.raises(NonFiniteError, match="step 7") as error:
        train(make(), tmp_path / "run", quiet=True)
    assert error.value.exit_code == 7
    event = next(row for row in read_jsonl(tmp_path / "run" / "events.jsonl") if row["event"] == "non-finite")
    assert event["sample_ids"]
    kept = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1]
    assert all(tensor.isfinite().all() for tensor in load_file(kept / "model.safetensors").values())


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError(), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")],
)
def test_out_of_memory_halves_the_micro_batch_and_not_the_run(error, make, tmp_path, monkeypatch):
    whole = train(make(), tmp_path / "whole", quiet=True)
    from isoform.training import loop

    original, failed = loop.accumulate, []

    def tight(module, batches, counts, **options):
        if max(batch.tokens.numel() for batch in batches) > 120:
            failed.append(len(batches))
            raise error
        return original(module, batches, counts, **options)

    monkeypatch.setattr(loop, "accumulate", tight)
    parts = train(make(), tmp_path / "parts", quiet=True)
    assert 0 < len(failed) < 4, "later steps are cut as small from the start"
    first, second = weights(whole.folder), weights(parts.folder)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-5)


def test_a_resume_with_another_config_shows_the_difference(make, tmp_path, monkeypatch):
    stop_after(monkeypatch, 4)
    with pytest.raises(Stopped):
        train(make(), tmp_path / "run", quiet=True)
    with pytest.raises(ConfigError, match=r"train.learning_rate: 0.003 -> 0.004"):
        train(make({"train": {"learning_rate": 0.004}}), tmp_path / "run", resume=True, quiet=True)
    with pytest.raises(ConfigError, match="unfinished run; add --resume"):
        train(make(), tmp_path / "run", quiet=True)


def test_a_resume_with_other_data_is_refused(make, tmp_path, corpus, monkeypatch):
    stop_after(monkeypatch, 4)
    with pytest.raises(Stopped):
        train(make(), tmp_path / "run", quiet=True)
    text = (corpus / "lines.txt").read_text()
    (corpus / "lines.txt").write_text(text.replace("moon", "noon", 1))
    with pytest.raises(DataError, match="the data has changed since this run began"):
        train(make(), tmp_path / "run", resume=True, quiet=True)


def test_a_folder_in_use_is_refused(make, tmp_path):
    with locked(tmp_path / "run"), pytest.raises(LockedError, match="is working in this folder") as error:
        train(make(), tmp_path / "run", quiet=True)
    assert error.value.exit_code == 5


def test_a_corpus_smaller_than_one_batch(make, tmp_path):
    with pytest.raises(DataError, match="fewer than one batch"):
        train(make({"train": {"batch_sequences": 1000}}), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_second_interrupt_ends_at_once():
    with Interrupts() as interrupts, pytest.raises(SystemExit):
        signal.raise_signal(signal.SIGINT)
        assert interrupts.requested == signal.SIGINT
        signal.raise_signal(signal.SIGINT)


SCRIPT = """
import sys, yaml
from pathlib import Path
from isoform.config import run_config
from isoform.training.run import train
config = run_config(yaml.safe_load(Path(sys.argv[1]).read_text()))
train(config, Path(sys.argv[2]), resume=True, quiet=True)
"""


def killed_runs(make, tmp_path, num_kills: int, seed: int) -> tuple[int, dict]:
    """Kills a process `num_kills` times at random moments, resuming each time; (kills that hit, final weights)."""
    import numpy as np

    config = make({"train": {"max_steps": 40, "checkpoint_every_steps": 2, "evaluate_every_steps": 10}})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    environment = {**os.environ, "ISOFORM_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "config.yaml"), str(tmp_path / "killed")]
    rng = np.random.default_rng(seed)
    hits = 0
    for _ in range(num_kills):
        child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        metrics = tmp_path / "killed" / "metrics.jsonl"
        deadline = time.monotonic() + 60
        while child.poll() is None and not metrics.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(float(rng.uniform(0, 1.0)))
        if child.poll() is None:
            child.kill()
            hits += 1
        child.wait()
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120)
    whole = train(config, tmp_path / "whole", quiet=True)
    assert same(weights(whole.folder), weights(tmp_path / "killed"))
    rows = read_jsonl(tmp_path / "killed" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert [row["loss"] for row in rows] == [row["loss"] for row in read_jsonl(whole.folder / "metrics.jsonl")]
    return hits, weights(whole.folder)


def test_killed_at_random_moments_and_resumed_ends_bit_equal(make, tmp_path):
    torch.set_num_threads(1)
    hits, _ = killed_runs(make, tmp_path, num_kills=3, seed=0)
    assert hits >= 1


@pytest.mark.slow
def test_twenty_kills_twenty_bit_equal_endings(make, tmp_path):
    torch.set_num_threads(1)
    for number in range(20):
        folder = tmp_path / str(number)
        folder.mkdir()
        killed_runs(make, folder, num_kills=1, seed=number)


def test_trackers_are_written_offline(make, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pytest.importorskip("wandb")
    config = make({"track": ["tensorboard", "wandb"], "train": {"max_steps": 3, "evaluate_every_steps": 2}})
    result = train(config, tmp_path / "run", quiet=True)
    events = accumulator.EventAccumulator(str(result.folder / "tensorboard"))
    events.Reload()
    steps = read_jsonl(result.folder / "metrics.jsonl")
    told = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert told == [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in steps] and len(told) == 3
    assert [event.step for event in events.Scalars("dev/loss")] == [2, 3]
    (kept,) = [row["value"] for row in result.rows if row["metric"] == "loss"]
    assert events.Scalars("final/dev/loss")[0].value == pytest.approx(kept, rel=1e-6)
    config_text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "learning_rate: 0.003" in config_text
    (offline,) = (result.folder / "wandb").glob("offline-run-*/*.wandb")
    written = offline.read_bytes()
    for word in ("train/loss", "dev/loss", "final/dev/loss", "learning_rate"):
        assert word.encode() in written, word


def test_a_run_without_steps_tells_trackers_its_scores(make, tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = train(make({"train": {"max_steps": 2}}), tmp_path / "run", quiet=True).folder
    config = make({"track": ["tensorboard"]})
    as_is = run_config({**config.model_dump(), "model": {"from": str(folder)}})
    rows = score_as_is(as_is, tmp_path / "as-is").rows
    events = accumulator.EventAccumulator(str(tmp_path / "as-is" / "tensorboard"))
    events.Reload()
    for row in (row for row in rows if row["value"] is not None):
        name = f"final/{row['split']}/{row['metric']}"
        assert events.Scalars(name)[0].value == pytest.approx(row["value"], rel=1e-6)


def test_an_unknown_tracker_is_refused_before_anything_is_written(make, tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'tensorboard'"):
        train(make({"track": ["tensorbord"]}), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_every_planned_rate_is_the_logged_rate(make, tmp_path):
    config = make({"train": {"schedule": {"kind": "cosine", "warmup_fraction": 0.25}}})
    result = train(config, tmp_path / "run", quiet=True)
    run = prepare(config)
    expected = [config.train.learning_rate * run.factor(step) for step in range(run.num_steps)]
    assert [row["lr"] for row in read_jsonl(result.folder / "metrics.jsonl")] == expected


def test_manifest_is_json_without_infinities(make, tmp_path):
    result = train(make(), tmp_path / "run", quiet=True)
    json.loads((result.folder / "manifest.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert run_module.differences({"a": {"b": 1}}, {"a": {"b": 2}}) == ["a.b: 1 -> 2"]


def test_no_split_may_be_scored(make, tmp_path):
    scored = train(make(), tmp_path / "scored", quiet=True)
    bare = train(make({"evaluate": {"splits": []}}), tmp_path / "bare", quiet=True)
    assert {row["split"] for row in scored.rows} == {"dev"} and bare.rows == read_json(bare.folder / "eval.json") == []
    assert (scored.folder / "predictions.jsonl").exists() and not (bare.folder / "predictions.jsonl").exists()
    assert scored.manifest["final_sha256"] == bare.manifest["final_sha256"]


def test_a_split_may_be_scored_at_a_length_of_its_own(make, tmp_path):
    """Windows of the same text, longer than in training: fewer of them, every byte once."""
    rotary = {"text": {"max_tokens": 8}, "model": {"position": {"kind": "rope"}}}
    twice = train(make({**rotary, "evaluate": {"max_tokens": {"dev": 16}}}), tmp_path / "twice", quiet=True)
    once = train(make(rotary), tmp_path / "once", quiet=True)
    assert same(weights(twice.folder), weights(once.folder)), "training is the same"
    long, short = (next(row for row in run.rows if row["metric"] == "bits_per_byte") for run in (twice, once))
    assert long["n"] < short["n"] and long["value"] != short["value"]
    whole, parts = ([row["stats"] for row in read_jsonl(run.folder / "predictions.jsonl")] for run in (twice, once))
    assert max(row["tokens"] for row in whole) == 16 and max(row["tokens"] for row in parts) == 8
    for total in ("bytes", "tokens"):
        assert sum(row[total] for row in whole) == sum(row[total] for row in parts)
    again = {row["metric"]: row["value"] for row in isoform.evaluate(twice.folder, split="dev")}
    assert again["bits_per_byte"] == pytest.approx(long["value"], rel=1e-6)
    for position in ("learned", "rope"):
        wrong = {**rotary, "model": {"position": {"kind": position}}}
        split = "dev" if position == "learned" else "absent"
        with pytest.raises(ConfigError, match=rf"evaluate\.max_tokens\.{split}: "):
            prepare(make({**wrong, "evaluate": {"max_tokens": {split: 16}}}))


def test_a_tracker_that_cannot_be_opened_or_closed_ends_no_run(make, tmp_path, monkeypatch):
    class Unreachable:
        def __init__(self, folder, name, config):
            raise ConnectionError("no route to host")

    class Unclosed:
        def __init__(self, folder, name, config): ...

        def log(self, step, values): ...

        def close(self):
            raise OSError("no room")

    real = logs.lookup
    kinds = {"tensorboard": Unreachable, "wandb": Unclosed}
    monkeypatch.setattr(logs, "lookup", lambda room, name, where: kinds.get(name) or real(room, name, where))
    run = train(make({"track": ["tensorboard", "wandb"], "train": {"max_steps": 3}}), tmp_path / "run", quiet=True)
    assert run.manifest["complete"]
    dropped = [row["reason"] for row in read_jsonl(run.folder / "events.jsonl") if row["event"] == "tracker-dropped"]
    assert dropped == ["no route to host", "no room"]


def test_how_a_model_generates_goes_on_through_its_training(make, tmp_path):
    first = train(make({"train": {"max_steps": 2}}), tmp_path / "first", quiet=True).folder / "final"
    own = read_json(first / "generation_config.json")["eos_token_id"]
    (first / "manifest.json").unlink()
    write_json(first / "generation_config.json", {"eos_token_id": [own + 1, 0], "do_sample": True, "top_p": 0.9})
    values = make({"train": {"max_steps": 2}}).model_dump() | {"model": {"from": str(first)}}
    values["text"]["tokenizer"] = {"kind": "from-model"}
    second = train(run_config(values), tmp_path / "second", quiet=True).folder
    for name in ("final", "last", "best-loss"):
        said = read_json(second / name / "generation_config.json")
        assert (said["do_sample"], said["top_p"]) == (True, 0.9)
        assert said["eos_token_id"] == [own + 1, 0, own]
    theirs = AutoModelForCausalLM.from_pretrained(second / "final").generation_config
    assert (theirs.top_p, theirs.eos_token_id) == (0.9, [own + 1, 0, own])
