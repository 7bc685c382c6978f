"""What a model that routes loses beside its objective: experts out of balance, and large router logits.

    p_i(t) = softmax of the router logits of token t at expert i;  f_i(t) = 1/k where t chose expert i, else 0

    balance = sum over layers and sequences s of  T_s e sum_i mean over s of f_i  x  mean over s of p_i
    router_z = sum over layers and tokens of  (log sum_i exp(z_i))^2

Both are sums over sequences, so that micro-batches and ranks cannot change them, and both are divided by the number of
(token, layer) pairs: 1 is even use of the experts, e is one expert for all. Filler is in neither.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from isoform.contracts import Batch, LossPart, Model, Objective, Output
from isoform.errors import ConfigError
from isoform.layers import ragged
from isoform.layers.moe import MixtureOfExperts, choose


class Routed:
    """An objective for a model that routes: its own loss, and the two of this file; all else is the objective's own.

    Statistics: `router_entropy`, nats a token and layer; `expert_load.L.X`, how much of the tokens of layer L expert X
    has, in even shares: 1 is even, 0 an expert that nobody chose.
    Source: Fedus, Zoph & Shazeer 2022, section 2.2, equation 4; Zoph et al. 2022, equation 5.
    Differs: the balance is taken in each sequence (DeepSeek-AI 2024, section 2.1.2), not over a batch, whose micro-
    batches would each be asked for a balance of their own; f is divided by the number of choices.
    """

    def __init__(self, objective: Objective, layers: list[MixtureOfExperts]) -> None:
        self.objective = objective
        self.layers = layers

    def __getattr__(self, name: str) -> Any:
        if "objective" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.objective, name)

    def counts(self, batch: Batch) -> dict[str, float]:
        """The objective's counts, the pairs of token and layer, and the tokens for each expert's load."""
        tokens = float(_num_real(batch))
        pairs = tokens * len(self.layers)
        loads = {name: tokens for number, layer in enumerate(self.layers) for name in _loads(number, layer)}
        shared = {"balance": pairs, "router_z": pairs, "_router_entropy": pairs}
        return {**self.objective.counts(batch), **shared, **loads}

    def loss(self, model: Model, batch: Batch, output: Output) -> dict[str, LossPart]:
        """The objective's parts and those of the routers."""
        assert output.router_logits is not None, "a model that routes says how"
        parts = self.objective.loss(model, batch, output)
        sums = [routing_sums(*pair, batch) for pair in zip(self.layers, output.router_logits, strict=True)]
        balance, z, entropy = (torch.stack([layer[place] for layer in sums]).sum() for place in range(3))
        config = self.layers[0].config  # the same in all layers
        parts["balance"] = LossPart(balance, config.balance_weight)
        parts["router_z"] = LossPart(z, config.z_weight)
        parts["_router_entropy"] = LossPart(entropy)
        for number, layer in enumerate(self.layers):
            parts |= {name: LossPart(load) for name, load in zip(_loads(number, layer), sums[number][3], strict=True)}
        return parts


def with_routing(objective: Objective, model: torch.nn.Module) -> Objective:
    """The objective as it is, or with the losses of the model's routers."""
    layers = [layer for layer in model.modules() if isinstance(layer, MixtureOfExperts)]
    if layers and "causal" not in cast("Any", model).capabilities:
        raise ConfigError("model.feedforward: moe: only decoders tell how their routers chose; use gpt2 or llama")
    return cast("Objective", Routed(objective, layers)) if layers else objective


def routing_sums(layer: MixtureOfExperts, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums of one layer without filler: balance, z, entropy (scalars), and each expert's even shares `(e,)`.

    Shapes: logits `(n, e)`.
    """
    real, experts = _num_real(batch), layer.config.experts
    logits = logits[:real]
    row = ragged.rows(batch.sequences, logits.device)[:real]
    log_all = logits.logsumexp(dim=-1)
    shares = (logits - log_all[:, None]).exp()  # (n, e)
    chosen, _ = choose(logits.detach(), layer.config.active, layer.config.softmax)
    taken = torch.zeros_like(shares).scatter_(1, chosen, 1 / layer.config.active)  # (n, e)
    empty = shares.new_zeros(len(batch.sequences), experts)
    tokens = torch.tensor(batch.sequences.lengths, dtype=shares.dtype, device=shares.device)
    together = empty.index_add(0, row, taken) * empty.index_add(0, row, shares)  # (b, e), each a sum over T_s
    balance = experts * (together.sum(dim=1) / tokens).sum()
    entropy = (log_all - (shares * logits).sum(dim=-1)).detach().sum()
    return balance, log_all.square().sum(), entropy, experts * taken.sum(dim=0)


def _loads(number: int, layer: MixtureOfExperts) -> list[str]:
    return [f"_expert_load.{number}.{expert}" for expert in range(layer.config.experts)]


def _num_real(batch: Batch) -> int:
    """Tokens of the sequences that are not filler, which stands at the end; 0 where a rank has no share of the step."""
    if batch.weights is not None and not bool(batch.weights.any()):
        return 0
    lengths = batch.sequences.lengths
    return sum(lengths[: len(lengths) - batch.num_filler])
