"""What this machine can do, what training makes of it, and where the time of a step goes.

GFLOP/s = tokens/s x (forward + backward FLOPs of a token) / 1e9
fraction = GFLOP/s / GFLOP/s of bare matrix products at the model's own shapes, in the same precision
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from isoform import machine
from isoform.config import RunConfig
from isoform.errors import ConfigError
from isoform.layers.choice import KINDS
from isoform.models.accounting import accounts
from isoform.training.feed import FRIENDLY_TOKENS
from isoform.training.plan import peak_memory_bytes
from isoform.training.prepare import Prepared, fits, prepare
from isoform.training.updates import CLIP, Update, restoring, updates

# A small GPT that needs no data but what comes with isoform.
DEFAULT: dict[str, Any] = {
    "name": "bench",
    "data": {"path": "builtin:python-docs", "splits": {"train": 1.0}, "overlap": "keep"},
    "text": {"tokenizer": {"kind": "char"}, "max_tokens": 256},
    "model": {"family": "gpt2", "num_layers": 4, "num_heads": 4, "width": 256, "dropout": 0.0},
    "objective": {"kind": "causal"},
    "train": {"max_steps": 100_000, "batch_tokens": 8192, "learning_rate": 1e-3},
}
DEFAULT_SECONDS = 10.0
WARM_STEPS, LEAST_STEPS, PROFILED_STEPS = 2, 3, 3
# More rows make a product no faster; fewer are what the model has.
MAX_ROWS = 4096
COPIED_BYTES = 1 << 28
GROUPS = ("matrix products", "attention", "norms and elementwise", "loss", "optimiser", "data", "other")
# Parts of the names of torch's operations; the first group that one of an operation's callers belongs to has it.
_OWNERS = {
    "optimiser": ("Optimizer.", CLIP),
    "attention": ("_Attention", "_ToBlocks", "_FromBlocks", "scaled_dot_product", "_flash_attention"),
    "loss": ("_Nats", "log_softmax", "LogSoftmax", "nll_loss", "NllLoss", "cross_entropy", "mse_loss"),
}
_PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::matmul", "aten::linear", "aten::_mkldnn"}
_OWN_KERNELS = ("_Norm", "_Gated", "_Rotate", "_Drop", "_Biased")


def bench(config: RunConfig, seconds: float = DEFAULT_SECONDS) -> dict[str, Any]:
    """{precision, kernels, ceilings, step, shares, peak_memory_bytes, ...} of the config's real updates.

    Nothing is kept. seconds: about how long updates are timed; the ceilings and the profile take about as long again.
    Units: GFLOP/s, GB/s (1e9 bytes read and written), tokens a second; shares are of a step's time and sum to 1.
    Raises: what `prepare` raises; ConfigError for a model that is not trained step by step.
    """
    if fits(config):
        raise ConfigError(f"model.family: {config.model['family']} is fitted in one go and has no steps to measure")
    run = prepare(config)
    with restoring(run):
        made, shares = _timed(run, seconds)
    tokens = sum(update.num_tokens for update in made)
    taken = sum(update.total_seconds for update in made)
    length = max(1, round(tokens / sum(update.num_sequences for update in made)))
    model = accounts(run.model, length)
    flops = model["flops_forward_per_token"] + model["flops_backward_per_token"]
    rate = tokens / taken
    rows = min(MAX_ROWS, config.train.micro_batch_tokens, tokens // len(made))
    rows = -(-rows // FRIENDLY_TOKENS) * FRIENDLY_TOKENS
    ceilings = _ceilings(run, rows, seconds / 2)
    reached = rate * flops / 1e9
    # What fp16 could reach is not measured: products are, in the two that every device has.
    ceiling = ceilings["fp32_gflops" if run.precision == "fp32" else "bf16_gflops"]
    return {
        "name": config.name,
        "machine": machine.describe(),
        "device": str(run.device),
        "precision": run.precision,
        "kernels": {**run.kernels, "what": KINDS[run.kernels["native"]]},
        "model": model,
        "mean_length_tokens": length,
        "flops_per_token": flops,
        "ceilings": {**ceilings, "rows": rows},
        "step": {
            "steps": len(made),
            "tokens": tokens / len(made),
            "seconds": taken / len(made),
            "tokens_per_second": rate,
            "gflops": reached,
            "fraction_of_ceiling": reached / ceiling,
        },
        "shares": shares,
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _timed(run: Prepared, seconds: float) -> tuple[list[Update], dict[str, float]]:
    """Updates for about so many seconds, after some that warm up; and the shares of some more under a profiler."""
    steps = updates(run, run.num_steps)
    for _ in range(WARM_STEPS):
        next(steps, None)
    made: list[Update] = []
    began = time.perf_counter()
    while len(made) < LEAST_STEPS or time.perf_counter() - began < seconds:
        update = next(steps, None)
        if update is None:
            break
        made.append(update)
    if not made:
        raise ConfigError(f"train.max_steps: {run.num_steps} given, more than {WARM_STEPS} are needed to time some")
    on_gpu = [ProfilerActivity.CUDA] if run.device.type == "cuda" else []
    with profile(activities=[ProfilerActivity.CPU, *on_gpu]) as profiled:
        watched = [update for _, update in zip(range(PROFILED_STEPS), steps, strict=False)]
    steps.close()  # type: ignore[attr-defined]
    return made, _shares(profiled.events(), watched or made)


# ------------------------------------------------------------------------------------------------- where the time goes


def _shares(events: Iterable[Any], watched: list[Update]) -> dict[str, float]:
    """Each group's share of the time of the updates that were watched; what no operation accounts for is `other`.

    Under a profiler the calls between operations take longer, so `other` is at most what is told.
    """
    listed = list(events)
    thread = next((event.thread for event in listed if event.name == CLIP), None)
    spent = dict.fromkeys(GROUPS, 0.0)
    for event in listed:
        if event.thread == thread:
            spent[group_of(event)] += event.self_cpu_time_total / 1e6
    spent["data"] += sum(update.waited_seconds for update in watched)
    total = sum(update.total_seconds for update in watched)
    named = sum(seconds for group, seconds in spent.items() if group != "other")
    spent["other"] = max(0.0, total - named)
    whole = sum(spent.values())
    return {group: seconds / whole for group, seconds in spent.items()}


def group_of(event: Any) -> str:
    """The group of a profiled operation: of whoever called it, else its own."""
    caller = event
    while caller is not None:
        for group, parts in _OWNERS.items():
            if any(part in caller.name for part in parts):
                return group
        caller = caller.cpu_parent
    if event.name in _PRODUCTS or event.name.startswith("mkldnn::") or event.name.startswith("_Linear"):
        return "matrix products"
    own = event.name.startswith("aten::") or any(part in event.name for part in _OWN_KERNELS)
    return "norms and elementwise" if own else "other"


# ------------------------------------------------------------------------------------------------------------- ceilings


def _ceilings(run: Prepared, rows: int, seconds: float) -> dict[str, float]:
    """Matrix products forward and backward at the model's shapes, each by its best of several, and a large copy."""
    shapes = matrix_shapes(run.model)
    if not shapes:
        raise ConfigError(f"{run.config.name}: the model has no matrices")
    rates = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        spent = 0.0
        for (outputs, inputs), number in shapes.items():
            ways = _products(rows, outputs, inputs, dtype, run.device)
            best = machine.race(ways, seconds / 2 / len(shapes), least_rounds=3)
            spent += number * sum(best.values())
        operations = sum(number * 3 * 2 * rows * outputs * inputs for (outputs, inputs), number in shapes.items())
        rates[f"{name}_gflops"] = operations / spent / 1e9
    return {**rates, "bandwidth_gb_per_second": _bandwidth(run.device)}


def matrix_shapes(model: nn.Module) -> Counter[tuple[int, int]]:
    """(outputs, inputs) of every matrix that all tokens are multiplied with, the tied head among them -> how often."""
    shapes: Counter[tuple[int, int]] = Counter()
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            shapes[(layer.out_features, layer.in_features)] += 1
    config: Any = model.config
    if getattr(config, "tied", False) and getattr(model, "classifier", None) is None:
        rows, columns = model.get_parameter("embedding.weight").shape
        shapes[(rows, columns)] += 1
    return shapes


def _products(
    rows: int, outputs: int, inputs: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[], object]]:
    """The product of a linear layer and the two of its backward pass."""
    hidden, weight, grad = (
        torch.full(shape, 0.01, dtype=dtype, device=device)
        for shape in ((rows, inputs), (outputs, inputs), (rows, outputs))
    )

    def finished(product: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            product()
            if device.type == "cuda":
                torch.cuda.synchronize()

        return run

    return {
        "forward": finished(lambda: hidden @ weight.T),
        "input": finished(lambda: grad @ weight),
        "weight": finished(lambda: grad.T @ hidden),
    }


def _bandwidth(device: torch.device) -> float:
    """GB/s read and written together by a copy that no cache holds."""
    source = torch.ones(min(COPIED_BYTES, machine.memory_bytes() // 16) // 4, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return 2 * source.nbytes / machine.race({"copy": copy}, 0.3, least_rounds=3)["copy"] / 1e9
