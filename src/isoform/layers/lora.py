"""Low-rank layers: a frozen matrix plus the product of two thin ones, which alone are trained.

    y = W x + bias + s B A dropout(x)        s = alpha / r, or alpha / sqrt(r) where it is rank-stabilised

B is 0 at the start, so that an adapted model begins as its base. One matrix of ours may be several of another
library's (queries, keys and values): a low-rank layer therefore has the rows of W that it adds to.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from isoform.contracts import Batch
from isoform.errors import ConfigError
from isoform.layers.dropout import Dropout, token_keys
from isoform.layers.init import normal


class DropoutKeys:
    """The dropout keys of the pass that is under way: a pre-hook of the model writes them, low-rank layers read them.

    own: `(n,)` of the batch's tokens, source: of what an encoder reads beside them; None: no dropout.
    """

    def __init__(self) -> None:
        self.own: Tensor | None = None
        self.source: Tensor | None = None

    def __call__(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        batch: Batch = inputs[0]
        self.own = token_keys(batch)
        self.source = None if batch.source is None else token_keys(batch.source)


class LowRank(nn.Module):
    """s B A dropout(x), added to some rows of a matrix.

    rows: (first, end) of the matrix. scale: s.

    Shapes: x `(n, inputs)`, down (A) `(r, inputs)`, up (B) `(end - first, r)` -> `(n, end - first)`.
    Source: Hu et al. 2021, section 4.1; rank-stabilised: Kalajdzievski 2023. Differs: A is drawn from a normal
    distribution of the variance that PEFT's uniform one has, 1 / (3 inputs); dropout is keyed, see `layers.dropout`.
    """

    def __init__(self, inputs: int, rows: tuple[int, int], rank: int, *, scale: float, dropout: float) -> None:
        super().__init__()
        self.rows, self.scale = rows, scale
        self.down = nn.Parameter(torch.empty(rank, inputs))
        self.up = nn.Parameter(torch.zeros(rows[1] - rows[0], rank))
        self.dropout = Dropout(dropout)

    @torch.no_grad()
    def draw(self, seed: int, name: str) -> None:
        """First values: A by (seed, name), B = 0."""
        values = normal(self.down.shape, seed, f"{name}.down") / math.sqrt(3 * self.down.shape[1])
        self.down.copy_(values)
        self.up.zero_()

    def forward(self, hidden: Tensor, keys: Tensor | None) -> Tensor:
        thin = nn.functional.linear(self.dropout(hidden.to(self.down.dtype), keys), self.down)
        return self.scale * nn.functional.linear(thin, self.up)

    def product(self) -> Tensor:
        """s B A in float64: `(end - first, inputs)`."""
        return self.scale * (self.up.double() @ self.down.double())


class LowRankLinear(nn.Linear):
    """A linear layer with low-rank layers of any number of adapters, of which one or none is active.

    adapters: adapter -> part (`whole`, `query`, ...) -> `LowRank`; the parts of an adapter share no rows. from_source:
    whether it reads the encoder's tokens, not the batch's own. Parameters keep their names: `weight` and `bias`.
    packed: W in four bits and what unpacks it, made at the first pass where `bits` is 4; W itself stays on the host.

    Shapes: hidden `(n, inputs)` -> `(n, outputs)`.
    """

    def __init__(self, base: nn.Linear, keys: DropoutKeys, *, from_source: bool) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight = base.weight
        self.register_parameter("bias", base.bias)
        self.adapters = nn.ModuleDict()
        self.active: str | None = None
        self.keys, self.from_source = keys, from_source
        self.bits: int | None = None
        self.packed: tuple[Tensor, Any] | None = None
        self.train(base.training)

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Self:
        """What `to`, `half` and their like do to every tensor; a W of which four bits are used is left where it is."""
        weight = self._parameters["weight"]
        if self.bits is not None:
            self._parameters["weight"] = None
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            if self.bits is not None:
                self._parameters["weight"] = weight
        return self

    @property
    def parts(self) -> dict[str, LowRank]:
        """The active adapter's low-rank layers."""
        if self.active is None or self.active not in self.adapters:
            return {}
        chosen: Any = self.adapters[self.active]
        return dict(chosen.items())

    def _in_four_bits(self, hidden: Tensor) -> Tensor:
        """W x + bias by bitsandbytes, W rounded to NF4. Source: Dettmers et al. 2023 (QLoRA), section 3."""
        library = importlib.import_module("bitsandbytes")
        if self.packed is None:
            self.packed = library.functional.quantize_4bit(
                self.weight.data.to(hidden.device), quant_type="nf4", compress_statistics=True
            )
        values, how = self.packed
        output: Tensor = library.matmul_4bit(hidden, values.t(), bias=self.bias, quant_state=how)
        return output

    def forward(self, hidden: Tensor) -> Tensor:
        output = super().forward(hidden) if self.bits is None else self._in_four_bits(hidden)
        keys = self.keys.source if self.from_source else self.keys.own
        for part in self.parts.values():
            first, end = part.rows
            added = part(hidden, keys).to(output.dtype)
            # As a sum with zeros beside it: writing into rows of a tensor cannot be traced everywhere.
            output = output + nn.functional.pad(added, (first, self.out_features - end))
        return output

    @torch.no_grad()
    def merged(self) -> Tensor:
        """W + s B A, summed in float64 and rounded once, in the precision of W."""
        total = self.weight.double()
        for part in self.parts.values():
            total[slice(*part.rows)] += part.product()
        return total.to(self.weight.dtype)


def scale_of(rank: int, alpha: float, *, rank_stabilized: bool) -> float:
    """s: alpha / r, or alpha / sqrt(r)."""
    return alpha / (math.sqrt(rank) if rank_stabilized else rank)


def require_four_bits() -> None:
    """Raises: ConfigError that says what is missing for frozen matrices in four bits."""
    missing = [] if importlib.util.find_spec("bitsandbytes") else ["bitsandbytes (pip install bitsandbytes)"]
    missing += [] if torch.cuda.is_available() else ["a CUDA device"]
    if missing:
        raise ConfigError(f"adapter.base_bits: 4 needs {' and '.join(missing)}; set it to null: the base as it is")
