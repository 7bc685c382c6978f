"""Adapters of a model: where they may stand, what they change, and how many parameters they train."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from isoform.errors import ConfigError
from isoform.models import heads, lora
from isoform.models.bert import Bert
from isoform.models.gpt2 import GPT2
from isoform.models.llama import Llama
from isoform.models.lora import Lora, activate, adapter_state
from isoform.models.modernbert import ModernBert
from isoform.models.t5 import T5
from isoform.registry import lookup

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def attached(model, name="default", seed=0, **options):
    Lora(Lora.Config(**options)).attach(model, seed=seed, name=name)
    return model


def shaken(model, seed=0):
    """The active adapter with values that are not zero anywhere."""
    draw = torch.Generator().manual_seed(seed)
    for tensor in adapter_state(model).values():
        tensor.copy_(0.3 * torch.randn(tensor.shape, generator=draw))
    return model


@pytest.mark.parametrize("family", [GPT2, Llama, Bert, ModernBert])
def test_begins_as_its_base_and_trains_nothing_else(family):
    model = family.tiny().eval()
    expected = model.dense(IDS)
    attached(model, targets=["all-linear"])
    assert torch.equal(model.dense(IDS), expected), "B is 0"
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(adapter_state(model))
    assert trained and all(".adapters." in name for name in trained)
    assert not torch.allclose(shaken(model).dense(IDS), expected, atol=1e-2)


def test_the_formula_and_both_scales():
    """alpha / r is 4 and alpha / sqrt(r) is 11.31 at the published r = 8, alpha = 32."""
    for stabilized, scale in ((False, 4.0), (True, 32 / 8**0.5)):
        model = shaken(attached(GPT2.tiny(), alpha=32, rank_stabilized=stabilized, targets=["key"]))
        layer = model.blocks[0].attention.qkv
        part = layer.adapters["default"]["key"]
        assert part.scale == pytest.approx(scale)
        hidden = torch.randn(5, 32)
        added = torch.zeros(5, 96)
        added[:, 32:64] = scale * hidden @ part.down.T @ part.up.T
        expected = hidden @ layer.weight.T + layer.bias + added
        torch.testing.assert_close(layer(hidden), expected)


def test_values_follow_from_the_seed_alone():
    first, second, other = (adapter_state(attached(GPT2.tiny(), seed=seed)) for seed in (3, 3, 4))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    name = next(name for name in first if name.endswith("down"))
    assert not torch.equal(first[name], other[name])
    assert float(first[name].std()) == pytest.approx(1 / 96**0.5, rel=0.2)


@pytest.mark.parametrize(
    ("model", "targets", "places"),
    [
        (GPT2, ["c_attn"], ["attention.qkv"]),
        (GPT2, ["attn.c_proj"], ["attention.output"]),
        (Llama, ["q_proj", "v_proj"], ["attention.query", "attention.value"]),
        (Bert, ["self.key"], ["attention.key"]),
        (Bert, ["layer.*.output.dense"], ["attention.output", "feedforward.down"]),
        (ModernBert, ["Wqkv"], ["attention.qkv"]),
    ],
)
def test_names_of_transformers_are_understood(model, targets, places):
    whole = model.tiny()
    found = [place.name for place in lora.choose(whole, targets)]
    layers = range(whole.config.num_layers)
    assert sorted(found) == sorted(f"blocks.{layer}.{place}" for layer in layers for place in places)


def test_cross_attention_and_both_stacks():
    found = {place.name for place in lora.choose(T5.tiny(), ["key"])}
    assert "decoder.blocks.0.cross_attention.key" in found
    assert "encoder.blocks.1.attention.key" in found
    assert {place.theirs for place in lora.choose(T5.tiny(), ["EncDecAttention.k"])} == {
        f"decoder.block.{layer}.layer.1.EncDecAttention.k" for layer in (0, 1)
    }


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["qurey"], r"'qurey' names no matrix.*did you mean 'query'.*names end in: .*value"),
        (["query", "nothing"], "'nothing' names no matrix"),
        (["blocks.7.attention.query"], r"names no matrix.*did you mean 'blocks\.[01]\.attention\.query'"),
        (["dense"], r"'dense' also names .*head\.dense.*name more of the path"),
        (["attention.qkv", "query"], "rows of one matrix"),
    ],
)
def test_what_a_pattern_misses_is_said(targets, message):
    with pytest.raises(ConfigError, match=message):
        lora.choose(Bert.tiny(), targets)


def test_whole_modules_are_trained_too_and_tied_tables_are_not():
    model = attached(Bert.tiny(tied=False), train=["head"])
    assert model.head.dense.weight.requires_grad
    assert not model.embedding.weight.requires_grad
    with pytest.raises(ConfigError, match="names no module with parameters"):
        attached(Bert.tiny(), train=["haed"])
    with pytest.raises(ConfigError, match="head's matrix too"):
        attached(GPT2.tiny(), train=["embedding"])


def test_several_adapters_on_one_base_are_switched():
    model = Bert.tiny(tied=False).eval()
    base = model.dense(IDS)
    first = shaken(attached(model, "first", train=["head"]), 1).dense(IDS)
    second = shaken(attached(model, "second", targets=["key"]), 2).dense(IDS)
    assert not torch.allclose(first, second)
    for name, expected in (("first", first), (None, base), ("second", second), ("first", first), (None, base)):
        activate(model, name)
        assert torch.equal(model.dense(IDS), expected), name
        assert any(parameter.requires_grad for parameter in model.parameters()) == (name is not None)
    with pytest.raises(ConfigError, match=r"'third'.*first, second"):
        activate(model, "third")
    with pytest.raises(ConfigError, match="has one of this name"):
        attached(model, "first")


@pytest.mark.parametrize(
    ("family", "targets", "options", "count"),
    [
        ("bert", ["query"], {"vocab_size": 30522, "pooler": "plain"}, 150_532),
        ("distilbert", ["k_lin"], {"vocab_size": 30522}, 667_396),
        ("roberta", ["key"], {"vocab_size": 50265, "padding_id": 1}, 741_124),
    ],
)
def test_published_counts_at_full_size(family, targets, options, count):
    """System 2's table: rank 8 on one matrix of each layer, and the new head of four classes."""
    cls = lookup("model", family)
    with torch.device("meta"):
        base = cls(cls.Config(**options, max_positions=512), seed=None)
        model = heads.attach(base, heads.Classifier(labels=("World", "Sports", "Business", "Sci/Tech")), seed=None)
    attached(model, rank=8, alpha=32, targets=targets)
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == count


def test_four_bits_run_through_bitsandbytes(monkeypatch):
    """A stand-in that rounds nothing: every frozen matrix of the blocks goes through it."""
    packed = []

    def quantize(weight, **how):
        assert how == {"quant_type": "nf4", "compress_statistics": True}
        packed.append(weight.clone())
        return packed[-1], "how"

    def multiply(hidden, matrix, *, bias, quant_state):
        assert quant_state == "how"
        return hidden @ matrix if bias is None else hidden @ matrix + bias

    library = SimpleNamespace(functional=SimpleNamespace(quantize_4bit=quantize), matmul_4bit=multiply)
    monkeypatch.setitem(sys.modules, "bitsandbytes", library)
    monkeypatch.setattr(lora, "require_four_bits", lambda: None)
    model = GPT2.tiny().eval()
    expected, before = model.dense(IDS), {name: t.clone() for name, t in model.state_dict().items()}
    attached(model, base_bits=4)
    names = [name for name, _ in model.named_parameters()]
    torch.testing.assert_close(model.dense(IDS), expected)
    model.dense(IDS)
    assert len(packed) == 2 * 4, "each matrix is packed once"
    assert [name for name, _ in model.double().named_parameters()] == names, "in their order"
    kept = {
        parameter.dtype for name, parameter in model.named_parameters() if parameter.dim() == 2 and "blocks" in name
    }
    assert torch.float32 in kept, "what is read in four bits is not moved"
    assert all(torch.equal(tensor, before[name]) for name, tensor in lora.base_state(model).items())
