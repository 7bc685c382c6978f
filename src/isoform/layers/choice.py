"""Kernels and threads that serve this machine best: measured in about a second, once, and kept in the user's cache.

A run or a study records its choice and keeps it: with other kernels or threads its numbers would be others.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from isoform import machine
from isoform.contracts import Sequences
from isoform.errors import ConfigError
from isoform.layers import fused, kernels
from isoform.layers.attention import attend
from isoform.layers.feedforward import Swiglu
from isoform.layers.norm import RMSNorm
from isoform.layers.position import inverse_frequencies, rotate_half_split

PLAIN, COMPILED, TILES = "plain", "compiled", "tiles"
KINDS = {
    PLAIN: "plain torch",
    COMPILED: "C++ kernels compiled for this processor",
    TILES: "C++ kernels compiled for this processor, attention on its matrix tiles",
}
# Half the threads must be so much faster before the other half is left idle.
WORTHWHILE_RATIO = 1.1
KERNEL_SECONDS, THREAD_SECONDS = 0.6, 0.4
CACHE = "kernels.json"
# What the kernels are tried on: 8 sequences of 128 tokens, 4 heads of 64 channels, a vocabulary of 2,048.
SEQUENCES, TOKENS, HEADS, HEAD_WIDTH, VOCABULARY = 8, 128, 4, 64, 2048


def choose(precision: str, device: torch.device, recorded: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """{native: plain | compiled | tiles, threads, speedup, why}, which this process follows from now on.

    speedup: of what the kernels take over, against plain torch in the same precision; None where it was not measured.
    recorded: the choice that a run or study was begun with, which is kept.

    Raises: ConfigError where the kernels of that choice are not here.
    """
    if device.type == "cpu":
        machine.keep_freed_memory()
    if recorded:
        chosen = _kept(recorded)
    else:
        kind, speedup, why = _native(precision, device)
        chosen = {"native": kind, "threads": _threads(precision, device), "speedup": speedup, "why": why}
    kernels.switch(chosen["native"] != PLAIN)
    if "OMP_NUM_THREADS" not in os.environ and chosen["threads"] != torch.get_num_threads():
        torch.set_num_threads(chosen["threads"])
    return chosen


@contextmanager
def held(chosen: Mapping[str, Any]) -> Iterator[None]:
    """Within it this process, and those that it starts, use the kernels of `chosen`, or plain torch, unmeasured."""
    before = os.environ.get("ISOFORM_NATIVE")
    os.environ["ISOFORM_NATIVE"] = "0" if chosen["native"] == PLAIN else "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["ISOFORM_NATIVE"]
        else:
            os.environ["ISOFORM_NATIVE"] = before


def available() -> str:
    """The best kind of kernels that is here, whether it is used or not."""
    library = kernels.library()
    return PLAIN if library is None else TILES if library.has_tiles else COMPILED


def _kept(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Raises: ConfigError."""
    wanted, here = str(recorded["native"]), available()
    if wanted not in (PLAIN, here):
        reason = kernels.why_plain() if here == PLAIN else f"here are {KINDS[here]}"
        raise ConfigError(
            f"begun with {KINDS.get(wanted, wanted)}, which are not here ({reason}), and without them its numbers "
            "would be others; go on where it was begun, or start anew with another --out"
        )
    return dict(recorded)


def _native(precision: str, device: torch.device) -> tuple[str, float | None, str]:
    """Kind, speedup, why."""
    if device.type != "cpu":
        return PLAIN, None, f"they are for processors, this runs on {device.type}"
    library = kernels.library()
    if library is None:
        return PLAIN, None, kernels.why_plain()
    if os.environ.get("ISOFORM_NATIVE") == "1":
        return available(), None, "asked for by ISOFORM_NATIVE=1, as a study does of its runs"
    key = f"{library.key} | {precision} | {torch.get_num_threads()} threads"
    speedup = machine.remembered(CACHE, key, lambda: kernel_speedup(precision))
    if speedup <= 1:
        return PLAIN, speedup, f"plain torch is faster here: the kernels reach {speedup:.2f} times its speed"
    return available(), speedup, f"{speedup:.2f} times as fast as plain torch in what they take over, {precision}"


def _threads(precision: str, device: torch.device) -> int:
    """All that there are, or half where they are hindrances, as the two threads of one core can be."""
    most = torch.get_num_threads()
    if device.type != "cpu" or "OMP_NUM_THREADS" in os.environ or most != machine.threads() or most < 2:
        return most
    key = f"{machine.cpu_model()} | torch {torch.__version__} | {precision} | half of {most} threads"
    speedup = machine.remembered(CACHE, key, lambda: half_speedup(precision, most))
    return most // 2 if speedup >= WORTHWHILE_RATIO else most


def kernel_speedup(precision: str) -> float:
    """Time of plain torch over that of the kernels in one forward and backward pass of what they take over.

    Matrix products are not among it: they are torch's either way. The fastest of several tries, in turns.
    """
    work, before = _work(precision), kernels.switched_on()

    def way(on: bool) -> Callable[[], None]:
        def run() -> None:
            kernels.switch(on)
            work()

        return run

    try:
        best = machine.race({PLAIN: way(False), COMPILED: way(True)}, KERNEL_SECONDS)
    finally:
        kernels.switch(before)
    return best[PLAIN] / best[COMPILED]


def half_speedup(precision: str, most: int) -> float:
    """Time of a training block with `most` threads over that with half of them."""
    block = machine.training_block(precision)

    def way(threads: int) -> Callable[[], None]:
        def run() -> None:
            torch.set_num_threads(threads)
            block()

        return run

    try:
        best = machine.race({"all": way(most), "half": way(most // 2)}, THREAD_SECONDS)
    finally:
        torch.set_num_threads(most)
    return best["all"] / best["half"]


def _work(precision: str) -> Callable[[], None]:
    """A forward and backward pass of norm, rotary positions, attention, gated activation and cross-entropy."""
    draw = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    n, width = SEQUENCES * TOKENS, HEADS * HEAD_WIDTH

    def leaf(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=draw).to(of).requires_grad_()

    sequences = Sequences([TOKENS] * SEQUENCES)
    norm = RMSNorm(RMSNorm.Config(), width)
    torch.nn.init.ones_(norm.weight)
    hidden = leaf(n, width, of=torch.float32)
    query, key, value = (leaf(n, HEADS, HEAD_WIDTH) for _ in range(3))
    gate, up, logits = leaf(n, 4 * width), leaf(n, 4 * width), leaf(n, VOCABULARY)
    targets = torch.randint(0, VOCABULARY, (n,), generator=draw)
    angle = (torch.arange(n) % TOKENS)[:, None] * inverse_frequencies(HEAD_WIDTH, 10_000.0, torch.device("cpu"))
    wave = angle.cos()[:, None].to(dtype), angle.sin()[:, None].to(dtype)  # (n, 1, k/2)
    leaves = [hidden, query, key, value, gate, up, logits, *norm.parameters()]

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            turned, read = rotate_half_split(query, *wave), rotate_half_split(key, *wave)
            mixed = attend(turned, read, value, sequences, sequences, causal=True)  # (n, h, k)
            losses = fused.nats(logits, targets)
            if losses is None:
                losses = functional.cross_entropy(logits.float(), targets, reduction="none")
            outputs = [norm(hidden), mixed, Swiglu.gated_by(gate, up), losses]
        torch.autograd.grad(outputs, leaves, [torch.ones_like(output) for output in outputs])

    return run
