"""The dense call that people know, as a thin border around the ragged one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from isoform.contracts import Batch, Sequences


def dense_logits(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
) -> Tensor:
    """The call that people know: padded ids, mask and types `(b, t)` -> logits `(b, t, v)`, zero at padding."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    real = mask.bool()
    batch = Batch(
        tokens=input_ids[real],
        positions=(real.cumsum(dim=1) - 1)[real],
        sequences=Sequences(real.sum(dim=1).tolist()),
        sample_keys=torch.arange(len(input_ids), device=input_ids.device),
        segments=None if token_type_ids is None else token_type_ids[real],
    )
    logits: Tensor = model.logits(model(batch).hidden)
    return logits.new_zeros(*input_ids.shape, logits.shape[-1]).masked_scatter(real[..., None], logits)
