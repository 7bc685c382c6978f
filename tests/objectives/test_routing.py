"""The losses of routers: their formula, that nothing but the tokens decides them, and that they reach the logs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from isoform.contracts import Batch, Sequences
from isoform.errors import ConfigError
from isoform.layers import ragged
from isoform.layers.moe import MixtureOfExperts
from isoform.models.llama import Llama
from isoform.models.t5 import T5
from isoform.objectives.crossentropy import TokenObjective
from isoform.objectives.routing import Routed, routing_sums, with_routing
from isoform.training.step import LossModule, accumulate

MOE = {"kind": "moe", "experts": 4, "active": 2}


def batch_of(lengths: list[int], num_filler: int = 0, seed: int = 0) -> Batch:
    sequences, generator = Sequences(lengths), torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 61, (sequences.num_tokens,), generator=generator)
    places = ragged.places(sequences, torch.device("cpu"))
    keys = torch.arange(len(lengths))
    targets = tokens.roll(-1)
    targets[sum(lengths[: len(lengths) - num_filler]) :] = -100
    return Batch(tokens, places, sequences, keys, targets=targets, num_filler=num_filler)


def split(batch: Batch, at: int) -> list[Batch]:
    """The first `at` sequences and the others."""
    cut, lengths = sum(batch.sequences.lengths[:at]), batch.sequences.lengths
    assert batch.targets is not None
    halves = [(slice(0, cut), lengths[:at]), (slice(cut, None), lengths[at:])]
    return [
        Batch(
            batch.tokens[part],
            batch.positions[part],
            Sequences(some),
            torch.zeros(len(some), dtype=torch.int64),
            targets=batch.targets[part],
        )
        for part, some in halves
    ]


def layer_of(**options: Any) -> MixtureOfExperts:
    layer: MixtureOfExperts = Llama.tiny(feedforward={**MOE, **options}).blocks[0].feedforward
    return layer


@pytest.mark.parametrize("softmax", ["after", "before"])
def test_one_sequence_is_the_loss_of_transformers(softmax: str) -> None:
    logits = torch.randn(23, 4)
    balance, z, entropy, load = routing_sums(layer_of(softmax=softmax), logits, batch_of([23]))
    expected = load_balancing_loss_func((logits,), num_experts=4, top_k=2)
    torch.testing.assert_close(balance / 23, expected / 2)
    torch.testing.assert_close(z, logits.logsumexp(-1).square().sum())
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=logits).entropy().sum())
    chosen = F.one_hot(logits.topk(2).indices, 4).sum((0, 1))
    torch.testing.assert_close(load, 4 * chosen / 2)
    torch.testing.assert_close(load.sum() / 23, torch.tensor(4.0))


def test_even_use_is_one_and_one_expert_for_all_is_the_number_of_experts() -> None:
    even = 30 * torch.eye(4).repeat(5, 1)
    layer = layer_of(active=1)
    assert float(routing_sums(layer, even, batch_of([20]))[0] / 20) == pytest.approx(1)
    assert float(routing_sums(layer, 30 * torch.eye(4)[:1].repeat(20, 1), batch_of([20]))[0] / 20) == pytest.approx(4)


def test_sequences_are_balanced_one_by_one() -> None:
    logits, layer = torch.randn(12, 4, dtype=torch.float64), layer_of()
    together = routing_sums(layer, logits, batch_of([3, 5, 4]))
    parts = [routing_sums(layer, rows, batch_of([len(rows)])) for rows in torch.split(logits, [3, 5, 4])]
    for place in range(4):
        torch.testing.assert_close(together[place], torch.stack([part[place] for part in parts]).sum(0))


def test_micro_batches_and_filler_change_nothing() -> None:
    model = Llama.tiny(feedforward=MOE).double()
    objective = with_routing(TokenObjective(None, None, 8), model)  # type: ignore[arg-type]
    whole, filled = batch_of([9, 2, 14, 6]), batch_of([9, 2, 14, 6, 5], num_filler=1)
    filled.tokens[:31] = whole.tokens
    filled.targets[:31] = whole.targets
    results = []
    for batches in ([whole], split(whole, 2), [filled]):
        model.zero_grad()
        counts: dict[str, float] = {}
        for batch in batches:
            for name, count in objective.counts(batch).items():
                counts[name] = counts.get(name, 0.0) + count
        totals = accumulate(LossModule(model, objective), batches, counts, precision="fp32", device=torch.device("cpu"))
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        results.append((counts, totals, gradients))
    for counts, totals, gradients in results[1:]:
        assert counts == results[0][0]
        assert totals == pytest.approx(results[0][1], rel=1e-12)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, results[0][2][name], rtol=1e-9, atol=1e-12)
    assert results[0][0]["balance"] == 31 * 2
    assert sum(total for name, total in results[0][1].items() if name.startswith("_expert_load.1.")) / 31 == 4


def test_a_rank_without_a_share_adds_nothing() -> None:
    model = Llama.tiny(feedforward=MOE).double()
    objective = with_routing(TokenObjective(None, None, 8), model)  # type: ignore[arg-type]
    batch = batch_of([9])
    batch.weights = torch.zeros(1)
    batch.targets[:] = -100  # type: ignore[index]
    counts = objective.counts(batch)
    assert not any(counts.values())
    totals = accumulate(LossModule(model, objective), [batch], counts, precision="fp32", device=torch.device("cpu"))
    assert not any(totals.values())
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


def test_models_that_cannot_tell_of_their_routers_are_refused() -> None:
    model = T5.tiny(feedforward={**MOE, "expert": "geglu-tanh"})
    with pytest.raises(ConfigError, match="only decoders tell how their routers chose"):
        with_routing(TokenObjective(None, None, 8), model)  # type: ignore[arg-type]


def test_the_routers_learn_from_both_losses_and_statistics_are_no_loss() -> None:
    model, batch = Llama.tiny(feedforward={**MOE, "balance_weight": 0.5, "z_weight": 0.25}), batch_of([9, 14])
    objective = with_routing(TokenObjective(None, None, 8), model)  # type: ignore[arg-type]
    output = model(batch)
    parts = objective.loss(model, batch, output)
    assert (parts["balance"].weight, parts["router_z"].weight) == (0.5, 0.25)
    for name in ("balance", "router_z"):
        gradient = torch.autograd.grad(parts[name].total, model.blocks[1].feedforward.router.weight, retain_graph=True)
        assert bool(gradient[0].any())
    assert not parts["_router_entropy"].total.requires_grad


def test_models_that_do_not_route_keep_their_objective() -> None:
    objective: Any = TokenObjective(None, None, 8)
    assert with_routing(objective, Llama.tiny()) is objective


def test_everything_else_is_the_objectives_own() -> None:
    objective = Routed(type("Own", (TokenObjective,), {"stochastic": True})(None, None, 8), [])  # type: ignore[arg-type]
    assert objective.stochastic
    assert objective.statistics.__self__ is objective.objective
    with pytest.raises(AttributeError):
        Routed.__new__(Routed).stochastic  # noqa: B018
