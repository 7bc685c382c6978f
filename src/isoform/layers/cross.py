"""Cross-attention: a decoder's tokens look at an encoder's states, two ragged streams of as many sequences."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from isoform.contracts import Sequences
from isoform.layers.attention import attend
from isoform.layers.block import Stream
from isoform.layers.cache import CrossCache
from isoform.layers.dropout import Dropout
from isoform.layers.init import linear
from isoform.layers.recompute import Recomputable


@dataclass(frozen=True, slots=True)
class Memory:
    """What cross-attention looks at: the encoder's states `(m, d)`, None where the cache has their keys and values."""

    hidden: Tensor | None
    sequences: Sequences
    cache: CrossCache | None = None


class CrossAttention(nn.Module):
    """Queries from the decoder, keys and values from the encoder; every token sees its whole source.

    head_width: k, d / h unless given. scale: of the scores, 1 / sqrt(k) unless given.

    Shapes: hidden `(n, d)`; query `(h k, d)`; key_value `(2 h k, d)`, rows first of keys; output `(d, h k)`.
    Source: Vaswani et al. 2017, section 3.2.3. Differs: nothing.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        layer: int,
        bias: bool,
        dropout: float,
        head_width: int | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_width = num_heads, head_width or width // num_heads
        self.layer, self.scale = layer, scale
        inner = num_heads * self.head_width
        self.query = linear(width, inner, bias=bias)
        self.key_value = linear(width, 2 * inner, bias=bias)
        self.output = linear(inner, width, bias=bias)
        self.dropout = Dropout(dropout)

    def forward(self, hidden: Tensor, stream: Stream, memory: Memory) -> Tensor:
        query = self.query(hidden).view(-1, self.num_heads, self.head_width)  # (n, h, k)
        key, value = self._keys_and_values(memory)
        mixed = attend(
            query,
            key,
            value,
            stream.sequences,
            memory.sequences,
            causal=False,
            scale=self.scale,
            dropout=self.dropout.on_weights(stream.dropout_keys),
        )
        output: Tensor = self.output(mixed.flatten(1))  # (n, h, k) -> (n, h k) -> (n, d)
        return output

    def _keys_and_values(self, memory: Memory) -> tuple[Tensor, Tensor]:
        """`(m, h, k)` each: from the encoder's states, or as the cache kept them."""
        if memory.hidden is None:
            assert memory.cache is not None, "without states there is a cache"
            kept = memory.cache.keys[self.layer], memory.cache.values[self.layer]
            assert kept[0] is not None and kept[1] is not None, "the first pass reads the source"
            return kept[0], kept[1]
        states = self.key_value(memory.hidden).view(-1, 2 * self.num_heads, self.head_width)  # (m, 2 h, k)
        key, value = states.split((self.num_heads, self.num_heads), dim=1)
        if memory.cache is not None:
            memory.cache.keys[self.layer], memory.cache.values[self.layer] = key.detach(), value.detach()
        return key, value


class DecoderBlock(Recomputable):
    """Self-attention, cross-attention and feed-forward, each in a residual arm with the norm first: x + arm(norm(x)).

    Shapes: hidden `(n, d)` -> `(n, d)`. Source: Raffel et al. 2020, section 2.1. Differs: nothing.
    """

    def __init__(
        self,
        attention: nn.Module,
        cross_attention: nn.Module,
        feedforward: nn.Module,
        norms: tuple[nn.Module, nn.Module, nn.Module],
        *,
        dropout: float,
    ) -> None:
        super().__init__()
        self.attention_norm, self.cross_attention_norm, self.feedforward_norm = norms
        self.attention, self.cross_attention, self.feedforward = attention, cross_attention, feedforward
        self.attention_dropout, self.cross_attention_dropout = Dropout(dropout), Dropout(dropout)
        self.feedforward_dropout = Dropout(dropout)

    def forward(self, hidden: Tensor, stream: Stream, memory: Memory) -> Tensor:
        keys = stream.dropout_keys
        hidden = hidden + self.attention_dropout(self.attention(self.attention_norm(hidden), stream), keys)
        looked = self.cross_attention(self.cross_attention_norm(hidden), stream, memory)
        hidden = hidden + self.cross_attention_dropout(looked, keys)
        added: Tensor = self.feedforward_dropout(self.feedforward(self.feedforward_norm(hidden)), keys)
        return hidden + added
