"""The feed-forward layer of a block: plain, or gated.

plain   down(act(up(x)))              gelu, gelu-tanh, relu, relu-squared
gated   down(act(gate(x)) * up(x))    geglu, geglu-tanh, swiglu
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from isoform.layers import fused
from isoform.layers.init import linear
from isoform.registry import Options, register


class Plain(nn.Module):
    """down(act(up(x))).

    Shapes: x `(n, d)`, up `(f, d)`, down `(d, f)`. Source: Vaswani et al. 2017, section 3.3. Differs: the activation.
    """

    class Config(Options):
        pass

    gated: ClassVar[bool] = False

    def __init__(self, config: Options, width: int, inner_width: int, *, bias: bool) -> None:
        super().__init__()
        self.up = linear(width, inner_width, bias=bias)
        self.down = linear(inner_width, width, bias=bias)

    @staticmethod
    def activation(hidden: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.down(self.activation(self.up(hidden)))
        return output


class Gated(nn.Module):
    """down(act(gate(x)) * up(x)).

    Shapes: x `(n, d)`, gate and up `(f, d)`, down `(d, f)`. Source: Shazeer 2020. Differs: nothing; the inner width is
    what the config says (a gated layer of width 2f/3 has as many parameters as a plain one of width f).
    """

    class Config(Options):
        pass

    gated: ClassVar[bool] = True
    fused: ClassVar[str | None] = None
    # the kernel that has this activation

    def __init__(self, config: Options, width: int, inner_width: int, *, bias: bool) -> None:
        super().__init__()
        self.gate = linear(width, inner_width, bias=bias)
        self.up = linear(width, inner_width, bias=bias)
        self.down = linear(inner_width, width, bias=bias)

    @staticmethod
    def activation(hidden: Tensor) -> Tensor:
        raise NotImplementedError

    @classmethod
    def gated_by(cls, gate: Tensor, up: Tensor) -> Tensor:
        """act(gate) * up, in one pass where a kernel has it."""
        fast = None if cls.fused is None else fused.gated(cls.fused, gate, up)
        return cls.activation(gate) * up if fast is None else fast

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.down(self.gated_by(self.gate(hidden), self.up(hidden)))
        return output


@register("feedforward", "gelu")
class Gelu(Plain):
    """act(x) = x Phi(x), exact. Source: Hendrycks & Gimpel 2016."""

    @staticmethod
    def activation(hidden: Tensor) -> Tensor:
        fast = fused.activated("gelu", hidden)
        return F.gelu(hidden) if fast is None else fast


@register("feedforward", "gelu-tanh")
class GeluTanh(Plain):
    """act(x) = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), GPT-2's own form. Source: HF `gelu_new`."""

    @staticmethod
    def activation(hidden: Tensor) -> Tensor:
        fast = fused.activated("gelu_tanh", hidden)
        return F.gelu(hidden, approximate="tanh") if fast is None else fast


@register("feedforward", "relu")
class Relu(Plain):
    """act(x) = max(x, 0)."""

    @staticmethod
    def activation(hidden: Tensor) -> Tensor:
        return F.relu(hidden)


@register("feedforward", "relu-squared")
class ReluSquared(Plain):
    """act(x) = max(x, 0)^2. Source: So et al. 2021 (Primer)."""

    @staticmethod
    def activation(hidden: Tensor) -> Tensor:
        return F.relu(hidden).square()


@register("feedforward", "geglu")
class Geglu(Gated):
    """act(x) = x Phi(x) on the gate. Source: Shazeer 2020."""

    fused = "gelu"

    @staticmethod
    def activation(hidden: Tensor) -> Tensor:
        return F.gelu(hidden)


@register("feedforward", "geglu-tanh")
class GegluTanh(Gated):
    """act(x) as in `gelu-tanh` on the gate: T5 v1.1's own form. Source: HF `gated-gelu` with `gelu_new`."""

    fused = "gelu_tanh"

    @staticmethod
    def activation(hidden: Tensor) -> Tensor:
        return F.gelu(hidden, approximate="tanh")


@register("feedforward", "swiglu")
class Swiglu(Gated):
    """act(x) = x sigmoid(x) on the gate. Source: Shazeer 2020."""

    fused = "silu"

    @staticmethod
    def activation(hidden: Tensor) -> Tensor:
        return F.silu(hidden)
