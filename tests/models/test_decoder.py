"""What holds for every decoder, whatever its parts: GPT-2 and LLaMA with each of them swapped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from isoform.contracts import Batch, Sequences
from isoform.layers import ragged
from isoform.models.decoder import Decoder
from isoform.models.gpt2 import GPT2
from isoform.models.llama import Llama

LENGTHS = [5, 1, 17, 9, 30]
VARIANTS: dict[str, dict[str, Any]] = {
    "learned": {},
    "none": {"position": "none"},
    "sinusoidal": {"position": "sinusoidal"},
    "rope": {"position": "rope"},
    "alibi": {"position": "alibi"},
    "t5": {"position": "t5"},
    "grouped t5 in a window": {"num_kv_heads": 2, "window": 6, "position": {"kind": "t5", "num_buckets": 8}},
    "window": {"window": 4, "position": "rope"},
    "grouped": {"num_kv_heads": 2, "position": "rope"},
    "one kv head": {"num_kv_heads": 1, "window": 6, "position": "alibi"},
    "norm last": {"norm_first": False},
    "experts": {"feedforward": {"kind": "moe", "experts": 3, "expert": "gelu"}, "bias": False},
    "rmsnorm, swiglu, untied, no bias": {"norm": "rmsnorm", "feedforward": "swiglu", "tied": False, "bias": False},
}
MOE = {"kind": "moe", "experts": 4, "active": 2}
LLAMAS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama learned": {"position": "learned"},
    "llama none": {"position": "none"},
    "llama sinusoidal": {"position": "sinusoidal"},
    "llama alibi, layernorm": {"position": "alibi", "norm": "layernorm"},
    "llama t5": {"position": "t5"},
    "llama stretched, tied": {"position": {"kind": "rope", "scaling": {"kind": "yarn"}}, "tied": True},
    "llama window, wide heads, biases": {"window": 4, "head_width": 12, "attention_bias": True},
    "llama gelu": {"feedforward": "gelu", "feedforward_bias": True, "num_kv_heads": None},
    "llama experts": {"feedforward": MOE},
    "llama experts, Switch": {"feedforward": {**MOE, "active": 1, "softmax": "before", "expert": "relu"}},
}
variants = pytest.mark.parametrize("variant", [*VARIANTS, *LLAMAS])


def fresh(variant: str, **changes: Any) -> Decoder:
    """A model as training begins with it."""
    if variant in VARIANTS:
        return GPT2.tiny(**VARIANTS[variant], **changes)
    return Llama.tiny(**LLAMAS[variant], **changes)


def tiny(variant: str, **changes: Any) -> Decoder:
    """A model whose every parameter is random and large enough to matter."""
    model = fresh(variant, **changes)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def part(batch: Batch, order: list[int], start: int = 0, stop: int | None = None) -> tuple[Batch, Tensor]:
    """Tokens start .. stop of some sequences, and where they stood."""
    first, lengths = ragged.starts(batch.sequences), batch.sequences.lengths
    ends = [lengths[row] if stop is None else min(stop, lengths[row]) for row in order]
    spans = [torch.arange(first[row] + start, first[row] + end) for row, end in zip(order, ends, strict=True)]
    index = torch.cat(spans)
    return (
        Batch(
            batch.tokens[index],
            batch.positions[index],
            Sequences([len(span) for span in spans]),
            batch.sample_keys[order],
            dropout_key=batch.dropout_key,
        ),
        index,
    )


# ------------------------------------------------------------------------------------------------- every variant


@variants
def test_a_batch_of_one_equals_a_batch_of_many_in_any_order(variant: str, make_batch: Any) -> None:
    model, batch = tiny(variant).double(), make_batch(LENGTHS)
    hidden = model(batch).hidden
    for order in ([3, 0, 4, 2, 1], [2], [4, 1]):
        chosen, index = part(batch, order)
        torch.testing.assert_close(model(chosen).hidden, hidden[index], rtol=1e-9, atol=1e-9)


@variants
def test_the_past_does_not_see_the_future(variant: str, make_batch: Any) -> None:
    model, batch = tiny(variant).double(), make_batch(LENGTHS)
    hidden = model(batch).hidden
    changed = batch.tokens.clone()
    places = ragged.places(batch.sequences, changed.device)
    changed[places >= 8] = (changed[places >= 8] + 1) % 61
    after = model(Batch(changed, batch.positions, batch.sequences, batch.sample_keys)).hidden
    if "experts" in variant:  # how many rows an expert multiplies at once changes the last bits
        torch.testing.assert_close(after[places < 8], hidden[places < 8], rtol=1e-12, atol=1e-12)
    else:
        assert torch.equal(after[places < 8], hidden[places < 8])
    assert not torch.isclose(after[places >= 8], hidden[places >= 8]).all(dim=1).any()


@variants
def test_cached_decoding_equals_the_full_pass(variant: str, make_batch: Any) -> None:
    model, batch = tiny(variant).double(), make_batch([12, 12, 12])
    full = model(batch).hidden
    cache = model.new_cache(3)
    for start, stop in ((0, 5), (5, 6), (6, 9), (9, 10)):
        chosen, index = part(batch, [0, 1, 2], start, stop)
        torch.testing.assert_close(model(chosen, cache=cache).hidden, full[index], rtol=1e-9, atol=1e-9)
    assert cache.lengths == [10, 10, 10]
    for stop in (11, 12):
        rows = [2, 0]
        cache = cache.select(rows if stop == 11 else [0, 1])
        chosen, index = part(batch, rows, stop - 1, stop)
        torch.testing.assert_close(model(chosen, cache=cache).hidden, full[index], rtol=1e-9, atol=1e-9)


@variants
def test_prompts_of_unequal_length_are_cached_side_by_side(variant: str, make_batch: Any) -> None:
    model, batch = tiny(variant).double(), make_batch(LENGTHS)
    full = model(batch).hidden
    cache = model.new_cache(3)
    rows = [0, 2, 4]
    prompt, index = part(batch, rows, 0, 7)
    torch.testing.assert_close(model(prompt, cache=cache).hidden, full[index], rtol=1e-9, atol=1e-9)
    cache = cache.select([1, 2])
    for place in range(7, 10):
        chosen, index = part(batch, [2, 4], place, place + 1)
        torch.testing.assert_close(model(chosen, cache=cache).hidden, full[index], rtol=1e-9, atol=1e-9)


@variants
def test_every_parameter_gets_a_gradient(variant: str, make_batch: Any) -> None:
    model, batch = tiny(variant), make_batch(LENGTHS)
    model.logits(model(batch).hidden).logsumexp(-1).sum().backward()
    assert [name for name, parameter in model.named_parameters() if not parameter.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("variant", [name for name in [*VARIANTS, *LLAMAS] if "experts" not in name])
def test_bfloat16_is_near_float32(variant: str, make_batch: Any) -> None:
    model, batch = fresh(variant), make_batch(LENGTHS)
    exact = model(batch).hidden
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(batch).hidden
    assert rough.dtype == torch.float32
    assert float((rough - exact).detach().norm() / exact.detach().norm()) < 0.01


@pytest.mark.parametrize(
    ("variant", "rates"),
    [
        ("rope", {"dropout": 0.3}),
        ("rope", {"attention_dropout": 0.3}),
        ("rope", {"embedding_dropout": 0.3}),
        ("llama", {"dropout": 0.3}),
        ("llama", {"attention_dropout": 0.3}),
    ],
)
def test_dropout_does_not_know_the_batch(variant: str, rates: dict[str, float], make_batch: Any) -> None:
    model, batch = tiny(variant, **rates).double(), make_batch(LENGTHS, dropout_key=7)
    hidden = model(batch).hidden
    chosen, index = part(batch, [3, 4, 0])
    torch.testing.assert_close(model(chosen).hidden, hidden[index], rtol=1e-9, atol=1e-9)
    assert torch.equal(model(batch).hidden, hidden)
    for key in (None, 8):
        batch.dropout_key = key
        assert not torch.allclose(model(batch).hidden, hidden)


def test_layers_on_request(make_batch: Any) -> None:
    model, batch = GPT2.tiny(), make_batch(LENGTHS)
    output = model(batch, all_layers=True)
    assert model(batch).layers is None
    assert output.layers is not None
    assert [tuple(layer.shape) for layer in output.layers] == [(62, 32)] * 3
    assert torch.equal(model.final_norm(output.layers[-1]), output.hidden)
