"""Blocks compiled by `torch.compile`, one after the other: what is made for the first serves all that are like it.

Sizes are symbols in it, so that another number of tokens does not have it made anew; attention stays apart.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

import torch
from torch import nn

from isoform.layers.apart import keep_apart
from isoform.layers.kernels import compiler
from isoform.layers.recompute import Recomputable


def compile_blocks(model: nn.Module) -> None:
    """Has the blocks compiled at their first use; parameters keep their names."""
    keep_apart()
    for part in blocks(model):
        if part._compiled_call_impl is None:
            part.compile(dynamic=True)


def uncompile_blocks(model: nn.Module) -> None:
    """The blocks as they were before `compile_blocks`."""
    for part in blocks(model):
        part._compiled_call_impl = None


def blocks(model: nn.Module) -> list[Recomputable]:
    return [part for part in model.modules() if isinstance(part, Recomputable)]


def is_compiled(model: nn.Module) -> bool:
    return any(part._compiled_call_impl is not None for part in blocks(model))


def plainly(model: nn.Module) -> AbstractContextManager[object]:
    """Within it nothing is compiled: evaluation comes in another mode and in other sizes, too seldom to be worth it."""
    return torch.compiler.set_stance("force_eager") if is_compiled(model) else nullcontext()


def missing(device: torch.device) -> str | None:
    """What the compiler lacks for such a device; None: nothing."""
    if device.type == "cpu":
        return None if compiler() else "no C++ compiler was found"
    if device.type == "cuda":
        return None if find_spec("triton") else "triton is not installed"
    return f"it is for processors and CUDA GPUs, this runs on {device.type}"
