"""Decoding in C++: all blocks of a decoder over a few new tokens in one call; see `native/decoding.cpp`.

One new token of each sequence is bound by reading all weights once, so that what counts is how many bytes they have:
float32 as they are, bfloat16, or int8 with a scale for each output channel. Activations keep 15 bits or more, so that
with few rows the weights alone are rounded.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import Structure, c_float, c_int32, c_int64, c_void_p
from typing import Any, Literal

import torch
from torch import Tensor, nn

from isoform.layers import feedforward
from isoform.layers.block import Block, SelfAttention
from isoform.layers.cache import KVCache
from isoform.layers.init import Linear
from isoform.layers.kernels import Library
from isoform.layers.lora import LowRankLinear
from isoform.layers.norm import LayerNorm, RMSNorm
from isoform.layers.position import Position, Rope

Weights = Literal["fp32", "bf16", "int8"]
KINDS = {"fp32": 0, "bf16": 1, "int8": 2}
ACTIVATIONS: dict[type[nn.Module], int] = {
    feedforward.Swiglu: 0,
    feedforward.Gelu: 1,
    feedforward.Geglu: 1,
    feedforward.GeluTanh: 2,
    feedforward.GegluTanh: 2,
    feedforward.Relu: 3,
    feedforward.ReluSquared: 4,
}


class _Norm(Structure):
    _fields_ = [("weight", c_void_p), ("bias", c_void_p), ("eps", c_float), ("centred", c_int32)]


class _Matrix(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("weight", "scales", "bias")),
        ("rows", c_int64),
        ("columns", c_int64),
        ("kind", c_int32),
    ]


class _Layer(Structure):
    _fields_ = [
        ("attention_norm", _Norm),
        ("feedforward_norm", _Norm),
        *((name, _Matrix) for name in ("qkv", "output", "gate", "up", "down")),
        ("keys", c_void_p),
        ("values", c_void_p),
    ]


class _Pass(Structure):
    _fields_ = [
        ("layers", ctypes.POINTER(_Layer)),
        ("final_norm", _Norm),
        *((name, c_void_p) for name in ("hidden", "cos", "sin", "starts", "stored", "slopes", "relative")),
        *((name, c_int64) for name in ("num_layers", "num_sequences", "n", "width", "heads", "groups", "head_width")),
        *((name, c_int64) for name in ("inner", "half", "capacity", "window", "reach")),
        ("scale", c_float),
        *((name, c_int32) for name in ("activation", "norm_first", "narrow_cache", "tiles", "threads")),
    ]


class Packed:
    """A matrix `(rows, columns)` as the kernels read it, once made from weight and bias.

    One of float32 is the weight itself and follows what is written into it; all else is kept as it was.
    """

    def __init__(self, library: Library, weight: Tensor, bias: Tensor | None, kind: Weights) -> None:
        self.library = library
        self.weight = weight.detach().float().contiguous()
        self.bias = None if bias is None else bias.detach().float().clone(memory_format=torch.contiguous_format)
        self.scales: Tensor | None = None
        self.fields = _Matrix(rows=weight.shape[0], columns=weight.shape[1], kind=KINDS[kind])
        if kind != "fp32":
            given = self.weight
            num_bytes = library.count("packed_bytes", ctypes.addressof(self.fields))
            self.weight = torch.empty(num_bytes, dtype=torch.uint8)
            self.scales = torch.empty(len(given)) if kind == "int8" else None
            address = ctypes.addressof(self.fields)
            library.call("pack", (), address, given, self.weight, self.scales, torch.get_num_threads())
        for name in ("weight", "scales", "bias"):
            tensor = getattr(self, name)
            setattr(self.fields, name, None if tensor is None else tensor.data_ptr())

    def __call__(self, states: Tensor) -> Tensor:
        """W x + bias: `(n, columns)` -> float32 `(n, rows)`."""
        states = states.float().contiguous()
        output = torch.empty(len(states), self.fields.rows)
        tiles = self.library.has_tiles
        given = (ctypes.addressof(self.fields), states, len(states), output, tiles, torch.get_num_threads())
        self.library.call("multiply", (), *given)
        return output

    def __deepcopy__(self, memo: Any) -> Packed:
        """Itself: it does not change, and addresses cannot be copied."""
        return self


def unfit(blocks: Sequence[nn.Module], position: Position, final_norm: nn.Module) -> bool:
    """Whether the kernel does not know some part of this decoder, which has one form for all blocks."""
    return (
        type(position).rotate not in (Position.rotate, Rope.rotate)
        or type(final_norm) not in (LayerNorm, RMSNorm, nn.Identity)
        or not all(_known(block) for block in blocks)
        or any(_form(block) != _form(blocks[0]) for block in blocks)
    )


def _form(block: Any) -> tuple[Any, ...]:
    """What the kernel is told of all blocks at once."""
    attention, inner = block.attention, block.feedforward
    heads = attention.num_heads, attention.num_kv_heads, attention.head_width, attention.window, attention.scale
    return *heads, bool(block.norm_first), type(inner), inner.up.out_features


def _known(block: nn.Module) -> bool:
    if type(block) is not Block or type(block.attention) is not SelfAttention or not block.attention.causal:
        return False
    linears = [block.attention.qkv, block.attention.output, *block.feedforward.children()]
    return (
        type(block.feedforward) in ACTIVATIONS
        and all(type(norm) in (LayerNorm, RMSNorm) for norm in (block.attention_norm, block.feedforward_norm))
        and all(
            type(each) in (nn.Linear, Linear) or (type(each) is LowRankLinear and each.bits is None) for each in linears
        )
        and all(part.dtype != torch.float64 and part.device.type == "cpu" for part in block.parameters())
    )


class Blocks:
    """The blocks of a decoder and its last norm, their weights packed as they are now, see `Packed` for float32.

    cache_dtype: of keys and values, float32 or bfloat16.
    """

    def __init__(
        self,
        library: Library,
        blocks: Sequence[nn.Module],
        position: Position,
        final_norm: nn.Module,
        kind: Weights,
        cache_dtype: torch.dtype,
    ) -> None:
        self.library, self.kind, self.position, self.cache_dtype = library, kind, position, cache_dtype
        self.kept: list[Tensor | Packed] = []
        # what is read by its address
        self.layers = (_Layer * len(blocks))(*(self._layer(block) for block in blocks))
        attention: Any = blocks[0].attention
        inner: Any = blocks[0].feedforward
        slopes, relative = position.slopes(), position.relative(causal=True)
        reach = 0 if relative is None else relative.shape[1] // 2
        self.groups, self.head_width = attention.num_kv_heads, attention.head_width
        self.fixed = _Pass(
            layers=self.layers,
            final_norm=self._norm(final_norm),
            slopes=self._keep(None if slopes is None else torch.tensor(slopes)),
            relative=self._keep(None if relative is None else relative[:, reach:]),
            num_layers=len(blocks),
            width=attention.qkv.in_features,
            heads=attention.num_heads,
            groups=attention.num_kv_heads,
            head_width=attention.head_width,
            inner=inner.up.out_features,
            window=-1 if attention.window is None else attention.window,
            reach=reach,
            scale=attention.head_width**-0.5 if attention.scale is None else attention.scale,
            activation=ACTIVATIONS[type(inner)],
            norm_first=bool(blocks[0].norm_first),
            tiles=library.has_tiles,
        )

    def run(self, hidden: Tensor, positions: Tensor, lengths: Sequence[int], cache: KVCache) -> Tensor:
        """What the head reads, of the embeddings of the new tokens; their keys and values are stored.

        Shapes: hidden `(n, d)`, positions `(n,)`, lengths of the new pieces `(b,)` -> `(n, d)`.
        """
        # Its own structures at every call: others may be under way.
        call, layers = _Pass.from_buffer_copy(self.fixed), type(self.layers).from_buffer_copy(self.layers)
        call.layers = layers
        output = hidden.float().clone(memory_format=torch.contiguous_format)
        shape = self.groups, self.head_width
        call.capacity = cache.reserve(max(map(sum, zip(cache.lengths, lengths, strict=True))), shape, self.cache_dtype)
        for layer, keys, values in zip(layers, cache.keys, cache.values, strict=True):
            assert keys is not None and values is not None
            layer.keys, layer.values = keys.data_ptr(), values.data_ptr()
            call.narrow_cache = keys.dtype == torch.bfloat16
        starts = torch.tensor([0, *lengths]).cumsum(0)
        stored = torch.tensor(cache.lengths)
        wave = self.position.waves(positions, torch.float32) if isinstance(self.position, Rope) else None
        if wave is not None:
            cos, sin = (part.contiguous() for part in wave)
            call.cos, call.sin, call.half = cos.data_ptr(), sin.data_ptr(), cos.shape[-1]
        call.hidden, call.starts, call.stored = output.data_ptr(), starts.data_ptr(), stored.data_ptr()
        call.num_sequences, call.n, call.threads = len(lengths), len(output), torch.get_num_threads()
        self.library.call("decode", (), ctypes.addressof(call))
        return output

    def _layer(self, block: Any) -> _Layer:
        attention: Any = block.attention
        inner: Any = block.feedforward
        gate = self._matrix(inner.gate) if inner.gated else _Matrix()
        return _Layer(
            self._norm(block.attention_norm),
            self._norm(block.feedforward_norm),
            self._matrix(attention.qkv),
            self._matrix(attention.output),
            gate,
            self._matrix(inner.up),
            self._matrix(inner.down),
        )

    def _matrix(self, linear: nn.Linear) -> _Matrix:
        weight = linear.merged() if isinstance(linear, LowRankLinear) and linear.parts else linear.weight
        packed = Packed(self.library, weight, linear.bias, self.kind)
        self.kept.append(packed)
        return packed.fields

    def _norm(self, norm: Any) -> _Norm:
        if isinstance(norm, nn.Identity):
            return _Norm()
        return _Norm(
            self._keep(norm.weight), self._keep(getattr(norm, "bias", None)), norm.eps, isinstance(norm, LayerNorm)
        )

    def _keep(self, tensor: Tensor | None) -> int | None:
        """The address of its floats, which stay there as long as this object does."""
        if tensor is None:
            return None
        floats = tensor.detach().float().clone(memory_format=torch.contiguous_format)
        self.kept.append(floats)
        return floats.data_ptr()
