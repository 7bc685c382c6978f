"""Where every parameter's first value comes from."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from isoform.chance import key64
from isoform.layers import fused


class Linear(nn.Linear):
    """torch's linear layer. The gradient of its bias is faster where there are kernels.

    converted: of a layer that `served` made, its weight in each precision that autocast has asked for.

    Shapes: hidden `(..., inputs)`, weight `(outputs, inputs)`, bias `(outputs,)` or None -> `(..., outputs)`.
    """

    converted: dict[torch.dtype, Tensor] | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        kind = hidden.device.type
        if self.converted is not None and torch.is_autocast_enabled(kind) and not torch.is_grad_enabled():
            dtype = torch.get_autocast_dtype(kind)
            if dtype not in self.converted:
                self.converted[dtype] = self.weight.detach().to(dtype)
            return fused.linear(hidden, self.converted[dtype], self.bias)
        return fused.linear(hidden, self.weight, self.bias)


def served(model: Any) -> Any:
    """The model for use alone: its linear layers convert their weights to the precision of autocast once, not at every
    call. It shares all parameters with the one given, and they may not change any more.
    """
    # Nothing tells of every change: a fused optimizer's step leaves the version of what it writes to as it was.
    shared = sharing(model)
    for layer in shared.modules():
        if isinstance(layer, Linear):
            layer.converted = {}
    return shared


def sharing(model: Any) -> Any:
    """A copy of the model with the same parameters, not equal ones."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def linear(inputs: int, outputs: int, *, bias: bool) -> Linear:
    """A linear layer whose values are not drawn yet: `initialize` draws them."""
    layer: Linear = skip_init(Linear, inputs, outputs, bias=bias)  # type: ignore[no-untyped-call]
    return layer


def embedding(rows: int, width: int) -> nn.Embedding:
    """A table whose values are not drawn yet: `initialize` draws them."""
    # Not by `skip_init`: a random draw on the meta device imports torch's compiler, which takes seconds.
    return nn.Embedding(rows, width, _weight=torch.empty(rows, width))


@torch.no_grad()
def initialize(model: nn.Module, seed: int, *, num_layers: int | None, std: float = 0.02) -> None:
    """Draws every parameter of the model, each from its own stream keyed by (seed, "init", its name).

    | parameter                                              | distribution                        |
    |--------------------------------------------------------|-------------------------------------|
    | vectors named `weight` (scales of norms)               | 1                                   |
    | vectors named `bias`                                   | 0                                   |
    | `output.weight`, `down.weight` (end of a residual arm) | N(0, (std / sqrt(2 num_layers))^2)  |
    | every other matrix (projections, tables, head)         | N(0, std^2)                         |

    num_layers: None where the ends of residual arms are like every other matrix (BERT).

    So a parameter of equal name and shape has equal values in every variant of a model, whatever else it contains.
    Source: Radford et al. 2019, section 2.3, and HF `GPT2PreTrainedModel._init_weights`. Differs: nothing.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            ends_arm = name.endswith(("output.weight", "down.weight"))
            scale = std / math.sqrt(2 * num_layers) if ends_arm and num_layers is not None else std
            parameter.copy_(normal(parameter.shape, seed, name) * scale)


def normal(shape: torch.Size, seed: int, name: str) -> Tensor:
    """Standard normal values, float32, that depend on the seed, the name and the shape alone."""
    generator = torch.Generator().manual_seed(key64(seed, "init", name) & 0x7FFF_FFFF_FFFF_FFFF)
    return torch.randn(shape, generator=generator)
