"""Blocks that keep their inputs alone and make their inner states again in the backward pass, where memory is short."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from isoform.errors import ConfigError
from isoform.layers.position import RelativeBias


class Recomputable(nn.Module):
    """A block that may be `recomputed`: a third more work, and of its states only the inputs are kept.

    Dropout is a function of its keys, so that the second pass drops what the first one dropped.
    Source: Chen et al. 2016. Differs: nothing.
    """

    recomputed: bool = False

    def __call__(self, *inputs: Any) -> Any:
        if self.recomputed and torch.is_grad_enabled():
            return checkpoint(super().__call__, *inputs, use_reentrant=False, preserve_rng_state=False)
        return super().__call__(*inputs)


def recompute_blocks(model: nn.Module, family_name: str) -> None:
    """Has the blocks recomputed. Raises: ConfigError where blocks share states that they make on the way."""
    if any(isinstance(part, RelativeBias) for part in model.modules()):
        raise ConfigError(
            f"train.recompute: the blocks of this {family_name} share learned scores that are made once a pass; "
            "leave the option out, or lower train.micro_batch_tokens for less memory"
        )
    for part in model.modules():
        if isinstance(part, Recomputable):
            part.recomputed = True
