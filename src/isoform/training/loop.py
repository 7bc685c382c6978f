"""The one training loop. It names no family, no objective and no adapter: it receives them by their protocols.

    for step: micro-batches -> sums -> one division by global counts -> clip -> rate(step) -> update
              -> log -> evaluate? -> checkpoint? -> stop?

Resuming restores weights, optimiser state and scalars; data order, masks and dropout are functions of the step, so
nothing else has to be restored and no batch is skipped or seen twice. The global random streams are kept all the
same, for parts that are not ours.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from isoform.checkpoints.forms import kept_tensors
from isoform.checkpoints.randomness import random_streams, restore_random_streams
from isoform.checkpoints.shards import copy_into, gathered, local_part, whole
from isoform.checkpoints.state import Loaded, optimizer_state_by_name, restore_optimizer
from isoform.contracts import RunState
from isoform.errors import NonFiniteError, OutOfMemoryError
from isoform.evaluation.evaluate import Evaluation
from isoform.layers.compiled import plainly
from isoform.registry import lookup
from isoform.training.feed import Feed, GlobalStep
from isoform.training.guards import Interrupts, Watch
from isoform.training.logs import RunLog
from isoform.training.prepare import Prepared
from isoform.training.progress import Progress
from isoform.training.saving import Writer
from isoform.training.sharding import Replica, shard
from isoform.training.step import LossModule, accumulate, set_rates, trained_parameters

# A folder beside the checkpoints for each way to choose one: the best by the selected metric, and by loss.
BEST_METRIC = "best-metric"
BEST_LOSS = "best-loss"


@dataclass
class Outcome:
    """What the loop leaves behind."""

    state: RunState
    seconds: float
    unused: list[str] = field(default_factory=list)
    # parameters that never received a gradient


class Loop:
    """Trains a prepared run in its folder."""

    def __init__(
        self,
        run: Prepared,
        folder: Path,
        accelerator: Accelerator,
        log: RunLog,
        evaluate: Callable[[nn.Module, str], Evaluation],
        progress: Progress,
    ) -> None:
        self.run = run
        self.folder = folder
        self.accelerator = accelerator
        self.log = log
        self.evaluate = evaluate
        self.progress = progress
        self.train = run.config.train
        self.names = trained_parameters(run.model, run.objective)
        helper = run.objective.helper
        self.companion: nn.Module | None = None if helper is None else helper.companion
        self.optimizers = run.optimizer.build(self.names, self.train.learning_rate, run.precision)
        self.module: nn.Module = LossModule(run.model, run.objective)
        self.replica: Replica | None = None
        if accelerator.is_fsdp2:
            self.replica = Replica(run.model)
            self.module, self.optimizers = shard(accelerator, self.module, self.optimizers)
            self.names = trained_parameters(run.model, run.objective)  # others now, under the same names
        else:
            self.module = accelerator.prepare(self.module)
        self.writer = Writer(log.event, run.generation)
        self.feed = self._feed()
        self.state = RunState()
        self.silent = set(self.names)
        self._saved_at = time.monotonic()
        self._saved_step = -1

    # ------------------------------------------------------------------------------------------------ the way through

    def resume(self, found: Loaded) -> None:
        """Goes on from a checkpoint."""
        copy_into(kept_tensors(self.run.model), found.tensors)
        if self.companion is not None:
            copy_into(self.companion.state_dict(), found.companion)
        restore_optimizer(self.optimizers, self.names, found.state.optimizer)
        self.state = found.state
        restore_random_streams(self.state.rng)
        self.silent = set(self.state.scalars.get("silent", []))
        if self.accelerator.scaler is not None and "scale" in self.state.scalars:
            self.accelerator.scaler.load_state_dict(self.state.scalars["scale"])
        self._saved_step = self.state.step
        self.log.event("resumed", step=self.state.step)

    def __call__(self) -> Outcome:
        """All remaining steps. Raises: NonFiniteError, OutOfMemoryError, Stopped."""
        started = time.monotonic()
        before = float(self.state.scalars.get("seconds", 0.0))
        self.module.train()
        assert self.run.batch_plan is not None
        watch = Watch(self.folder, self.train.step_minutes, self.accelerator.process_index)
        with Interrupts() as interrupts, watch, self.writer:
            watch.step(self.state.step + 1)
            for step in self.feed.ahead(self.state.step, self.run.num_steps):
                began = time.monotonic()
                totals, counts = self._update(step)
                self.state.step = step.step + 1
                self.state.tokens += round(counts["loss"] if "loss" in counts else sum(_lost(counts).values()))
                self._log(step, totals, counts, time.monotonic() - began)
                watch.rest()
                improved = self._evaluate_if_due()
                watch.step(self.state.step + 1)
                self.state.scalars["seconds"] = before + time.monotonic() - started
                if interrupts.requested is not None:
                    self._save()
                    self.writer.wait()
                    raise interrupts.stopped(f"stopped at step {self.state.step} of {self.run.num_steps}, saved")
                if self._patience_over():
                    self.log.event("early-stop", step=self.state.step)
                    break
                if improved or self._save_due():
                    self._save()
            if self._saved_step != self.state.step:
                self._save()
        if self.replica is not None:
            self.run.model = self.replica.fill(self.run.model)
        return Outcome(self.state, before + time.monotonic() - started, sorted(self.silent))

    def _feed(self) -> Feed:
        assert self.run.batch_plan is not None
        return Feed(
            self.run.datasets["train"],
            self.run.objective,
            self.run.batch_plan,
            seed=self.run.config.seed,
            micro_batch_tokens=self.train.micro_batch_tokens,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            pin=self.run.device.type == "cuda",
        )

    # ------------------------------------------------------------------------------------------------------ one update

    def _update(self, step: GlobalStep) -> tuple[dict[str, float], dict[str, float]]:
        counts = self._reduce(step.counts)
        while True:
            try:
                totals = accumulate(
                    self.module,
                    step.batches,
                    counts,
                    precision=self.run.precision,
                    device=self.run.device,
                    world=self.accelerator.num_processes,
                    no_sync=self.accelerator.no_sync,
                    backward=self.accelerator.backward,
                )
                break
            except (MemoryError, RuntimeError) as error:
                if not _out_of_memory(error):
                    raise
                step = self._smaller(step, error)
        self._grad_norm = self._clip()
        totals = self._reduce(totals)
        if not all(map(math.isfinite, totals.values())) or not (math.isfinite(self._grad_norm) or self._may_shrink()):
            self._refuse_non_finite(step, totals)
        self._note_silent()
        self._rate = set_rates(self.optimizers, self.run.factor(step.step))
        self._step()
        self._clear()
        return totals, counts

    def _smaller(self, step: GlobalStep, error: BaseException) -> GlobalStep:
        """The same step in half the micro-batch: memory runs out, the run stays the same."""
        self._clear()
        largest = max(batch.num_tokens for batch in step.batches)
        longest = max(batch.longest_tokens for batch in step.batches)
        if self.accelerator.num_processes > 1:  # the others have made their share of this step
            raise OutOfMemoryError(
                f"step {step.step + 1}: memory runs out, and one rank of several cannot take smaller steps than the "
                f"others; lower train.micro_batch_tokens ({self.feed.micro_batch_tokens}) and go on with --resume"
            ) from error
        if largest <= longest:
            raise OutOfMemoryError(
                f"step {step.step + 1}: one sequence of {longest} tokens does not fit into memory; "
                "lower text.max_tokens or the model's size"
            ) from error
        self.feed.micro_batch_tokens = max(longest, largest // 2)
        self.log.event("smaller-micro-batch", step=step.step, micro_batch_tokens=self.feed.micro_batch_tokens)
        return self.feed.at(step.step)

    def _step(self) -> None:
        """One step of every optimiser; in fp16, none where a scaled gradient was too large, and a smaller scale."""
        scaler = self.accelerator.scaler
        for optimizer in self.optimizers:
            optimizer.step() if scaler is None else scaler.step(optimizer)
        if scaler is not None:
            scaler.update()

    def _may_shrink(self) -> bool:
        """Whether a gradient that is not finite may come from the scale of fp16, which becomes smaller by itself."""
        scaler = self.accelerator.scaler
        return scaler is not None and scaler.get_scale() > 1

    def _clip(self) -> float:
        """The gradients' norm; they are no longer scaled, and no longer than `train.clip_norm`."""
        if self.accelerator.scaler is not None:
            for optimizer in self.optimizers:
                self.accelerator.scaler.unscale_(optimizer)
        limit = self.train.clip_norm if self.train.clip_norm is not None else float("inf")
        return float(whole(self.accelerator.clip_grad_norm_(list(self.names.values()), limit)))

    def _clear(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _note_silent(self) -> None:
        """Crosses out the parameters that have received a gradient by now."""
        asked = {name: self.names[name].grad for name in sorted(self.silent)}
        gradients = {name: local_part(gradient) for name, gradient in asked.items() if gradient is not None}
        if not gradients:
            return
        heard = torch.stack([gradient.any() for gradient in gradients.values()]).tolist()
        found = {name: float(flag) for name, flag in zip(gradients, heard, strict=True)}
        if self.replica is not None:
            found = self._reduce(found)
        self.silent -= {name for name, ranks in found.items() if ranks}

    def _reduce(self, values: dict[str, float]) -> dict[str, float]:
        """Sums over ranks, in double precision."""
        if self.accelerator.num_processes == 1:
            return values
        names = sorted(values)
        kind = torch.float32 if self.run.device.type == "mps" else torch.float64
        tensor = torch.tensor([values[name] for name in names], dtype=kind, device=self.run.device)
        summed = self.accelerator.reduce(tensor, reduction="sum").tolist()
        return dict(zip(names, summed, strict=True))

    def _refuse_non_finite(self, step: GlobalStep, totals: dict[str, float]) -> None:
        self._clear()
        lost = _lost(totals)
        bad = [f"{name} {value}" for name, value in lost.items() if not math.isfinite(value)]
        what = ", ".join(bad) or f"gradient norm {self._grad_norm}"
        self.log.event("non-finite", step=step.step, what=what, sample_ids=list(step.sample_ids))
        self.log.flush()
        raise NonFiniteError(
            f"step {step.step + 1}: {what}; no update was made, the last checkpoint is whole. Lower "
            f"train.learning_rate or lengthen the warm-up; the batch's sample ids are in {self.folder / 'events.jsonl'}"
        )

    # --------------------------------------------------------------------------------------------- logs and evaluation

    def _log(self, step: GlobalStep, totals: dict[str, float], counts: dict[str, float], seconds: float) -> None:
        means = {name: total / max(1.0, counts[name]) for name, total in totals.items()}
        loss = means["loss"] if "loss" in means else sum(_lost(totals).values()) / max(1.0, sum(_lost(counts).values()))
        tokens = step.num_tokens * self.accelerator.num_processes
        if self.state.step % self.train.log_every_steps == 0 or self.state.step == self.run.num_steps:
            parts = {f"loss_{name}": value for name, value in _lost(means).items() if name != "loss"}
            statistics = {name[1:]: value for name, value in means.items() if name.startswith("_")}
            self.log.step(
                {
                    "step": self.state.step,
                    "epoch": step.epoch,
                    "tokens": self.state.tokens,
                    "loss": loss,
                    **parts,
                    "lr": self._rate,
                    "grad_norm": self._grad_norm,
                    "tokens_per_second": tokens / max(1e-9, seconds),
                    **statistics,
                }
            )
        self.progress.step(self.state.step, loss, tokens)

    def _evaluate_if_due(self) -> bool:
        """Evaluates where the config asks for it; whether a checkpoint became the best so far."""
        if not self._evaluation_due():
            return False
        select = self.train.select
        began = time.monotonic()
        with plainly(self.run.model), self._whole_model() as model:
            evaluation = self.evaluate(model, select.split)
            asks_train = self.run.config.evaluate.train_examples is not None
            beside = self.evaluate(model, "train").rows if asks_train else []
        self.module.train()
        seconds = time.monotonic() - began
        self.log.evaluation(self.state.step, self.state.tokens, seconds, [*evaluation.rows, *beside])
        values = {row["metric"]: row["value"] for row in evaluation.rows}
        self.progress.evaluation(self.state.step, select.split, values)
        improved = self._keep_best(BEST_LOSS, "loss", values.get("loss"))
        if select.metric != "last":
            better = self._keep_best(BEST_METRIC, select.metric, values.get(select.metric))
            waited = 0 if better else int(self.state.scalars.get("waited", 0)) + 1
            self.state.scalars["waited"] = waited
            improved = improved or better
        return improved

    def _evaluation_due(self) -> bool:
        train, step = self.train, self.state.step
        if train.select.split not in self.run.datasets:
            return False
        if train.evaluate_every_steps is not None:
            return step % train.evaluate_every_steps == 0 or step == self.run.num_steps
        if train.evaluate_every_epochs is not None:
            assert self.run.batch_plan is not None
            every = max(1, round(train.evaluate_every_epochs * self.run.batch_plan.steps_per_epoch))
            return step % every == 0 or step == self.run.num_steps
        return step == self.run.num_steps and train.select.metric != "last"

    def _keep_best(self, folder: str, metric: str, value: float | None) -> bool:
        """Saves the weights where `value` is the best so far; NaN and missing values are never the best."""
        if value is None or not math.isfinite(value):
            return False
        best = self.state.scalars.get(folder)
        sign = 1 if lookup("metric", metric).higher_is_better else -1
        if best is not None and sign * value <= sign * best["value"]:
            return False
        self.state.scalars[folder] = {"step": self.state.step, "metric": metric, "value": value}
        with self._whole_model() as model:
            if self.accelerator.is_main_process:
                self.writer.model(self.folder / folder, model, self.run.tokenizer, self.state.step)
                if self.replica is not None:
                    self.writer.wait()  # before the replica is emptied
        return True

    def _patience_over(self) -> bool:
        return self.train.patience is not None and int(self.state.scalars.get("waited", 0)) >= self.train.patience

    # ----------------------------------------------------------------------------------------------------- checkpoints

    def _save_due(self) -> bool:
        if self.train.checkpoint_every_steps is not None:
            return self.state.step % self.train.checkpoint_every_steps == 0
        # Ranks must agree, and clocks do not: only steps that all ranks see the same way save by time.
        due = time.monotonic() - self._saved_at >= self.train.checkpoint_every_seconds
        return bool(self._reduce({"due": float(due)})["due"]) if self.state.step % 10 == 0 else False

    def _save(self) -> None:
        self.log.flush()
        self.state.scalars["silent"] = sorted(self.silent)
        if self.accelerator.scaler is not None:
            self.state.scalars["scale"] = self.accelerator.scaler.state_dict()
        assert self.run.batch_plan is not None
        epoch, offset = divmod(self.state.step, self.run.batch_plan.steps_per_epoch)
        self.state.cursor = {"epoch": epoch, "step_in_epoch": offset}
        self.state.rng = random_streams()
        self.state.optimizer = optimizer_state_by_name(self.optimizers, self.names)
        if self.replica is not None:
            self.state.optimizer = gathered(self.state.optimizer, keep=self.accelerator.is_main_process)
        companion = {} if self.companion is None else self.companion.state_dict()
        with self._whole_model() as model:
            beside = {name: whole(tensor) for name, tensor in companion.items()}
            if self.accelerator.is_main_process:
                folder, keep = self.folder / "checkpoints", self.train.keep_checkpoints
                self.writer.state(folder, model, self.run.tokenizer, self.state, keep, beside)
                if self.replica is not None:
                    self.writer.wait()
        self.accelerator.wait_for_everyone()
        self._saved_at = time.monotonic()
        self._saved_step = self.state.step

    def _whole_model(self) -> AbstractContextManager[nn.Module]:
        """The model as one, for what is not the loop's own; where it is sharded, all ranks have to ask for it."""
        return nullcontext(self.run.model) if self.replica is None else self.replica.filled(self.run.model)


def _out_of_memory(error: BaseException) -> bool:
    """Of a GPU, of Python, or of torch's allocator for processors, which has no error of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def _lost(parts: dict[str, float]) -> dict[str, float]:
    """The parts of the loss, without statistics."""
    return {name: value for name, value in parts.items() if not name.startswith("_")}


def planned_rates(run: Prepared) -> list[float]:
    """The learning rate of every step, before any is taken."""
    return [run.config.train.learning_rate * run.factor(step) for step in range(run.num_steps)]
