"""A disk that fails on command, and models small enough to save a hundred times."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from isoform import storage
from isoform.checkpoints.optimizers import optimizer_state_by_name
from isoform.contracts import RunState
from isoform.models.gpt2 import GPT2


class Killed(BaseException):
    """What stands for kill -9: no handler may do anything after it."""


class Disk:
    """Counts the four operations of `storage`, and fails or dies at one of them.

    at: number of the operation, from 1. when: `before` (a write is left half done) or `after` it. error: raised instead
    of dying. Power loss is simulated with every death: what was written and not yet synced loses its second half.
    """

    def __init__(self, at: int | None = None, when: str = "before", error: OSError | None = None) -> None:
        self.at, self.when, self.error = at, when, error
        self.operations: list[str] = []
        self.dead = False
        self.unsynced: set[Path] = set()

    def step(self, name: str) -> bool:
        """Counts an operation; True where it is the one to fail."""
        if self.dead:
            raise Killed
        self.operations.append(name)
        return len(self.operations) == self.at

    def fail(self) -> None:
        if self.error is not None:
            raise self.error
        self.dead = True
        for path in self.unsynced:
            if path.is_file():
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        raise Killed

    def write_blocks(self, path: Path, blocks: Iterable[bytes | memoryview]) -> None:
        failing = self.step("write")
        data = b"".join(bytes(block) for block in blocks)
        self.unsynced.add(path)
        path.write_bytes(data[: len(data) // 2] if failing and self.when == "before" else data)
        if failing:
            self.fail()

    def sync_file(self, path: Path) -> None:
        failing = self.step("sync")
        if failing and self.when == "before":
            self.fail()
        self.unsynced.discard(path)
        if failing:
            self.fail()

    def rename(self, path: Path, target: Path) -> None:
        failing = self.step("rename")
        if failing and self.when == "before":
            self.fail()
        path.replace(target)
        moved = {name for name in self.unsynced if name == path or path in name.parents}
        self.unsynced = (self.unsynced - moved) | {target / name.relative_to(path) for name in moved}
        if failing:
            self.fail()

    def remove(self, path: Path) -> None:
        failing = self.step("remove")
        files = sorted(path.rglob("*")) if path.is_dir() else []
        if failing and self.when == "before":
            for file in [file for file in files if file.is_file()][::2]:
                file.unlink()
            self.fail()
        self.real_remove(path)
        if failing:
            self.fail()

    real_remove = staticmethod(storage.remove)

    @contextmanager
    def installed(self) -> Iterator[Disk]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(storage, "write_blocks", self.write_blocks)
            patch.setattr(storage, "sync_file", self.sync_file)
            patch.setattr(storage, "sync_folder", self.sync_file)
            patch.setattr(storage, "rename", self.rename)
            patch.setattr(storage, "remove", self.remove)
            yield self


class Training:
    """A tiny model with Muon on its matrices and AdamW on the rest, after some updates on noise."""

    def __init__(self, seed: int = 0, **config: Any) -> None:
        sizes = {"num_layers": 1, "num_heads": 2, "width": 8, "vocab_size": 13, "max_positions": 6}
        self.model = GPT2.tiny(**{**sizes, **config})
        self.names = dict(self.model.named_parameters())
        matrices = [p for name, p in self.names.items() if p.ndim == 2 and name.startswith("blocks")]
        others = [p for p in self.names.values() if all(p is not matrix for matrix in matrices)]
        self.optimizers: list[torch.optim.Optimizer] = [torch.optim.Muon(matrices), torch.optim.AdamW(others)]
        self.step = 0
        self.seed = seed

    def update(self, steps: int = 1) -> Training:
        for _ in range(steps):
            self.step += 1
            draw = torch.Generator().manual_seed(1000 * self.seed + self.step)
            for parameter in self.names.values():
                parameter.grad = torch.randn(parameter.shape, generator=draw)
            for optimizer in self.optimizers:
                optimizer.step()
        return self

    def state(self) -> RunState:
        return RunState(
            step=self.step,
            tokens=100 * self.step,
            cursor={"epoch": 0, "step_in_epoch": self.step},
            rng={"words": [self.step, 2**80]},
            optimizer=optimizer_state_by_name(self.optimizers, self.names),
            scalars={"best": float("-inf"), "waited": 2},
        )

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two tables of tensors have the same names, types and bits."""
    return first.keys() == second.keys() and all(
        tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]) for name, tensor in first.items()
    )


@pytest.fixture
def disk() -> type[Disk]:
    return Disk


@pytest.fixture
def training() -> type[Training]:
    return Training


@pytest.fixture
def equal_tensors() -> Any:
    return same


@pytest.fixture
def killed() -> type[Killed]:
    return Killed
