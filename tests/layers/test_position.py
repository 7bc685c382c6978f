from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.gpt_neox import modeling_gpt_neox as neox
from transformers.models.t5.modeling_t5 import T5Attention

from isoform.errors import ConfigError
from isoform.layers.position import Position, alibi_slopes, distance_buckets, sinusoids
from isoform.registry import component, names


def make(kind: str, *, width: int = 32, heads: int = 4, max_positions: int | None = 64, **options: Any) -> Position:
    cls, config = component("position", {"kind": kind, **options}, "model.position")
    position: Position = cls(
        config, width=width, num_heads=heads, head_width=width // heads, max_positions=max_positions
    )
    return position


def test_every_scheme_acts_in_one_place() -> None:
    acts = {"none": set(), "learned": {"embed"}, "sinusoidal": {"embed"}, "rope": {"rotate"}, "alibi": {"slopes"}}
    acts["t5"] = {"relative"}
    assert set(acts) <= set(names("position"))
    hidden, query, places = torch.randn(5, 32), torch.randn(5, 4, 8), torch.arange(5) + 1
    for kind, expected in acts.items():
        position = make(kind)
        if kind == "learned":
            torch.nn.init.normal_(position.get_parameter("embedding.weight"))
        found = set()
        if not torch.equal(position.embed(hidden, places), hidden):
            found.add("embed")
        if not torch.equal(position.rotate(query, query, places, places)[0], query):
            found.add("rotate")
        if position.slopes() is not None:
            found.add("slopes")
        if position.relative(causal=True) is not None:
            found.add("relative")
        assert found == expected, kind


@settings(max_examples=20, deadline=None)
@given(
    first=st.integers(0, 500),
    distance=st.integers(0, 500),
    shift=st.integers(-400, 400),
    fraction=st.sampled_from([0.25, 0.5, 1.0]),
    scale=st.sampled_from([1.0, 4.0]),
)
def test_rotated_products_depend_on_the_distance_alone(
    first: int, distance: int, shift: int, fraction: float, scale: float
) -> None:
    rope = make("rope", fraction=fraction, scale=scale)
    query, key = torch.randn(1, 4, 8, dtype=torch.float64), torch.randn(1, 2, 8, dtype=torch.float64)

    def product(at: int) -> torch.Tensor:
        q, k = rope.rotate(query, key, torch.tensor([at + distance]), torch.tensor([at]))
        return (q.view(2, 2, 8) * k.view(2, 1, 8)).sum(-1)

    moved = max(first + shift, 0)
    torch.testing.assert_close(product(first), product(moved), rtol=1e-3, atol=1e-3)
    same = rope.rotate(query, key, torch.tensor([first]), torch.tensor([first]))
    torch.testing.assert_close(same[0].norm(), query.norm())


@pytest.mark.parametrize("fraction", [0.5, 1.0])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_rope_equals_transformers(fraction: float, scale: float) -> None:
    parameters = {"rope_theta": 500.0, "partial_rotary_factor": fraction, "rope_type": "default"}
    if scale != 1:
        parameters |= {"rope_type": "linear", "factor": scale}
    config = neox.GPTNeoXConfig(
        hidden_size=32, num_attention_heads=4, rope_parameters=parameters, bos_token_id=None, eos_token_id=None
    )
    query, key, places = torch.randn(1, 4, 9, 8), torch.randn(1, 4, 9, 8), torch.arange(9)[None]
    cos, sin = neox.GPTNeoXRotaryEmbedding(config)(query, places)
    expected = neox.apply_rotary_pos_emb(query, key, cos, sin)
    rope = make("rope", base=500.0, fraction=fraction, scale=scale)
    flat = [states[0].transpose(0, 1) for states in (query, key)]
    for ours, theirs in zip(rope.rotate(*flat, places[0], places[0]), expected, strict=True):
        torch.testing.assert_close(ours, theirs[0].transpose(0, 1), rtol=1e-5, atol=1e-6)


def test_slopes_are_those_of_the_paper() -> None:
    assert alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(6) == [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]
    assert len(alibi_slopes(1)) == 1


@pytest.mark.parametrize("heads", [1, 2, 3, 8, 12, 20])
def test_alibi_equals_transformers(heads: int) -> None:
    """BLOOM leaves out what is the same for all keys of a query, and so the softmax of it: here as weights."""
    length = 9
    scores = torch.randn(heads, length, length)
    ours = scores - torch.tensor(alibi_slopes(heads))[:, None, None] * (
        torch.arange(length)[:, None] - torch.arange(length)
    )
    theirs = scores + build_alibi_tensor(torch.ones(1, length), heads, torch.float32)
    past = torch.ones(length, length).tril().bool()
    torch.testing.assert_close(*(s.masked_fill(~past, -torch.inf).softmax(-1) for s in (ours, theirs)))


def test_waves() -> None:
    table = sinusoids(torch.arange(10), 6, 10_000.0, 1.0)
    assert torch.equal(table[0], torch.tensor([0.0, 1.0] * 3))
    torch.testing.assert_close(table[7, 2], torch.tensor(7 / 10_000 ** (2 / 6)).sin())
    torch.testing.assert_close(sinusoids(torch.arange(200), 64, 1e4, 0.02 * 2**0.5).pow(2).mean().sqrt().item(), 0.02)


@pytest.mark.parametrize(("buckets", "reach"), [(32, 128), (32, 1000), (8, 20), (6, 5), (12, 7)])
@pytest.mark.parametrize("causal", [True, False])
def test_buckets_of_distances_equal_transformers(buckets: int, reach: int, causal: bool) -> None:
    distance = torch.arange(-2500, 2501)
    expected = T5Attention._relative_position_bucket(-distance, not causal, buckets, reach)
    assert torch.equal(distance_buckets(distance, buckets, reach, causal=causal), expected)
    table = torch.arange(buckets).float()[:, None].repeat(1, 4)
    position = make("t5", num_buckets=buckets, max_distance=reach)
    position.load_state_dict({"embedding.weight": table})
    found = position.relative(causal=causal)
    assert found is not None
    assert torch.equal(found[0, distance.clamp(-reach, reach) + reach], expected.float())


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"model.position.max_distance: 16 given, more than half of num_buckets 32"):
        make("t5", max_distance=16)
    with pytest.raises(ConfigError, match=r"model.max_positions: missing"):
        make("learned", max_positions=None)
    with pytest.raises(ConfigError, match=r"model.position.fraction: 0.1 of the head width 8 is 0 channels"):
        make("rope", fraction=0.1)
    with pytest.raises(ConfigError, match="even width"):
        make("sinusoidal", width=33, heads=3)
    with pytest.raises(ConfigError, match=r"did you mean 'rope'"):
        make("ropes")
