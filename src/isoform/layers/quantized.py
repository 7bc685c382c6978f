"""Linear layers in int8: a quarter of the bytes of float32, at some cost in accuracy.

    y = s_x s_w (q_x . q_w) + bias        q_w = round(w / s_w), s_w = max |w| / 127 of each output channel

Activations get their scale at every pass, s_x of each row: in 15 bits where there are C++ kernels, otherwise in 8 bits,
s_x = max |x| / 127, by torch's integer product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from isoform.layers import kernels
from isoform.layers.decoding import Packed
from isoform.layers.init import sharing
from isoform.layers.lora import LowRankLinear

# Fewer are refused by CUDA's integer product.
LEAST_ROWS = 17


class Int8Linear(nn.Module):
    """A linear layer whose weights are int8; it learns nothing.

    Shapes: hidden `(..., inputs)` -> `(..., outputs)` in the precision of hidden, or of autocast. Source: symmetric
    dynamic quantisation as in torch's `quantize_dynamic`. Differs: activations have a scale for each row.
    """

    weight: Tensor
    scales: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = (linear.merged() if isinstance(linear, LowRankLinear) else linear.weight).detach().float()
        library = kernels.serves(weight)
        self.packed = None if library is None else Packed(library, weight, linear.bias, "int8")
        if self.packed is not None:
            return
        scales = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        self.register_buffer("weight", (weight / scales[:, None]).round().to(torch.int8), persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        self.bias = None if linear.bias is None else linear.bias.detach().float()

    def forward(self, hidden: Tensor) -> Tensor:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        rows = hidden.reshape(-1, self.in_features)
        if self.packed is not None:
            return self.packed(rows).to(dtype).view(*hidden.shape[:-1], self.out_features)
        scale = rows.abs().amax(dim=1, keepdim=True).float().clamp(min=torch.finfo(torch.float32).tiny) / 127
        few = max(0, LEAST_ROWS - len(rows))
        codes = nn.functional.pad((rows / scale).round().to(torch.int8), (0, 0, 0, few))
        whole = torch._int_mm(codes, self.weight.t())[: len(rows)]
        output = whole.float() * scale * self.scales
        if self.bias is not None:
            output = output + self.bias
        return output.to(dtype).view(*hidden.shape[:-1], self.out_features)


def in_int8(model: Any) -> Any:
    """The model with the linear layers of its blocks in int8; it shares everything else with the one given.

    The model itself where there are none, such as one that is in int8 already.
    """
    # A router and the head are read as matrices, not called.
    found = [
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and "blocks." in name and not name.endswith(".router")
    ]
    if not found:
        return model
    quantized = sharing(model)
    for name, layer in found:
        owner, _, leaf = name.rpartition(".")
        setattr(quantized.get_submodule(owner), leaf, Int8Linear(layer))
    return quantized
