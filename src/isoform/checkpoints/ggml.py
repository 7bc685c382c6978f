"""How ggml packs numbers: rows of blocks of 32, each block with its own scale.

    Q8_0   scale d                y = d q                    q in -128 .. 127, one byte each
    Q4_0   scale d                y = d (q - 8)              q in 0 .. 15, two a byte: the first 16, then the last 16
    Q4_1   scale d, minimum m     y = d q + m                q as in Q4_0

d and m are float16. F32, F16 and BF16 are not packed.
Source: ggml-quants.c of ggml; the `gguf` package's `quants`, with which every number agrees bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from isoform.errors import CheckpointError

Bytes = npt.NDArray[np.uint8]
Singles = npt.NDArray[np.float32]

BLOCK = 32


def _q8_0(blocks: Bytes) -> Singles:
    """`(blocks, 34)` -> `(blocks, 32)`."""
    return _half(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _q4_0(blocks: Bytes) -> Singles:
    """`(blocks, 18)` -> `(blocks, 32)`."""
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]) - np.float32(8))


def _q4_1(blocks: Bytes) -> Singles:
    """`(blocks, 20)` -> `(blocks, 32)`."""
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]) + _half(blocks, 2)


def _half(blocks: Bytes, start: int) -> Singles:
    """A float16 of each block, `(blocks, 1)`."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view(np.float16).astype(np.float32)


def _nibbles(packed: Bytes) -> Singles:
    """`(blocks, 16)` bytes -> `(blocks, 32)` numbers from 0 to 15: the low halves, then the high halves."""
    return np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float32)


def _bf16(data: Bytes) -> Singles:
    return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


# Kind -> (bytes of a block, what makes numbers of blocks).
PACKED: dict[str, tuple[int, Callable[[Bytes], Singles]]] = {
    "Q8_0": (34, _q8_0),
    "Q4_0": (18, _q4_0),
    "Q4_1": (20, _q4_1),
}
PLAIN: dict[str, Callable[[Bytes], Singles]] = {
    "F32": lambda data: data.view(np.float32),
    "F16": lambda data: data.view(np.float16).astype(np.float32),
    "BF16": _bf16,
}
KINDS = (*PACKED, *PLAIN)


def unpack(data: npt.NDArray[Any], kind: str, shape: tuple[int, ...], name: str) -> Singles:
    """The float32 numbers of a tensor. Raises: CheckpointError where the kind is not read or the bytes do not fit.

    data: the tensor's bytes as they stand in the file; shape: rows first, as torch has it.
    """
    raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    if kind in PLAIN:
        numbers = PLAIN[kind](raw)
    elif kind in PACKED:
        width, unpacked = PACKED[kind]
        numbers = unpacked(raw.reshape(-1, width)).reshape(-1)
    else:
        raise CheckpointError(
            f"{name}: packed as {kind}, which is not read; read are {', '.join(KINDS)}: take a file of one of these, "
            "or make one with `llama-quantize --allow-requantize FILE OUT Q8_0`"
        )
    if numbers.size != int(np.prod(shape)):
        raise CheckpointError(f"{name}: {numbers.size} numbers in the file, {int(np.prod(shape))} are expected")
    return numbers.reshape(shape)
