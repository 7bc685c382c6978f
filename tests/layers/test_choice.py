"""The choice of kernels and threads: measured once, kept by whoever was begun with it, never for the slower."""

from __future__ import annotations

import json
import os

import pytest
import torch

from isoform import machine, registry
from isoform.errors import ConfigError
from isoform.layers import choice, fused, kernels
from isoform.layers.choice import Shape

CPU = torch.device("cpu")
TINY = Shape(
    width=16, num_heads=4, num_kv_heads=2, head_width=8, feedforward_width=24, feedforward="swiglu", drops=True
)
needs_kernels = pytest.mark.skipif(kernels.library() is None, reason="no C++ compiler here")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """A cache of its own for what is measured, and the switch back where it was; the compiled kernels stay."""
    kernels.library()
    monkeypatch.setattr(machine, "cache_folder", lambda: tmp_path)
    monkeypatch.delenv("ISOFORM_NATIVE", raising=False)
    before = kernels.switched_on()
    yield tmp_path
    kernels.switch(before)


def speedups(monkeypatch, value: float) -> list[str]:
    """Makes the measurement give `value`; the list that is returned has an entry for each."""
    asked: list[str] = []
    monkeypatch.setattr(choice, "kernel_speedup", lambda precision, shape: asked.append(precision) or value)
    return asked


@needs_kernels
def test_it_is_measured_once_for_each_precision_and_kept(monkeypatch, own_cache):
    asked = speedups(monkeypatch, 2.0)
    first = choice.choose("bf16", CPU)
    assert choice.choose("bf16", CPU) == first and asked == ["bf16"]
    choice.choose("fp32", CPU)
    assert asked == ["bf16", "fp32"]
    assert first["native"] == choice.available() != choice.PLAIN and first["speedup"] == 2.0
    assert json.loads(json.dumps(first)) == first
    assert len(json.loads((own_cache / choice.CACHE).read_text())) == 2


@needs_kernels
def test_what_is_slower_than_plain_torch_is_not_used(monkeypatch):
    speedups(monkeypatch, 0.9)
    chosen = choice.choose("fp32", CPU)
    assert chosen["native"] == choice.PLAIN and "plain torch is faster" in chosen["why"]
    logits, targets = torch.randn(4, 7), torch.zeros(4, dtype=torch.int64)
    assert fused.nats(logits, targets) is None
    speedups(monkeypatch, 1.5)
    choice.choose("bf16", CPU)
    assert fused.nats(logits, targets) is not None


@needs_kernels
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_measurement_is_a_ratio_of_two_ways_that_both_work_and_leaves_the_switch(precision, monkeypatch):
    monkeypatch.setattr(choice, "KERNEL_SECONDS", 0.0)
    for on in (False, True):
        kernels.switch(on)
        assert 0.001 < choice.kernel_speedup(precision, TINY) < 1000
        assert kernels.switched_on() is on


def test_half_of_the_threads_are_left_idle_only_where_that_is_faster(monkeypatch):
    before, used = torch.get_num_threads(), []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine, "threads", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: used[-1] if used else 4)
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    monkeypatch.setenv("ISOFORM_NATIVE", "0")
    for speedup, expected in ((1.05, 4), (1.2, 2)):
        monkeypatch.setattr(choice, "half_speedup", lambda precision, most, value=speedup: value)
        assert choice.choose("fp32" if expected == 4 else "bf16", CPU)["threads"] == expected
    assert used == [2]
    monkeypatch.undo()
    assert torch.get_num_threads() == before


def test_half_speedup_leaves_the_threads_alone(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(choice, "THREAD_SECONDS", 0.0)
    assert 0.001 < choice.half_speedup("fp32", 2) < 1000
    torch.set_num_threads(before)


def test_a_recorded_choice_that_is_not_here_is_refused_in_one_line(monkeypatch):
    monkeypatch.setenv("ISOFORM_NATIVE", "0")
    recorded = {"native": choice.TILES, "threads": 1, "speedup": 2.0, "why": "faster"}
    with pytest.raises(ConfigError, match=r"begun with C\+\+ kernels .* which are not here \(switched off by ISOFORM"):
        choice.choose("bf16", CPU, recorded)


@needs_kernels
def test_a_run_that_began_in_plain_torch_goes_on_so(monkeypatch):
    speedups(monkeypatch, 2.0)
    recorded = {"native": choice.PLAIN, "threads": torch.get_num_threads(), "speedup": None, "why": "no C++ compiler"}
    assert choice.choose("fp32", CPU, recorded) == recorded
    assert not kernels.switched_on()


@needs_kernels
def test_within_a_study_nothing_is_measured(monkeypatch):
    asked = speedups(monkeypatch, 0.5)
    with choice.held({"native": choice.available()}):
        assert choice.choose("fp32", CPU)["native"] == choice.available()
    with choice.held({"native": choice.PLAIN}):
        assert choice.choose("fp32", CPU)["native"] == choice.PLAIN
    assert asked == [] and "ISOFORM_NATIVE" not in os.environ


def test_a_gpu_has_no_use_for_them():
    chosen = choice.choose("bf16", torch.device("cuda"))
    assert chosen["native"] == choice.PLAIN and "cuda" in chosen["why"]


def test_bf16_is_taken_only_where_every_shape_is_faster_in_it(monkeypatch, own_cache):
    measured = []
    speedups = {16: 0.9, 512: 3.0, 64: 1.1}
    monkeypatch.setattr(choice, "bf16_speedup", lambda shape: measured.append(shape.width) or speedups[shape.width])
    small, slow, large = Shape(width=16), Shape(width=64), Shape(width=512)
    assert choice.choose_precision("auto", CPU, [large]) == "bf16"
    assert choice.choose_precision("auto", CPU, [small]) == choice.choose_precision("auto", CPU, [slow]) == "fp32"
    assert choice.choose_precision("auto", CPU, [large, small]) == "fp32"
    assert measured == [512, 16, 64]  # each once
    assert choice.choose_precision("bf16", CPU, [small]) == "bf16"


@needs_kernels
def test_kernels_have_to_be_faster_at_every_shape(monkeypatch):
    monkeypatch.setattr(choice, "kernel_speedup", lambda precision, shape: 0.5 if shape.width == 16 else 2.0)
    assert choice.choose("bf16", CPU, shapes=[Shape(width=512)])["native"] == choice.available()
    chosen = choice.choose("bf16", CPU, shapes=[Shape(width=512), Shape(width=16)])
    assert chosen["native"] == choice.PLAIN and chosen["speedup"] == 0.5 and "width 16, bf16" in chosen["why"]


def test_precisions_are_measured_on_a_block_that_works(monkeypatch):
    monkeypatch.setattr(choice, "PRECISION_SECONDS", 0.0)
    before = kernels.switched_on()
    assert 0.001 < choice.bf16_speedup(TINY) < 1000
    assert kernels.switched_on() is before


def test_every_family_tells_its_shape_and_wide_ones_are_measured_smaller():
    for name in registry.names("model"):
        family = registry.lookup("model", name)
        if "fits" not in family.capabilities:
            model = family.tiny()
            shape = Shape.of(model.config)
            widths = [layer.out_features for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
            assert shape.width == model.config.width and shape.num_heads * shape.head_width == shape.width
            assert shape.feedforward_width in widths or 2 * shape.feedforward_width in widths, name
            assert shape.bounded is shape
            assert registry.lookup("feedforward", shape.feedforward)
    wide = Shape(8192, 64, 8, 128, 28_672, "swiglu", "rope").bounded
    assert wide == Shape(1024, 8, 1, 128, 3584, "swiglu", "rope")
