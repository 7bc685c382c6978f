from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from isoform.layers.attention import visibility
from isoform.models.accounting import accounts, mean_visible
from isoform.models.bert import Bert
from isoform.models.gpt2 import GPT2
from isoform.models.modernbert import ModernBert


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2, "feedforward": "swiglu", "bias": False}])
def test_matrix_products_are_those_that_torch_counts(tied: bool, options: dict[str, object]) -> None:
    """A sequence of one token has one score a head, so only the matrices and that one score are left to count."""
    model = GPT2.tiny(tied=tied, **options)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.dense(torch.zeros(1, 1, dtype=torch.int64))
    attention = 4 * model.config.width * model.config.num_layers
    counted = counter.get_total_flops()
    found = accounts(model, 1)
    assert found["flops_forward_per_token"] in (counted, counted + attention)  # the fused kernel may not be counted
    assert found["flops_backward_per_token"] == 2 * found["flops_forward_per_token"]


def test_attention_grows_with_what_is_seen() -> None:
    assert mean_visible(1, None) == 1
    assert mean_visible(4, None) == 2.5
    assert mean_visible(4, 2) == (1 + 2 + 2 + 2) / 4
    assert mean_visible(4, 9) == 2.5
    model = GPT2.tiny()
    grown = [accounts(model, context)["flops_forward_per_token"] for context in (1, 101)]
    assert grown[1] - grown[0] == 4 * 32 * 2 * 50


def test_parameters() -> None:
    model = GPT2.tiny(tied=False)
    model.embedding.requires_grad_(False)
    found = accounts(model, 10)
    tables = 2 * 61 * 32 + 48 * 32
    assert found["total"] == found["active"] == sum(parameter.numel() for parameter in model.parameters())
    assert found["total"] - found["trainable"] == 61 * 32
    assert found["total"] - found["non_embedding"] == tables


@pytest.mark.parametrize("window", [None, 1, 4, 7, 40])
def test_what_an_encoder_sees_is_counted(window: int | None) -> None:
    for context in (1, 5, 12):
        seen = visibility(context, context, causal=False, window=window).sum().item() / context
        assert mean_visible(context, window, causal=False) == pytest.approx(seen)


def test_an_encoder_s_head_is_counted_where_it_has_one() -> None:
    with_head, alone = (accounts(Bert.tiny(head=head), 16) for head in ("masked", "none"))
    assert with_head["non_embedding"] - alone["non_embedding"] == 32 * 32 + 3 * 32
    assert with_head["total"] - alone["total"] == 32 * 32 + 3 * 32 + 61
    assert with_head["flops_forward_per_token"] - alone["flops_forward_per_token"] == 2 * (32 * 32 + 61 * 32)
    every, third = (accounts(ModernBert.tiny(global_every=n), 40)["flops_forward_per_token"] for n in (1, 3))
    assert every - third == pytest.approx(2 * 4 * 32 * (40 - mean_visible(40, 8, causal=False)), abs=1)
