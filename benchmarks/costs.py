"""(h) What training costs: time by tokens and by layers, memory by the size of the corpus, and the share of the
processor's matrix products that a step of the baby GPT reaches.

    fit: seconds of a step = a + b x (tokens or layers), by least squares over medians of rounds
    R^2 = 1 - sum (seconds - fit)^2 / sum (seconds - mean)^2;  deviation = |seconds / fit - 1|

Sizes take turns update by update, so that whatever else the machine does meets all of them.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.pairs import OURS, Done, Fact, Setting, builtin

TOKENS, LAYERS, LENGTH = (2048, 4096, 8192, 16_384), (2, 4, 8), 256
MODEL = {"family": "gpt2", "num_layers": 4, "num_heads": 4, "width": 256, "dropout": 0.0}
LAYERS_TOKENS, ROUNDS, WARM = 8192, 5, 2
QUICK_TOKENS, QUICK_LENGTH = (256, 512, 1024), 32
QUICK_MODEL = {**MODEL, "num_layers": 2, "num_heads": 2, "width": 32}
# Characters of the small corpus; the other is TIMES as large.
CORPUS, QUICK_CORPUS, TIMES = 3_000_000, 60_000, 10
SMALL, LARGE = "1 x", f"{TIMES} x"
FEED_STEPS = 200
CEILING_SECONDS = 20.0
BABY = "shakespeare-char"


def text_of(setting: Setting) -> str:
    if setting.quick:
        return "\n".join(document["text"] for document in builtin("python-docs"))[:60_000]
    return setting.data("tinyshakespeare", "input.txt").read_text(encoding="utf-8")


def prepare(folder: Path, setting: Setting) -> None:
    (folder / "text.txt").write_text(text_of(setting), encoding="utf-8")


def config_of(path: Path, model: dict[str, Any], length: int, tokens: int, steps: int) -> Any:
    from isoform.config import run_config

    data = {"path": str(path), "unit": "piece", "splits": {"train": 1.0}, "overlap": "keep"}
    train = {"max_steps": steps, "batch_sequences": tokens // length, "learning_rate": 1e-3}
    return run_config(
        {
            "name": "cost",
            "data": data,
            "text": {"tokenizer": {"kind": "char"}, "max_tokens": length},
            "model": model,
            "objective": {"kind": "causal"},
            "train": {**train, "schedule": {"kind": "constant"}},
        }
    )


# --------------------------------------------------------------------------------------------------------- time, a line


def seconds_by(axis: str, folder: Path, setting: Setting) -> Done:
    """The median seconds of an update at each size, the sizes in turns. axis: tokens or layers."""
    from isoform.training.prepare import prepare
    from isoform.training.updates import Update, updates

    model, length = (QUICK_MODEL, QUICK_LENGTH) if setting.quick else (MODEL, LENGTH)
    tokens = QUICK_TOKENS if setting.quick else TOKENS
    sizes = tokens if axis == "tokens" else LAYERS
    going: dict[int, Iterator[Update]] = {}
    for size in sizes:
        changed = model if axis == "tokens" else {**model, "num_layers": size}
        read = size if axis == "tokens" else min(LAYERS_TOKENS, tokens[-1])
        run = prepare(config_of(folder / "text.txt", changed, length, read, WARM + ROUNDS))
        going[size] = updates(run, WARM + ROUNDS)
    taken: dict[int, list[float]] = {size: [] for size in sizes}
    for number in range(WARM + ROUNDS):
        for size, steps in going.items():
            update = next(steps)
            if number >= WARM:
                taken[size].append(update.total_seconds)
    points = [[size, statistics.median(seconds)] for size, seconds in taken.items()]
    return Done(ROUNDS, sum(map(sum, taken.values())), {"points": points})


def fit(points: list[list[float]]) -> tuple[float, float, float, float]:
    """(a, b, R^2, largest deviation) of seconds = a + b x size."""
    sizes, seconds = zip(*points, strict=True)
    slope, start = statistics.linear_regression(sizes, seconds)
    line = [start + slope * size for size in sizes]
    mean = statistics.fmean(seconds)
    left = sum((each - on) ** 2 for each, on in zip(seconds, line, strict=True))
    whole = sum((each - mean) ** 2 for each in seconds)
    return start, slope, 1 - left / whole, max(abs(each / on - 1) for each, on in zip(seconds, line, strict=True))


def tell_line(axis: str, scale: float, unit: str, reports: Mapping[str, Mapping[str, Any]]) -> str:
    points = reports[OURS]["checks"]["points"]
    start, slope, explained, deviation = fit(points)
    told = ", ".join(f"{seconds:.3f} s at {size:,}" for size, seconds in points)
    return (
        f"{told} {axis}; {start:.3f} s + {slope * scale:.4f} s {unit}: R^2 = {explained:.4f}, "
        f"largest deviation {100 * deviation:.1f} %"
    )


# ------------------------------------------------------------------------------------------------------ memory, ceiling


def write_corpora(folder: Path, setting: Setting) -> None:
    """Two texts, of which one is as long as ten of the other; lines are numbered, so that none stands twice."""
    lines = [line for line in text_of(setting).splitlines() if line]
    small = QUICK_CORPUS if setting.quick else CORPUS
    for name, most in ((SMALL, small), (LARGE, TIMES * small)):
        with (folder / f"{name}.txt").open("w", encoding="utf-8") as file:
            written = number = 0
            while written < most:
                written += file.write(f"{number} {lines[number % len(lines)]}\n")
                number += 1


def read_corpus(name: str, folder: Path, setting: Setting) -> Done:
    """Tokenizer, encoding, plan, and the batches of some steps; the model is next to nothing."""
    os.environ["ISOFORM_CACHE"] = str(folder / f"cache {name}")
    from isoform.training.feed import Feed
    from isoform.training.prepare import prepare

    config = config_of(folder / f"{name}.txt", QUICK_MODEL, 64, 4096, FEED_STEPS)
    run = prepare(config, precision="fp32")
    assert run.batch_plan is not None
    feed = Feed(run.datasets["train"], run.objective, run.batch_plan, seed=0, micro_batch_tokens=4096)
    read = sum(step.num_tokens for step in feed.ahead(0, FEED_STEPS))
    return Done(read, 1.0, {"bytes": (folder / f"{name}.txt").stat().st_size})


def tell_memory(reports: Mapping[str, Mapping[str, Any]]) -> str:
    small, large = (reports[name] for name in (SMALL, LARGE))
    told = [f"{each['peak_bytes'] / 1e6:,.0f} MB at {each['checks']['bytes'] / 1e6:.1f} MB" for each in (small, large)]
    return f"peak memory {told[0]} of text, {told[1]}: {large['peak_bytes'] / small['peak_bytes']:.2f} times"


def reach(folder: Path, setting: Setting) -> Done:
    """`isoform bench` of the recipe of the published baby GPT."""
    from isoform.config import run_config
    from isoform.reading import merge, read_config
    from isoform.training.bench import bench

    data = {"path": str(folder / "text.txt"), "splits": {"train": 1.0, "dev": 0.0}}
    changes: dict[str, Any] = {"data": data, "train": {"select": {"metric": "last"}}}
    if setting.quick:
        changes["model"] = {"num_layers": 2, "num_heads": 2, "width": 32}
        changes["train"]["batch_sequences"] = 4
    found = bench(run_config(merge(read_config(BABY), changes)), 0.5 if setting.quick else CEILING_SECONDS)
    ceiling = found["ceilings"]["fp32_gflops" if found["precision"] == "fp32" else "bf16_gflops"]
    told = {"fraction": found["step"]["fraction_of_ceiling"], "gflops": found["step"]["gflops"], "ceiling": ceiling}
    return Done(1, 1.0, {**told, "precision": found["precision"], "shares": found["shares"]})


def tell_reach(reports: Mapping[str, Mapping[str, Any]]) -> str:
    found = reports[OURS]["checks"]
    shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in found["shares"].items() if share >= 0.005)
    return (
        f"{100 * found['fraction']:.0f} %: {found['gflops']:,.0f} of {found['ceiling']:,.0f} GFLOP/s in "
        f"{found['precision']}; of its time {shares}"
    )


FACTS = (
    Fact(
        "cost-tokens",
        "h",
        f"seconds of an update by its tokens, a GPT of 4 layers, width 256, windows of {LENGTH}",
        prepare,
        {OURS: partial(seconds_by, "tokens")},
        partial(tell_line, "tokens", 1000, "per 1,000 tokens"),
    ),
    Fact(
        "cost-layers",
        "h",
        f"seconds of an update of {LAYERS_TOKENS:,} tokens by layers, width 256",
        prepare,
        {OURS: partial(seconds_by, "layers")},
        partial(tell_line, "layers", 1, "a layer"),
    ),
    Fact(
        "corpus-memory",
        "h",
        "peak memory of reading, encoding and batching a corpus, and of one ten times as large, torch included",
        write_corpora,
        {name: partial(read_corpus, name) for name in (SMALL, LARGE)},
        tell_memory,
    ),
    Fact(
        "ceiling",
        "h",
        f"share of the speed of bare matrix products at its own shapes that an update of `{BABY}` reaches",
        prepare,
        {OURS: reach},
        tell_reach,
    ),
)
