"""Muon with its Newton-Schulz iterations done for all matrices of a shape at once.

Small matrices are bound by calls, not by arithmetic: a model of 12 layers makes 4 stacks of them where torch makes 48.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from isoform.checkpoints.shards import spread_like, whole

# Of the quintic a x + b x^3 + c x^5 that draws singular values towards 1; Jordan et al. 2024.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
LEAST_NORM = 1e-7


class StackedMuon(torch.optim.Muon):
    """`torch.optim.Muon`, equal to it up to rounding, in stacks of matrices of equal shape.

    m = momentum m + (1 - momentum) g;  u = orthogonal(g + momentum (m - g));  w = (1 - lr decay) w - lr adjust u

    g, m, w: `(rows, columns)`. dtype: of the iterations; bfloat16 where the machine multiplies it fast.
    Source: Jordan et al. 2024; `torch.optim.Muon`. Differs: nothing but the order of work.
    """

    def __init__(self, params: Iterable[dict[str, Any]], *, dtype: torch.dtype, **options: Any) -> None:
        super().__init__(params, **options)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None, "no closure is taken"
        for group in self.param_groups:
            stacks: dict[tuple[int, ...], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    stacks.setdefault(tuple(sorted(parameter.shape)), []).append(parameter)
            for parameters in stacks.values():
                self._update(parameters, group)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """parameters: of one shape, or of its transpose."""
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        buffers = [self._buffer(parameter) for parameter in parameters]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        wanted = torch._foreach_lerp(grads, buffers, group["momentum"]) if group["nesterov"] else buffers
        wanted = [whole(u) for u in wanted]
        flat = torch.stack([u if u.shape[0] <= u.shape[1] else u.T for u in wanted]).to(self.dtype)
        flat = orthogonal(flat, group["ns_steps"])  # (matrices, rows, columns), rows <= columns
        for parameter, update in zip(parameters, flat, strict=True):
            rate = group["lr"] * _adjust(group["adjust_lr_fn"], *parameter.shape)
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            turned = update if parameter.shape[0] <= parameter.shape[1] else update.T
            parameter.add_(spread_like(turned, parameter), alpha=-rate)

    def _buffer(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: Tensor = state["momentum_buffer"]
        return buffer


def orthogonal(stack: Tensor, iterations: int) -> Tensor:
    """Newton-Schulz: each matrix with its singular values drawn to about 1.  `(z, rows, columns)`, rows <= columns.

    x = x / |x|;  iterations times:  s = x x^T;  x = a x + (b s + c s s) x
    """
    a, b, c = COEFFICIENTS
    x: Tensor = stack / torch.linalg.vector_norm(stack, dim=(1, 2), keepdim=True).clamp(min=LEAST_NORM)
    for _ in range(iterations):
        square = x @ x.mT  # (z, rows, rows)
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x


def _adjust(rule: str, rows: int, columns: int) -> float:
    """`original`: sqrt(max(1, rows / columns)); `match_rms_adamw`: 0.2 sqrt(max(rows, columns))."""
    if rule == "original":
        return math.sqrt(max(1.0, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))
