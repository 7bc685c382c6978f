"""Optimisers: AdamW, and Muon for the hidden matrices with AdamW for the rest.

Each registered class maps named parameters to torch optimisers whose groups carry `peak_rate`; the loop sets
`lr = peak_rate x schedule factor` before every update, so no optimiser knows of a schedule. The run's precision, which
its manifest records, is theirs too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from isoform.registry import Options, register
from isoform.training.muon import StackedMuon


class Optimizer(Protocol):
    def build(
        self, parameters: Mapping[str, Tensor], learning_rate: float, precision: str
    ) -> list[torch.optim.Optimizer]: ...


class AdamWOptions(Options):
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    epsilon: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    # decoupled, on matrices alone: vectors (norms, biases) are never decayed
    decay_embeddings: bool = False
    # whether token and position tables count as matrices


def is_embedding(name: str) -> bool:
    """Whether a parameter is a table looked up by index, or the output layer."""
    return any(part in name for part in ("embedding", "head."))


def adamw(parameters: Mapping[str, Tensor], rate: float, options: AdamWOptions) -> torch.optim.AdamW:
    """AdamW with decay on matrices only (Loshchilov & Hutter 2019), fused where torch offers it."""

    def decayed(name: str, tensor: Tensor) -> bool:
        return tensor.ndim >= 2 and (options.decay_embeddings or not is_embedding(name))

    with_decay = [tensor for name, tensor in parameters.items() if decayed(name, tensor)]
    without = [tensor for name, tensor in parameters.items() if not decayed(name, tensor)]
    groups = [
        {"params": tensors, "weight_decay": decay, "peak_rate": rate}
        for tensors, decay in ((with_decay, options.weight_decay), (without, 0.0))
        if tensors
    ]
    fused = all(tensor.device.type in {"cpu", "cuda", "mps"} for tensor in parameters.values())
    betas = (options.beta1, options.beta2)
    return torch.optim.AdamW(groups, lr=rate, betas=betas, eps=options.epsilon, fused=fused)


@register("optimizer", "adamw")
class AdamW:
    """AdamW on every parameter."""

    class Config(AdamWOptions):
        pass

    def __init__(self, options: Config) -> None:
        self.options = options

    def build(
        self, parameters: Mapping[str, Tensor], learning_rate: float, precision: str
    ) -> list[torch.optim.Optimizer]:
        return [adamw(parameters, learning_rate, self.options)]


@register("optimizer", "muon")
class Muon:
    """Muon on the matrices inside the blocks; AdamW on tables, the output layer, norms and biases.

    Source: Jordan et al. 2024, Muon; `torch.optim.Muon`. `match-rms` scales each update to the size of AdamW's
    (Liu et al. 2025, Muon is scalable, section 2.2), so one learning rate serves both halves. Matrices are
    orthogonalised in bf16 in a bf16 run, else in fp32.
    """

    class Config(AdamWOptions):
        momentum: float = Field(0.95, ge=0, lt=1)
        nesterov: bool = True
        iterations: int = Field(5, gt=0)
        # Newton-Schulz iterations
        scale: Literal["match-rms", "original"] = "match-rms"
        adamw_learning_rate: float | None = Field(None, gt=0)
        # peak rate of the AdamW half; null: train.learning_rate

    def __init__(self, options: Config) -> None:
        self.options = options

    def build(
        self, parameters: Mapping[str, Tensor], learning_rate: float, precision: str
    ) -> list[torch.optim.Optimizer]:
        options = self.options
        hidden = {name: p for name, p in parameters.items() if p.ndim == 2 and not is_embedding(name)}
        rest = {name: p for name, p in parameters.items() if name not in hidden}
        optimizers: list[torch.optim.Optimizer] = []
        if hidden:
            muon = StackedMuon(
                [{"params": list(hidden.values()), "peak_rate": learning_rate}],
                dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
                lr=learning_rate,
                weight_decay=options.weight_decay,
                momentum=options.momentum,
                nesterov=options.nesterov,
                ns_steps=options.iterations,
                adjust_lr_fn="match_rms_adamw" if options.scale == "match-rms" else "original",
            )
            optimizers.append(muon)
        if rest:
            optimizers.append(adamw(rest, options.adamw_learning_rate or learning_rate, options))
        return optimizers
