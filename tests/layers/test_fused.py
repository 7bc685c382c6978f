"""The C++ kernels beside plain torch: values and gradients, whatever the number of threads; NaN stays NaN."""

from __future__ import annotations

import itertools

import pytest
import torch
from comparing import close, gradients, leaf
from torch.nn import functional as F

from isoform.contracts import IGNORE, Sequences
from isoform.layers import attention, fused, kernels
from isoform.layers.dropout import Dropout
from isoform.layers.position import Rope
from isoform.registry import build_options

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="no C++ compiler is here to build the kernels")
tiles = pytest.mark.skipif(
    not (kernels.library() and kernels.library().has_tiles), reason="this processor has no matrix tiles"
)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("width", [3, 24, 192])
def test_norms_are_those_of_torch(centred, width):
    hidden, weight, bias = leaf(300, width), leaf(width), leaf(width) if centred else None
    ours = fused.norm(hidden, weight, bias, 1e-5, centred=centred, narrow=True)
    inputs = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    if centred:
        plain = F.layer_norm(wide[0], (width,), wide[1], wide[2], 1e-5)
    else:
        plain = F.rms_norm(wide[0], (width,), wide[1], 1e-5)
    assert ours.dtype == torch.float32  # no autocast: narrow changes nothing
    torch.testing.assert_close(ours.double(), plain, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(gradients(ours, *inputs), gradients(plain, *wide), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()) + 1e-6)


@pytest.mark.parametrize("narrow", [True, False])
def test_a_narrow_norm_comes_in_the_precision_of_autocast(narrow):
    hidden, weight = leaf(70, 48), leaf(48)
    with torch.autocast("cpu", torch.bfloat16):
        ours = fused.norm(hidden, weight, None, 1e-6, centred=False, narrow=narrow)
    assert ours.dtype == (torch.bfloat16 if narrow else torch.float32)
    plain = F.rms_norm(hidden, (48,), weight, 1e-6)
    assert close(ours, plain, 5e-3)
    for mine, theirs in zip(gradients(ours, hidden, weight), gradients(plain, hidden, weight), strict=True):
        assert mine.dtype == torch.float32 and close(mine, theirs, 5e-3)


@pytest.mark.parametrize(
    ("name", "plain"),
    [("silu", F.silu), ("gelu", F.gelu), ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh"))],
)
def test_gated_activations_are_those_of_torch(name, plain):
    spread = torch.linspace(-12, 12, 4 * 1030).view(-1, 10)
    gate, up = spread.bfloat16().requires_grad_(), leaf(*spread.shape, dtype=torch.bfloat16, seed=1)
    ours = fused.gated(name, gate, up)
    wide = [tensor.detach().float().requires_grad_() for tensor in (gate, up)]
    theirs = plain(wide[0]) * wide[1]
    assert close(ours, theirs, 4e-3)
    assert (ours.float() - theirs).abs().max() < 0.01 * theirs.abs().max()
    for mine, other in zip(gradients(ours, gate, up), gradients(theirs, *wide), strict=True):
        assert close(mine, other, 4e-3)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_activations_alone_are_those_of_torch(approximate, dtype):
    name = "gelu" if approximate == "none" else "gelu_tanh"
    spread = torch.cat([torch.linspace(-12, 12, 4091), torch.tensor([-1e4, -300.0, 0.0, 300.0, 1e4])])
    hidden = spread.to(dtype).requires_grad_()
    ours = fused.activated(name, hidden)
    if approximate == "none" and dtype == torch.float32:
        assert ours is None  # torch's own is as fast
        return
    wide = hidden.detach().double().requires_grad_()
    theirs = F.gelu(wide, approximate=approximate)
    step = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-20  # half of the last place; some more for float32
    tail = 2e-5 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(ours.double(), theirs, rtol=step, atol=tail)
    (mine,), (other,) = (torch.autograd.grad(output.sum(), of) for output, of in ((ours, hidden), (theirs, wide)))
    torch.testing.assert_close(mine.double(), other, rtol=step, atol=5e-5 if dtype == torch.bfloat16 else 2e-6)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("shape", [(1,), (301,), (4, 50)])
def test_linear_layers_are_those_of_torch_and_sum_their_bias_in_float32(autocast, shape):
    hidden, weight, bias = leaf(*shape, 24), leaf(40, 24), leaf(40)
    inputs = (hidden, weight, bias)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, plain = fused.linear(*inputs), F.linear(*inputs)
    assert type(ours.grad_fn).__name__ == "_BiasedBackward" and torch.equal(ours, plain)
    mine, theirs = gradients(ours, *inputs), gradients(plain, *inputs)
    assert all(torch.equal(one, other) for one, other in zip(mine[:2], theirs[:2], strict=True))
    weights = torch.randn(plain.shape, generator=torch.Generator().manual_seed(9)).to(plain.dtype)
    assert mine[2].dtype == torch.float32
    torch.testing.assert_close(mine[2], weights.float().view(-1, 40).sum(0), rtol=1e-5, atol=1e-5)


def test_a_linear_layer_whose_bias_is_not_trained_is_left_to_torch():
    hidden, weight = leaf(8, 24), leaf(40, 24)
    for bias in (None, torch.ones(40)):
        assert "_Biased" not in type(fused.linear(hidden, weight, bias).grad_fn).__name__
    with torch.no_grad():
        assert fused.linear(hidden, weight, leaf(40)).grad_fn is None


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_positions_turn_as_the_formula_says(fraction, dtype, monkeypatch):
    states, positions = leaf(150, 3, 16, dtype=dtype), torch.arange(150)
    options = build_options(Rope, {"fraction": fraction}, "position")
    rope = Rope(options, width=48, num_heads=3, head_width=16, max_positions=None)
    tolerance = 1e-6 if dtype == torch.float32 else 8e-3
    ours = rope.rotate(states, states[:, :2], positions, positions)
    monkeypatch.setattr(fused, "serves", lambda *tensors: None)
    plain = rope.rotate(states, states[:, :2], positions, positions)
    for mine, theirs in zip(ours, plain, strict=True):
        assert close(mine, theirs, tolerance)
    assert close(gradients(ours[0], states)[0], gradients(plain[0], states)[0], tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [5, 4099])
def test_nats_are_the_cross_entropy_of_torch(dtype, size):
    logits = (leaf(200, size) * 4).detach().to(dtype).requires_grad_()
    targets = torch.arange(200) % size
    targets[7::10] = IGNORE
    ours = fused.nats(logits, targets)
    wide = logits.detach().double().requires_grad_()
    plain = F.cross_entropy(wide, targets, reduction="none", ignore_index=IGNORE)
    torch.testing.assert_close(ours.double(), plain, rtol=1e-5, atol=1e-5)
    (mine,), (theirs,) = gradients(ours, logits), gradients(plain, wide)
    assert close(mine, theirs, 1e-5 if dtype == torch.float32 else 4e-3)
    assert not mine[7::10].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad):
    hidden = torch.ones(40, 64)
    hidden[3, 5] = bad
    assert not fused.norm(hidden, torch.ones(64), None, 1e-6, centred=False, narrow=False)[3].isfinite().all()
    assert not fused.nats(hidden, torch.zeros(40, dtype=torch.int64))[3].isfinite()
    for name in ("silu", "gelu", "gelu_tanh"):
        assert not fused.gated(name, hidden.bfloat16(), hidden.bfloat16())[3].isfinite().all()
    for name in ("gelu", "gelu_tanh"):
        assert not fused.activated(name, hidden.bfloat16())[3].isfinite().all()


def everything():
    hidden, weight = leaf(1000, 64), leaf(64)
    results = [*gradients(fused.norm(hidden, weight, weight, 1e-5, centred=True, narrow=False), hidden, weight)]
    results += gradients(fused.linear(hidden, leaf(50, 64), leaf(50)), hidden)
    bias = leaf(50)
    results += gradients(fused.linear(hidden, leaf(50, 64), bias), bias)
    results.append(Dropout(0.3)(hidden, torch.arange(1000)))
    logits = leaf(1000, 50)
    results += gradients(fused.nats(logits, torch.zeros(1000, dtype=torch.int64)), logits)
    if kernels.library().has_tiles:
        with torch.autocast("cpu", torch.bfloat16):
            weight = leaf(200, 64)
            results += gradients(fused.linear(hidden, weight, None), hidden, weight)
        states = [leaf(300, 4, 32, dtype=torch.bfloat16, seed=seed) for seed in range(3)]
        sequences = Sequences([100, 150, 50])
        results += gradients(attention.attend(*states, sequences, sequences, causal=True), *states)
    return results


def test_the_number_of_threads_changes_no_bit():
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(everything())
    finally:
        torch.set_num_threads(before)
    assert all(itertools.starmap(torch.equal, zip(*found, strict=True)))


@tiles
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(256, 32, 32), (700, 96, 200), (999, 72, 33), (513, 600, 700)])
@pytest.mark.parametrize("biased", [True, False])
def test_gradients_of_a_linear_layer_are_those_in_float32_of_what_was_rounded(rows, inputs, outputs, biased):
    hidden, weight = leaf(rows, inputs), leaf(outputs, inputs, seed=1)
    bias = leaf(outputs, seed=2) if biased else None
    wanted = [hidden, weight] + ([bias] if biased else [])
    with torch.autocast("cpu", torch.bfloat16):
        ours = fused.linear(hidden, weight, bias)
    assert type(ours.grad_fn).__name__ == "_LinearBackward"
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(3)).bfloat16()
    dhidden, dweight, *dbias = torch.autograd.grad(ours, wanted, upstream)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours, F.linear(hidden, weight, bias))
    x, w, g = hidden.detach().bfloat16().double(), weight.detach().bfloat16().double(), upstream.double()
    assert dweight.dtype == torch.float32 and close(dweight, g.T @ x, 1e-6)
    assert close(dhidden, g @ w, 4e-3)
    assert not biased or close(dbias[0], g.sum(0), 1e-6)


@tiles
@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 2), (1, 2), ()])
def test_what_is_not_trained_gets_no_gradient_and_changes_none(trained):
    tensors = [leaf(300, 64), leaf(96, 64, seed=1), leaf(96, seed=2)]
    with torch.autocast("cpu", torch.bfloat16):
        whole = fused.linear(*tensors)
        given = [tensor.detach().requires_grad_(index in trained) for index, tensor in enumerate(tensors)]
        part = fused.linear(*given)
    assert torch.equal(whole, part) and part.requires_grad == bool(trained)
    if trained:
        wanted = torch.autograd.grad(whole, [tensors[index] for index in trained], torch.ones_like(whole))
        found = torch.autograd.grad(part, [given[index] for index in trained], torch.ones_like(part))
        assert all(itertools.starmap(torch.equal, zip(found, wanted, strict=True)))


@tiles
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("rows", [8, 300])
def test_weights_that_were_converted_before_give_what_torch_gives(rows, biased):
    hidden, weight, bias = leaf(rows, 64), leaf(96, 64, seed=1), leaf(96, seed=2) if biased else None
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fused.linear(hidden, weight.bfloat16(), bias), F.linear(hidden, weight, bias))


@tiles
def test_few_rows_and_small_matrices_are_left_to_torch():
    with torch.autocast("cpu", torch.bfloat16):
        for rows, inputs, outputs in ((255, 64, 64), (300, 64, 31), (300, 31, 64)):
            product = fused.linear(leaf(rows, inputs), leaf(outputs, inputs), None)
            assert type(product.grad_fn).__name__ != "_LinearBackward"
