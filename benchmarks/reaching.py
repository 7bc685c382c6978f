"""(f) The time to a loss on tiny Shakespeare: our recipes against the published one of nanoGPT in a plain loop.

    time = sum of the seconds of all updates, the first included, until the loss on the held-out tenth is low enough

The split is nanoGPT's: the last tenth of the text, 111,540 characters. Its loss is the mean over every character but
the first, in windows end to end as long as the recipe's context, so each is asked once. Looking at it is not timed, on
either side; nor is loading. Source of the plain recipe: nanoGPT's page and `train_shakespeare_char`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import gpt
from benchmarks.pairs import OURS, WHOLE, Done, Fact, Setting, Work, builtin

TRAIN_SHARE = 0.9
WARMUP_STEPS, FINAL_RATE = 100, 1e-4
FAST, BEST = "shakespeare-fast", "shakespeare-best"
TARGETS = {FAST: 1.88, BEST: 1.47}
# Updates between two looks at the held-out text.
EVERY_STEPS = {FAST: 10, BEST: 50}
PLAIN = replace(gpt.SMALL, steps=2000)
PLAIN_EVERY_STEPS = 100
QUICK_TARGET, QUICK_STEPS = 3.6, 30
QUICK_MODEL = {"num_layers": 2, "num_heads": 2, "width": 32, "feedforward_width": 64}


def prepare(folder: Path, setting: Setting) -> None:
    """train.txt, val.txt, and start/: the plain recipe's fresh model as a GPT-2 folder."""
    from isoform.checkpoints.forms import save_model
    from isoform.training.prepare import prepare as preparing

    if setting.quick:
        text = "\n".join(document["text"] for document in builtin("python-docs"))[:30_000]
    else:
        text = setting.data("tinyshakespeare", "input.txt").read_text(encoding="utf-8")
    cut = int(len(text) * TRAIN_SHARE)
    # Both names: one is the recipes', one that of the other works on this text.
    for name, part in (("train", text[:cut]), ("val", text[cut:]), ("text", text[:cut])):
        (folder / f"{name}.txt").write_text(part, encoding="utf-8")
    size = gpt.size_of(PLAIN, setting)
    sizes = {"num_layers": size.layers, "num_heads": size.heads, "width": size.width, "dropout": 0.0}
    model = {"family": "gpt2", **sizes, "bias": False, "feedforward": {"kind": "gelu"}}
    run = preparing(gpt.config_of(size, folder, model), precision="fp32")
    save_model(folder / "start", run.model, run.tokenizer)


def target_of(recipe: str, setting: Setting) -> float:
    return QUICK_TARGET if setting.quick else TARGETS[recipe]


def ours(recipe: str, folder: Path, setting: Setting) -> Done:
    """The recipe as it stands, its data included, until its loss is low enough or it ends."""
    from isoform.config import run_config
    from isoform.reading import merge, read_config
    from isoform.training.prepare import prepare
    from isoform.training.scoring import score
    from isoform.training.updates import updates

    changes: dict[str, Any] = {"data": {"root": str(folder)}}
    if setting.quick:
        changes |= {"model": QUICK_MODEL, "train": {"max_steps": QUICK_STEPS, "batch_sequences": 8}}
    run = prepare(run_config(merge(read_config(recipe), changes)))
    seconds, loss = 0.0, math.inf
    for step, update in enumerate(updates(run, run.num_steps), 1):
        seconds += update.total_seconds
        if step % EVERY_STEPS[recipe] == 0 or step == run.num_steps:
            rows = score(run, run.model, "dev").rows
            loss = next(row["value"] for row in rows if row["metric"] == "loss")
            run.model.train()
            if loss <= target_of(recipe, setting):
                break
    found = {"loss": loss, "steps": step, "target": target_of(recipe, setting)}
    return Done(1, seconds, {**found, "precision": run.precision})


def plain(recipe: str, folder: Path, setting: Setting) -> Done:
    """nanoGPT's recipe for a processor in a plain loop in fp32, until its loss is as low or it ends."""
    import torch
    from benchmarks.plain_gpt import PlainGPT, adamw, mean_loss, windows

    from isoform.text.tokenizers import load_tokenizer

    size = gpt.size_of(PLAIN, setting)
    tokenizer = load_tokenizer(folder / "start")
    data, held_out = (
        torch.tensor(tokenizer.encode((folder / f"{name}.txt").read_text(encoding="utf-8")), dtype=torch.int64)
        for name in ("train", "val")
    )
    model = PlainGPT(tokenizer.vocab_size, size.length, size.layers, size.heads, size.width, bias=False, dropout=0.0)
    model.load(folder / "start")
    optimizer, draw = adamw(model, gpt.RATE), torch.Generator().manual_seed(0)
    seconds, loss = 0.0, math.inf
    for step in range(1, size.steps + 1):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = rate(step - 1, size.steps)
        model(*windows(data, size.batch, size.length, draw)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), gpt.CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds += time.perf_counter() - began
        if step % PLAIN_EVERY_STEPS == 0 or step == size.steps:
            loss = mean_loss(model, held_out, size.length)
            if loss <= target_of(recipe, setting):
                break
    return Done(1, seconds, {"loss": loss, "steps": step, "precision": "fp32"})


def rate(step: int, steps: int) -> float:
    """Its warm-up, then half a cosine down to a tenth of the peak."""
    warmup = min(WARMUP_STEPS, steps // 2)
    if step < warmup:
        return gpt.RATE * (step + 1) / (warmup + 1)
    done = (step - warmup) / (steps - warmup)
    return FINAL_RATE + (gpt.RATE - FINAL_RATE) * (1 + math.cos(math.pi * done)) / 2


def reached(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[bool, str]:
    """Ours must come to the loss; where the other does not, all of its run counts, and its loss is told."""
    told = [f"{side['loss']:.4f} after {side['steps']:,} steps" for side in (ours, theirs)]
    return ours["loss"] <= ours["target"], f"{told[0]} and {told[1]}"


def tell_best(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """Loss, time and updates of our recipe: no other side, for the published run is that of a GPU."""
    report = reports[OURS]
    found = report["checks"]
    reached = "" if found["loss"] <= found["target"] else f"; {found['target']} is not reached"
    took = f"{report['seconds']:,.0f} s in {found['precision']}"
    return f"{found['loss']:.3f} after {found['steps']:,} updates, {took}{reached}"


WORKS = (
    Work(
        "reach-1.88",
        "f",
        f"time until the loss on nanoGPT's held-out tenth of tiny Shakespeare is {TARGETS[FAST]}, ours by the recipe "
        f"`{FAST}`; the loss is looked at every {EVERY_STEPS[FAST]} updates of ours",
        WHOLE,
        prepare,
        {OURS: partial(ours, FAST), "plain PyTorch, fp32, nanoGPT's recipe": partial(plain, FAST)},
        reached,
    ),
)
FACTS = (
    Fact(
        "reach-1.47",
        "f",
        f"loss on the same tenth by the recipe `{BEST}`, until it is {TARGETS[BEST]} (published for the baby GPT: "
        "three minutes of an A100) or the recipe ends",
        prepare,
        {OURS: partial(ours, BEST)},
        tell_best,
    ),
)
