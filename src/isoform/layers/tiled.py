"""Attention on matrix tiles as a differentiable function; see attention.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from isoform.contracts import Sequences
from isoform.layers import ragged
from isoform.layers.dropout import DropoutSite, drop_threshold, hashes_on_cpu, kept_inverse
from isoform.layers.kernels import AttentionCall, AttentionGradients, Drop, Library, serves
from isoform.layers.relative import Relative

CPU = torch.device("cpu")
# The kernel rounds lengths up to it.
KERNEL_BLOCK = 32
# Shorter sequences, such as single tokens in decoding, leave the matrix tiles empty.
MIN_QUERIES = 8
# The scores of 32 queries with so many keys fit into a second-level cache; wider heads do not fill up to 32 channels.
MAX_KEYS, MAX_HEAD_WIDTH = 8192, 256
# Gradients of learned scores are kept for each sequence, as long as the longest: 128 MB of them.
MAX_LEANS = 1 << 25


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Sequences,
    keys: Sequences,
    *,
    causal: bool,
    window: int | None,
    slopes: tuple[float, ...] | None,
    scale: float,
    relative: Relative | None,
    dropout: DropoutSite | None,
) -> Tensor | None:
    """`attend` in bfloat16 on matrix tiles; see attention.cpp. Shapes: as there."""
    library = serves(query, key, value)
    if (
        library is None
        or not library.has_tiles
        or any(states.dtype != torch.bfloat16 for states in (query, key, value))
        or queries.max_length < MIN_QUERIES
        or keys.max_length > MAX_KEYS
        or query.shape[-1] > MAX_HEAD_WIDTH
        or len(queries) != len(keys)
        or any(seen == 0 < asking for asking, seen in zip(queries.lengths, keys.lengths, strict=True))
        or (queries.prefixes and window is not None)
        or (dropout is not None and causal and queries.lengths != keys.lengths)
    ):
        return None
    reach = max(queries.max_length, keys.max_length)
    if relative is not None and len(queries) * query.shape[1] * (2 * reach + 1) > MAX_LEANS:
        return None
    lean = None if relative is None else relative.line(reach)
    if slopes is not None:
        slanted = _slanted(slopes, reach)
        lean = slanted if lean is None else lean + slanted
    plan = _AttentionPlan(queries, keys, causal, window, scale, dropout, key.shape[1], query.shape)
    output: Tensor = _Attention.apply(query, key, value, lean, plan, library)  # type: ignore[no-untyped-call]
    return output


def _slanted(slopes: tuple[float, ...], reach: int) -> Tensor:
    """float32 `(h, 2 reach + 1)`: -slope |i - j| in the column reach + j - i."""
    return -torch.tensor(slopes)[:, None] * torch.arange(-reach, reach + 1).abs()


class _AttentionPlan:
    """What the kernel reads beside the states; it keeps alive what is given by address."""

    def __init__(
        self,
        queries: Sequences,
        keys: Sequences,
        causal: bool,
        window: int | None,
        scale: float,
        dropout: DropoutSite | None,
        groups: int,
        shape: torch.Size,
    ) -> None:
        heads, width = shape[1:]
        self.tensors = {
            "query_starts": ragged.bounds(queries, CPU),
            "key_starts": ragged.bounds(keys, CPU),
            "prefixes": torch.tensor(queries.prefixes) if queries.prefixes else None,
        }
        self.call = AttentionCall(
            num_sequences=len(queries),
            heads=heads,
            groups=groups,
            width=width,
            window=-1 if window is None else window,
            causal=causal,
            scale=scale,
            threads=torch.get_num_threads(),
            **{name: _address(tensor) for name, tensor in self.tensors.items()},
        )
        if dropout is not None:
            self.tensors["keys"] = dropout.row_keys(heads).contiguous()
            self.tensors["columns"] = hashes_on_cpu((keys.max_length // KERNEL_BLOCK + 1) * KERNEL_BLOCK)
            self.call.drop = Drop(
                keys=_address(self.tensors["keys"]),
                columns=_address(self.tensors["columns"]),
                threshold=drop_threshold(dropout.rate),
                factor=kept_inverse(dropout.rate),
            )

    def reading(self, states: Sequence[Tensor], lean: Tensor | None) -> AttentionCall:
        """The call on query, key and value, heads standing side by side, and on what is added to their scores."""
        _point(self.call, states)
        self.call.lean, self.call.reach = _address(lean), 0 if lean is None else lean.shape[1] // 2
        return self.call


def _point(structure: AttentionCall | AttentionGradients, states: Sequence[Tensor]) -> None:
    """Query, key and value, or their gradients, by address and stride."""
    for name, tensor in zip(("query", "key", "value"), states, strict=True):
        setattr(structure, name, tensor.data_ptr())
        setattr(structure, f"{name}_stride", tensor.stride(0))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lean: Tensor | None,
        plan: _AttentionPlan,
        library: Library,
    ) -> Tensor:
        states = [_side_by_side(tensor) for tensor in (query, key, value)]
        lean = None if lean is None else lean.contiguous()
        output = query.new_empty(query.shape)
        log_sums = torch.empty(query.shape[:2])
        library.attention_forward(plan.reading(states, lean), output, log_sums)
        ctx.save_for_backward(*states, output, log_sums, lean)
        ctx.plan, ctx.library = plan, library
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        *states, output, log_sums, lean = ctx.saved_tensors
        plan = ctx.plan
        grads = [torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in states]
        into = AttentionGradients()
        _point(into, grads)
        leans = None
        if ctx.needs_input_grad[3]:
            leans = torch.zeros(plan.call.num_sequences, *lean.shape)  # one for each sequence: any order, one sum
            into.lean = leans.data_ptr()
        ctx.library.attention_backward(plan.reading(states, lean), output, log_sums, grad.contiguous(), into)
        return *grads, None if leans is None else leans.sum(0), None, None


def _side_by_side(states: Tensor) -> Tensor:
    """`(n, heads, k)` with the heads of a token next to one another, as they mostly are."""
    return states if states.stride()[1:] == (states.shape[2], 1) else states.contiguous()


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
