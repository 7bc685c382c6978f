"""XLNet's block: two streams through one set of weights, and attention by relative positions.

    score(i, j) = ((q_i + u) . k_j  +  (q_i + w) . r_{i-j}  +  (q_i + s) . e_{other segment?}) / sqrt(k)

    content stream h   knows its own token: sees what is known or guessed before it, and itself
    query stream g     knows its place alone: sees the same of h, not itself; it is where tokens are guessed

r_d is a projection of fixed waves of the distance d; u, w and s `(h, k)` are learned, one for each kind of term.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from isoform.contracts import Batch
from isoform.layers import blockwise, ragged
from isoform.layers.apart import apart
from isoform.layers.dropout import Dropout, mix64
from isoform.layers.init import linear
from isoform.layers.position import inverse_frequencies
from isoform.layers.recompute import Recomputable

BASE = 10_000.0
# Tells the query stream's dropout from that of the content stream at the same token.
QUERY_STREAM = 0x5851F42D4C957F2D


@dataclass(slots=True)
class View:
    """What every block of a pass reads beside the states.

    ranks `(n,)`: see `Batch`; None: every token is known. asked `(m,)`: the places of the query stream. keys and
    asked_keys `(n,)`, `(m,)`: of dropout, or None. seen: whom each place sees in each block of attention, by stream.
    """

    batch: Batch
    max_distance: int | None
    ranks: Tensor | None = None
    asked: Tensor | None = None
    keys: Tensor | None = None
    asked_keys: Tensor | None = None
    seen: dict[bool, list[Tensor | None]] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: Batch, max_distance: int | None, keys: Tensor | None) -> View:
        """The view of a batch; keys `(n,)`: of dropout, or None."""
        if batch.ranks is None:
            return cls(batch, max_distance, keys=keys)
        asked = (batch.ranks > 0).nonzero().squeeze(1)
        asked_keys = None if keys is None else mix64(keys ^ QUERY_STREAM)[asked]
        return cls(batch, max_distance, batch.ranks, asked, keys, asked_keys)

    def visible(self, plan: blockwise.Plan, *, itself: bool) -> list[Tensor | None]:
        """Of each block bool `(b, 1, t, t)`: who sees whom; None: all see all."""
        if itself not in self.seen:
            self.seen[itself] = [self._visible(take, itself=itself) for take in plan.queries.take]
        return self.seen[itself]

    def _visible(self, take: Tensor, *, itself: bool) -> Tensor | None:
        if self.ranks is None:
            return None
        rank = self.ranks[take]  # (b, t)
        # What is known sees what is known; what is guessed, also all that was guessed before it.
        seen = rank[:, None, :] < rank.clamp(min=1)[:, :, None]
        if itself:
            seen = seen | torch.eye(take.shape[1], dtype=torch.bool, device=take.device)
        return seen[:, None]


class TwoStreamAttention(nn.Module):
    """Attention of both streams over the content stream, see the head of this file.

    Shapes: hidden `(n, d)`; qkv `(3 h k, d)`, rows in the order queries, keys, values; position `(h k, d)`; biases
    `(h, k)`; segment_embedding `(2, h, k)`; output `(d, h k)`.
    Source: Yang et al. 2019, sections 2.3 and 2.5; Dai et al. 2019, section 3.3; HF `XLNetRelativeAttention`.
    Differs: no memory of an earlier text; no dropout on the waves; a place that sees nothing gets zeros.
    """

    window: int | None = None
    causal = False

    def __init__(self, width: int, num_heads: int, *, dropout: float) -> None:
        super().__init__()
        self.width, self.num_heads, self.head_width = width, num_heads, width // num_heads
        self.qkv = linear(width, 3 * width, bias=False)
        self.position = linear(width, width, bias=False)
        self.output = linear(width, width, bias=False)
        shape = num_heads, self.head_width
        self.content_bias = nn.Parameter(torch.empty(shape))
        self.position_bias = nn.Parameter(torch.empty(shape))
        self.segment_bias = nn.Parameter(torch.empty(shape))
        self.segment_embedding = nn.Parameter(torch.empty(2, *shape))
        self.dropout = Dropout(dropout)

    def forward(self, content: Tensor, query: Tensor | None, view: View) -> tuple[Tensor, Tensor | None]:
        """content `(n, d)`, query `(m, d)` or None -> what each stream adds to itself."""
        heads = self.num_heads
        states = self.qkv(content).view(-1, 3 * heads, self.head_width)  # (n, 3 h, k)
        q, k, v = states.split(heads, dim=1)
        mixed = self._mixed(q, k, v, view, itself=True)
        if query is None or view.asked is None:
            return self.output(mixed), None
        rows = nn.functional.linear(query, self.qkv.weight[: self.width]).view(-1, heads, self.head_width)  # (m, h, k)
        places = q.new_zeros(q.shape).index_copy(0, view.asked, rows.to(q.dtype))
        guessed = self._mixed(places, k, v, view, itself=False)[view.asked]
        return self.output(mixed), self.output(guessed)

    @apart
    def _mixed(self, q: Tensor, k: Tensor, v: Tensor, view: View, *, itself: bool) -> Tensor:
        """Queries, keys and values `(n, h, k)` -> `(n, h k)`."""
        scale = self.head_width**-0.5
        sequences = view.batch.sequences
        rule = blockwise.Rule(causal=False, window=None, slopes=None, scale=scale, relative=True)
        plan = blockwise.plan(sequences, sequences, rule, q, self.num_heads)
        by_position = blockwise.to_blocks(q + self.position_bias.to(q.dtype), plan.queries)
        by_segment = blockwise.to_blocks(q + self.segment_bias.to(q.dtype), plan.queries)
        visible = view.visible(plan, itself=itself)
        biases = []
        for block, (near, within) in enumerate(zip(by_position, by_segment, strict=True)):
            bias = plan.bias[block] + scale * self._by_distance(near, view.max_distance)
            if view.batch.segments is not None:
                bias = bias + scale * self._by_segment(within, view.batch.segments[plan.queries.take[block]])
            seen = visible[block]
            if seen is not None:
                bias = torch.where(seen, bias, blockwise.UNSEEN)
            biases.append(bias)
        site = self.dropout.on_weights(view.keys)
        content = (q + self.content_bias.to(q.dtype)).contiguous()
        mixed = blockwise.attend(content, k, v, plan, rule, site, biases)
        if view.ranks is not None and not itself:
            mixed = mixed * _sees_any(view)[:, None, None].to(mixed.dtype)
        return mixed.flatten(1)  # (n, h, k) -> (n, h k)

    def _by_distance(self, query: Tensor, max_distance: int | None) -> Tensor:
        """(q_i + w) . r_{i-j}: `(b, h, t, k)` -> `(b, h, t, t)`."""
        t = query.shape[2]
        distance = torch.arange(t - 1, -t, -1, device=query.device)
        if max_distance is not None:
            distance = distance.clamp(-max_distance, max_distance)
        far = waves(distance, self.width).to(self.position.weight.dtype)
        key = self.position(far).view(-1, self.num_heads, self.head_width)  # (2 t - 1, h, k)
        return diagonals(torch.einsum("bhtk,chk->bhtc", query, key.to(query.dtype)))

    def _by_segment(self, query: Tensor, segments: Tensor) -> Tensor:
        """(q_i + s) . e, e by whether j is of another segment than i: `(b, h, t, k)`, `(b, t)` -> `(b, h, t, t)`."""
        scores = torch.einsum("bhtk,chk->cbht", query, self.segment_embedding.to(query.dtype))
        other = segments[:, None, :, None] != segments[:, None, None, :]
        return torch.where(other, scores[1][..., None], scores[0][..., None])


class TwoStreamBlock(Recomputable):
    """norm(x + attention), norm(x + feedforward), of both streams.

    Shapes: content `(n, d)`, query `(m, d)` or None -> the same. Source: HF `XLNetLayer`. Differs: no dropout inside
    the feed-forward layer.
    """

    def __init__(
        self,
        attention: TwoStreamAttention,
        feedforward: nn.Module,
        attention_norm: nn.Module,
        feedforward_norm: nn.Module,
        *,
        dropout: float,
    ) -> None:
        super().__init__()
        self.attention, self.attention_norm = attention, attention_norm
        self.feedforward, self.feedforward_norm = feedforward, feedforward_norm
        self.attention_dropout, self.feedforward_dropout = Dropout(dropout), Dropout(dropout)

    def forward(self, content: Tensor, query: Tensor | None, view: View) -> tuple[Tensor, Tensor | None]:
        mixed, guessed = self.attention(content, query, view)
        if query is not None and guessed is not None:
            query = self._after(query, guessed, view.asked_keys)
        return self._after(content, mixed, view.keys), query

    def _after(self, hidden: Tensor, mixed: Tensor, keys: Tensor | None) -> Tensor:
        hidden = self.attention_norm(hidden + self.attention_dropout(mixed, keys))
        added = self.feedforward_dropout(self.feedforward(hidden), keys)
        output: Tensor = self.feedforward_norm(hidden + added)
        return output


def waves(distance: Tensor, width: int) -> Tensor:
    """Sines of all frequencies, then their cosines, of distances `(c,)`: float32 `(c, d)`."""
    angle = distance[:, None].float() * inverse_frequencies(width, BASE, distance.device)
    return torch.cat((angle.sin(), angle.cos()), dim=1)


def diagonals(scores: Tensor) -> Tensor:
    """Column c of `(.., t, 2 t - 1)` is of distance t - 1 - c -> `(.., t, t)`, column j of row i being of i - j."""
    t = scores.shape[-2]
    # Row i begins t - 1 - i columns later: with one more column a row, all of them in steps of 2 t - 1.
    line = nn.functional.pad(scores, (0, 1)).flatten(-2)[..., t - 1 : t - 1 + t * (2 * t - 1)]
    return line.reshape(*line.shape[:-1], t, 2 * t - 1)[..., :t]


def _sees_any(view: View) -> Tensor:
    """bool `(n,)`: whether something of its text is known before a place is guessed."""
    assert view.ranks is not None, "only a permutation hides anything"
    sequences = view.batch.sequences
    rows = ragged.rows(sequences, view.ranks.device)
    least = view.ranks.new_full((len(sequences),), torch.iinfo(torch.int64).max)
    first = least.scatter_reduce(0, rows, view.ranks, "amin")[rows]
    return first < view.ranks.clamp(min=1)
