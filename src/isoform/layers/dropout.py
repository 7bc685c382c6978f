"""Dropout as a pure function: whether an element falls out follows from what it is, not from when it is drawn.

    keep(element) = hash(dropout key of the step, sample, position in its sequence, site, channel) >= rate

so that micro-batches, ranks, the order of sequences and a resume cannot change a mask. A site is one `Dropout` module
of a model and is known by its name, so two variants of a model share the masks of the sites that they share.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from isoform.chance import key64
from isoform.contracts import Batch
from isoform.layers import ragged

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

    Shapes: hidden `(n, d)`, keys `(n,)` or None (then nothing happens).
    Source: Srivastava et al. 2014. Differs: the mask is keyed, see above; the rate is rounded to 1/65536, and the
    factor is that of the rounded rate.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.site = 0

    def forward(self, hidden: Tensor, keys: Tensor | None) -> Tensor:
        if keys is None or self.rate == 0:
            return hidden
        keep = keep_mask(mix64(keys ^ self.site), hidden.shape[-1], self.rate)
        return hidden * (keep * hidden.new_tensor(kept_inverse(self.rate)))

    def on_weights(self, keys: Tensor | None) -> DropoutSite | None:
        """The same site as `attend` takes it."""
        return None if keys is None or self.rate == 0 else DropoutSite(keys, self.site, self.rate)


def name_sites(model: nn.Module) -> None:
    """Numbers every dropout site of the model by its name."""
    for name, module in model.named_modules():
        if isinstance(module, Dropout):
            module.site = key64("dropout", name)
