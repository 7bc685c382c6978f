"""The model that a preference is measured against: the trained one as it was before the first step."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isoform.contracts import Batch
from isoform.errors import ConfigError
from isoform.layers.init import Linear
from isoform.layers.lora import LowRankLinear
from isoform.models.lora import active_adapter, adapters_of


class Reference:
    """The first state of the model that is trained; implements `contracts.Helper`.

    An adapted model has it in itself: its base, with the adapter switched off. Of any other model a frozen copy is made
    when the training begins, before a checkpoint is read; it is never trained and never saved.
    """

    sources: Mapping[str, str] = {}
    companion: Any = None
    reads_layers: bool = False

    def __init__(self) -> None:
        self.model: Any = None

    def begin(self, model: Any) -> None:
        """Takes the model as it is: until it is trained, it is its own reference."""
        self.model = model

    def join(self, others: Mapping[str, Any], model: Any, seed: int) -> None:
        self.begin(model)

    def rehearse(self, train: Any, cache: Path, device: Any, precision: str, autocast: Callable[[], Any]) -> None:
        """Copies the model where it has no adapter."""
        if active_adapter(self.model) is None:
            self.model = copy.deepcopy(self.model).requires_grad_(False).eval()

    @torch.no_grad()
    def ask(self, model: Any, batch: Batch, read: Callable[[Any, Batch], Tensor]) -> Tensor:
        """What `read` finds in a batch by the reference of `model`, without dropout and without gradients.

        Raises: ConfigError where it is not known any more.
        """
        quiet = dataclasses.replace(batch, dropout_key=None)
        if active_adapter(model) is not None:
            with base_alone(model):
                return read(model, quiet)
        if self.model is None:
            raise ConfigError(
                "objective.kind: preference measures against the model before the training, which is not kept of a run "
                "without an adapter; score held-out data in the run itself (data.dev, data.test)"
            )
        if next(self.model.parameters()).device != batch.tokens.device:
            self.model.to(batch.tokens.device)
        return read(self.model, quiet)


@contextmanager
def base_alone(model: Any) -> Iterator[None]:
    """An adapted model without its adapter, for a pass without gradients; what it trains whole has its first values.

    Values are put aside, not overwritten, so that a pass whose gradients are still to come is not disturbed. What was
    converted from them to another precision is forgotten on both ways.
    """
    adapters, adapter = adapters_of(model), active_adapter(model)
    assert adapters is not None and adapter is not None, "an adapted model"
    layers = [layer for layer in model.modules() if isinstance(layer, LowRankLinear)]
    whole = {name: parameter for name, parameter in model.named_parameters() if name in adapter.whole}
    values = {name: parameter.data for name, parameter in whole.items()}
    active = adapters.active
    served = [layer for layer in model.modules() if isinstance(layer, Linear) and layer.converted is not None]
    converted = [layer.converted for layer in served]
    try:
        torch.clear_autocast_cache()
        for each in served:
            each.converted = {}
        for name, parameter in whole.items():
            parameter.data = adapters.base_values[name].to(parameter.device)
        for layer in layers:
            layer.active = None
        yield
    finally:
        torch.clear_autocast_cache()
        for each, before in zip(served, converted, strict=True):
            each.converted = before
        for name, parameter in whole.items():
            parameter.data = values[name]
        for layer in layers:
            layer.active = active
