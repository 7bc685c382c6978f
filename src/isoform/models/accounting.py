"""What a model costs: parameters, and floating-point operations per token."""

from __future__ import annotations

from typing import Any

from torch import nn

from isoform.layers.block import SelfAttention
from isoform.layers.cross import CrossAttention
from isoform.layers.lora import LowRankLinear
from isoform.layers.moe import ExpertLinear, MixtureOfExperts
from isoform.layers.two_stream import TwoStreamAttention


def accounts(model: nn.Module, context_tokens: int) -> dict[str, int]:
    """Counts of one model, for its manifest; operations per token at sequences of `context_tokens`.

    Parameters: `total`; `trainable`; `non_embedding`: without token and position tables and an untied head;
    `active`: those that one token passes through (the same as `total` but in mixtures of experts).
    Operations: `flops_forward_per_token` and `flops_backward_per_token`, see `flops_per_token`.
    """
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    forward, backward = flops_per_token(model, context_tokens)
    return {
        "total": sum(sizes.values()),
        "trainable": trainable,
        "non_embedding": sum(size for name, size in sizes.items() if not _is_table(name)),
        "active": sum(sizes.values()) - sum(layer.idle_parameters for layer in _mixtures(model)),
        "flops_forward_per_token": forward,
        "flops_backward_per_token": backward,
    }


def flops_per_token(model: Any, context_tokens: int) -> tuple[int, int]:
    """Operations of a forward and a backward pass for one token of a sequence of `context_tokens`, on average.

    forward = 2 x (elements of every matrix that a token is multiplied with, the head among them)
            + 4 x h k x (tokens that a query sees, on average) in each layer, for scores and weighted values

    Of an encoder-decoder: the mean over the tokens of a source and of a target, of `context_tokens` each.

    backward = 2 x forward: one product for the gradient of the input, one for that of the matrix, which a frozen matrix
    does without.
    Counted: matrix products, a multiplication and an addition as two. Not counted: norms, activations, softmax, biases,
    look-ups, the loss, the optimiser, anything recomputed; nor padding inside blocks of attention, nor XLNet's second
    stream and its scores by distance.
    Source: Kaplan et al. 2020, section 2.1, with the attention term and the head kept. Differs: causal attention counts
    what is seen, not the whole square.
    """
    config: Any = model.config
    matrices = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear | ExpertLinear))
    matrices -= sum(layer.idle_parameters for layer in _mixtures(model))
    thin = [part for layer in model.modules() if isinstance(layer, LowRankLinear) for part in layer.parts.values()]
    matrices += sum(part.down.numel() + part.up.numel() for part in thin)
    frozen = sum(
        layer.weight.numel()
        for layer in model.modules()
        if isinstance(layer, nn.Linear) and not layer.weight.requires_grad
    )
    guesses = getattr(config, "head", None) != "none" and getattr(model, "classifier", None) is None
    if guesses and config.tied:
        matrices += model.get_parameter("embedding.weight").numel()
    attention = sum(
        4 * layer.num_heads * layer.head_width * mean_visible(context_tokens, layer.window, causal=layer.causal)
        for layer in model.modules()
        if isinstance(layer, SelfAttention | TwoStreamAttention)
    )
    attention += sum(
        4 * layer.num_heads * layer.head_width * context_tokens
        for layer in model.modules()
        if isinstance(layer, CrossAttention)
    )
    forward = 2 * matrices + round(attention)
    if "encoder-decoder" in model.capabilities:
        forward, frozen = forward // 2, frozen // 2
    return forward, 2 * forward - 2 * frozen


def mean_visible(context_tokens: int, window: int | None, *, causal: bool = True) -> float:
    """How many tokens a query sees on average, itself among them: the last `window`, or half of them to each side."""
    if not causal:
        half = context_tokens if window is None else window // 2 + 1
        return 2 * mean_visible(context_tokens, half) - 1
    width = min(window or context_tokens, context_tokens)
    return (width * (width + 1) / 2 + (context_tokens - width) * width) / context_tokens


def _mixtures(model: nn.Module) -> list[MixtureOfExperts]:
    return [layer for layer in model.modules() if isinstance(layer, MixtureOfExperts)]


def _is_table(name: str) -> bool:
    return "embedding" in name or name in ("head.weight", "head.table.weight", "head.bias")
