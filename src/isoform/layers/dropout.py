"""Dropout as a pure function: whether an element falls out follows from what it is, not from when it is drawn.

    keep(element) = hash(dropout key of the step, sample, position in its sequence, site, channel) >= rate

so that micro-batches, ranks, the order of sequences and a resume cannot change a mask. A site is one `Dropout` module
of a model and is known by its name, so two variants of a model share the masks of the sites that they share.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from isoform.chance import key64
from isoform.contracts import Batch
from isoform.layers import ragged
from isoform.layers.apart import apart
from isoform.layers.kernels import Library, serves

# Constants of splitmix64 (Steele, Lea & Flood 2014) as signed integers.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64
_MIX_32 = 0x7FEB352D  # of the 32-bit mixer found by Wellons' search (lowbias32)


def mix64(keys: Tensor) -> Tensor:
    """The finaliser of splitmix64: a bijection of int64 in which every bit in decides every bit out."""
    keys = (keys ^ ((keys >> 30) & (2**34 - 1))) * _MIX_1
    keys = (keys ^ ((keys >> 27) & (2**37 - 1))) * _MIX_2
    return keys ^ ((keys >> 31) & (2**33 - 1))


def token_keys(batch: Batch) -> Tensor | None:
    """int64 `(n,)`: a hash of (dropout key, sample, position in its sequence), or None: no dropout."""
    if batch.dropout_key is None:
        return None
    samples = mix64(mix64(batch.sample_keys) ^ batch.dropout_key)
    rows = ragged.rows(batch.sequences, batch.tokens.device)
    return mix64(samples[rows] + (batch.positions + 1) * _GOLDEN)


def keep_mask(keys: Tensor, columns: int, rate: float) -> Tensor:
    """bool `(..., columns)`, True where an element stays; keys int64 `(...)`, one a row.

    bits = mix32((low(key) xor hash(column pair)) * (high(key) | 1)), 16 of the 32 for each column of the pair.
    """
    column = column_hashes(columns, keys.device)
    low = keys.to(torch.int32).unsqueeze(-1)
    high = (keys >> 32).to(torch.int32).unsqueeze(-1) | 1
    bits = (low ^ column).mul_(high)
    bits ^= (bits >> 15) & (2**17 - 1)  # the shift of a signed integer repeats the sign; the mask undoes that
    bits *= _MIX_32
    bits ^= (bits >> 16) & (2**16 - 1)
    lanes = bits.view(torch.int16)
    return (lanes >= drop_threshold(rate))[..., :columns]


def column_hashes(columns: int, device: torch.device) -> Tensor:
    """int32 `(columns / 2,)`, rounded up: the hash of each pair of columns."""
    return mix64(torch.arange(1, (columns + 1) // 2 + 1, device=device) * _GOLDEN).to(torch.int32)


def drop_threshold(rate: float) -> int:
    """The 16-bit number below which an element falls out."""
    return min(round(rate * 65_536), 65_535) - 32_768


def kept_inverse(rate: float) -> float:
    """1 / (the exact probability of staying), by which what stays is multiplied."""
    return 65_536 / (32_768 - drop_threshold(rate))


@dataclass(frozen=True, slots=True)
class DropoutSite:
    """Dropout of attention weights: `keys (n,)` of the query tokens, the site's number and its rate."""

    keys: Tensor
    site: int
    rate: float

    def row_keys(self, num_heads: int) -> Tensor:
        """int64 `(n, h)`: one key for each query token and head."""
        heads = torch.arange(1, num_heads + 1, device=self.keys.device) * _GOLDEN
        return mix64((self.keys ^ self.site)[:, None] + heads)


class Dropout(nn.Module):
    """Zeroes elements with probability `rate` and multiplies the rest by 1 / (1 - rate).

    Shapes: hidden `(n, d)`, keys `(n,)` or None (then nothing falls out).
    Source: Srivastava et al. 2014. Differs: the mask is keyed, see above; the rate is rounded to 1/65536, and the
    factor is that of the rounded rate.
    """

    site_key: Tensor

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.site = 0
        # The same as a tensor: compiled code is made anew for another number.
        self.register_buffer("site_key", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, hidden: Tensor, keys: Tensor | None, onto: Tensor | None = None) -> Tensor:
        """onto: of the shape of hidden, to which what stays is added."""
        if keys is None or self.rate == 0:
            return hidden if onto is None else _summed(hidden, onto)
        if not torch.compiler.is_compiling():
            fast = _in_one_pass(hidden, onto, keys, self.site, self.rate)
            if fast is not None:
                return fast
        keep = keep_mask(mix64(keys ^ self.site_key), hidden.shape[-1], self.rate)
        kept = hidden * (keep * hidden.new_tensor(kept_inverse(self.rate)))
        return kept if onto is None else onto + kept

    @apart
    def on_weights(self, keys: Tensor | None) -> DropoutSite | None:
        """The same site as `attend` takes it."""
        return None if keys is None or self.rate == 0 else DropoutSite(keys, self.site, self.rate)


# ---------------------------------------------------------------------------------------------------------- the kernel


def _summed(hidden: Tensor, onto: Tensor) -> Tensor:
    """onto + hidden; of two types torch would convert one first, in a pass of its own."""
    if hidden.dtype != onto.dtype and hidden.ndim > 1 and not torch.compiler.is_compiling():
        fast = _in_one_pass(hidden, onto, None, 0, 0.0)
        if fast is not None:
            return fast
    return onto + hidden


def _in_one_pass(hidden: Tensor, onto: Tensor | None, keys: Tensor | None, site: int, rate: float) -> Tensor | None:
    """What `Dropout` makes, by the C++ kernel where it serves; both passes make the mask from the keys again.

    keys: None where all stays.
    """
    library = serves(hidden, onto, keys)
    dtype = hidden.dtype if onto is None else torch.promote_types(hidden.dtype, onto.dtype)
    if library is None or not hidden.is_floating_point() or (keys is not None and hidden.shape[:-1] != keys.shape):
        return None
    if onto is not None and (onto.dtype != dtype or onto.shape != hidden.shape):
        return None
    output: Tensor = _Drop.apply(hidden, onto, keys, site, rate, dtype, library)  # type: ignore[no-untyped-call]
    return output


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        onto: Tensor | None,
        keys: Tensor | None,
        site: int,
        rate: float,
        dtype: torch.dtype,
        library: Library,
    ) -> Tensor:
        ctx.save_for_backward(keys)
        ctx.dtype, ctx.site, ctx.rate, ctx.library = hidden.dtype, site, rate, library
        return _kept(hidden, onto, keys, site, rate, dtype, library)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (keys,) = ctx.saved_tensors
        dhidden = _kept(grad, None, keys, ctx.site, ctx.rate, ctx.dtype, ctx.library)
        return dhidden, grad if ctx.needs_input_grad[1] else None, *(None,) * 5


def _kept(
    hidden: Tensor,
    onto: Tensor | None,
    keys: Tensor | None,
    site: int,
    rate: float,
    dtype: torch.dtype,
    library: Library,
) -> Tensor:
    """onto + hidden keep factor, in `dtype`."""
    hidden, onto = hidden.contiguous(), None if onto is None else onto.contiguous()
    output = torch.empty(hidden.shape, dtype=dtype)
    d = hidden.shape[-1]
    masked = (None, 0, None) if keys is None else (keys.contiguous(), site, hashes_on_cpu(d))
    how = (hidden.numel() // max(1, d), d, drop_threshold(rate), kept_inverse(rate), torch.get_num_threads())
    library.call("drop", (hidden.dtype, dtype), hidden, onto, output, *masked, *how)
    return output


@lru_cache(maxsize=64)
def hashes_on_cpu(columns: int) -> Tensor:
    """`column_hashes` as the kernels read them."""
    return column_hashes(columns, torch.device("cpu"))


# --------------------------------------------------------------------------------------------------------------- sites


def name_sites(model: nn.Module) -> None:
    """Numbers every dropout site of the model by its name."""
    for name, module in model.named_modules():
        if isinstance(module, Dropout):
            module.site = key64("dropout", name)
            module.site_key.fill_(module.site)
