"""A mixture of experts: a router sends each token to a few of many feed-forward layers.

    z = W_r x                                              router logits, one for each expert
    y = sum over chosen experts i of  w_i expert_i(x)      the `active` experts with the largest logits

    softmax after    w = softmax over the chosen z              Mixtral
    softmax before   w_i = exp(z_i) / sum over all j exp(z_j)   Switch: what is not chosen is lost

Dropless: every token reaches each expert that it chose, however many others did. So a token's output knows nothing of
the other tokens, and filler changes nobody's.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from isoform.errors import ConfigError
from isoform.layers import fused
from isoform.layers.apart import apart
from isoform.layers.feedforward import Gated, Plain
from isoform.layers.init import linear
from isoform.registry import Options, lookup, register

# An expert's rows are rounded up to it where experts have so many of them on average.
ROW_BLOCK, MANY_BLOCKS = 128, 4


class ExpertLinear(nn.Module):
    """One matrix for each expert, whose values are not drawn yet. Shapes: weight `(e, outputs, inputs)`."""

    def __init__(self, experts: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs))


@register("feedforward", "moe")
class MixtureOfExperts(nn.Module):
    """`active` of `experts` feed-forward layers for each token, see the head of this file.

    Shapes: x `(n, d)`, router `(e, d)`, gate and up `(e, f, d)`, down `(e, d, f)`; f is the width of one expert.
    Source: Shazeer et al. 2017; Fedus, Zoph & Shazeer 2022, section 2.1; Jiang et al. 2024, section 2.1, and HF
    `MixtralSparseMoeBlock`. Differs: no capacity, so no token is dropped; no noise on the router; the router computes
    in float32 in every precision.
    """

    class Config(Options):
        experts: int = Field(8, gt=0)
        active: int = Field(2, gt=0)
        # experts that each token passes through
        softmax: Literal["after", "before"] = "after"
        # over the logits of the chosen experts, or over all before the choice
        expert: str = "swiglu"
        # the kind of feed-forward layer that an expert is; without biases
        balance_weight: float = Field(0.01, ge=0)
        # of the loss that keeps experts in balance, see `objectives.routing`
        z_weight: float = Field(0.001, ge=0)
        # of the loss that keeps router logits small

        @model_validator(mode="after")
        def _fits(self) -> MixtureOfExperts.Config:
            if self.active > self.experts:
                raise ValueError(f"`active` is {self.active}, at most `experts` {self.experts} is expected")
            return self

    gated: ClassVar[bool] = False

    def __init__(self, config: Config, width: int, inner_width: int, *, bias: bool) -> None:
        super().__init__()
        if bias:
            raise ConfigError("model.feedforward: experts have no biases; `bias=False` is expected")
        self.config = config
        self.expert = _expert_class(config.expert)
        self.router = linear(width, config.experts, bias=False)
        if self.expert.gated:
            self.gate = ExpertLinear(config.experts, width, inner_width)
        self.up = ExpertLinear(config.experts, width, inner_width)
        self.down = ExpertLinear(config.experts, inner_width, width)

    @property
    def idle_parameters(self) -> int:
        """Parameters that one token does not pass through."""
        each = sum(matrix.weight[0].numel() for matrix in self.children() if isinstance(matrix, ExpertLinear))
        return (self.config.experts - self.config.active) * each

    def forward(self, hidden: Tensor) -> Tensor:
        return self.route(hidden)[0]

    @apart
    def route(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The experts' weighted sum `(n, d)`, and the router logits `(n, e)` in float32 or wider."""
        logits = self._router_logits(hidden)
        chosen, weights = choose(logits, self.config.active, self.config.softmax)
        if torch.compiler.is_exporting():
            return self._every(hidden, torch.zeros_like(logits).scatter(1, chosen, weights)), logits
        every = hidden[:, None].expand(-1, self.config.active, -1).flatten(0, 1)  # (n k, d)
        rows, place, counts = grouped(chosen.flatten(), self.config.experts)
        mixed = self._experts(every.index_select(0, rows), counts)
        each = mixed.index_select(0, place).view(*chosen.shape, -1)  # (n, k, d), as the tokens stood
        return (each * weights[..., None].to(each.dtype)).sum(dim=1), logits

    def _every(self, hidden: Tensor, weights: Tensor) -> Tensor:
        """The same sum through all experts, weights `(n, e)` being 0 where not chosen: a graph cannot sort tokens."""
        matrices = [self.up.weight, self.down.weight] + ([self.gate.weight] if self.expert.gated else [])
        experts = enumerate(zip(*(matrix.unbind(0) for matrix in matrices), strict=True))
        each = [self._expert(hidden, *expert) * weights[:, index, None].to(hidden.dtype) for index, expert in experts]
        return torch.stack(each).sum(dim=0)

    def _router_logits(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            dtype = torch.promote_types(hidden.dtype, torch.float32)
            return nn.functional.linear(hidden.to(dtype), self.router.weight.to(dtype))

    def _experts(self, hidden: Tensor, counts: list[int]) -> Tensor:
        """Rows, of which the first `counts[0]` are expert 0's and so on -> as many."""
        matrices = [self.up.weight, self.down.weight]
        if self.expert.gated:
            matrices.append(self.gate.weight)
        # `unbind`, whose backward pass is one stack: that of an index would add a whole (e, f, d) for each expert.
        experts = zip(*(matrix.unbind(0) for matrix in matrices), strict=True)
        parts = torch.split(hidden, counts)
        mixed = [self._expert(rows, *expert) for rows, expert in zip(parts, experts, strict=True) if len(rows)]
        return torch.cat(mixed)

    def _expert(self, hidden: Tensor, up: Tensor, down: Tensor, gate: Tensor | None = None) -> Tensor:
        inner = fused.linear(hidden, up, None)
        if gate is not None and issubclass(self.expert, Gated):
            inner = self.expert.gated_by(fused.linear(hidden, gate, None), inner)
        else:
            inner = self.expert.activation(inner)
        return fused.linear(inner, down, None)


def grouped(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, list[int]]:
    """Choices by expert: the choice that stands in each row, the row of each choice, and how many rows each expert has.

    Where there are many, an expert's rows are filled up to a multiple of `ROW_BLOCK` with choice 0, which nobody reads
    there: for every new number of rows the library of matrix products would build its code anew.

    Shapes: experts `(n k,)`, the expert of each choice -> rows `(m,)`, m >= n k, and places `(n k,)`.
    """
    count = torch.bincount(experts, minlength=num_experts)
    block = ROW_BLOCK if len(experts) >= MANY_BLOCKS * ROW_BLOCK * num_experts else 1
    filled = (count + block - 1) // block * block
    order = experts.argsort(stable=True)
    shift = (filled - count).cumsum(0) - (filled - count)  # fillers that stand before each expert's rows
    standing = torch.arange(len(order), device=order.device) + shift[experts[order]]
    counts: list[int] = filled.tolist()
    rows = order.new_zeros(sum(counts)).scatter_(0, standing, order)
    return rows, torch.empty_like(order).scatter_(0, order, standing), counts


def choose(logits: Tensor, active: int, softmax: Literal["after", "before"]) -> tuple[Tensor, Tensor]:
    """The experts of each token, best first, and their weights: logits `(n, e)` -> `(n, k)` twice."""
    if softmax == "before":
        weights, chosen = logits.softmax(dim=-1).topk(active, dim=-1)
        return chosen, weights
    best, chosen = logits.topk(active, dim=-1)
    return chosen, best.softmax(dim=-1)


def _expert_class(kind: str) -> type[Plain] | type[Gated]:
    cls = lookup("feedforward", kind, "model.feedforward.expert")
    if not issubclass(cls, Plain | Gated):
        raise ConfigError(f"model.feedforward.expert: {kind!r} given, one feed-forward layer is expected")
    return cls
