"""Tensors that are spread over the ranks of a run, of which each holds a part (FSDP2's `DTensor`).

What is spread tells so by itself; `torch.distributed.tensor` need not be imported to ask.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def is_spread(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The tensor as one; where it is spread, all ranks have to ask for it."""
    full: Tensor = tensor.full_tensor() if is_spread(tensor) else tensor  # type: ignore[attr-defined]
    return full


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of it."""
    part: Tensor = tensor.to_local() if is_spread(tensor) else tensor  # type: ignore[attr-defined]
    return part


def spread_like(tensor: Tensor, like: Any) -> Tensor:
    """A tensor that every rank has as one, spread as `like` is; where that is one too, as it is."""
    if not is_spread(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh = like.device_mesh
    return distribute_tensor(tensor.to(like.device, like.dtype), mesh, like.placements, src_data_rank=None)


def copy_into(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> None:
    """Gives each of `targets`, spread or not, the values that `sources` has under its name."""
    with torch.no_grad():
        for name, tensor in targets.items():
            tensor.copy_(spread_like(sources[name], tensor))


def gathered(states: Mapping[str, Mapping[str, Any]], keep: bool) -> dict[str, dict[str, Any]]:
    """An optimiser's state with whole tensors on the host. keep: on this rank; the others only help to make it."""
    found: dict[str, dict[str, Any]] = {}
    for name, values in states.items():
        found[name] = {}
        for key, value in values.items():
            one = whole(value).cpu() if isinstance(value, Tensor) else value
            if keep:
                found[name][key] = one
    return found
