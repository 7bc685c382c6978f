"""Attention on matrix tiles beside the plain form: values and gradients, for every rule of who sees whom."""

from __future__ import annotations

import pytest
import torch
from comparing import close, gradients, leaf

from isoform.contracts import Sequences
from isoform.layers import attention, kernels, tiled
from isoform.layers.dropout import DropoutSite, mix64
from isoform.layers.relative import Relative

pytestmark = pytest.mark.skipif(
    not (kernels.library() and kernels.library().has_tiles), reason="this processor has no matrix tiles"
)


CASES = {
    "causal": {"causal": True},
    "both sides": {"causal": False},
    "causal window": {"causal": True, "window": 40},
    "window": {"causal": False, "window": 40},
    "slopes": {"causal": True, "slopes": (0.5, 0.25, 0.1, 0.05)},
    "dropout": {"causal": True, "rate": 0.3},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("width", [24, 32])
def test_attention_on_tiles_is_attention(case, groups, width, monkeypatch):
    check_attention([70, 1, 33], [70, 1, 33], groups, width, monkeypatch, **CASES[case])


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_attention_across_two_streams_on_tiles(rate, monkeypatch):
    check_attention([40, 33], [21, 90], 4, 32, monkeypatch, causal=False, rate=rate)


def test_attention_of_what_follows_a_cache_on_tiles(monkeypatch):
    check_attention([40, 9], [90, 50], 2, 32, monkeypatch, causal=True)


def test_attention_with_prefixes_on_tiles(monkeypatch):
    check_attention([70, 40], [70, 40], 4, 32, monkeypatch, causal=True, prefixes=(35, 0))


@pytest.mark.parametrize(
    "rule", [{"causal": True}, {"causal": False}, {"causal": True, "slopes": (0.5, 0.2, 0.1, 0.0)}]
)
@pytest.mark.parametrize("known", [10, 90])
def test_learned_scores_by_distance_and_their_gradients_on_tiles(rule, known):
    lengths, heads = [70, 33, 1], 4
    states = [leaf(sum(lengths), heads, 32, seed=seed).detach().bfloat16().requires_grad_() for seed in range(3)]
    values = leaf(heads, 2 * known + 1, seed=5)

    def run(inputs, values):
        sequences = Sequences(lengths)
        mixed = attention.attend(*inputs, sequences, sequences, relative=Relative(values), **rule)
        return mixed, gradients(mixed, *inputs, values)

    ours, found = run(states, values)
    wide = [tensor.detach().float().requires_grad_() for tensor in states]
    plain, expected = run(wide, values)  # float32: the kernel does not serve it
    assert type(ours.grad_fn).__name__ == "_AttentionBackward" != type(plain.grad_fn).__name__
    assert close(ours, plain, 4e-3)
    assert all(close(mine, theirs, 6e-3) for mine, theirs in zip(found, expected, strict=True))


def check_attention(lengths, key_lengths, groups, width, monkeypatch, *, rate=0.0, prefixes=(), **rule):
    """Ours in bfloat16 as near to the plain form in float32 as the rounding of what goes in and out allows."""
    heads, n, m = 4, sum(lengths), sum(key_lengths)
    # Heads of query, key and value side by side, as one projection makes them.
    together = [leaf(n, heads, width), leaf(m, groups, width, seed=1), leaf(m, groups, width, seed=2)]
    states = [tensor.detach().bfloat16().requires_grad_() for tensor in together]
    wide = [tensor.detach().float().requires_grad_() for tensor in states]
    site = DropoutSite(mix64(torch.arange(n)), 77, rate) if rate else None

    def attend(inputs):
        queries = Sequences(lengths, prefixes)
        keys = queries if lengths == key_lengths else Sequences(key_lengths)
        return attention.attend(*inputs, queries, keys, dropout=site, **rule)

    with monkeypatch.context() as patch:
        patch.setattr(tiled, "serves", lambda *tensors: None)
        plain = attend(wide)
    called = []
    monkeypatch.setattr(tiled, "serves", lambda *tensors: called.append(1) or kernels.serves(*tensors))
    ours = attend(states)
    assert called and type(ours.grad_fn).__name__ == "_AttentionBackward" and close(ours, plain, 4e-3)
    for mine, theirs in zip(gradients(ours, *states), gradients(plain, *wide), strict=True):
        assert close(mine, theirs, 6e-3)


def test_queries_keys_and_values_of_one_projection_need_no_copy():
    lengths = [40, 30]
    together = leaf(70, 8, 32).detach().bfloat16().requires_grad_()
    apart = [part.detach().contiguous() for part in together.split((4, 2, 2), dim=1)]
    sequences = Sequences(lengths)
    views = attention.attend(*together.split((4, 2, 2), dim=1), sequences, sequences, causal=True)
    assert torch.equal(views, attention.attend(*apart, sequences, sequences, causal=True))
