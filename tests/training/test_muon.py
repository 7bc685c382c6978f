"""Stacked Muon against torch's own."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from isoform.training.muon import StackedMuon, orthogonal

SHAPES = [(24, 8), (8, 8), (8, 24), (24, 8), (8, 8), (5, 16)]


@pytest.mark.parametrize(("rule", "nesterov"), list(product(["original", "match_rms_adamw"], [True, False])))
def test_updates_are_torchs(rule: str, nesterov: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape, generator=draw)) for shape in SHAPES]
    theirs = [torch.nn.Parameter(parameter.detach().clone()) for parameter in ours]
    options = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "nesterov": nesterov, "adjust_lr_fn": rule}
    stacked = StackedMuon([{"params": ours}], dtype=torch.bfloat16, **options)
    plain = torch.optim.Muon([{"params": theirs}], **options)
    for _ in range(3):
        for mine, other in zip(ours[1:], theirs[1:], strict=True):  # the first has no gradient, and stays
            mine.grad = torch.randn(mine.shape, generator=draw)
            other.grad = mine.grad.clone()
        stacked.step()
        plain.step()
    for mine, other in zip(ours, theirs, strict=True):
        # one rounding of a bfloat16 product apart at most
        torch.testing.assert_close(mine, other, rtol=0, atol=0.02 * 2**-8)


def test_singular_values_are_drawn_to_one() -> None:
    stack = torch.randn(3, 8, 24, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(stack, 5))
    assert values.min() > 0.6 and values.max() < 1.25


def test_an_empty_gradient_is_no_nan() -> None:
    assert orthogonal(torch.zeros(2, 3, 4), 5).abs().max() == 0
