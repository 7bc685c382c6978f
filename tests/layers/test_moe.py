"""The fast path against a plain sum over experts, and what holds for every mixture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from isoform.errors import ConfigError
from isoform.layers import moe
from isoform.layers.moe import MixtureOfExperts
from isoform.registry import component

ACTIVATIONS = {"swiglu": F.silu, "geglu": F.gelu, "gelu": F.gelu, "relu": F.relu}


def make(width: int = 8, inner: int = 20, dtype: torch.dtype = torch.float64, **options: Any) -> MixtureOfExperts:
    cls, config = component("feedforward", {"kind": "moe", **options}, "model.feedforward")
    layer: MixtureOfExperts = cls(config, width, inner, bias=False)
    generator = torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype) * 0.5
    return layer


def plain(layer: MixtureOfExperts, hidden: Tensor) -> Tensor:
    """Token by token, expert by expert, as the head of the module says it."""
    rows = []
    act = ACTIVATIONS[layer.config.expert]
    for x in hidden:
        z = layer.router.weight @ x
        chosen = sorted(range(len(z)), key=lambda i: -z[i].item())[: layer.config.active]
        over = z[chosen] if layer.config.softmax == "after" else z
        row = torch.zeros_like(x)
        for i in chosen:
            inner = layer.up.weight[i] @ x
            inner = act(layer.gate.weight[i] @ x) * inner if layer.expert.gated else act(inner)
            row = row + z[i].exp() / over.exp().sum() * (layer.down.weight[i] @ inner)
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("expert", ACTIVATIONS)
@pytest.mark.parametrize("softmax", ["after", "before"])
@pytest.mark.parametrize("active", [1, 2, 5])
@pytest.mark.parametrize("row_block", [1, 3])
def test_values_and_gradients_are_those_of_the_plain_sum(
    expert: str, softmax: str, active: int, row_block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moe, "ROW_BLOCK", row_block)
    monkeypatch.setattr(moe, "MANY_BLOCKS", 0)
    layer = make(experts=5, active=active, softmax=softmax, expert=expert)
    hidden = torch.randn(37, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(37, 8, dtype=torch.float64)
    wanted = [hidden, *layer.parameters()]
    ours, theirs = layer(hidden), plain(layer, hidden)
    torch.testing.assert_close(ours, theirs)
    for got, expected in zip(
        torch.autograd.grad((ours * weight).sum(), wanted, allow_unused=True, materialize_grads=True),
        torch.autograd.grad((theirs * weight).sum(), wanted, allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


def test_experts_have_few_numbers_of_rows_where_tokens_are_many() -> None:
    choices = torch.randint(0, 4, (8_000,), generator=torch.Generator().manual_seed(0))
    rows, places, counts = moe.grouped(choices, 4)
    assert all(count % moe.ROW_BLOCK == 0 for count in counts) and sum(counts) == len(rows)
    assert torch.equal(rows[places], torch.arange(8_000))
    expert_of_row = torch.arange(4).repeat_interleave(torch.tensor(counts))
    assert torch.equal(expert_of_row[places], choices)
    assert len(moe.grouped(choices[:100], 4)[0]) == 100


def test_all_experts_at_once_are_the_dense_sum() -> None:
    hidden = torch.randn(11, 8, dtype=torch.float64)
    for softmax in ("after", "before"):
        layer = make(experts=4, active=4, softmax=softmax)
        shares = layer.router(hidden).softmax(-1)
        dense = sum(shares[:, i, None] * _alone(layer, hidden, i) for i in range(4))
        torch.testing.assert_close(layer(hidden), dense)


def _alone(layer: MixtureOfExperts, hidden: Tensor, i: int) -> Tensor:
    inner = F.silu(hidden @ layer.gate.weight[i].T) * (hidden @ layer.up.weight[i].T)
    return inner @ layer.down.weight[i].T


def test_a_token_knows_nothing_of_the_others() -> None:
    layer, hidden = make(experts=4), torch.randn(50, 8, dtype=torch.float64)
    every, logits = layer.route(hidden)
    order = torch.randperm(50)
    torch.testing.assert_close(layer(hidden[order]), every[order])
    torch.testing.assert_close(layer(hidden[7:8]), every[7:8])
    assert logits.shape == (50, 4)


def test_an_expert_that_nobody_chose_has_a_gradient_of_zero() -> None:
    layer = make(experts=3, active=1)
    layer.router.weight.data[2] = 0
    hidden = torch.randn(9, 8, dtype=torch.float64)
    layer.router.weight.data[:2] = torch.stack([hidden[0], -hidden[0]])
    layer(hidden[:1]).sum().backward()
    assert layer.up.weight.grad is not None
    assert [bool(layer.up.weight.grad[i].any()) for i in range(3)] == [True, False, False]


def test_the_router_stays_in_float32_under_autocast() -> None:
    layer, hidden = make(experts=4, dtype=torch.float32), torch.randn(20, 8)
    exact, logits = layer.route(hidden)
    with torch.autocast("cpu", torch.bfloat16):
        rough, same = layer.route(hidden)
    assert torch.equal(logits, same)
    assert float((rough - exact).detach().norm() / exact.detach().norm()) < 0.02


def test_idle_parameters() -> None:
    assert make(experts=5, active=2).idle_parameters == 3 * 3 * 8 * 20
    assert make(experts=5, active=2, expert="gelu").idle_parameters == 3 * 2 * 8 * 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 2, "active": 3}, r"model.feedforward: .*`active` is 3, at most `experts` 2"),
        ({"expert": "moe"}, r"model.feedforward.expert: 'moe' given, one feed-forward layer"),
        ({"expert": "swigloo"}, r"model.feedforward.expert: 'swigloo' is not a known feedforward"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**options)


def test_biases_are_refused() -> None:
    cls, config = component("feedforward", {"kind": "moe"}, "model.feedforward")
    with pytest.raises(ConfigError, match="experts have no biases"):
        cls(config, 8, 20, bias=True)
