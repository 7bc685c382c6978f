"""Normalisation over the width: LayerNorm and RMSNorm.

A norm whose output goes into projections alone is `narrow`: under autocast it comes in the precision that they take.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from isoform.layers import fused
from isoform.registry import Options, register


@register("norm", "layernorm")
class LayerNorm(nn.Module):
    """Zero mean and unit variance over the width, then a learned scale and shift.

    y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias

    Shapes: x `(..., d)`, weight and bias `(d,)`, y `(..., d)`.
    Source: Ba, Kiros & Hinton 2016. Differs: nothing; `bias: false` leaves the shift out.
    """

    class Config(Options):
        eps: float = Field(1e-5, gt=0)
        bias: bool = True

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        self.eps, self.narrow = config.eps, False
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if config.bias else None

    def forward(self, hidden: Tensor) -> Tensor:
        fast = fused.norm(hidden, self.weight, self.bias, self.eps, centred=True, narrow=self.narrow)
        return F.layer_norm(hidden, self.weight.shape, self.weight, self.bias, self.eps) if fast is None else fast


@register("norm", "rmsnorm")
class RMSNorm(nn.Module):
    """Unit root mean square over the width, then a learned scale.

    y = x / sqrt(mean(x^2) + eps) * weight

    Shapes: x `(..., d)`, weight `(d,)`, y `(..., d)`.
    Source: Zhang & Sennrich 2019. Differs: nothing; the mean of squares is taken in float32 whatever x is.
    """

    class Config(Options):
        eps: float = Field(1e-6, gt=0)

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        self.eps, self.narrow = config.eps, False
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, hidden: Tensor) -> Tensor:
        fast = fused.norm(hidden, self.weight, None, self.eps, centred=False, narrow=self.narrow)
        return F.rms_norm(hidden, self.weight.shape, self.weight, self.eps) if fast is None else fast
