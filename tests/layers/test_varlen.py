"""Flash attention on a GPU, which is not here: stand-ins with the kernels' documented signatures, beside `attend`."""

from __future__ import annotations

import inspect
import sys
import types

import pytest
import torch
from torch.nn.attention import varlen as of_torch

from isoform.contracts import Sequences
from isoform.layers import varlen
from isoform.layers.attention import attend, attend_dense, distance
from isoform.layers.dropout import Dropout, mix64
from isoform.layers.relative import Relative

SLOPES = (0.5, 0.25, 0.1, 0.05)


def reference(query, key, value, query_bounds, key_bounds, seen, scale, slopes=None):
    """Each sequence alone; a query sees `seen` keys before and after its place, the last one standing at the last."""
    assert query_bounds.dtype == key_bounds.dtype == torch.int32
    assert all(tensor.stride(-1) == 1 and tensor.shape[-1] % 8 == 0 for tensor in (query, key, value))
    outputs = []
    for (q0, q1), (k0, k1) in zip(
        *(torch.stack([b[:-1], b[1:]], 1).tolist() for b in (query_bounds, key_bounds)), strict=True
    ):
        behind = distance(q1 - q0, k1 - k0, query.device)
        before, after = (10**9 if most < 0 else most for most in seen)
        visible = (behind <= before) & (-behind <= after)
        parts = [query[None, q0:q1], key[None, k0:k1], value[None, k0:k1]]
        outputs.append(attend_dense(*parts, visible[None], scale=scale, slopes=slopes)[0])
    return torch.cat(outputs)


def torch_stand_in(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
    assert enable_gqa or query.shape[1] == key.shape[1]
    return reference(query, key, value, cu_seq_q, cu_seq_k, window_size, scale)


def package_stand_in(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    assert (max_seqlen_q, max_seqlen_k) == (int(cu_seqlens_q.diff().max()), int(cu_seqlens_k.diff().max()))
    slopes = None if alibi_slopes is None else tuple(alibi_slopes.tolist())
    seen = (window_size[0], 0) if causal else window_size
    return reference(q, k, v, cu_seqlens_q, cu_seqlens_k, seen, softmax_scale, slopes)


@pytest.fixture
def gpu(monkeypatch):
    """As if this were a GPU with both kernels; the list that is given has the name of each that was called."""
    called = []

    def told(name, kernel):
        def call(*arguments, **options):
            called.append(name)
            return kernel(*arguments, **options)

        return call

    monkeypatch.setattr(varlen, "is_served", lambda device: True)
    monkeypatch.setattr(varlen, "has_torch_kernel", lambda: True)
    monkeypatch.setattr(varlen, "has_package", lambda: True)
    monkeypatch.setattr(varlen, "DTYPES", (torch.float64,))
    monkeypatch.setattr(of_torch, "varlen_attn", told("torch", torch_stand_in))
    package = types.ModuleType("flash_attn")
    package.flash_attn_varlen_func = told("package", package_stand_in)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    return called


def states(queries, keys, groups, width, heads=4):
    draw = torch.Generator().manual_seed(1)
    shapes = [(sum(queries), heads, width), (sum(keys), groups, width), (sum(keys), groups, width)]
    return [torch.randn(*shape, generator=draw, dtype=torch.float64, requires_grad=True) for shape in shapes]


def fast(parts, queries, keys, *, scale=None, **rule):
    rule = {"window": None, "slopes": None, "relative": None, "dropout": None, **rule}
    return varlen.attention(*parts, queries, keys, scale=scale or parts[0].shape[-1] ** -0.5, **rule)


def test_the_stand_in_has_the_signature_of_the_torch_that_is_installed():
    theirs, ours = (inspect.signature(function).parameters for function in (of_torch.varlen_attn, torch_stand_in))
    assert [(one.name, one.kind, one.default) for one in theirs.values()] == [
        (one.name, one.kind, one.default) for one in ours.values()
    ]


@pytest.mark.parametrize("rule", [
    {"causal": True}, {"causal": False}, {"causal": True, "window": 3}, {"causal": False, "window": 4},
    {"causal": True, "window": 1}, {"causal": False, "scale": 0.3}, {"causal": True, "slopes": SLOPES},
    {"causal": False, "slopes": SLOPES, "window": 6},
])  # fmt: skip
@pytest.mark.parametrize(("groups", "width"), [(4, 8), (2, 8), (1, 5)])
@pytest.mark.parametrize(
    ("queries", "keys"), [([5, 3, 9, 17, 1], None), ([1, 1, 2], [5, 9, 20])], ids=["ragged", "decoding"]
)
def test_values_and_gradients_are_those_of_attend(gpu, rule, groups, width, queries, keys):
    parts = states(queries, keys or queries, groups, width)
    same = Sequences(queries)
    sides = same, same if keys is None else Sequences(keys)
    ours, plain = fast(parts, *sides, **rule), attend(*parts, *sides, **rule)
    assert gpu == ["package" if "slopes" in rule else "torch"]
    weight = torch.randn(plain.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    got, want = ([out, *torch.autograd.grad((out * weight).sum(), parts)] for out in (ours, plain))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)  # slopes are float32 there


def test_states_that_are_part_of_more_are_read_where_they_stand(gpu):
    whole = torch.randn(9, 4 + 2 + 2, 8, dtype=torch.float64)
    parts = whole.split((4, 2, 2), dim=1)
    sequences = Sequences([4, 5])
    torch.testing.assert_close(
        fast(parts, sequences, sequences, causal=True), attend(*parts, sequences, sequences, causal=True)
    )


def test_what_no_kernel_knows_is_left_to_the_blocks(gpu, monkeypatch):
    parts, sequences = states([4, 5], [4, 5], 4, 8), Sequences([4, 5])
    site = Dropout(0.1)
    site.site = 1
    dropped = site.on_weights(mix64(torch.arange(9)))
    assert dropped is not None
    assert fast(parts, sequences, sequences, causal=True, dropout=dropped) is None
    relative = Relative(torch.zeros(4, 5, dtype=torch.float64))
    assert fast(parts, sequences, sequences, causal=True, relative=relative) is None
    with_prefix = Sequences([4, 5], [2, 0])
    assert fast(parts, with_prefix, with_prefix, causal=True) is None
    single = [tensor.detach().float() for tensor in parts]
    assert fast(single, sequences, sequences, causal=True) is None
    wide = states([4, 5], [4, 5], 4, 264)
    assert fast(wide, sequences, sequences, causal=True) is None
    monkeypatch.setattr(varlen, "has_package", lambda: False)
    assert fast(parts, sequences, sequences, causal=True, slopes=SLOPES) is None
    assert gpu == []


def test_the_package_serves_where_torch_was_built_without(gpu, monkeypatch):
    monkeypatch.setattr(varlen, "has_torch_kernel", lambda: False)
    parts, sequences = states([4, 5], [4, 5], 4, 8), Sequences([4, 5])
    plain = attend(*parts, sequences, sequences, causal=True)
    torch.testing.assert_close(fast(parts, sequences, sequences, causal=True), plain)
    assert gpu == ["package"]


def test_what_attends_is_told(gpu, monkeypatch):
    device = torch.device("cuda")
    assert varlen.kernel_of(device) == "attention in blocks", "no GPU is here"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert varlen.kernel_of(device) == "torch's flash attention"
    monkeypatch.setattr(varlen, "has_torch_kernel", lambda: False)
    assert varlen.kernel_of(device) == "flash-attn"


@pytest.mark.parametrize(("capability", "served"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_it_is_for_gpus_from_ampere_on(monkeypatch, capability, served):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert varlen.is_served(torch.device("cuda")) is served
    assert not varlen.is_served(torch.device("cpu"))
