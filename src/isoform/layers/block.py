"""A transformer block of a decoder or encoder: self-attention and feed-forward, each in a residual arm.

norm first   x + arm(norm(x))          norm last   norm(x + arm(x))
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from isoform.contracts import Sequences
from isoform.layers.apart import apart
from isoform.layers.attention import attend
from isoform.layers.cache import KVCache
from isoform.layers.dropout import Dropout
from isoform.layers.init import linear
from isoform.layers.moe import MixtureOfExperts
from isoform.layers.position import Position
from isoform.layers.recompute import Recomputable
from isoform.layers.relative import Relative


@dataclass(frozen=True, slots=True)
class Stream:
    """What every block of a forward pass reads beside the hidden states.

    positions: `(n,)`; dropout_keys: `(n,)` or None, no dropout; cache: of earlier tokens, or None.
    router_logits: `(n, e)` of every layer that routes, which the blocks add here as the pass goes through them.
    """

    positions: Tensor
    sequences: Sequences
    position: Position
    dropout_keys: Tensor | None = None
    cache: KVCache | None = None
    router_logits: list[Tensor] = field(default_factory=list)
    made: dict[bool, Relative | None] = field(default_factory=dict)

    @apart
    def relative(self, causal: bool) -> Relative | None:
        """The position scheme's learned scores, one object for all layers of the pass."""
        if causal not in self.made:
            values = self.position.relative(causal=causal)
            self.made[causal] = None if values is None else Relative(values)
        return self.made[causal]


class SelfAttention(nn.Module):
    """Projections round `attend`: one matrix makes queries, keys and values.

    head_width: k, d / h unless given. scale: of the scores, 1 / sqrt(k) unless given.

    Shapes: hidden `(n, d)`; qkv `((h + 2 g) k, d)`, rows in the order queries, keys, values; output `(d, h k)`.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        layer: int,
        causal: bool,
        window: int | None,
        bias: bool,
        dropout: float,
        head_width: int | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_width = num_heads, num_kv_heads, head_width or width // num_heads
        self.layer, self.causal, self.window, self.scale = layer, causal, window, scale
        self.qkv = linear(width, (num_heads + 2 * num_kv_heads) * self.head_width, bias=bias)
        self.output = linear(num_heads * self.head_width, width, bias=bias)
        self.dropout = Dropout(dropout)

    def forward(self, hidden: Tensor, stream: Stream) -> Tensor:
        heads, groups = self.num_heads, self.num_kv_heads
        states = self.qkv(hidden).view(-1, heads + 2 * groups, self.head_width)  # (n, h + 2 g, k)
        query, key, value = states.split((heads, groups, groups), dim=1)
        query, key = stream.position.rotate(query, key, stream.positions, stream.positions)
        keys = stream.sequences
        if stream.cache is not None:
            key, value, keys = stream.cache.extend(self.layer, key, value, stream.sequences)
        mixed = attend(
            query,
            key,
            value,
            stream.sequences,
            keys,
            causal=self.causal,
            window=self.window,
            slopes=stream.position.slopes(),
            scale=self.scale,
            relative=stream.relative(self.causal),
            dropout=self.dropout.on_weights(stream.dropout_keys),
        )
        output: Tensor = self.output(mixed.flatten(1))  # (n, h, k) -> (n, h k) -> (n, d)
        return output


class Block(Recomputable):
    """Attention and feed-forward with their norms and dropouts, in the order that the head of this file shows.

    Shapes: hidden `(n, d)` -> `(n, d)`. Source: Xiong et al. 2020 for both orders. Differs: nothing.
    """

    def __init__(
        self,
        attention: nn.Module,
        feedforward: nn.Module,
        attention_norm: nn.Module,
        feedforward_norm: nn.Module,
        *,
        norm_first: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.attention_norm, self.attention = attention_norm, attention
        self.feedforward_norm, self.feedforward = feedforward_norm, feedforward
        for norm in (attention_norm, feedforward_norm):
            norm.narrow = norm_first  # type: ignore[assignment]
        self.attention_dropout, self.feedforward_dropout = Dropout(dropout), Dropout(dropout)

    def forward(self, hidden: Tensor, stream: Stream) -> Tensor:
        keys = stream.dropout_keys
        if self.norm_first:
            attended = self.attention(self.attention_norm(hidden), stream)
            hidden = self.attention_dropout(attended, keys, onto=hidden)
            hidden = self.feedforward_dropout(self._feed(self.feedforward_norm(hidden), stream), keys, onto=hidden)
        else:
            attended = self.attention(hidden, stream)
            hidden = self.attention_norm(self.attention_dropout(attended, keys, onto=hidden))
            hidden = self.feedforward_norm(self.feedforward_dropout(self._feed(hidden, stream), keys, onto=hidden))
        return hidden

    def _feed(self, hidden: Tensor, stream: Stream) -> Tensor:
        if isinstance(self.feedforward, MixtureOfExperts):
            mixed, router_logits = self.feedforward.route(hidden)
            stream.router_logits.append(router_logits)
            return mixed
        output: Tensor = self.feedforward(hidden)
        return output
