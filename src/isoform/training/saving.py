"""Checkpoints written while training goes on: from a copy, by a thread, one step at a time.

What takes long is waiting for the disk, not the copy. Nothing is lost by it: a folder appears whole or not at all, in
the order in which they were asked for, and the loop ends when all of them are there. After one that failed none
follows: a training state may name a best model only where that is on the disk.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from isoform import machine
from isoform.checkpoints.forms import save_model
from isoform.checkpoints.state import save_state
from isoform.contracts import RunState, Tokenizer
from isoform.errors import DiskError

# A copy of weights and optimiser may take so much of the machine's memory; where it is larger, the loop waits.
COPY_FRACTION = 1 / 16


class Writer:
    """Writes models and training states. Raises: DiskError of an earlier one at the next, or at the end.

    generation: as of `save_model`.
    on_event: told as `on_event("checkpoint-lost", problem=...)` of what failed while another error ended the run.
    """

    def __init__(self, on_event: Callable[..., None], generation: Mapping[str, Any] | None = None) -> None:
        self._on_event = on_event
        self._generation = generation
        self._failed: BaseException | None = None
        # the first job's that failed
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="isoform-save")
        self._pending: list[Future[object]] = []
        self._copied: tuple[int, nn.Module] | None = None
        # the step of the copy, and the copy

    def model(self, folder: Path, model: nn.Module, tokenizer: Tokenizer, step: int) -> None:
        """`save_model` of the model as it is now, at `step`."""
        taken = self._copy(model, step)
        self._write(lambda: save_model(folder, taken, tokenizer, generation=self._generation), taken is model)

    def state(
        self,
        folder: Path,
        model: nn.Module,
        tokenizer: Tokenizer,
        state: RunState,
        keep: int,
        companion: Mapping[str, Tensor],
    ) -> None:
        """`save_state` of all of it as it is now."""
        taken = self._copy(model, state.step)
        if taken is not model:
            optimizer = {name: _on_host(values) for name, values in state.optimizer.items()}
            state = replace(copy.deepcopy(replace(state, optimizer={})), optimizer=optimizer)
            companion = _on_host(companion)
        self._write(lambda: save_state(folder, taken, tokenizer, state, keep=keep, companion=companion), taken is model)
        self._copied = None  # nothing more is saved of this step

    def wait(self) -> None:
        """Until all is on the disk."""
        pending, self._pending, self._copied = self._pending, [], None
        for job in pending:
            job.result()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown(wait=True)
        if error is None:
            self.wait()
        elif self._failed is not None and error is not self._failed:
            with contextlib.suppress(DiskError):  # the disk may be too full for that, too
                self._on_event("checkpoint-lost", problem=str(self._failed))

    def _write(self, job: Callable[[], object], at_once: bool) -> None:
        self._pending.append(self._pool.submit(self._attempt, job))
        if at_once:
            self.wait()

    def _attempt(self, job: Callable[[], object]) -> None:
        """In the thread: the job, if all before it went well."""
        if self._failed is not None:
            raise self._failed
        try:
            job()
        except BaseException as error:
            self._failed = error
            raise

    def _copy(self, model: nn.Module, step: int) -> nn.Module:
        """The model as it is now, on the host, one copy a step; the model itself where there is no room for another."""
        if self._copied is not None and self._copied[0] == step:
            return self._copied[1]
        self.wait()
        tensors = [*model.parameters(), *model.buffers()]
        # Weights and the two moments of AdamW.
        if (
            3 * sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            > machine.memory_bytes() * COPY_FRACTION
        ):
            return model
        made = {id(tensor): _like(tensor) for tensor in tensors}
        taken = copy.deepcopy(model, made)
        self._copied = step, taken
        return taken


def _like(tensor: Tensor) -> Tensor:
    data = tensor.detach().to("cpu", copy=True)
    return nn.Parameter(data, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data


def _on_host(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
        for name, value in values.items()
    }
