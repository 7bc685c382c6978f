"""A run with an adapter: what is trained, what is written, that it resumes bit by bit, and that PEFT reads it.

Oracles: peft and transformers; the whole batch for its micro-batches; Accelerate's own `accumulate()`.
"""

from __future__ import annotations

import signal

import pytest
import torch
from accelerate import Accelerator
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import isoform.config
import isoform.reading
from isoform.checkpoints.adapters import merge
from isoform.errors import CheckpointError, ConfigError, Stopped
from isoform.models.lora import activate, adapter_state
from isoform.storage import read_json, read_jsonl
from isoform.training.feed import Feed
from isoform.training.loop import Loop
from isoform.training.plan import plan_run
from isoform.training.prepare import prepare
from isoform.training.run import train
from isoform.training.step import LossModule, accumulate

# What peft itself warns of.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
LORA = {"adapter": {"kind": "lora", "rank": 3, "alpha": 6, "dropout": 0.2, "targets": ["query", "feedforward.up"]}}
SHORT = {"train": {"max_steps": 4, "evaluate_every_steps": None}}
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def stop_after(monkeypatch, stop: int) -> None:
    original = Loop._update

    def update(self, step):
        if step.step + 1 == stop:
            signal.raise_signal(signal.SIGINT)
        return original(self, step)

    monkeypatch.setattr(Loop, "_update", update)


def test_only_the_adapter_is_trained_and_kept(make, tmp_path):
    run = prepare(make(LORA))
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    folder = train(make(LORA), tmp_path / "run", quiet=True).folder
    counts = read_json(folder / "manifest.json")["model"]
    assert counts["trainable"] == 2 * (3 * 16 + 16 * 3 + 3 * 16 + 64 * 3) < counts["total"]
    trained = set(adapter_state(run.model))
    for name, tensor in isoform.load(folder).model.state_dict().items():
        assert ".adapters." in name or torch.equal(tensor, before[name]), name
    step = sorted((folder / "checkpoints").glob("step-*"))[-1]
    assert not (step / "model.safetensors").exists()
    for file in ("optimizer", "master"):
        names = {name.rpartition("/")[0] or name for name in load_file(step / "state" / f"{file}.safetensors")}
        assert names == trained, file
    assert read_json(folder / "manifest.json")["unused_parameters"] == []


def test_peft_and_transformers_read_the_final_folder_with_equal_logits(make, tmp_path):
    folder = train(make({**LORA, **SHORT}), tmp_path / "run", quiet=True).folder
    ours = isoform.load(folder).model
    with torch.no_grad():
        expected = ours.dense(IDS)
        base = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
        assert not torch.allclose(base(IDS).logits, expected, atol=1e-4), "the adapter does something"
        adapted = PeftModel.from_pretrained(base, folder / "final").eval()
        torch.testing.assert_close(adapted(IDS).logits, expected, rtol=1e-4, atol=1e-5)
        by_name = AutoPeftModelForCausalLM.from_pretrained(folder / "final").eval()
        torch.testing.assert_close(by_name(IDS).logits, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(adapted.merge_and_unload()(IDS).logits, expected, rtol=1e-4, atol=1e-5)
        merged = merge(ours)
        torch.testing.assert_close(merged.model.dense(IDS), expected, rtol=1e-4, atol=1e-5)
        activate(ours, None)
        torch.testing.assert_close(
            AutoModelForCausalLM.from_pretrained(folder / "base")(IDS).logits, ours.dense(IDS), rtol=1e-4, atol=1e-5
        )


def test_stopped_and_resumed_ends_bit_equal(make, tmp_path, monkeypatch):
    whole = train(make(LORA), tmp_path / "whole", quiet=True)
    stop_after(monkeypatch, 7)
    with pytest.raises(Stopped):
        train(make(LORA), tmp_path / "parts", quiet=True)
    monkeypatch.undo()
    monkeypatch.setenv("ISOFORM_CACHE", str(tmp_path / "cache"))
    parts = train(make(LORA), tmp_path / "parts", resume=True, quiet=True)
    first, second = (load_file(run.folder / "final" / "adapter_model.safetensors") for run in (whole, parts))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    losses = [[row["loss"] for row in read_jsonl(run.folder / "metrics.jsonl")] for run in (whole, parts)]
    assert losses[0] == losses[1]
    assert [row["value"] for row in whole.rows] == [row["value"] for row in parts.rows]


def test_a_moved_run_finds_its_base_and_another_base_is_refused(make, tmp_path):
    folder = train(make({**LORA, **SHORT}), tmp_path / "run", quiet=True).folder
    expected = isoform.load(folder).model.dense(IDS)
    folder = folder.rename(tmp_path / "moved")
    assert torch.equal(isoform.load(folder).model.dense(IDS), expected)
    other = train(make({**LORA, **SHORT, "seed": 1}), tmp_path / "other", quiet=True).folder
    with pytest.raises(CheckpointError, match="trained on another base"):
        isoform.load(folder, base=other / "base")
    with pytest.raises(CheckpointError, match="an adapter too"):
        isoform.load(folder, base=other)
    (folder / "base").rename(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="name the base"):
        isoform.load(folder)


def test_the_next_stage_begins_from_what_was_learned(make, tmp_path):
    folder = train(make({**LORA, **SHORT}), tmp_path / "run", quiet=True).folder
    expected = isoform.load(folder).model.dense(IDS)
    for changes in ({}, LORA):
        model = prepare(make(changes), start=folder / "final").model.eval()
        torch.testing.assert_close(model.dense(IDS), expected, rtol=1e-5, atol=1e-6)
    assert all(parameter.requires_grad for parameter in prepare(make(), start=folder / "final").model.parameters())


def gradients(run, micro_batch_tokens: int, step: int) -> dict[str, torch.Tensor]:
    feed = Feed(run.datasets["train"], run.objective, run.batch_plan, seed=0, micro_batch_tokens=micro_batch_tokens)
    share = feed.at(step)
    run.model.zero_grad()
    accumulate(LossModule(run.model, run.objective), share.batches, share.counts, precision="fp32", device=run.device)
    return {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["gpt2", "t5"])
@pytest.mark.parametrize("micro_batch_tokens", [1, 97])
def test_micro_batches_do_not_change_the_gradient(make, family, micro_batch_tokens):
    """Dropout on, the last incomplete batch of the epoch included, both streams of an encoder-decoder."""
    kinds = {
        "gpt2": {},
        "t5": {
            "model": {"family": "t5", "num_layers": 1, "num_heads": 2, "width": 16, "feedforward_width": 24},
            "objective": {"kind": "t5-spans"},
            "text": {"tokenizer": {"kind": "char", "sentinels": 20}},
            "adapter": {**LORA["adapter"], "targets": ["query", "key", "value"]},
            "train": {"select": {"metric": "last"}},
        },
    }
    run = prepare(make(isoform.reading.merge(LORA, kinds[family])))
    run.model.double()
    draw = torch.Generator().manual_seed(0)
    for tensor in adapter_state(run.model).values():
        tensor.copy_(torch.randn(tensor.shape, generator=draw, dtype=tensor.dtype))
    for step in (0, run.batch_plan.steps_per_epoch - 1):
        whole, parts = gradients(run, 1_000_000, step), gradients(run, micro_batch_tokens, step)
        assert whole.keys() == parts.keys() == adapter_state(run.model).keys()
        scale = max(float(gradient.abs().max()) for gradient in whole.values())
        for name, gradient in whole.items():
            assert float((gradient - parts[name]).abs().max()) <= 1e-12 * scale, name


def test_agrees_with_accelerates_own_accumulation_where_that_is_exact(make):
    """Equal numbers of targets in every micro-batch: there the mean of means that `accumulate()` takes is right."""
    run = prepare(make({**LORA, "train": {"batch_sequences": 4}}))
    run.model.double()
    feed = Feed(run.datasets["train"], run.objective, run.batch_plan, seed=0, micro_batch_tokens=1)
    batches = [feed.at(0).batches[0]] * 4
    module = LossModule(run.model, run.objective)
    count = run.objective.counts(batches[0])["loss"]
    accumulate(module, batches, {"loss": 4 * count}, precision="fp32", device=run.device)
    ours = {name: p.grad.clone() for name, p in run.model.named_parameters() if p.requires_grad}
    run.model.zero_grad()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    prepared = accelerator.prepare(module)
    for batch in batches:
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(batch)["loss"].total / count)
    for name, gradient in ours.items():
        torch.testing.assert_close(run.model.get_parameter(name).grad, gradient, rtol=1e-10, atol=1e-14)


def test_the_plan_counts_what_is_trained(make):
    full, adapted = (plan_run(prepare(make(changes)), probe=False) for changes in ({}, LORA))
    assert adapted["model"]["trainable"] < full["model"]["trainable"] / 4
    assert adapted["disk_bytes"] < full["disk_bytes"]


def test_an_adapter_that_nothing_trains_is_refused(make):
    message = r"train.parameters: .* leaves out blocks\.0\..*\.up, .* add '\*\.adapters\.\*'"
    for patterns in (["final_norm*"], ["*.adapters.*.down"]):
        with pytest.raises(ConfigError, match=message) as error:
            prepare(make({**LORA, "train": {"parameters": patterns}}))
        assert "\n" not in str(error.value)
    beside = prepare(make({**LORA, "train": {"parameters": ["*.adapters.*"]}})).model
    trained = {name for name, tensor in beside.named_parameters() if tensor.requires_grad}
    assert trained == set(adapter_state(beside))


def test_four_bits_are_refused_where_they_cannot_be(make, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"adapter.base_bits: 4 needs .*CUDA"):
        prepare(make({"adapter": {**LORA["adapter"], "base_bits": 4}}))
