"""An optimiser's state by parameter name, so that the order of parameters may change between save and load."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from isoform.checkpoints.shards import spread_like
from isoform.errors import CheckpointError

# What each optimiser keeps for a parameter, to tell a state of another optimiser before the first step is taken.
_KEEPS = {
    "AdamW": {"step", "exp_avg", "exp_avg_sq"},
    "Muon": {"momentum_buffer"},
    "StackedMuon": {"momentum_buffer"},
}

Optimizers = Any | Sequence[Any]
NamedParameters = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]


def optimizer_state_by_name(optimizers: Optimizers, named_parameters: NamedParameters) -> dict[str, dict[str, Any]]:
    """Parameter name -> state name -> tensor or number, over one optimiser or several that share the parameters.

    A parameter without state (before the first step) has an empty entry, so that the names are always complete.
    """
    names = _names(named_parameters)
    return {
        names[id(parameter)]: dict(optimizer.state.get(parameter, {})) for optimizer, _, parameter in _each(optimizers)
    }


def restore_optimizer(
    optimizers: Optimizers, named_parameters: NamedParameters, saved: Mapping[str, Mapping[str, Any]]
) -> None:
    """Gives each parameter its saved state, whatever order they stand in.

    Raises: CheckpointError that lists parameters which only one side has, or whose state is another optimiser's or of
    another shape; nothing is changed then.
    """
    names = _names(named_parameters)
    placed = [(optimizer, group, parameter, names[id(parameter)]) for optimizer, group, parameter in _each(optimizers)]
    ours = {name for *_, name in placed}
    missing, extra = sorted(ours - saved.keys()), sorted(saved.keys() - ours)
    if missing or extra:
        raise CheckpointError(
            "the saved optimiser state is of other parameters: "
            f"{len(missing)} missing in it: {', '.join(missing[:5]) or 'none'}; "
            f"{len(extra)} unknown here: {', '.join(extra[:5]) or 'none'}"
        )
    for optimizer, _, parameter, name in placed:
        _check(type(optimizer).__name__, name, parameter, saved[name])
    for optimizer, group, parameter, name in placed:
        if saved[name]:
            optimizer.state[parameter] = {
                key: _place(key, value, parameter, group) for key, value in saved[name].items()
            }


def _names(named_parameters: NamedParameters) -> dict[int, str]:
    pairs = named_parameters.items() if isinstance(named_parameters, Mapping) else named_parameters
    return {id(parameter): name for name, parameter in pairs}


def _each(optimizers: Optimizers) -> Iterator[tuple[torch.optim.Optimizer, dict[str, Any], Tensor]]:
    """Optimiser, group and parameter, through wrappers (Accelerate's) and composites."""
    if isinstance(optimizers, Sequence):
        for optimizer in optimizers:
            yield from _each(optimizer)
    elif hasattr(optimizers, "optimizers"):
        yield from _each(list(optimizers.optimizers))
    elif hasattr(optimizers, "optimizer"):
        yield from _each(optimizers.optimizer)
    else:
        for group in optimizers.param_groups:
            for parameter in group["params"]:
                yield optimizers, group, parameter


def _check(kind: str, name: str, parameter: Tensor, states: Mapping[str, Any]) -> None:
    expected = _KEEPS.get(kind)
    if states and expected is not None and not expected <= states.keys():
        raise CheckpointError(
            f"the saved optimiser state of {name} holds {', '.join(sorted(states))}; {kind} keeps "
            f"{', '.join(sorted(expected))}: it was saved by another optimiser"
        )
    for key, value in states.items():
        if isinstance(value, Tensor) and value.dim() > 0 and value.shape != parameter.shape:
            raise CheckpointError(
                f"the saved {key} of {name} has the shape {tuple(value.shape)}, the parameter {tuple(parameter.shape)}"
            )


def _place(key: str, value: Any, parameter: Tensor, group: Mapping[str, Any]) -> Any:
    if not isinstance(value, Tensor):
        return value
    # AdamW counts its steps on the host unless the kernel itself reads the count.
    on_host = key == "step" and not (group.get("capturable") or group.get("fused"))
    placed = value.to("cpu" if on_host else parameter.device, copy=True)
    return spread_like(placed, parameter) if placed.dim() else placed
