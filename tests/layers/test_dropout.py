"""Masks are functions of what an element is; statistically they are as good as drawn ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy import stats

from isoform.contracts import Batch, Sequences
from isoform.layers import blockwise, dropout, kernels, ragged
from isoform.layers.attention import attend
from isoform.layers.dropout import Dropout, DropoutSite, keep_mask, kept_inverse, mix64, name_sites, token_keys

RATE = 0.3


def keys_of(make_batch: Any, lengths: list[int], key: int = 5) -> torch.Tensor:
    keys = token_keys(make_batch(lengths, dropout_key=key))
    assert keys is not None
    return keys


def test_no_key_no_dropout(make_batch: Any) -> None:
    batch = make_batch([3, 4])
    hidden = torch.randn(7, 8)
    assert token_keys(batch) is None
    assert Dropout(0.5)(hidden, None) is hidden
    assert Dropout(0.0)(hidden, torch.arange(7)) is hidden
    assert Dropout(0.0).on_weights(torch.arange(7)) is None


def test_mix64_is_splitmix64() -> None:
    # The first two outputs of the published generator with seed 0.
    golden = 0x9E3779B97F4A7C15 - 2**64
    states = torch.tensor([golden, 2 * golden + 2**64])
    assert [int(x) % 2**64 for x in mix64(states)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


def test_share_kept_is_the_rate_in_every_row_and_column(make_batch: Any) -> None:
    keep = keep_mask(keys_of(make_batch, [50] * 40), 501, RATE).double()
    n, d = keep.shape
    spread = (RATE * (1 - RATE)) ** 0.5
    assert abs(float(keep.mean()) - (1 - RATE)) < 4 * spread / (n * d) ** 0.5
    for axis, size in ((0, n), (1, d)):
        z = (keep.mean(axis) - (1 - RATE)) / (spread / size**0.5)
        assert stats.kstest(z.numpy(), "norm").pvalue > 1e-3


def test_elements_are_independent(make_batch: Any) -> None:
    keep = keep_mask(keys_of(make_batch, [64] * 64), 512, 0.5).double() - 0.5
    n, d = keep.shape
    pairs = {
        "neighbouring columns": (keep[:, :-1], keep[:, 1:]),
        "columns of neighbouring pairs": (keep[:, :-2], keep[:, 2:]),
        "neighbouring rows": (keep[:-1], keep[1:]),
        "the same place of neighbouring sequences": (keep[:-64], keep[64:]),
        "rectangles": (keep[:-1, :-2] * keep[1:, :-2], keep[:-1, 2:] * keep[1:, 2:]),
    }
    for name, (a, b) in pairs.items():
        correlation = float((a * b).mean() / (a.pow(2).mean() * b.pow(2).mean()).sqrt())
        assert abs(correlation) < 5 / (n * d) ** 0.5, name


def test_sites_and_steps_have_their_own_masks(make_batch: Any) -> None:
    keys, later = keys_of(make_batch, [64] * 32, key=5), keys_of(make_batch, [64] * 32, key=6)
    masks = [keep_mask(mix64(k ^ site), 256, 0.5).double() - 0.5 for k in (keys, later) for site in (1, 2)]
    for index, one in enumerate(masks):
        for other in masks[:index]:
            assert abs(float((one * other).mean()) * 4) < 5 / one.numel() ** 0.5


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.9])
def test_expectation_is_kept(rate: float, make_batch: Any) -> None:
    layer = Dropout(rate)
    output = layer(torch.ones(4000, 64), keys_of(make_batch, [40] * 100))
    assert abs(float(output.mean()) - 1) < 5 * (rate / (1 - rate) / output.numel()) ** 0.5
    assert set(output.unique().tolist()) <= {0.0, float(torch.tensor(kept_inverse(rate)))}


def select(batch: Batch, order: list[int]) -> tuple[Batch, torch.Tensor]:
    """The batch with some of its sequences, in another order, and where their tokens stood."""
    first = ragged.starts(batch.sequences)
    lengths = batch.sequences.lengths
    index = torch.cat([torch.arange(first[row], first[row] + lengths[row]) for row in order])
    sequences = Sequences([lengths[row] for row in order])
    chosen = Batch(
        batch.tokens[index],
        batch.positions[index],
        sequences,
        batch.sample_keys[order],
        dropout_key=batch.dropout_key,
    )
    return chosen, index


@pytest.mark.parametrize("order", [[2, 0, 1, 3], [1], [3, 2]])
def test_masks_do_not_know_the_batch(order: list[int], make_batch: Any) -> None:
    batch = make_batch([5, 9, 3, 20], dropout_key=11)
    other, index = select(batch, order)
    keys, other_keys = token_keys(batch), token_keys(other)
    assert keys is not None
    assert other_keys is not None
    assert torch.equal(other_keys, keys[index])
    for causal in (True, False):
        states = torch.randn(37, 4, 8, dtype=torch.float64)
        site, other_site = DropoutSite(keys, 3, RATE), DropoutSite(other_keys, 3, RATE)
        whole = attend(states, states, states, batch.sequences, batch.sequences, causal=causal, dropout=site)
        part = states[index]
        alone = attend(part, part, part, other.sequences, other.sequences, causal=causal, dropout=other_site)
        torch.testing.assert_close(alone, whole[index], rtol=1e-10, atol=1e-12)


def test_dropout_of_weights_is_dropout_of_weights(make_batch: Any) -> None:
    """Values that are the identity show the weights themselves: what is left is the plain weights, scaled."""
    batch = make_batch([16], dropout_key=4)
    keys = token_keys(batch)
    assert keys is not None
    query = torch.randn(16, 1, 16, dtype=torch.float64)
    value = torch.eye(16, dtype=torch.float64)[:, None]
    run = {"queries": batch.sequences, "keys": batch.sequences, "causal": False}
    plain = attend(query, query, value, **run)
    dropped = attend(query, query, value, **run, dropout=DropoutSite(keys, 1, 0.5))
    kept = dropped != 0
    assert 0.3 < float(kept.double().mean()) < 0.7
    torch.testing.assert_close(dropped, torch.where(kept, 2 * plain, 0))


def test_gradient_of_dropped_weights(make_batch: Any) -> None:
    batch = make_batch([2, 4], dropout_key=4)
    keys = token_keys(batch)
    assert keys is not None
    parts = [torch.randn(6, heads, 2, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]

    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        site = DropoutSite(keys, 1, RATE)
        return attend(query, key, value, batch.sequences, batch.sequences, causal=True, dropout=site)

    assert torch.autograd.gradcheck(call, parts)


def test_other_devices_drop_the_same_weights(make_batch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch([9, 17], dropout_key=4)
    keys = token_keys(batch)
    assert keys is not None
    states = torch.randn(26, 4, 8, dtype=torch.float64)
    site = DropoutSite(keys, 1, RATE)
    here = attend(states, states, states, batch.sequences, batch.sequences, causal=True, dropout=site)
    monkeypatch.setattr(blockwise, "_has_flash", lambda states: False)
    there = attend(states, states, states, batch.sequences, batch.sequences, causal=True, dropout=site)
    torch.testing.assert_close(there, here, rtol=1e-10, atol=1e-12)


def test_sites_are_numbered_by_name() -> None:
    models = [torch.nn.ModuleDict({"a": Dropout(0.1), "b": Dropout(0.1)}), torch.nn.ModuleDict({"b": Dropout(0.1)})]
    for model in models:
        name_sites(model)
    assert models[0]["b"].site == models[1]["b"].site != models[0]["a"].site


def test_both_halves_of_a_hash_are_uniform(make_batch: Any) -> None:
    """Sixteen rates cut the range into equal shares, for the first and the second column of a pair alike."""
    keys = keys_of(make_batch, [128] * 16)
    counts = torch.zeros(2, 16)
    stayed = torch.ones(len(keys), 256, dtype=torch.bool)
    for step in range(16):
        keep = keep_mask(keys, 256, (step + 1) / 16) if step < 15 else torch.zeros_like(stayed)
        counts[:, step] = (stayed & ~keep).view(-1, 128, 2).sum(dim=(0, 1))
        stayed = keep
    for row in counts.numpy():
        assert stats.chisquare(row).pvalue > 1e-4


needs_kernels = pytest.mark.skipif(kernels.library() is None, reason="no C++ compiler is here to build the kernels")


@needs_kernels
@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize("width", [1, 7, 384, 1025])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_drops_what_the_mask_says(rate: float, width: int, dtype: torch.dtype, make_batch: Any) -> None:
    """Each bit of the mask, the exact factor, the same in the backward pass, alone and added to something."""
    keys = keys_of(make_batch, [130, 7, 1])
    layer = Dropout(rate)
    layer.site = -(2**62) + 12345
    keep = keep_mask(mix64(keys ^ layer.site), width, rate)
    ones = torch.ones(138, width, dtype=dtype, requires_grad=True)
    output = layer(ones, keys)
    assert type(output.grad_fn).__name__ == "_DropBackward" and output.dtype == dtype
    assert torch.equal(output, (keep * kept_inverse(rate)).to(dtype))
    (grad,) = torch.autograd.grad(output, ones, torch.full_like(output, 2.0))
    assert torch.equal(grad, (keep * (2 * kept_inverse(rate))).to(dtype))
    onto = torch.randn(138, width, requires_grad=True)
    total = layer(ones, keys, onto=onto)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, onto + keep * kept_inverse(rate), rtol=1e-6, atol=1e-6)
    grads = torch.autograd.grad(total, (ones, onto), torch.ones_like(total))
    assert torch.equal(grads[0], (keep * kept_inverse(rate)).to(dtype)) and torch.equal(
        grads[1], torch.ones(138, width)
    )


@needs_kernels
def test_with_and_without_kernels_the_same_falls_out(make_batch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, layer = keys_of(make_batch, [60, 33]), Dropout(RATE)
    hidden, onto = torch.randn(93, 48), torch.randn(93, 48)
    fast = layer(hidden, keys, onto=onto)
    monkeypatch.setattr(dropout, "serves", lambda *tensors: None)
    torch.testing.assert_close(fast, layer(hidden, keys, onto=onto), rtol=1e-6, atol=1e-6)
    assert torch.equal(layer(hidden, None, onto=onto), onto + hidden)


@needs_kernels
def test_what_is_not_finite_is_seen_although_it_falls_out(make_batch: Any) -> None:
    keys, hidden = keys_of(make_batch, [20]), torch.full((20, 32), float("inf"))
    assert not Dropout(0.9)(hidden, keys).isfinite().any()


@needs_kernels
def test_a_sum_of_two_types_without_dropout_is_one_pass() -> None:
    arm = torch.randn(133, 7).bfloat16().requires_grad_()
    onto = torch.randn(133, 7, requires_grad=True)
    ours, plain = Dropout(0.0)(arm, None, onto=onto), onto + arm
    assert type(ours.grad_fn).__name__ == "_DropBackward" and torch.equal(ours, plain)
    weights = torch.randn(133, 7)
    for mine, theirs in zip(*(torch.autograd.grad(y, (arm, onto), weights) for y in (ours, plain)), strict=True):
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)
    assert type(Dropout(0.0)(onto, None, onto=onto).grad_fn).__name__ == "AddBackward0"
