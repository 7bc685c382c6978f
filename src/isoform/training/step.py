"""One optimiser update: token-true accumulation over micro-batches and ranks.

    gradient = d/dw  sum over parts of weight x (total over all micro-batches and ranks) / (count over the same)

The counts are known before the first backward pass, so no micro-batch is ever averaged on its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from isoform.contracts import Batch, LossPart, Model, Objective


class LossModule(nn.Module):
    """Model and objective as one module, so that a distributed wrapper sees every use of every parameter."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        helper = objective.helper
        self.companion = None if helper is None else helper.companion
        self._all_layers = helper is not None and helper.reads_layers
        self._objective = (objective,)  # a tuple, so that torch does not take it for a sub-module

    def forward(self, batch: Batch) -> dict[str, LossPart]:
        model: Model = self.model  # type: ignore[assignment]
        return self._objective[0].loss(model, batch, model(batch, all_layers=self._all_layers))


def trained_parameters(model: nn.Module, objective: Objective) -> dict[str, nn.Parameter]:
    """What the optimiser changes, by name: the model's parameters that are not frozen, and those of its companion."""
    named = list(model.named_parameters())
    if objective.helper is not None and objective.helper.companion is not None:
        named += objective.helper.companion.named_parameters(prefix="objective")
    return {name: parameter for name, parameter in named if parameter.requires_grad}


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """bf16 or fp16 compute with fp32 master weights, or nothing."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.float16 if precision == "fp16" else torch.bfloat16)


def accumulate(
    module: nn.Module,
    batches: list[Batch],
    counts: dict[str, float],
    *,
    precision: str,
    device: torch.device,
    world: int = 1,
    no_sync: Callable[[nn.Module], AbstractContextManager[Any]] = lambda module: contextlib.nullcontext(),
    after: Callable[[], None] = lambda: None,
    backward: Callable[[Tensor], object] = Tensor.backward,
) -> dict[str, float]:
    """Adds the gradient of one global step to the parameters; returns each part's total over this rank.

    counts: each part's global count. world: the wrapper averages gradients over ranks, so sums are scaled by it.
    after: called after each micro-batch. backward: what is done with its loss, where gradients are scaled.
    """
    totals: dict[str, float] = {}
    sums: list[tuple[list[str], Tensor]] = []
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        with contextlib.nullcontext() if last else no_sync(module):
            with autocast(precision, device):
                parts: dict[str, LossPart] = module(batch.to(device))
            loss: Tensor = sum(
                (
                    part.total * (part.weight * world / max(1.0, counts[name]))
                    for name, part in parts.items()
                    if not name.startswith("_")
                ),
                start=torch.zeros((), device=device),
            )
            backward(loss)
        sums.append((list(parts), torch.stack([part.total.detach().to(loss.dtype) for part in parts.values()])))
        after()
    for names, values in sums:  # read at the end, for which alone the host waits
        for name, value in zip(names, values.tolist(), strict=True):
            totals[name] = totals.get(name, 0.0) + value
    return totals


def set_rates(optimizers: list[torch.optim.Optimizer], factor: float) -> float:
    """Sets every group's rate to its peak times `factor`; returns the first group's."""
    rates = []
    for group in parameter_groups(optimizers):
        group["lr"] = group["peak_rate"] * factor
        rates.append(group["lr"])
    return float(rates[0])


def parameter_groups(optimizers: list[torch.optim.Optimizer]) -> Iterator[dict[str, Any]]:
    for optimizer in optimizers:
        yield from optimizer.param_groups
