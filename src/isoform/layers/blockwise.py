"""The fast path of `attend`: sequences of similar length become small dense blocks whose scores stay in the cache.

A batch is cut into blocks of sequences, sorted by length; a block is padded to its longest sequence (that alone; it
costs a few percent), multiplied, and unpadded. Scores are never kept: backward makes them again from the logarithm of
each row's sum (Dao et al. 2022). torch's own CPU backward is not used: in bfloat16 it is some twenty times slower.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from isoform.contracts import Sequences
from isoform.layers import ragged
from isoform.layers.dropout import DropoutSite, keep_mask, kept_inverse

# Scores (b h t s) of one block: 2^19 bfloat16 numbers are 1 MiB, half of a server core's second cache.
BLOCK_SCORES = 2**19
# Lengths are rounded up to this: narrower rows do not fill vector registers and matrix tiles.
ROUND_LENGTH = 16


@dataclass(frozen=True, slots=True)
class Rule:
    """Who sees whom, and how scores are made."""

    causal: bool
    window: int | None
    slopes: tuple[float, ...] | None
    scale: float


@dataclass(slots=True)
class Side:
    """Where one side's (queries' or keys') rows of `(n, heads, k)` go in the blocks `(b, heads, length, k)`.

    take: for each block, token numbers `(b, length)`, padding repeats some token of the batch; pad: bool of the same
    shape, True at padding. restore: for each token, where its first head stands in the blocks laid end to end, and how
    far apart its heads stand there.
    """

    heads: int
    take: list[Tensor]
    pad: list[Tensor]
    restore: Tensor
    rows: dict[int, list[Tensor]] = field(default_factory=dict)

    def gather(self, states: Tensor) -> Iterator[Tensor]:
        """`(n, heads, k)` -> blocks `(b, heads, length, k)`."""
        width = states.shape[-1]
        if states.stride()[1:] != (width, 1) or states.stride(0) % width or states.storage_offset() % width:
            states = states.contiguous()
        step = states.stride(0) // width
        if step not in self.rows:
            head = torch.arange(self.heads, device=states.device)[:, None]
            self.rows[step] = [(take[:, None] * step + head).flatten() for take in self.take]
        flat = states.as_strided(((len(states) - 1) * step + self.heads, width), (width, 1))
        for take, rows in zip(self.take, self.rows[step], strict=True):
            yield flat.index_select(0, rows).view(len(take), self.heads, -1, width)

    def scatter(self, blocks: list[Tensor]) -> Tensor:
        """Blocks `(b, heads, length, k)` -> `(n, heads, k)`, padding left out."""
        width = blocks[0].shape[-1]
        flat = torch.cat([block.reshape(-1, width) for block in blocks])
        return flat.index_select(0, self.restore).view(-1, self.heads, width)


@dataclass(slots=True)
class Plan:
    """The blocks of a batch: both sides, each block's additive bias, and whether plain causal masking is enough."""

    queries: Side
    keys: Side
    bias: list[Tensor]
    plain_causal: bool
    left: bool


def plan(queries: Sequences, keys: Sequences, rule: Rule, query: Tensor, groups: int) -> Plan:
    """The plan of a batch for query `(n, h, k)`, made once for all layers that share the rule."""
    heads = query.shape[1]
    key = ("attend", str(query.device), query.dtype, keys.lengths, rule, heads, groups)
    if key not in queries.derived:
        queries.derived[key] = _make_plan(queries, keys, rule, heads, groups, query)
    made: Plan = queries.derived[key]
    return made


def _make_plan(queries: Sequences, keys: Sequences, rule: Rule, heads: int, groups: int, query: Tensor) -> Plan:
    device = query.device
    assert len(queries) == len(keys), f"{len(queries)} sequences of queries, {len(keys)} of keys"
    same = queries.lengths == keys.lengths
    members = _members(queries, keys, heads)
    # A block has one distance for query i and key j: both sides begin at 0, or, lengths differing, both end at the end.
    left = same or not (rule.causal or rule.window or rule.slopes)
    query_side = _side(queries, members, heads, left, device)
    key_side = query_side if same and heads == groups else _side(keys, members, groups, left, device)
    bias = [
        _bias(query_take.shape[1], key_pad, rule, heads, groups, same).to(query.dtype)
        for query_take, key_pad in zip(query_side.take, key_side.pad, strict=True)
    ]
    plain = same and rule.causal and rule.window is None and rule.slopes is None and heads == groups
    return Plan(query_side, key_side, bias, plain, left)


def _members(queries: Sequences, keys: Sequences, heads: int) -> list[list[int]]:
    """Numbers of the sequences in each block: sorted by length, as many as keep the scores within `BLOCK_SCORES`."""
    order = sorted(range(len(queries)), key=lambda row: (keys.lengths[row], queries.lengths[row], row))
    members: list[list[int]] = [[]]
    t = s = 0
    for row in order:
        t, s = max(t, _round(queries.lengths[row])), max(s, _round(keys.lengths[row]))
        if members[-1] and (len(members[-1]) + 1) * heads * t * s > BLOCK_SCORES:
            members.append([])
            t, s = _round(queries.lengths[row]), _round(keys.lengths[row])
        members[-1].append(row)
    return members


def _round(length: int) -> int:
    return length if length == 1 else -(-length // ROUND_LENGTH) * ROUND_LENGTH


def _side(sequences: Sequences, members: list[list[int]], heads: int, left: bool, device: torch.device) -> Side:
    first = torch.tensor(ragged.starts(sequences))
    lengths = torch.tensor(sequences.lengths)
    takes, pads = [], []
    restore = torch.empty(sequences.num_tokens, heads, dtype=torch.int64)
    offset = 0
    for rows in members:
        size = _round(max(sequences.lengths[row] for row in rows))
        place = torch.arange(size) - (0 if left else (size - lengths[rows])[:, None])
        pad = (place < 0) | (place >= lengths[rows][:, None])  # (b, size)
        take = (first[rows][:, None] + place).masked_fill(pad, 0)
        column = torch.arange(len(rows))[:, None] * heads * size + torch.arange(size)  # place of head 0
        restore[take[~pad]] = (column + offset)[~pad][:, None] + torch.arange(heads) * size
        offset += len(rows) * heads * size
        takes.append(take.to(device))
        pads.append(pad.to(device))
    return Side(heads, takes, pads, restore.flatten().to(device))


def _bias(t: int, key_pad: Tensor, rule: Rule, heads: int, groups: int, same: bool) -> Tensor:
    """What is added to a block's scores, float32, broadcast to `(b, g, h/g t, s)`: a large negative number if unseen."""
    s, device = key_pad.shape[1], key_pad.device
    ahead = torch.arange(s - t, s, device=device)[:, None] - torch.arange(s, device=device)  # (t, s)
    unseen = ahead < 0 if rule.causal else torch.zeros_like(ahead, dtype=torch.bool)
    if rule.window is not None:
        unseen = unseen | ((ahead >= rule.window) if rule.causal else (ahead.abs() > rule.window // 2))
    unseen = unseen[None, None, None]  # (1, 1, 1, t, s)
    if not (same and rule.causal):  # there no query sees the padding after its sequence anyway
        unseen = unseen | key_pad[:, None, None, None]
    bias = torch.zeros(1, 1, 1, t, s, dtype=torch.float64, device=device)
    if rule.slopes is not None:
        slope = torch.tensor(rule.slopes, dtype=torch.float64, device=device).view(1, groups, heads // groups, 1, 1)
        bias = -slope * ahead.abs()
    bias = torch.where(unseen, torch.finfo(torch.bfloat16).min / 4, bias)
    b, g, _, _, _ = bias.shape
    return bias.expand(b, g, heads // groups, t, s).reshape(b, g, -1, s)


def attend(query: Tensor, key: Tensor, value: Tensor, plan: Plan, rule: Rule, dropout: DropoutSite | None) -> Tensor:
    """query `(n, h, k)`, key and value `(m, g, k)` -> `(n, h, k)`, block by block."""
    output: Tensor = _Blocks.apply(query, key, value, plan, rule, dropout)
    return output


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: Plan, rule: Rule, dropout: Any) -> Tensor:
        groups, group = plan.keys.heads, plan.queries.heads // plan.keys.heads
        outputs, saved = [], []
        drops = _drops(dropout, plan, query.dtype)
        for q, k, v, bias in zip(
            plan.queries.gather(query), plan.keys.gather(key), plan.keys.gather(value), plan.bias, strict=True
        ):
            q = q.view(len(q), groups, -1, q.shape[-1])  # heads of a group one under the other
            drop = next(drops)
            output, log_sum = _forward(q, k, v, bias, rule.scale, plan.plain_causal, drop)
            outputs.append(output.reshape(len(q), groups * group, -1, v.shape[-1]))
            saved += [q, k, v, output, log_sum]
        ctx.save_for_backward(*saved)
        ctx.plan, ctx.rule, ctx.dropout = plan, rule, dropout
        return plan.queries.scatter(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        grads: tuple[list[Tensor], ...] = ([], [], [])
        drops = _drops(ctx.dropout, plan, grad.dtype)
        saved = ctx.saved_tensors
        for number, dout in enumerate(plan.queries.gather(grad)):
            q, k, v, output, log_sum = saved[5 * number : 5 * number + 5]
            dout.masked_fill_(plan.queries.pad[number][:, None, :, None], 0.0)
            dout = dout.view(q.shape)
            parts = _backward(dout, q, k, v, output, log_sum, plan.bias[number], ctx.rule.scale, next(drops))
            for into, part in zip(grads, parts, strict=True):
                into.append(part)
        heads = plan.queries.heads
        query_grads = [part.view(len(part), heads, -1, part.shape[-1]) for part in grads[0]]
        return (
            plan.queries.scatter(query_grads),
            plan.keys.scatter(grads[1]),
            plan.keys.scatter(grads[2]),
            None,
            None,
            None,
        )


def _forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, plain_causal: bool, drop: Tensor | None
) -> tuple[Tensor, Tensor]:
    """q `(b, g, t, k)`, k and v `(b, g, s, k)` -> output `(b, g, t, k)` and log of each row's sum `(b, g, t)`."""
    if drop is None and q.device.type == "cpu":
        mask = None if plain_causal else bias
        output, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, plain_causal, attn_mask=mask, scale=scale
        )
        return output, log_sum
    scores = q @ k.transpose(-1, -2) * scale + bias
    log_sum = scores.float().logsumexp(-1) if scores.dtype != torch.float64 else scores.logsumexp(-1)
    weights = (scores - log_sum[..., None].to(scores.dtype)).exp_()
    if drop is not None:
        weights = weights * drop
    return weights @ v, log_sum


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    log_sum: Tensor,
    bias: Tensor,
    scale: float,
    drop: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from that of the output; with P the weights, dS = P * (dout v^T - sum(dout * output))."""
    shape = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    flat = (shape[0] * shape[1], shape[2], shape[3])
    q3, k3, v3, d3 = (x.reshape(flat[0], -1, x.shape[-1]) for x in (q, k, v, dout))
    weights = (bias - log_sum[..., None].to(q.dtype)).expand(shape).reshape(flat)
    weights = weights.baddbmm_(q3, k3.transpose(1, 2), alpha=scale).exp_()  # P (b g, t, s)
    delta = (dout * output).sum(-1, keepdim=True).neg_().view(flat[0], -1, 1)
    if drop is None:
        dv = torch.bmm(weights.transpose(1, 2), d3)
        dscores = torch.baddbmm(delta.expand(flat), d3, v3.transpose(1, 2)).mul_(weights)
    else:
        drop = drop.reshape(flat)
        dv = torch.bmm((weights * drop).transpose(1, 2), d3)
        dscores = torch.bmm(d3, v3.transpose(1, 2)).mul_(drop).add_(delta).mul_(weights)
    dq = torch.bmm(dscores, k3).mul_(scale)
    dk = torch.bmm(dscores.transpose(1, 2), q3).mul_(scale)
    return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)


def _drops(dropout: DropoutSite | None, plan: Plan, dtype: torch.dtype) -> Iterator[Tensor | None]:
    """For each block what its weights are multiplied with, `(b, g, t, s)`, or None."""
    heads, groups = plan.queries.heads, plan.keys.heads
    assert dropout is None or plan.left, "dropout of weights needs queries and keys that begin together"
    keys = None if dropout is None else dropout.row_keys(heads)[:, :, None]
    rows = plan.queries.gather(keys) if keys is not None else iter([None] * len(plan.bias))
    for row, bias in zip(rows, plan.bias, strict=True):
        if dropout is None or row is None:
            yield None
        else:
            keep = keep_mask(row[..., 0], bias.shape[-1], dropout.rate)  # (b, h, t, s)
            yield (keep * torch.tensor(kept_inverse(dropout.rate), dtype=dtype)).view(
                len(row), groups, -1, bias.shape[-1]
            )
