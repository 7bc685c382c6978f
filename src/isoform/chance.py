"""Chance as a pure function: every random choice is keyed by what it is for, never by when it is drawn.

    generator(seed, "corruption", epoch, sample_id)    numpy generator, Philox keyed by a hash of its arguments
    key64(seed, step)                                  the same hash as an integer, for counter-based dropout

So the order of workers, ranks, micro-batches and resumes cannot change a draw.
"""

from __future__ import annotations

import hashlib

import numpy as np


def key64(*parts: int | str) -> int:
    """A signed 64-bit hash of the parts; equal parts, equal key, on every machine."""
    text = "\x1f".join(f"{type(part).__name__[0]}{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def generator(*parts: int | str) -> np.random.Generator:
    """A numpy generator whose stream depends on `parts` alone (Philox-4x64; Salmon et al. 2011)."""
    return np.random.Generator(np.random.Philox(key=key64(*parts) & 0xFFFF_FFFF_FFFF_FFFF))
