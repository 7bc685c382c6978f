"""Learned scores by distance, as `attend` adds them: a vector for each head becomes blocks of equal diagonals."""

from __future__ import annotations

import torch
from torch import Tensor

from isoform.layers.blockwise import Plan


class Relative:
    """Learned scores by distance `(h, 2 r + 1)`, and the blocks made from them in one forward pass.

    Column r + d is what head x adds to the score of a key that stands d tokens before the query; a key farther away
    than r, to either side, counts as r away. An object serves one pass: its blocks belong to that pass's gradient.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self._made: dict[int, tuple[Plan, list[Tensor]]] = {}
        self._lines: dict[int, Tensor] = {}

    def biases(self, plan: Plan) -> list[Tensor]:
        """Of each block, `plan.bias` and the learned scores: `(1 or b, g, h/g t, s)`, once for all layers."""
        if id(plan) not in self._made:
            groups = plan.keys.heads
            blocks = [
                bias + self.block(take.shape[1], bias.shape[-1]).to(bias.dtype).reshape(groups, -1, bias.shape[-1])
                for take, bias in zip(plan.queries.take, plan.bias, strict=True)
            ]
            self._made[id(plan)] = plan, blocks
        return self._made[id(plan)][1]

    def line(self, reach: int) -> Tensor:
        """float32 `(h, 2 reach + 1)`: the score of key j and query i in the column reach + j - i, for all layers."""
        if reach not in self._lines:
            known = self.values.shape[1] // 2
            distance = torch.arange(reach, -reach - 1, -1, device=self.values.device)
            self._lines[reach] = self.values[:, distance.clamp(-known, known) + known].float()
        return self._lines[reach]

    def block(self, t: int, s: int) -> Tensor:
        """`(h, t, s)` for t queries and s keys of which the last stand together."""
        reach = self.values.shape[1] // 2
        # Along every diagonal of the block the distance is the same: i - j + s - t = s - 1 - (t - 1 - i + j).
        distance = torch.arange(s - 1, -t, -1, device=self.values.device)
        line = self.values[:, distance.clamp(-reach, reach) + reach]  # (h, t + s - 1)
        return line.unfold(1, s, 1).flip(1)
