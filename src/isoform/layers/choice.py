"""Precision, kernels and threads that serve a model best on this machine: measured on a block of its shape in about a
second, once, and kept in the user's cache.

A run or a study records its choice and keeps it: with another its numbers would be others.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Several
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from isoform import machine
from isoform.contracts import Sequences
from isoform.errors import ConfigError
from isoform.layers import fused, kernels, varlen
from isoform.layers.block import Block, SelfAttention, Stream
from isoform.layers.dropout import mix64
from isoform.layers.init import initialize
from isoform.registry import component

PLAIN, COMPILED, TILES = "plain", "compiled", "tiles"
KINDS = {
    PLAIN: "plain torch",
    COMPILED: "C++ kernels compiled for this processor",
    TILES: "C++ kernels compiled for this processor, attention on its matrix tiles",
}
# Half the threads must be so much faster before the other half is left idle.
WORTHWHILE_RATIO = 1.1
# bf16 must be so much faster than fp32 before its lower precision is worth having.
WORTHWHILE_BF16_RATIO = 1.2
PRECISION_SECONDS, KERNEL_SECONDS, THREAD_SECONDS = 0.5, 0.4, 0.4
CACHE = "kernels.json"
# Tokens of some sequences, which are ragged as in a run; how often they stand in a narrow and in a wide block, what is
# wide, and some vocabulary.
LENGTHS, REPEATS, FEW_REPEATS, WIDE, VOCABULARY = (128, 61, 197, 126), 2, 1, 512, 2048
DROPOUT = 0.1
# Wider blocks are measured at this width, heads and all in proportion: matrix products rule them all alike.
WIDEST = 1024


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a model's blocks decides in which precision and by which kernels they are fastest."""

    width: int = 256
    num_heads: int = 4
    num_kv_heads: int = 4
    head_width: int = 64
    feedforward_width: int = 1024
    feedforward: str = "gelu"
    # its kind
    position: str = "none"
    # rope, or none: any other costs little
    drops: bool = False
    # whether there is dropout

    @classmethod
    def of(cls, config: Any) -> Shape:
        """That of a family's config."""
        resolved = getattr(config, "resolved", None) or config.model_dump
        whole = resolved() if callable(resolved) else resolved
        heads, inner = whole["num_heads"], whole.get("feedforward") or {"kind": "geglu"}
        return cls(
            width=whole["width"],
            num_heads=heads,
            num_kv_heads=whole.get("num_kv_heads") or heads,
            head_width=whole.get("head_width") or whole["width"] // heads,
            feedforward_width=whole.get("feedforward_width") or 4 * whole["width"],
            feedforward=inner.get("expert", inner["kind"]),
            position="rope" if (whole.get("position") or {}).get("kind") == "rope" else "none",
            drops=any(rate for name, rate in whole.items() if name.endswith("dropout")),
        )

    @property
    def bounded(self) -> Shape:
        """The same, or at most `WIDEST` wide in the same proportions."""
        if self.width <= WIDEST:
            return self
        part = self.width / WIDEST
        heads = max(1, round(self.num_heads / part))
        groups = max(1, round(heads * self.num_kv_heads / self.num_heads))
        heads = heads // groups * groups
        inner = round(self.feedforward_width / part)
        return replace(self, width=WIDEST, num_heads=heads, num_kv_heads=groups, feedforward_width=inner)

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in asdict(self).items())


def choose_precision(asked: str, device: torch.device, shapes: Several[Shape] = ()) -> str:
    """`machine.choose_precision`; for `auto` on a CPU bf16 where blocks of all these shapes train faster in it."""
    return machine.choose_precision(asked, device, lambda: all(map(fast_bf16, shapes or (Shape(),))))


def choose(
    precision: str, device: torch.device, recorded: Mapping[str, Any] | None = None, shapes: Several[Shape] = ()
) -> dict[str, Any]:
    """{native: plain | compiled | tiles, threads, speedup, why}, which this process follows from now on.

    speedup: of a training block of the shape that gains least, against plain torch in the same precision; None where
    it was not measured. recorded: the choice that a run or study was begun with, which is kept.

    Raises: ConfigError where the kernels of that choice are not here.
    """
    if device.type == "cpu":
        machine.keep_freed_memory()
    if recorded:
        chosen = _kept(recorded)
    else:
        kind, speedup, why = _native(precision, device, shapes or (Shape(),))
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


def _native(precision: str, device: torch.device, shapes: Several[Shape]) -> tuple[str, float | None, str]:
    """Kind, speedup, why."""
    if device.type != "cpu":
        return PLAIN, None, f"they are for processors, this runs on {device.type} with {varlen.kernel_of(device)}"
    library = kernels.library()
    if library is None:
        return PLAIN, None, kernels.why_plain()
    if os.environ.get("ISOFORM_NATIVE") == "1":
        return available(), None, "asked for by ISOFORM_NATIVE=1, as a study does of its runs"
    speedups = {shape: _remembered_speedup(library, precision, shape) for shape in shapes}
    worst = min(speedups, key=lambda shape: speedups[shape])
    speedup = speedups[worst]
    where = f"in a block of width {worst.width}, {precision}"
    if speedup <= 1:
        return PLAIN, speedup, f"plain torch is faster here: the kernels reach {speedup:.2f} times its speed {where}"
    return available(), speedup, f"{speedup:.2f} times as fast as plain torch {where}"


def _remembered_speedup(library: kernels.Library, precision: str, shape: Shape) -> float:
    key = f"{library.key} | {precision} | {shape} | {torch.get_num_threads()} threads"
    return machine.remembered(CACHE, key, lambda: kernel_speedup(precision, shape))


def _threads(precision: str, device: torch.device) -> int:
    """All that there are, or half where they are hindrances, as the two threads of one core can be."""
    most = torch.get_num_threads()
    if device.type != "cpu" or "OMP_NUM_THREADS" in os.environ or most != machine.threads() or most < 2:
        return most
    key = f"{machine.cpu_model()} | torch {torch.__version__} | {precision} | half of {most} threads"
    speedup = machine.remembered(CACHE, key, lambda: half_speedup(precision, most))
    return most // 2 if speedup >= WORTHWHILE_RATIO else most


def fast_bf16(shape: Shape) -> bool:
    """Whether such a block trains at least 1.2 times as fast in bf16 as in fp32, each by its better kernels."""
    library = kernels.library()
    kinds = _kinds()
    made_of = "plain torch" if library is None else f"{library.key} {' or '.join(kinds)}"
    key = f"{machine.cpu_model()} | torch {torch.__version__} | {made_of} | bf16 | {shape}"
    key += f" | {torch.get_num_threads()} threads"
    return machine.remembered(CACHE, key, lambda: bf16_speedup(shape)) >= WORTHWHILE_BF16_RATIO


def _kinds() -> list[str]:
    """What this process may use: one where it is told which."""
    if kernels.library() is None:
        return [PLAIN]
    return [available()] if os.environ.get("ISOFORM_NATIVE") == "1" else [PLAIN, available()]


def bf16_speedup(shape: Shape) -> float:
    """Time of a training block in fp32 over that in bf16, each with the kernels that are better for it."""
    taken = _raced(shape, ("fp32", "bf16"), _kinds(), PRECISION_SECONDS)
    of = {precision: min(taken[precision, kind] for kind in _kinds()) for precision in ("fp32", "bf16")}
    return of["fp32"] / of["bf16"]


def kernel_speedup(precision: str, shape: Shape) -> float:
    """Time of a training block in plain torch over that with the kernels."""
    taken = _raced(shape, (precision,), (PLAIN, COMPILED), KERNEL_SECONDS)
    return taken[precision, PLAIN] / taken[precision, COMPILED]


def _raced(shape: Shape, precisions: Several[str], kinds: Several[str], seconds: float) -> dict[tuple[str, str], float]:
    """(precision, kind) -> share of the time of a forward and backward pass of a block; they take turns."""
    before = kernels.switched_on()

    def way(work: Callable[[], None], kind: str) -> Callable[[], None]:
        def run() -> None:
            kernels.switch(kind != PLAIN)
            work()

        return run

    works = {precision: _work(precision, shape.bounded) for precision in precisions}
    ways = {(precision, kind): way(works[precision], kind) for precision in precisions for kind in kinds}
    try:
        return machine.shares(ways, seconds)
    finally:
        kernels.switch(before)


def half_speedup(precision: str, most: int) -> float:
    """Time of a training block with `most` threads over that with half of them."""
    block = machine.training_block(precision)

    def way(threads: int) -> Callable[[], None]:
        def run() -> None:
            torch.set_num_threads(threads)
            block()

        return run

    try:
        taken = machine.shares({"all": way(most), "half": way(most // 2)}, THREAD_SECONDS)
    finally:
        torch.set_num_threads(most)
    return taken["all"] / taken["half"]


def _work(precision: str, shape: Shape) -> Callable[[], None]:
    """A forward and backward pass of a block, and of the cross-entropy of some logits."""
    draw = torch.Generator().manual_seed(0)
    lengths = [*LENGTHS] * (FEW_REPEATS if shape.width > WIDE else REPEATS)
    n = sum(lengths)
    block, position = _block(shape)
    hidden = torch.randn(n, shape.width, generator=draw).requires_grad_()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    logits = torch.randn(n, VOCABULARY, generator=draw).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (n,), generator=draw)
    sequences, positions = Sequences(lengths), torch.cat([torch.arange(length) for length in lengths])
    keys = mix64(torch.arange(n)) if shape.drops else None
    leaves = [hidden, logits, *block.parameters()]

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            output: Tensor = block(hidden, Stream(positions, sequences, position, keys))
            losses = fused.nats(logits, targets)
            if losses is None:
                losses = functional.cross_entropy(logits.float(), targets, reduction="none")
        torch.autograd.grad([output, losses], leaves, [torch.ones_like(output), torch.ones_like(losses)])

    return run


def _block(shape: Shape) -> tuple[Block, Any]:
    """A block of a decoder, and its position scheme."""
    width, heads = shape.width, shape.num_heads
    cls, options = component("feedforward", {"kind": shape.feedforward}, "model.feedforward")
    scheme, position = component("position", {"kind": shape.position}, "model.position")
    norm_class, norm = component("norm", {"kind": "layernorm"}, "model.norm")
    attention = SelfAttention(
        width,
        heads,
        shape.num_kv_heads,
        layer=0,
        causal=True,
        window=None,
        bias=not cls.gated,
        dropout=DROPOUT,
        head_width=shape.head_width,
    )
    inner = cls(options, width, shape.feedforward_width, bias=not cls.gated)
    norms = norm_class(norm, width), norm_class(norm, width)
    block = Block(attention, inner, *norms, norm_first=True, dropout=DROPOUT)
    initialize(block, 0, num_layers=None)
    made = scheme(position, width=width, num_heads=heads, head_width=shape.head_width, max_positions=max(LENGTHS))
    return block, made
