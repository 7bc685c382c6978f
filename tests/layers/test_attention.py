"""`attend` against the plain reference, sequence by sequence, in float64: outputs and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isoform.contracts import Sequences
from isoform.layers import blockwise
from isoform.layers.attention import attend, attend_dense, visibility
from isoform.layers.relative import Relative

RULES: list[dict[str, Any]] = [
    {"causal": True},
    {"causal": False},
    {"causal": True, "window": 3},
    {"causal": False, "window": 4},
    {"causal": True, "slopes": (0.5, 0.25, 0.1, 0.05)},
    {"causal": False, "slopes": (0.5, 0.25, 0.1, 0.05)},
    {"causal": True, "scale": 0.2, "window": 5, "slopes": (0.5, 0.25, 0.1, 0.05)},
]


def states(
    queries: Sequence[int], keys: Sequence[int], groups: int, *, heads: int = 4, width: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def draw(tokens: int, rows: int) -> Tensor:
        return torch.randn(tokens, rows, width, generator=generator, dtype=torch.float64, requires_grad=True)

    return draw(sum(queries), heads), draw(sum(keys), groups), draw(sum(keys), groups)


def reference(
    parts: tuple[Tensor, Tensor, Tensor],
    queries: Sequence[int],
    keys: Sequence[int],
    *,
    causal: bool,
    window: int | None = None,
    **rest: Any,
) -> Tensor:
    """Each sequence alone, under its own mask."""
    query, key, value = parts
    outputs = []
    for q, k, v in zip(query.split(list(queries)), key.split(list(keys)), value.split(list(keys)), strict=True):
        visible = visibility(len(q), len(k), causal=causal, window=window)
        outputs.append(attend_dense(q[None], k[None], v[None], visible[None], **rest)[0])
    return torch.cat(outputs)


def assert_equal_with_gradients(queries: Sequence[int], keys: Sequence[int], groups: int, rule: dict[str, Any]) -> None:
    parts = states(queries, keys, groups)
    same = Sequences(queries)
    output = attend(*parts, same, same if list(queries) == list(keys) else Sequences(keys), **rule)
    expected = reference(parts, queries, keys, **rule)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    got = [output, *torch.autograd.grad((output * weight).sum(), parts)]
    want = [expected, *torch.autograd.grad((expected * weight).sum(), parts)]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        ([5, 3, 9, 17, 1], [5, 3, 9, 17, 1]),
        ([4, 4, 4], [4, 4, 4]),
        ([1, 1, 2], [5, 9, 20]),
        ([3, 40], [33, 41]),
    ],
    ids=["ragged", "equal", "decoding", "longer keys"],
)
def test_attend_equals_the_reference(queries: list[int], keys: list[int], groups: int, rule: dict[str, Any]) -> None:
    assert_equal_with_gradients(queries, keys, groups, rule)


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8), rule=st.sampled_from(RULES))
def test_any_lengths(lengths: list[int], rule: dict[str, Any]) -> None:
    assert_equal_with_gradients(lengths, lengths, 2, rule)


@settings(max_examples=10, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 30)), min_size=1, max_size=6),
    groups=st.sampled_from([1, 4]),
)
def test_attention_across_sequences_of_other_lengths(lengths: list[tuple[int, int]], groups: int) -> None:
    queries, keys = [t for t, _ in lengths], [s for _, s in lengths]
    assert_equal_with_gradients(queries, keys, groups, {"causal": False})


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("rows", [8, 256])
def test_our_own_backward_pass(rule: dict[str, Any], groups: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "OWN_BACKWARD", (torch.float64,))
    monkeypatch.setattr(blockwise, "CAUSAL_ROWS", rows)
    assert_equal_with_gradients([30, 17, 8, 1], [30, 17, 8, 1], groups, rule)
    assert_equal_with_gradients([1, 3], [9, 20], groups, rule)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("groups", [4, 2])
def test_other_devices_take_the_same_blocks(rule: dict[str, Any], groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "_has_flash", lambda states: False)
    assert_equal_with_gradients([5, 3, 17], [5, 3, 17], groups, rule)
    assert_equal_with_gradients([1, 2], [9, 20], groups, rule)


# ----------------------------------------------------------------------------------------------------- learned scores


def scores_by_distance(reach: int, heads: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(heads, 2 * reach + 1, generator=generator, dtype=torch.float64, requires_grad=True)


def assert_learned_equal(queries: list[int], keys: list[int], groups: int, rule: dict[str, Any], reach: int) -> None:
    parts, values = states(queries, keys, groups), scores_by_distance(reach)
    same = Sequences(queries)
    sides = same, same if queries == keys else Sequences(keys)
    relative = Relative(values)
    # Two layers of one pass share the blocks; both gradients reach the table.
    output = attend(*parts, *sides, relative=relative, **rule) + 2 * attend(*parts, *sides, relative=relative, **rule)
    expected = 3 * reference(parts, queries, keys, relative=values, **rule)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    got = [output, *torch.autograd.grad((output * weight).sum(), (*parts, values))]
    want = [expected, *torch.autograd.grad((expected * weight).sum(), (*parts, values))]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("reach", [2, 50])
@pytest.mark.parametrize("flash", [True, False])
def test_learned_scores_equal_the_reference(
    rule: dict[str, Any], groups: int, reach: int, flash: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not flash:
        monkeypatch.setattr(blockwise, "_has_flash", lambda states: False)
    assert_learned_equal([5, 3, 9, 17, 1], [5, 3, 9, 17, 1], groups, rule, reach)
    assert_learned_equal([1, 1, 2], [5, 9, 20], groups, rule, reach)
    assert_learned_equal([3, 40], [33, 41], groups, rule, reach)


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_of_learned_scores_against_differences(causal: bool) -> None:
    lengths = [3, 5]
    parts, values = states(lengths, lengths, 2, heads=2, width=2), scores_by_distance(3, heads=2)

    def run(query: Tensor, key: Tensor, value: Tensor, learned: Tensor) -> Tensor:
        sequences = Sequences(lengths)
        return attend(query, key, value, sequences, sequences, causal=causal, relative=Relative(learned))

    assert torch.autograd.gradcheck(run, (*parts, values))


def test_learned_scores_under_autocast_get_their_gradient() -> None:
    lengths = [20, 33, 7]
    query, key, value = (part.detach().float() for part in states(lengths, lengths, 4))
    grads = []
    for rough in (False, True):
        values = scores_by_distance(8).detach().float().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=rough):
            sequences = Sequences(lengths)
            output = attend(query, key, value, sequences, sequences, causal=True, relative=Relative(values))
        output.float().square().sum().backward()
        assert values.grad is not None
        grads.append(values.grad)
    assert float((grads[0] - grads[1]).norm() / grads[0].norm()) < 0.03


# ------------------------------------------------------------------------------------------------------------ prefixes


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule["causal"]])
@pytest.mark.parametrize("groups", [4, 2])
def test_tokens_of_a_prefix_see_one_another(rule: dict[str, Any], groups: int) -> None:
    lengths, prefixes = [5, 3, 9, 17, 1], [2, 3, 0, 11, 0]
    parts = states(lengths, lengths, groups)
    sequences = Sequences(lengths, prefixes)
    got = attend(*parts, sequences, sequences, **rule)
    want, options = [], {key: value for key, value in rule.items() if key in ("slopes", "scale")}
    for q, k, v, prefix in zip(*(part.split(lengths) for part in parts), prefixes, strict=True):
        visible = visibility(len(q), len(q), causal=True, window=rule.get("window"), prefix=prefix)
        want.append(attend_dense(q[None], k[None], v[None], visible[None], **options)[0])
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for a, b in zip(
        [got, *torch.autograd.grad((got * weight).sum(), parts)],
        [torch.cat(want), *torch.autograd.grad((torch.cat(want) * weight).sum(), parts)],
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_what_a_prefix_sees() -> None:
    assert visibility(4, 4, causal=True, prefix=2).sum(dim=1).tolist() == [2, 2, 3, 4]
    assert Sequences([4, 2], [0, 0]).prefixes == ()


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [5, 30, 17, 2, 30]
    parts = states(lengths, lengths, 4)
    whole = attend(*parts, Sequences(lengths), Sequences(lengths), causal=True)
    monkeypatch.setattr(blockwise, "CPU_BLOCK_SCORES", 1)
    alone = attend(*parts, Sequences(lengths), Sequences(lengths), causal=True)
    torch.testing.assert_close(whole, alone, rtol=1e-12, atol=1e-13)


def test_layers_of_one_batch_may_have_other_rules() -> None:
    lengths = [5, 17]
    parts, sequences = states(lengths, lengths, 4), Sequences(lengths)
    for rule in RULES:
        expected = reference(parts, lengths, lengths, **rule)
        torch.testing.assert_close(attend(*parts, sequences, sequences, **rule), expected)


def test_states_that_are_part_of_a_wider_tensor() -> None:
    lengths = [4, 9]
    whole = torch.randn(13, 12, 8, dtype=torch.float64)
    parts = whole.split((4, 4, 4), dim=1)
    copies = tuple(part.contiguous() for part in parts)
    sequences = Sequences(lengths)
    torch.testing.assert_close(
        attend(*parts, sequences, sequences, causal=True), attend(*copies, sequences, sequences, causal=True)
    )


def test_a_window_is_as_wide_as_it_says() -> None:
    assert visibility(5, 5, causal=True, window=2).sum(dim=1).tolist() == [1, 2, 2, 2, 2]
    assert visibility(5, 5, causal=False, window=2).sum(dim=1).tolist() == [2, 3, 3, 3, 2]
    assert visibility(1, 5, causal=True, window=2)[0].tolist() == [False, False, False, True, True]


def test_autocast_multiplies_in_bfloat16() -> None:
    lengths = [20, 33, 7]
    query, key, value = (part.detach().float() for part in states(lengths, lengths, 4))
    exact = attend(query, key, value, Sequences(lengths), Sequences(lengths), causal=True)
    with torch.autocast("cpu", torch.bfloat16):
        rough = attend(query, key, value, Sequences(lengths), Sequences(lengths), causal=True)
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), exact, rtol=0.03, atol=0.03)
