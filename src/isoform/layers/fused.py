"""The C++ kernels as differentiable functions, each with the condition under which it stands in for plain torch.

Every function returns None where the kernels do not serve what it is given; the caller then takes the plain way. The
formulas stand with the callers, in `norm`, `feedforward` and `position`. Attention is in `tiled`, dropout in `dropout`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from isoform.contracts import IGNORE
from isoform.layers.kernels import Library, serves

# Fewer rows, or narrower matrices, are not worth packing into tiles.
MIN_ROWS, MIN_WIDTH = 256, 32


# -------------------------------------------------------------------------------------------------------- normalisation


def norm(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, centred: bool, narrow: bool
) -> Tensor | None:
    """LayerNorm (centred) or RMSNorm of `(..., d)`; narrow: under autocast the result is in its precision."""
    library = serves(hidden, weight, bias)
    if library is None or weight.dtype != torch.float32 or (bias is not None and bias.dtype != torch.float32):
        return None
    autocast = torch.is_autocast_enabled("cpu")
    if not autocast and hidden.dtype != torch.float32:
        return None
    dtype = torch.get_autocast_dtype("cpu") if autocast and narrow else torch.float32
    if dtype not in (torch.float32, torch.bfloat16):
        return None
    output: Tensor = _Norm.apply(hidden, weight, bias, eps, centred, dtype, library)  # type: ignore[no-untyped-call]
    return output


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        centred: bool,
        dtype: torch.dtype,
        library: Library,
    ) -> Tensor:
        x = hidden.contiguous()
        d = x.shape[-1]
        n = x.numel() // d
        output = torch.empty(x.shape, dtype=dtype)
        mean, inverse = torch.empty(n), torch.empty(n)
        library.call(
            "norm_forward",
            (x.dtype, dtype),
            x,
            weight,
            bias,
            output,
            mean,
            inverse,
            n,
            d,
            eps,
            centred,
            torch.get_num_threads(),
        )
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.centred, ctx.shifted, ctx.library = centred, bias is not None, library
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, mean, inverse = ctx.saved_tensors
        grad = grad.contiguous()
        dx, dweight = torch.empty_like(x), torch.empty_like(weight)
        dbias = torch.empty_like(weight) if ctx.shifted else None
        d = x.shape[-1]
        given = (
            grad,
            x,
            weight,
            mean,
            inverse,
            dx,
            dweight,
            dbias,
            x.numel() // d,
            d,
            ctx.centred,
            torch.get_num_threads(),
        )
        ctx.library.call("norm_backward", (x.dtype, grad.dtype), *given)
        return dx, dweight, dbias, None, None, None, None


# --------------------------------------------------------------------------------------------------------- activations


def gated(name: str, gate: Tensor, up: Tensor) -> Tensor | None:
    """act(gate) * up, name being silu, gelu or gelu_tanh; in bfloat16 alone.

    Only the inputs are kept for the backward pass; torch would keep act(gate) too.
    """
    library = serves(gate, up)
    if library is None or gate.dtype != torch.bfloat16 or up.dtype != torch.bfloat16:
        return None
    output: Tensor = _Gated.apply(name, gate, up, library)  # type: ignore[no-untyped-call]
    return output


# Activations without a gate, and the types in which torch is slower.
_ALONE = {"gelu": (torch.bfloat16,), "gelu_tanh": (torch.bfloat16, torch.float32)}


def activated(name: str, hidden: Tensor) -> Tensor | None:
    """act(hidden), name being gelu or gelu_tanh."""
    library = serves(hidden)
    if library is None or hidden.dtype not in _ALONE[name]:
        return None
    output: Tensor = _Gated.apply(name, hidden, None, library)  # type: ignore[no-untyped-call]
    return output


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, gate: Tensor, up: Tensor | None, library: Library) -> Tensor:
        gate, up = gate.contiguous(), None if up is None else up.contiguous()
        output = torch.empty_like(gate)
        library.call(name, (gate.dtype,), gate, up, output, *_rows(gate), torch.get_num_threads())
        ctx.save_for_backward(gate, up)
        ctx.name, ctx.library = name, library
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), None if up is None else torch.empty_like(up)
        given = (grad.contiguous(), gate, up, dgate, dup, *_rows(gate), torch.get_num_threads())
        ctx.library.call(f"{ctx.name}_backward", (gate.dtype,), *given)
        return None, dgate, dup, None


# -------------------------------------------------------------------------------------------------------- linear layers


def linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """hidden weight^T + bias, with gradients of weight and bias summed in float32, each in one pass."""
    library = serves(hidden, weight, bias)
    if library is not None and library.has_tiles and _fills_tiles(hidden, weight):
        given = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
        if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in given):
            return _narrow_product(hidden.bfloat16(), weight.bfloat16(), bias)
        output: Tensor = _Linear.apply(hidden, weight, bias, library)  # type: ignore[no-untyped-call]
        return output
    if library is None or bias is None or not (torch.is_grad_enabled() and weight.requires_grad and bias.requires_grad):
        return F.linear(hidden, weight, bias)
    product = F.linear(hidden, weight, bias.detach())
    if serves(product) is None:  # autocast to something else
        return F.linear(hidden, weight, bias)
    biased: Tensor = _Biased.apply(product, bias, library)  # type: ignore[no-untyped-call]
    return biased


def _fills_tiles(hidden: Tensor, weight: Tensor) -> bool:
    """Whether this is a product in bfloat16 of matrices that are not too small."""
    return (
        torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and (weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and not weight.requires_grad))
        and hidden.ndim == 2
        and len(hidden) >= MIN_ROWS
        and min(weight.shape) >= MIN_WIDTH
    )


def _narrow_product(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In bfloat16. oneDNN adds the bias itself, where torch's own `linear` writes it out first, in twice the time."""
    with torch.autocast("cpu", enabled=False):
        if bias is None or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            return F.linear(hidden, weight, None if bias is None else bias.bfloat16())
        output: Tensor = torch.ops.mkldnn._linear_pointwise(hidden, weight, bias.bfloat16(), "none", [], "")
        return output


class _Linear(torch.autograd.Function):
    """In bfloat16, from float32 weights, whose gradient is in float32; see products.cpp."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, library: Library) -> Tensor:
        x, narrow = hidden.bfloat16().contiguous(), weight.bfloat16()
        ctx.save_for_backward(x if weight.requires_grad else None, narrow)
        ctx.dtype, ctx.library = hidden.dtype, library
        return _narrow_product(x, narrow, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.bfloat16().contiguous()
        dhidden = (grad @ weight).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        dweight = None
        if ctx.needs_input_grad[1]:
            dweight = torch.empty(weight.shape)
            ctx.library.weight_gradient(grad, x, dweight, torch.get_num_threads())
        return dhidden, dweight, _column_sums(grad, ctx.library) if ctx.needs_input_grad[2] else None, None


def _column_sums(grad: Tensor, library: Library) -> Tensor:
    """float32 `(d,)` of `(..., d)`."""
    rows, width = _rows(grad)
    sums = torch.empty(width)
    library.call("column_sums", (grad.dtype,), grad.contiguous(), sums, rows, width, torch.get_num_threads())
    return sums


class _Biased(torch.autograd.Function):
    """What is given, which contains the bias already."""

    @staticmethod
    def forward(ctx: Any, product: Tensor, bias: Tensor, library: Library) -> Tensor:
        ctx.dtype, ctx.library = bias.dtype, library
        return product.view_as(product)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return grad, _column_sums(grad, ctx.library).to(ctx.dtype), None


# ----------------------------------------------------------------------------------------------------- rotary positions


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor | None:
    """The first channels of each head turned: states `(n, h, k)`, cos and sin `(n, 1, r/2)`."""
    library = serves(states, cos, sin)
    if library is None or len(cos) != len(states):
        return None
    output: Tensor = _Rotate.apply(states, cos.float(), sin.float(), library)  # type: ignore[no-untyped-call]
    return output


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor, library: Library) -> Tensor:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        ctx.library = library
        return _turned(states, cos, sin, 1.0, library)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, sin, -1.0, ctx.library), None, None, None


def _turned(states: Tensor, cos: Tensor, sin: Tensor, sign: float, library: Library) -> Tensor:
    turned = states.clone(memory_format=torch.contiguous_format)
    n, heads, width = turned.shape
    library.call(
        "rotate",
        (turned.dtype,),
        turned,
        cos,
        sin,
        n,
        heads,
        heads * width,
        width,
        cos.shape[-1],
        sign,
        torch.get_num_threads(),
    )
    return turned


# -------------------------------------------------------------------------------------------------------- cross-entropy


def nats(logits: Tensor, targets: Tensor) -> Tensor | None:
    """-log softmax(logits)[target] of each row, float32 `(m,)`, 0 where it is IGNORE; logits `(m, v)`.

    No float32 copy of the logits is made, forward or backward.
    """
    library = serves(logits, targets)
    if library is None or logits.ndim != 2 or not len(logits):
        return None
    losses: Tensor = _Nats.apply(logits, targets, library)  # type: ignore[no-untyped-call]
    return losses


class _Nats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, library: Library) -> Tensor:
        logits, targets = logits.contiguous(), targets.contiguous()
        losses, log_sums = torch.empty(len(logits)), torch.empty(len(logits))
        library.call("nats_forward", (logits.dtype,), logits, targets, losses, log_sums, *_shape(logits))
        ctx.save_for_backward(logits, targets, log_sums)
        ctx.library = library
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        logits, targets, log_sums = ctx.saved_tensors
        dlogits = torch.empty_like(logits)
        given = (grad.float().contiguous(), logits, targets, log_sums, dlogits, *_shape(logits))
        ctx.library.call("nats_backward", (logits.dtype,), *given)
        return dlogits, None, None


def _rows(states: Tensor) -> tuple[int, int]:
    """Rows and width of `(..., d)`."""
    return states.numel() // max(1, states.shape[-1]), states.shape[-1]


def _shape(logits: Tensor) -> tuple[int, int, int, int]:
    return len(logits), logits.shape[1], IGNORE, torch.get_num_threads()
