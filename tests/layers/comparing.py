"""Tensors that the kernels and plain torch are both given, and how near their results are."""

from __future__ import annotations

import torch


def leaf(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()


def gradients(output, *inputs):
    """Gradients of a sum with uneven weights, so that an error in any place is seen."""
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(9))
    return torch.autograd.grad((output.float() * weights).sum(), inputs)


def close(ours, plain, relative):
    return ((ours.double() - plain.double()).norm() / plain.double().norm()).item() < relative
