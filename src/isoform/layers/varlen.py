"""Attention of ragged batches by flash attention on NVIDIA GPUs: torch's own kernel, or that of the flash-attn package.

Both read `(n, heads, k)` and where sequences begin, as our batches are; where queries and keys differ in number, the
last query stands at the last key. `attention` returns None where they do not serve; `blockwise` then does the work.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from isoform.contracts import Sequences
from isoform.layers import ragged
from isoform.layers.dropout import DropoutSite
from isoform.layers.relative import Relative

DTYPES = (torch.bfloat16, torch.float16)
# Of Ampere, the first for which flash attention is written.
LEAST_CAPABILITY = (8, 0)
# The widest head that the kernels know; heads are padded with zeros to a multiple of 8.
MAX_HEAD_WIDTH, HEAD_STEP = 256, 8


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
    """`attend` in half precision on a GPU. Shapes: as there.

    Dropout has keys of its own, learned scores have gradients, and a prefix is no rule of positions alone: no kernel
    knows any of them.
    """
    if (
        query.dtype not in DTYPES
        or not (query.dtype == key.dtype == value.dtype)
        or query.shape[-1] > MAX_HEAD_WIDTH
        or relative is not None
        or dropout is not None
        or queries.prefixes
        or min(keys.lengths, default=0) < 1
        or not is_served(query.device)
    ):
        return None
    by_torch = slopes is None and has_torch_kernel()
    if not by_torch and not has_package():
        return None
    width = query.shape[-1]
    missing = -width % HEAD_STEP
    q, k, v = (pad(tensor, (0, missing)) if missing else _side_by_side(tensor) for tensor in (query, key, value))
    seen = reach(causal, window)
    if by_torch:
        output = _by_torch(q, k, v, queries, keys, seen, scale)
    else:
        output = _by_package(q, k, v, queries, keys, seen, slopes, scale)
    return output[..., :width] if missing else output


def kernel_of(device: torch.device) -> str:
    """In words what attends there, for whoever records it."""
    if device.type != "cuda" or not torch.cuda.is_available() or not is_served(device):
        return "attention in blocks"
    return "torch's flash attention" if has_torch_kernel() else "flash-attn" if has_package() else "attention in blocks"


def is_served(device: torch.device) -> bool:
    """Whether the device is a GPU for which flash attention is written."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY
    )


def has_torch_kernel() -> bool:
    """Whether this torch was built with flash attention."""
    return bool(torch.backends.cuda.is_flash_attention_available())


@cache
def has_package() -> bool:
    """Whether flash-attn is installed, which knows slopes; torch's kernel does not."""
    return importlib.util.find_spec("flash_attn") is not None


def reach(causal: bool, window: int | None) -> tuple[int, int]:
    """How many keys before and after its own place a query sees, -1 being all; see `attend`."""
    if causal:
        return -1 if window is None else window - 1, 0
    return (-1, -1) if window is None else (window // 2, window // 2)


def _by_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Sequences,
    keys: Sequences,
    seen: tuple[int, int],
    scale: float,
) -> Tensor:
    """Source: https://docs.pytorch.org/docs/stable/nn.attention.varlen.html."""
    from torch.nn.attention.varlen import varlen_attn

    output = varlen_attn(
        query,
        key,
        value,
        ragged.bounds(queries, query.device, torch.int32),
        ragged.bounds(keys, query.device, torch.int32),
        queries.max_length,
        keys.max_length,
        scale=scale,
        window_size=seen,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor), "one tensor where no sums of rows are asked for"
    return output


def _by_package(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Sequences,
    keys: Sequences,
    seen: tuple[int, int],
    slopes: tuple[float, ...] | None,
    scale: float,
) -> Tensor:
    """Source: https://github.com/Dao-AILab/flash-attention, `flash_attn_varlen_func`, version 2.4 or later."""
    from flash_attn import flash_attn_varlen_func

    output: Tensor = flash_attn_varlen_func(
        query,
        key,
        value,
        ragged.bounds(queries, query.device, torch.int32),
        ragged.bounds(keys, query.device, torch.int32),
        queries.max_length,
        keys.max_length,
        softmax_scale=scale,
        causal=seen[1] == 0,
        window_size=seen,
        alibi_slopes=None if slopes is None else _lean(queries, slopes, query.device),
    )
    return output


def _lean(queries: Sequences, slopes: tuple[float, ...], device: torch.device) -> Tensor:
    """float32 `(h,)`, made once for all layers."""
    return ragged.derived(queries, f"slopes {slopes}", device, lambda: torch.tensor(slopes, dtype=torch.float32))


def _side_by_side(states: Tensor) -> Tensor:
    """`(n, heads, k)` whose channels are next to one another."""
    return states if states.stride(-1) == 1 else states.contiguous()
