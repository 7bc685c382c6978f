"""Where every parameter's first value comes from."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from isoform.chance import key64
from isoform.layers import fused


class Linear(nn.Linear):
    """torch's linear layer. The gradient of its bias is faster where there are kernels; in inference mode the weight is
    converted to the precision of autocast once, not at every call.

    Shapes: hidden `(..., inputs)`, weight `(outputs, inputs)`, bias `(outputs,)` or None -> `(..., outputs)`.
    """

    _converted: tuple[Tensor, int, Tensor] | None = None
    # the weight, the version of its values, and these in another precision

    def forward(self, hidden: Tensor) -> Tensor:
        kind = hidden.device.type
        if torch.is_inference_mode_enabled() and torch.is_autocast_enabled(kind) and not self.weight.is_inference():
            return F.linear(hidden, self._in(torch.get_autocast_dtype(kind)), self.bias)
        return fused.linear(hidden, self.weight, self.bias)

    def _in(self, dtype: torch.dtype) -> Tensor:
        """The weight in `dtype`, made again where it has changed."""
        weight, version = self.weight, self.weight._version
        kept = self._converted
        # The tensor that was converted is kept with it, so that no other can stand at its address.
        fresh = kept is not None and kept[0].data_ptr() == weight.data_ptr() and kept[1] == version
        if kept is None or not fresh or kept[2].dtype != dtype:
            kept = self._converted = weight.detach(), version, weight.detach().to(dtype)
        return kept[2]


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
