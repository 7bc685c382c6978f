"""Training with parameters, gradients and optimiser state spread over the ranks: FSDP2, set up by Accelerate.

Each block is gathered when it computes and let go again. Evaluation and checkpoints see a whole model: a replica
beside the sharded one, which is filled while they need it and holds nothing in between.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from isoform.checkpoints.shards import whole
from isoform.errors import ConfigError
from isoform.layers.recompute import Recomputable


def check(accelerator: Accelerator) -> None:
    """Raises: ConfigError where Accelerate was asked to spread a run in a way that the loop does not know."""
    kind = accelerator.distributed_type
    if kind == DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise ConfigError(
                "accelerate launch: FSDP version 1 given, which knows no single parameters; add --fsdp_version 2"
            )
        plugin = accelerator.state.fsdp_plugin
        plugin.auto_wrap_policy = plugin.auto_wrap_policy or transformer_auto_wrap_policy
        plugin.cpu_ram_efficient_loading = False  # every rank makes the same weights by itself
    elif kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ConfigError(
            f"accelerate launch: {kind.value} given; use --use_fsdp --fsdp_version 2, or --multi_gpu for a whole "
            "model on each GPU"
        )


def shard(
    accelerator: Accelerator, module: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    """The module with its parameters spread, block by block, and the optimisers of what it has now."""
    blocks = {type(part).__name__ for part in module.modules() if isinstance(part, Recomputable)}
    module._no_split_modules = sorted(blocks)  # type: ignore[assignment]  # where Accelerate looks for them
    prepared, *wrapped = accelerator.prepare(module, *optimizers)
    # Accelerate's wrapper would scale gradients and count steps, which the loop does by itself.
    return prepared, [one.optimizer for one in wrapped]


class Replica:
    """A model of the same form as a sharded one, without values of its own."""

    def __init__(self, model: nn.Module) -> None:
        """model: before it is sharded."""
        self.model = copy.deepcopy(model)
        self._empty()

    def fill(self, sharded: nn.Module) -> nn.Module:
        """The whole model; all ranks have to ask for it."""
        sources = dict(sharded.named_parameters())
        for name, parameter in self.model.named_parameters():
            parameter.data = whole(sources[name].detach())
        buffers = dict(sharded.named_buffers())
        for name, buffer in self.model.named_buffers():
            buffer.copy_(buffers[name])
        return self.model

    @contextmanager
    def filled(self, sharded: nn.Module) -> Iterator[nn.Module]:
        """The whole model within the block."""
        try:
            yield self.fill(sharded)
        finally:
            self._empty()

    def _empty(self) -> None:
        for parameter in self.model.parameters():
            parameter.data = parameter.data.new_empty(0)
