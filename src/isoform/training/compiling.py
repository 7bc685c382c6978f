"""Whether a run's blocks are compiled: measured on its own first batch where the run is long, and recorded.

Compiling takes a minute or more, which only hours repay; and on a processor whose kernels are here it mostly loses.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from isoform import machine
from isoform.checkpoints.randomness import random_streams, restore_random_streams
from isoform.errors import ConfigError
from isoform.layers import kernels
from isoform.layers.compiled import blocks, compile_blocks, missing, plainly, uncompile_blocks
from isoform.storage import fingerprint
from isoform.training import ranks
from isoform.training.feed import Feed
from isoform.training.prepare import Prepared
from isoform.training.step import LossModule, accumulate

# A run that takes less than so many seconds, or so few steps that no time need be spent to find that out, is too short.
WORTH_SECONDS, WORTH_STEPS = 1200.0, 200
# Compiled blocks must be so much faster: by less, the measurement may err.
WORTHWHILE_RATIO = 1.05
# For both ways together, without the compiling itself.
RACE_SECONDS = 5.0
CACHE = "compile.json"

Choice = tuple[bool, float | None, str]


def choose(run: Prepared, accelerator: Accelerator, earlier: Mapping[str, Any]) -> dict[str, Any]:
    """{on, speedup, why}, after which the model's blocks are compiled or not.

    speedup: of a forward and backward pass of a micro-batch, None where it was not measured. earlier: the manifest
    that the run was begun with, empty for a new one; its choice is kept.

    Raises: ConfigError where blocks are to be compiled and nothing here does it.
    """
    on, speedup, why = _choice(run, accelerator, earlier)
    lacking = missing(run.device)
    if on and lacking is not None:
        what = "begun with compiled blocks" if earlier else "train.compile: on given"
        raise ConfigError(f"{what}, but {lacking}; install it, or start anew with train.compile: off")
    compile_blocks(run.model) if on else uncompile_blocks(run.model)
    return {"on": on, "speedup": speedup, "why": why}


def _choice(run: Prepared, accelerator: Accelerator, earlier: Mapping[str, Any]) -> Choice:
    asked = run.config.train.compile
    if earlier:
        begun = earlier.get("compile") or {"on": False, "speedup": None, "why": "begun without"}
        return begun["on"], begun["speedup"], begun["why"]
    if asked != "auto":
        return asked == "on", None, "asked for"
    lacking = missing(run.device)
    if lacking is not None:
        return False, None, lacking
    if "ISOFORM_NATIVE" in os.environ:
        return False, None, "runs of a study are compared with one another; say on to have all of them compiled"
    if accelerator.is_fsdp2:
        return False, None, "sharded parameters are not measured; say on to have blocks compiled"
    if run.num_steps < WORTH_STEPS or not blocks(run.model):
        return False, None, f"{run.num_steps} steps are too few to repay it"
    return _measured(run, accelerator)


def _measured(run: Prepared, accelerator: Accelerator) -> Choice:
    rng = random_streams()
    first = _Pass(run, accelerator)
    try:
        first()
        began = time.perf_counter()
        first()
        expected = ranks.mean((time.perf_counter() - began) * first.number, accelerator)
        if expected < WORTH_SECONDS:
            return False, None, f"about {expected:.0f} s of training are too few to repay it"
        speedup = machine.remembered(CACHE, _key(run, first), lambda: _speedup(run.model, first))
        speedup = ranks.mean(speedup, accelerator)
    except Exception as error:  # of the compiler or of too little memory, whatever it is: a run goes on without
        return False, None, f"not measured: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    finally:
        first.module.zero_grad(set_to_none=True)
        restore_random_streams(rng)
    if speedup < WORTHWHILE_RATIO:
        return False, speedup, f"compiled blocks reach {speedup:.2f} times the speed of those that are not"
    return True, speedup, f"compiled blocks are {speedup:.2f} times as fast"


class _Pass:
    """A forward and backward pass of the run's first micro-batch, which leaves nothing behind; `number`: in the run."""

    def __init__(self, run: Prepared, accelerator: Accelerator) -> None:
        assert run.batch_plan is not None
        feed = Feed(
            run.datasets["train"],
            run.objective,
            run.batch_plan,
            seed=run.config.seed,
            micro_batch_tokens=run.config.train.micro_batch_tokens,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
        )
        step = feed.at(0)
        self.run, self.batch, self.counts = run, step.batches[0], step.counts
        self.processes = accelerator.num_processes
        self.number = run.num_steps * len(step.batches)
        self.module = LossModule(run.model, run.objective).train()

    def __call__(self) -> None:
        accumulate(self.module, [self.batch], self.counts, precision=self.run.precision, device=self.run.device)
        self.module.zero_grad(set_to_none=True)
        if self.run.device.type == "cuda":
            torch.cuda.synchronize(self.run.device)


def _speedup(model: nn.Module, once: _Pass) -> float:
    """Time of a pass as it is over that with compiled blocks."""

    def plain() -> None:
        with plainly(model):
            once()

    compile_blocks(model)
    taken = machine.shares({"plain": plain, "compiled": once}, RACE_SECONDS)
    return taken["plain"] / taken["compiled"]


def _key(run: Prepared, first: _Pass) -> str:
    """What decides it: machine, torch, kernels, precision, model, adapter, and how much passes through at once."""
    library = kernels.library() if kernels.switched_on() else None
    on = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else machine.cpu_model()
    train = run.config.train
    parts = [run.resolved["model"], run.resolved["adapter"], run.resolved["objective"], train.recompute]
    shape = fingerprint([*parts, train.micro_batch_tokens, run.config.text.max_tokens])
    made_of = "plain torch" if library is None else library.key
    tokens = 2 ** round(math.log2(max(1, first.batch.num_tokens)))
    facts = [f"{on} | torch {torch.__version__} | {made_of} | {run.precision} | {torch.get_num_threads()} threads"]
    return " | ".join([*facts, f"{first.processes} processes", f"about {tokens} tokens", shape])
