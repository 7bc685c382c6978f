"""Compiled blocks: the same numbers, made once for all layers and sizes; chosen where they are faster, and kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch._dynamo.testing import CompileCounter

from isoform import machine
from isoform.contracts import Sample
from isoform.data.batches import collate
from isoform.errors import ConfigError
from isoform.layers.compiled import blocks, compile_blocks, is_compiled, plainly, uncompile_blocks
from isoform.layers.recompute import Recomputable
from isoform.models.gpt2 import GPT2
from isoform.models.llama import Llama
from isoform.models.t5 import T5
from isoform.storage import read_json, read_jsonl
from isoform.training import compiling
from isoform.training.prepare import prepare
from isoform.training.run import train

# Of torch's own, on its way through a block.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@pytest.fixture
def counter(monkeypatch):
    """In place of the real backend one that only counts what it is given: quick, and the graphs are the same."""
    made = CompileCounter()
    monkeypatch.setattr(Recomputable, "compile", lambda part, **how: nn.Module.compile(part, backend=made, **how))
    torch._dynamo.reset()
    yield made
    torch._dynamo.reset()


def batch(lengths):
    samples = [Sample(str(length), np.arange(length, dtype=np.int32) % 30 + 3) for length in lengths]
    made = collate([Sample(s.id, s.tokens, source=s) for s in samples])
    made.dropout_key = 12345
    return made


def passed(model, given):
    model.zero_grad()
    hidden = model(given).hidden
    hidden.square().sum().backward()
    return [hidden.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


MODELS = {
    "gpt2": lambda: GPT2.tiny(num_layers=3, dropout=0.2),
    "rope": lambda: Llama.tiny(num_layers=3),
    "t5": lambda: T5.tiny(dropout=0.1),
}


@pytest.mark.parametrize("name", MODELS)
def test_compiled_blocks_give_the_same_and_are_made_once(name, counter):
    model = MODELS[name]().train()
    batches = [batch(lengths) for lengths in ([9, 17, 5], [4, 30], [12], [8, 8, 9, 10])]
    plain = [passed(model, one) for one in batches]
    compile_blocks(model)
    for number, one in enumerate(batches):
        for mine, theirs in zip(passed(model, one), plain[number], strict=True):
            assert (mine - theirs).norm() <= 1e-4 * theirs.norm()
        if number == 0:
            frames = counter.frame_count
            assert 0 < frames <= 16
    assert counter.frame_count == frames, "another number of tokens has the blocks compiled anew"
    with plainly(model), torch.no_grad():
        model.eval()(batches[0])
    assert counter.frame_count == frames
    uncompile_blocks(model)
    assert not is_compiled(model)


@pytest.fixture
def run(make, tmp_path, monkeypatch, counter):
    monkeypatch.setattr(machine, "cache_folder", lambda: tmp_path)
    monkeypatch.delenv("ISOFORM_NATIVE", raising=False)
    prepared = prepare(make())
    yield prepared
    uncompile_blocks(prepared.model)


def choose(run, earlier=None):
    return compiling.choose(run, Accelerator(cpu=True), earlier or {})


def asked(run, word):
    run.config = run.config.model_copy(update={"train": run.config.train.model_copy(update={"compile": word})})
    return run


def test_short_runs_and_studies_are_not_compiled(run, monkeypatch):
    assert not choose(run)["on"] and "12 steps are too few" in choose(run)["why"]
    run.num_steps = 1000
    assert "s of training are too few" in choose(run)["why"] and not is_compiled(run.model)
    monkeypatch.setenv("ISOFORM_NATIVE", "1")
    assert "runs of a study" in choose(run)["why"]


@pytest.mark.parametrize(("speedup", "on"), [(0.8, False), (1.01, False), (1.3, True)])
def test_what_is_slower_is_never_picked_and_it_is_measured_once(run, monkeypatch, speedup, on):
    measured = []
    run.num_steps = 1000
    monkeypatch.setattr(compiling, "WORTH_SECONDS", 0.0)
    monkeypatch.setattr(compiling, "_speedup", lambda model, once: measured.append(once) or speedup)
    before = torch.get_rng_state()
    first = choose(run)
    assert choose(run) == first and len(measured) == 1
    assert first["on"] is on is is_compiled(run.model) and first["speedup"] == speedup
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in run.model.parameters())


def test_other_batches_and_other_numbers_of_processes_are_measured_by_themselves(make, run, monkeypatch):
    def key(given, processes=1):
        monkeypatch.setattr(Accelerator, "num_processes", processes)
        return compiling._key(given, compiling._Pass(given, Accelerator(cpu=True)))

    assert key(prepare(make())) == key(run) != key(run, processes=2)
    assert key(run) != key(prepare(make({"train": {"batch_sequences": 2}})))


def test_the_measurement_compares_two_ways_that_both_work(run, monkeypatch):
    monkeypatch.setattr(compiling, "RACE_SECONDS", 0.0)
    assert 0.001 < compiling._speedup(run.model, compiling._Pass(run, Accelerator(cpu=True))) < 1000


def test_a_compiler_that_fails_leaves_the_run_as_it_was(run, monkeypatch):
    run.num_steps = 1000
    monkeypatch.setattr(compiling, "WORTH_SECONDS", 0.0)

    def broken(model, once):
        compile_blocks(model)
        once.module(once.batch)["loss"].total.backward()
        raise RuntimeError("no such instruction\nand much more")

    monkeypatch.setattr(compiling, "_speedup", broken)
    assert choose(run)["why"] == "not measured: RuntimeError: no such instruction" and not is_compiled(run.model)
    assert all(parameter.grad is None for parameter in run.model.parameters())


def test_it_may_be_asked_for_and_what_was_begun_is_kept(run, monkeypatch):
    assert choose(asked(run, "on"))["on"] and all(part._compiled_call_impl for part in blocks(run.model))
    assert not choose(asked(run, "off"))["on"]
    begun = {"on": True, "speedup": 1.2, "why": "faster"}
    assert choose(run, {"compile": begun}) == begun
    assert not choose(asked(run, "on"), {"kernels": {}})["on"], "begun before there was a choice"
    monkeypatch.setattr(compiling, "missing", lambda device: "no C++ compiler was found")
    with pytest.raises(ConfigError, match=r"train\.compile: on given, but no C\+\+ compiler"):
        choose(asked(run, "on"))
    with pytest.raises(ConfigError, match="begun with compiled blocks, but no C"):
        choose(run, {"compile": begun})
    assert choose(asked(run, "auto"))["why"] == "no C++ compiler was found"


def test_a_compiled_run_learns_the_same(make, tmp_path, counter):
    folders = {}
    for word in ("off", "on"):
        config = make({"train": {"compile": word, "max_steps": 4, "evaluate_every_steps": 2}})
        folders[word] = train(config, tmp_path / word, quiet=True).folder
    assert counter.frame_count and read_json(folders["on"] / "manifest.json")["compile"]["on"]
    losses = [[row["loss"] for row in read_jsonl(folder / "metrics.jsonl")] for folder in folders.values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
