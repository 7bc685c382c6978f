"""DistilBERT and ModernBERT: what is their own; parity with transformers is in `test_encoder.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from isoform.contracts import Batch
from isoform.errors import ConfigError
from isoform.layers.dropout import Dropout
from isoform.models.distilbert import DistilBert
from isoform.models.modernbert import ModernBert
from isoform.registry import build_options


def test_layers_see_near_and_far_by_turns(make_batch: Any) -> None:
    model, batch = ModernBert.tiny(), make_batch([31])
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    changed = batch.tokens.clone()
    changed[15] = (changed[15] + 1) % 61
    pairs = [
        model(Batch(tokens, batch.positions, batch.sequences, batch.sample_keys), all_layers=True).layers
        for tokens in (batch.tokens, changed)
    ]
    moved = [(after != before).any(dim=1).sum().item() for before, after in zip(*pairs, strict=True)]
    assert moved == [1, 31, 31, 31, 31]
    near = ModernBert.tiny(global_every=9)
    near.blocks = near.blocks[1:]
    pairs = [
        near(Batch(tokens, batch.positions, batch.sequences, batch.sample_keys), all_layers=True).layers
        for tokens in (batch.tokens, changed)
    ]
    moved = [(after != before).any(dim=1).nonzero().flatten().tolist() for before, after in zip(*pairs, strict=True)]
    assert moved[1] == list(range(11, 20))
    assert set(moved[1]) < set(moved[2]) <= set(range(7, 24))


@pytest.mark.parametrize("family", [DistilBert, ModernBert])
def test_every_parameter_gets_a_gradient(family: Any, make_batch: Any) -> None:
    model = family.tiny(tied=False)
    model.logits(model(make_batch([5, 1, 17])).hidden).logsumexp(-1).sum().backward()
    assert [name for name, parameter in model.named_parameters() if not parameter.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("family", [DistilBert, ModernBert])
def test_dropout_is_a_function_of_the_key(family: Any, make_batch: Any) -> None:
    for rate in ("attention_dropout", "dropout" if family is DistilBert else "feedforward_dropout"):
        model, batch = family.tiny(**{rate: 0.3}).double(), make_batch([9, 4], dropout_key=7)
        hidden = model(batch).hidden
        assert torch.equal(model(batch).hidden, hidden)
        batch.dropout_key = None
        assert not torch.allclose(model(batch).hidden, hidden)


def test_distilbert_drops_nothing_between_attention_and_the_sum_after_it() -> None:
    model = DistilBert.tiny(dropout=0.3)
    dropping = [name for name, part in model.named_modules() if isinstance(part, Dropout) and part.rate > 0]
    assert dropping == [
        "input_dropout",
        *(f"blocks.{layer}.{site}" for layer in (0, 1) for site in ("attention.dropout", "feedforward_dropout")),
    ]


@pytest.mark.parametrize("family", [DistilBert, ModernBert])
@pytest.mark.parametrize("kind", ["none", "sinusoidal", "rope", "alibi"])
def test_positions_are_not_swapped_and_the_reason_is_said(family: Any, kind: str) -> None:
    with pytest.raises(ConfigError, match=r"^model.position: (DistilBERT|ModernBERT) .* bert swaps? them$"):
        build_options(family, {"position": kind}, "model")


def test_a_resolved_config_is_read_again() -> None:
    for family in (DistilBert, ModernBert):
        config = family.tiny().config
        assert build_options(family, config.model_dump(mode="json"), "model") == config


def test_what_an_encoder_cannot_do_is_refused() -> None:
    for family in (DistilBert, ModernBert):
        with pytest.raises(ConfigError, match="cannot continue one"):
            family.tiny().new_cache(1)
        with pytest.raises(ConfigError, match="without a head that guesses tokens"):
            family.tiny(head="none").logits(torch.zeros(1, 32))
