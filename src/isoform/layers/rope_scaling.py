"""How RoPE is stretched past the length that a model was trained at: by changing its angles per position.

    theta_i = base^(-2i/r), i = 0 .. r/2 - 1       radians per position of the i-th pair of channels

A scaling maps theta `(r/2,)` to other angles; fast pairs, which turn many times within the trained length, keep
theirs, slow ones are divided by `factor`. Plain division of all is `scale` of the position itself.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from isoform.registry import Options


class Llama3(Options):
    """theta / factor where a turn is longer than L / low, theta where it is shorter than L / high, mixed between.

    share = (L theta / 2 pi - low) / (high - low), cut to 0 .. 1;  theta' = (1 - share) theta / factor + share theta

    L: `original_positions`; low, high: turns within L, `low_turns` and `high_turns`.
    Source: HF `_compute_llama3_parameters` (low_freq_factor, high_freq_factor). Differs: nothing.
    """

    kind: Literal["llama3"] = "llama3"
    factor: float = Field(8.0, ge=1)
    low_turns: float = Field(1.0, gt=0)
    high_turns: float = Field(4.0, gt=0)
    original_positions: int = Field(8192, gt=0)
    # tokens that the model was trained at before

    @property
    def amplitude(self) -> float:
        return 1.0

    def angles(self, theta: Tensor, base: float) -> Tensor:
        """`(r/2,)` -> `(r/2,)`."""
        turns = self.original_positions * theta / (2 * math.pi)
        share = ((turns - self.low_turns) / (self.high_turns - self.low_turns)).clamp(0, 1)
        return (1 - share) * theta / self.factor + share * theta


class Yarn(Options):
    """theta / factor for slow pairs, theta for fast ones, a ramp over the pairs' numbers between.

    pair(turns) = r ln(L / (2 pi turns)) / (2 ln base), the pair that turns so often within L
    share_i = 1 - (i - pair(fast)) / (pair(slow) - pair(fast)), cut to 0 .. 1;  theta' as in `Llama3`

    Cosines and sines are multiplied by `amplitude`, so that scores grow by its square.
    Source: Peng et al. 2023, sections 3.2 to 3.4; HF `_compute_yarn_parameters`. Differs: nothing.
    """

    kind: Literal["yarn"] = "yarn"
    factor: float = Field(4.0, ge=1)
    original_positions: int = Field(2048, gt=0)
    # tokens that the model was trained at before
    fast_turns: float = Field(32.0, gt=0)
    slow_turns: float = Field(1.0, gt=0)
    rounded: bool = True
    # whether the ramp begins and ends at whole numbers
    attention_factor: float | None = Field(None, gt=0)
    # null: 0.1 ln(factor) + 1

    @property
    def amplitude(self) -> float:
        return 0.1 * math.log(self.factor) + 1 if self.attention_factor is None else self.attention_factor

    def angles(self, theta: Tensor, base: float) -> Tensor:
        """`(r/2,)` -> `(r/2,)`."""
        channels = 2 * len(theta)

        def pair(turns: float) -> float:
            return channels * math.log(self.original_positions / (turns * 2 * math.pi)) / (2 * math.log(base))

        first, last = pair(self.fast_turns), pair(self.slow_turns)
        if self.rounded:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, channels - 1)
        ramp = (torch.arange(len(theta), device=theta.device) - first) / (last - first or 0.001)
        share = 1 - ramp.clamp(0, 1)
        return (1 - share) * theta / self.factor + share * theta


Scaling = Annotated[Llama3 | Yarn, Field(discriminator="kind")]
