"""Attention on ragged batches: `attend`, and `attend_dense`, the plain reference that it must agree with.

    weights(i, j) = softmax over visible j of  scale q_i . k_j - slope |i - j| + relative(i - j)
    output(i)     = sum over j of weights(i, j) v_j

Letters: n query tokens, m key tokens, b sequences, t queries and s keys of a sequence, h heads, g key/value heads
(head number x reads key/value head x // (h / g)), k head width. Where there are fewer queries than keys, the last
query stands at the last key: cached decoding is the case t = 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from isoform.contracts import Sequences
from isoform.layers import blockwise, tiled, varlen
from isoform.layers.apart import apart
from isoform.layers.dropout import DropoutSite
from isoform.layers.relative import Relative


class Padded(Sequences):
    """Sequences that stand in a rectangle `(b, t)` of which n = b t places are read, padding at either end among them.

    For a graph that must not know lengths (ONNX): there `attend` takes the dense form. real: bool `(b, t)`, where no
    padding stands. Between tokens there may be none.
    """

    __slots__ = ("real",)

    def __init__(self, real: Tensor) -> None:
        super().__init__(())
        self.real = real


@apart
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Sequences,
    keys: Sequences,
    *,
    causal: bool,
    window: int | None = None,
    slopes: tuple[float, ...] | None = None,
    scale: float | None = None,
    relative: Relative | None = None,
    dropout: DropoutSite | None = None,
) -> Tensor:
    """Attention of each sequence's queries over the same sequence's keys.

    causal: no query sees a later key, but for tokens that both stand in the prefix of their sequence (`Sequences`).
    window: causal, the last `window` tokens, its own among them; otherwise `window // 2` tokens to each side. slopes
    `(h,)`: see ALiBi. relative: learned scores by distance, see T5. scale: 1 / sqrt(k) unless given.

    Shapes: query `(n, h, k)`, key and value `(m, g, k)` -> `(n, h, k)`.
    Source: Vaswani et al. 2017, section 3.2; grouped heads: Ainslie et al. 2023. Differs: nothing.
    """
    if isinstance(queries, Padded) and isinstance(keys, Padded):
        visible = _visible(queries, keys, causal=causal, window=window)
        values = None if relative is None else relative.values
        mixed = attend_dense(
            query.view(*queries.real.shape, *query.shape[1:]),  # (n, h, k) -> (b, t, h, k)
            key.view(*keys.real.shape, *key.shape[1:]),
            value.view(*keys.real.shape, *value.shape[1:]),
            visible,
            slopes=slopes,
            scale=scale,
            relative=values,
        )
        return mixed.flatten(0, 1)  # (b, t, h, k) -> (n, h, k)
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    rule = blockwise.Rule(causal, window, slopes, scale, relative is not None)
    fast = varlen.attention if query.device.type == "cuda" else tiled.attention
    done = fast(
        query,
        key,
        value,
        queries,
        keys,
        causal=causal,
        window=window,
        slopes=slopes,
        scale=scale,
        relative=relative,
        dropout=dropout,
    )
    if done is not None:
        return done
    plan = blockwise.plan(queries, keys, rule, query, key.shape[1])
    biases = None if relative is None else relative.biases(plan)
    return blockwise.attend(query, key, value, plan, rule, dropout, biases)


def attend_dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    *,
    slopes: tuple[float, ...] | None = None,
    scale: float | None = None,
    relative: Tensor | None = None,
) -> Tensor:
    """Attention of padded sequences under a mask, step by step as the formula says; queries end where keys end.

    Shapes: query `(b, t, h, k)`, key and value `(b, s, g, k)`, visible bool `(b, t, s)`, relative `(h, 2 r + 1)` as in
    `Relative` -> `(b, t, h, k)`.
    """
    t, s = visible.shape[-2:]
    group = query.shape[2] // key.shape[2]
    key, value = key.repeat_interleave(group, dim=2), value.repeat_interleave(group, dim=2)  # (b, s, h, k)
    scores = torch.einsum("bthk,bshk->bhts", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if slopes is not None:
        slope = torch.tensor(slopes, dtype=scores.dtype, device=scores.device)[:, None, None]  # (h, 1, 1)
        scores = scores - slope * distance(t, s, scores.device).abs()
    if relative is not None:
        reach = relative.shape[1] // 2
        scores = scores + relative[:, distance(t, s, scores.device).clamp(-reach, reach) + reach]  # (h, t, s)
    scores = scores.masked_fill(~visible[:, None], float("-inf"))
    return torch.einsum("bhts,bshk->bthk", scores.softmax(dim=-1), value)


def _visible(queries: Padded, keys: Padded, *, causal: bool, window: int | None) -> Tensor:
    """bool `(b, t, s)`: real keys only; of its own sequence a place always sees itself, so that no row is empty."""
    t, s = queries.real.shape[1], keys.real.shape[1]
    device = keys.real.device
    seen = keys.real[:, None] & visibility(t, s, causal=causal, window=window, device=device)
    return seen | (distance(t, s, device) == 0) if queries is keys else seen


def distance(t: int, s: int, device: torch.device) -> Tensor:
    """`(t, s)`: how many tokens key j stands before query i, when the last query stands at the last key."""
    return torch.arange(s - t, s, device=device)[:, None] - torch.arange(s, device=device)


def visibility(
    t: int, s: int, *, causal: bool, window: int | None = None, prefix: int = 0, device: torch.device | None = None
) -> Tensor:
    """bool `(t, s)`: which key each query of one sequence may see; the first `prefix` keys are seen by all."""
    ahead = distance(t, s, device or torch.device("cpu"))
    seen = ahead >= 0 if causal else torch.ones_like(ahead, dtype=torch.bool)
    seen = seen | (torch.arange(s, device=ahead.device) < prefix)
    if window is not None:
        seen = seen & ((ahead.abs() < window) if causal else (ahead.abs() <= window // 2))
    return seen
