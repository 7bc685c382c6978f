"""The fast path of `attend`: sequences of similar length become small dense blocks whose scores stay in the cache.

A batch is cut into blocks of sequences, sorted by length, each padded to its longest (a few percent of waste, and that
inside attention alone). `to_blocks` and `from_blocks` carry rows in and out; as every token stands in one place, the
backward pass of the one is the other. Between them stands `block_attention`, on a CPU with a backward pass of our own
that makes the scores again from the logarithm of each row's sum (Dao et al. 2022): torch's own, which serves the other
precisions, is many times slower in bfloat16 on short rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from isoform.contracts import Sequences
from isoform.layers import ragged
from isoform.layers.dropout import DropoutSite, keep_mask, kept_inverse

# Scores (b h t s) of one block on a CPU: 2^20 bfloat16 numbers are 2 MiB, a server core's second cache.
CPU_BLOCK_SCORES = 2**20
# Elsewhere blocks are as large as memory likes.
BLOCK_SCORES = 2**27
# Lengths are rounded up to this: narrower rows do not fill vector registers and matrix tiles.
ROUND_LENGTH = 16
# Rows of causal scores that the backward pass makes at once.
CAUSAL_ROWS = 256
# Precisions in which the backward pass below is faster than torch's.
OWN_BACKWARD = (torch.bfloat16,)
# What is added to the score of an unseen key. Finite, so that a row of padding, which sees nothing, is no NaN.
UNSEEN = -1e30


@dataclass(frozen=True, slots=True)
class Rule:
    """Who sees whom, and how scores are made; see `attend`. relative: whether a learned score is added."""

    causal: bool
    window: int | None
    slopes: tuple[float, ...] | None
    scale: float
    relative: bool = False


@dataclass(slots=True)
class Side:
    """Where the rows `(n, heads, k)` of queries or of keys stand in the blocks `(b, heads, length, k)`.

    take: for each block the token of every place, `(b, length)`; padding repeats token 0. pad: bool, True at padding.
    restore: `(n heads,)` the place of each row in the blocks laid end to end. rows: `take` as row numbers, made once
    for each distance between tokens that the states have.
    """

    heads: int
    take: list[Tensor]
    pad: list[Tensor]
    restore: Tensor
    rows: dict[int, list[Tensor]] = field(default_factory=dict)

    def gather(self, states: Tensor) -> tuple[Tensor, ...]:
        """`(n, heads, k)` -> blocks `(b, heads, length, k)`."""
        width = states.shape[-1]
        if states.stride()[1:] != (width, 1) or states.stride(0) % width:
            states = states.contiguous()
        step = states.stride(0) // width  # rows from a token to the next, wider where the states are part of more
        if step not in self.rows:
            head = torch.arange(self.heads, device=states.device)[:, None]
            self.rows[step] = [(take[:, None] * step + head).flatten() for take in self.take]
        flat = states.as_strided(((len(states) - 1) * step + self.heads, width), (width, 1))
        return tuple(
            flat.index_select(0, rows).view(len(take), self.heads, -1, width)
            for take, rows in zip(self.take, self.rows[step], strict=True)
        )

    def scatter(self, blocks: tuple[Tensor, ...]) -> Tensor:
        """Blocks `(b, heads, length, k)` -> `(n, heads, k)`, padding left out."""
        width = blocks[0].shape[-1]
        flat = torch.cat([block.reshape(-1, width) for block in blocks])
        return flat.index_select(0, self.restore).view(-1, self.heads, width)


@dataclass(frozen=True, slots=True)
class Plan:
    """The blocks of a batch. bias: of each block, `(1 or b, 1 or g, h/g t, s)`, what is added to its scores.

    causal_alone: the bias says no more than that no query sees a later key. begin_together: place 0 of the keys is
    place 0 of the queries.
    """

    queries: Side
    keys: Side
    bias: list[Tensor]
    causal_alone: bool
    begin_together: bool


def plan(queries: Sequences, keys: Sequences, rule: Rule, query: Tensor, groups: int) -> Plan:
    """The plan of a batch for query `(n, h, k)`, made once for all layers that share the rule."""
    key = ("attend", str(query.device), query.dtype, keys.lengths, queries.prefixes, rule, query.shape[1], groups)
    if key not in queries.derived:
        queries.derived[key] = _make_plan(queries, keys, rule, query, groups)
    made: Plan = queries.derived[key]
    return made


def _make_plan(queries: Sequences, keys: Sequences, rule: Rule, query: Tensor, groups: int) -> Plan:
    assert len(queries) == len(keys), f"{len(queries)} sequences of queries, {len(keys)} of keys"
    heads, device = query.shape[1], query.device
    same = queries.lengths == keys.lengths
    assert same or not queries.prefixes, "tokens that see one another are read at once"
    members = _members(queries, keys, heads, CPU_BLOCK_SCORES if device.type == "cpu" else BLOCK_SCORES)
    # A block has one distance for query i and key j: both sides begin at 0, or, lengths differing, both end at the end.
    together = same or not (rule.causal or rule.window or rule.slopes or rule.relative)
    query_side = _side(queries, members, heads, together, device)
    key_side = query_side if same and heads == groups else _side(keys, members, groups, together, device)
    prefixes = [
        torch.tensor([queries.prefixes[row] for row in rows], device=device) if queries.prefixes else None
        for rows in members
    ]
    bias = [
        _bias(take.shape[1], pad, rule, heads, groups, same, prefix).to(query.dtype)
        for take, pad, prefix in zip(query_side.take, key_side.pad, prefixes, strict=True)
    ]
    plain = rule.window is None and rule.slopes is None and not rule.relative and not queries.prefixes
    causal_alone = same and rule.causal and plain and heads == groups
    return Plan(query_side, key_side, bias, causal_alone, together)


def _members(queries: Sequences, keys: Sequences, heads: int, most_scores: int) -> list[list[int]]:
    """Numbers of the sequences in each block: sorted by length, as many as keep its scores within `most_scores`."""
    order = sorted(range(len(queries)), key=lambda row: (keys.lengths[row], queries.lengths[row], row))
    members: list[list[int]] = [[]]
    t = s = 0
    for row in order:
        t, s = max(t, _rounded(queries.lengths[row])), max(s, _rounded(keys.lengths[row]))
        if members[-1] and (len(members[-1]) + 1) * heads * t * s > most_scores:
            members.append([])
            t, s = _rounded(queries.lengths[row]), _rounded(keys.lengths[row])
        members[-1].append(row)
    return members


def _rounded(length: int) -> int:
    return length if length == 1 else -(-length // ROUND_LENGTH) * ROUND_LENGTH


def _side(sequences: Sequences, members: list[list[int]], heads: int, begin: bool, device: torch.device) -> Side:
    """begin: whether sequences stand at the beginning of their row in a block, or at its end."""
    first, lengths = torch.tensor(ragged.starts(sequences)), torch.tensor(sequences.lengths)
    takes, pads = [], []
    restore = torch.empty(sequences.num_tokens, heads, dtype=torch.int64)
    offset = 0
    for rows in members:
        size = _rounded(max(sequences.lengths[row] for row in rows))
        length = lengths[rows][:, None]
        place = torch.arange(size) - (0 if begin else size - length)  # (1 or b, size)
        pad = (place < 0) | (place >= length)  # (b, size)
        take = (first[rows][:, None] + place).masked_fill(pad, 0)
        place_of_head_0 = offset + torch.arange(len(rows))[:, None] * heads * size + torch.arange(size)
        restore[take[~pad]] = place_of_head_0[~pad][:, None] + torch.arange(heads) * size
        offset += len(rows) * heads * size
        takes.append(take.to(device))
        pads.append(pad.to(device))
    return Side(heads, takes, pads, restore.flatten().to(device))


def _bias(t: int, key_pad: Tensor, rule: Rule, heads: int, groups: int, same: bool, prefix: Tensor | None) -> Tensor:
    """What is added to a block's scores, `(1 or b, 1 or g, h/g t, s)` in float64; prefix `(b,)`: see `Sequences`."""
    s, device = key_pad.shape[1], key_pad.device
    ahead = torch.arange(s - t, s, device=device)[:, None] - torch.arange(s, device=device)  # (t, s)
    unseen = (ahead < 0 if rule.causal else torch.zeros_like(ahead, dtype=torch.bool))[None]  # (1, t, s)
    if prefix is not None:
        unseen = unseen & (torch.arange(s, device=device) >= prefix[:, None, None])  # (b, t, s)
    if rule.window is not None:
        unseen = unseen | (ahead.abs() > (rule.window - 1 if rule.causal else rule.window // 2))
    unseen = unseen[:, None, None]  # (1 or b, 1, 1, t, s)
    if not (same and rule.causal):  # there no query sees the padding after its sequence anyway
        unseen = unseen | key_pad[:, None, None, None]
    bias = torch.zeros(1, 1, 1, t, s, dtype=torch.float64, device=device)
    if rule.slopes is not None:
        slope = torch.tensor(rule.slopes, dtype=torch.float64, device=device)
        bias = -slope.view(1, groups, heads // groups, 1, 1) * ahead.abs()
    bias = torch.where(unseen, UNSEEN, bias)
    b, g = bias.shape[:2]
    return bias.expand(b, g, heads // groups, t, s).reshape(b, g, -1, s)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    rule: Rule,
    dropout: DropoutSite | None,
    biases: list[Tensor] | None = None,
) -> Tensor:
    """query `(n, h, k)`, key and value `(m, g, k)` -> `(n, h, k)`, block by block; biases: other than the plan's."""
    groups = plan.keys.heads
    blocks = []
    for q, k, v, bias, drop in zip(
        to_blocks(query, plan.queries),
        to_blocks(key, plan.keys),
        to_blocks(value, plan.keys),
        plan.bias if biases is None else biases,
        _drops(dropout, plan, query.dtype),
        strict=True,
    ):
        b, h, t, width = q.shape
        grouped = q.view(b, groups, h // groups * t, width)  # the heads of a group one under the other
        output = block_attention(grouped, k, v, bias, rule.scale, causal_alone=plan.causal_alone, drop=drop)
        blocks.append(output.reshape(b, h, t, width))
    return from_blocks(blocks, plan.queries)


def _drops(dropout: DropoutSite | None, plan: Plan, dtype: torch.dtype) -> Iterator[Tensor | None]:
    """For each block what its weights are multiplied with, `(b, g, h/g t, s)`, or None."""
    if dropout is None:
        yield from [None] * len(plan.bias)
        return
    assert plan.begin_together, "dropout of weights needs queries and keys that begin together"
    keys = plan.queries.gather(dropout.row_keys(plan.queries.heads)[:, :, None])
    for key, bias in zip(keys, plan.bias, strict=True):
        keep = keep_mask(key[..., 0], bias.shape[-1], dropout.rate)  # (b, h, t, s)
        yield keep.view(len(key), plan.keys.heads, -1, bias.shape[-1]).to(dtype).mul_(kept_inverse(dropout.rate))


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, *, causal_alone: bool, drop: Tensor | None
) -> Tensor:
    """softmax(scale q k^T + bias) * drop  v:  q `(b, g, t, k)`, k and v `(b, g, s, k)` -> `(b, g, t, k)`.

    bias: broadcast to `(b, g, t, s)`; causal_alone: it only hides later keys; drop: `(b, g, t, s)` or None.
    """
    if not _has_flash(q) and drop is None:
        mask = None if causal_alone else bias
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal_alone, scale=scale)
    output: Tensor = _Attention.apply(q, k, v, bias, scale, causal_alone, drop)  # type: ignore[no-untyped-call]
    return output


class _Attention(torch.autograd.Function):
    """With P the weights: dV = P^T dO, dS = P * (dO V^T - sum(dO * O)), dQ = scale dS K, dK = scale dS^T Q.

    The gradient of a learned bias is dS, summed where the bias was broadcast; torch's kernels do not give it.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, causal: bool, drop: Any
    ) -> Tensor:
        output, log_sum = _forward(q, k, v, bias, scale, causal)
        if drop is not None:
            output = _weights(q, k, bias, log_sum, scale).mul_(drop) @ v
        ctx.save_for_backward(q, k, v, bias, output, log_sum, drop)
        ctx.scale, ctx.causal = scale, causal
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, output, log_sum, drop = ctx.saved_tensors
        learned = ctx.needs_input_grad[3]
        if drop is None and q.dtype not in OWN_BACKWARD and not learned and _has_flash(q):
            flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
            mask = None if ctx.causal else bias
            grads = flash_backward(grad, q, k, v, output, log_sum, 0.0, ctx.causal, attn_mask=mask, scale=ctx.scale)
            return *grads, None, None, None, None
        delta = (grad * output).sum(-1, keepdim=True).neg_()  # (b, g, t, 1)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        dbias = None
        t, s = q.shape[2], k.shape[2]
        step = CAUSAL_ROWS if ctx.causal else t
        for start in range(0, t, step):
            # Of causal scores, the part right of the last row's own key is skipped.
            rows, seen = slice(start, start + step), slice(0, start + step if ctx.causal else s)
            query, key, dout = q[:, :, rows], k[:, :, seen], grad[:, :, rows]
            weights = _weights(query, key, bias[:, :, rows, seen], log_sum[:, :, rows], ctx.scale)
            if drop is None:
                kept = weights
                dscores = _plus_product(delta[:, :, rows], dout, v[:, :, seen], 1.0)
            else:
                kept = weights * drop[:, :, rows, seen]
                dscores = (dout @ v[:, :, seen].transpose(2, 3)).mul_(drop[:, :, rows, seen]).add_(delta[:, :, rows])
            dscores.mul_(weights)
            if learned:
                dbias = dscores.sum_to_size(bias.shape)  # no bias is learned where rows are taken in steps
            dq[:, :, rows] = (dscores @ key).mul_(ctx.scale)
            dk[:, :, seen] += (dscores.transpose(2, 3) @ query).mul_(ctx.scale)
            dv[:, :, seen] += kept.transpose(2, 3) @ dout
        return dq, dk, dv, dbias, None, None, None


def _forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, causal_alone: bool) -> tuple[Tensor, Tensor]:
    """Output `(b, g, t, k)` without dropout, and the logarithm of each row's sum `(b, g, t)`."""
    if _has_flash(q):
        mask = None if causal_alone else bias
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        output, log_sum = flash(q, k, v, 0.0, causal_alone, attn_mask=mask, scale=scale)
        return output, log_sum
    log_sum = _plus_product(bias, q, k, scale).logsumexp(-1)
    return _weights(q, k, bias, log_sum, scale) @ v, log_sum


def _has_flash(states: Tensor) -> bool:
    """Whether torch's fused CPU kernel, which alone of its kind returns the sums of rows, is there."""
    return states.device.type == "cpu" and hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")


def _weights(q: Tensor, k: Tensor, bias: Tensor, log_sum: Tensor, scale: float) -> Tensor:
    """exp(scale q k^T + bias - log_sum): `(b, g, t, s)`."""
    b, g, t, s = *q.shape[:3], k.shape[2]
    scores = q.new_empty(b * g, t, s)
    torch.sub(bias, log_sum[..., None].to(q.dtype), out=scores.view(b, g, t, s))
    scores.baddbmm_(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), alpha=scale)
    return scores.exp_().view(b, g, t, s)


def _plus_product(base: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """base + scale left right^T in one pass: `(b, g, t, s)`, base broadcast to it."""
    shape = *left.shape[:3], right.shape[2]
    whole = base.expand(shape).flatten(0, 1)
    product = torch.baddbmm(whole, left.flatten(0, 1), right.flatten(0, 1).transpose(1, 2), alpha=scale)
    return product.view(shape)


def to_blocks(states: Tensor, side: Side) -> tuple[Tensor, ...]:
    """`(n, heads, k)` -> blocks `(b, heads, length, k)`; padding holds some token's values."""
    blocks: tuple[Tensor, ...] = _ToBlocks.apply(states, side)  # type: ignore[no-untyped-call]
    return blocks


def from_blocks(blocks: list[Tensor], side: Side) -> Tensor:
    """Blocks `(b, heads, length, k)` -> `(n, heads, k)`."""
    states: Tensor = _FromBlocks.apply(side, *blocks)  # type: ignore[no-untyped-call]
    return states


class _ToBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, side: Side) -> tuple[Tensor, ...]:
        ctx.side = side
        return side.gather(states)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Nothing reaches padding: padded queries get no gradient, padded keys no weight.
        return ctx.side.scatter(grads), None


class _FromBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, side: Side, *blocks: Tensor) -> Tensor:
        ctx.side = side
        return side.scatter(blocks)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        side: Side = ctx.side
        blocks = side.gather(grad)
        for block, pad in zip(blocks, side.pad, strict=True):
            block.masked_fill_(pad[:, None, :, None], 0.0)
        return None, *blocks
