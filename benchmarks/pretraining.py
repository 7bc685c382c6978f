"""(g) Pretraining on lines about people, as the recipe `birthplaces` does, against the same model in a plain loop.

Both take the recipe's first updates: the same weights, the same views of lines in the same order, the same optimiser.
The plain loop pads every view, as the assignment's own code does, to the model's 128 places, or to the longest of its
batch. Tokens are those of texts: padding is counted by nobody.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.pairs import OURS, Done, Setting, Side, Work, builtin, near

RECIPE, STAGE = "birthplaces", "pretrain"
STEPS, WARM, CHECKED = 40, 5, 10
QUICK_STEPS, QUICK_WARM, QUICK_CHECKED = 8, 2, 4
QUICK_LINES = 120
PADDED, SHORTEST = "plain PyTorch, fp32, padded to 128", "plain PyTorch, fp32, padded to the longest"


def steps_of(setting: Setting) -> tuple[int, int, int]:
    """Updates, how many of the first are not timed, how many of the last have their loss compared."""
    return (QUICK_STEPS, QUICK_WARM, QUICK_CHECKED) if setting.quick else (STEPS, WARM, CHECKED)


def config_of(folder: Path, model: dict[str, Any] | None = None) -> Any:
    """The recipe's pretraining. model: in the place of the recipe's."""
    from isoform.config import run_config
    from isoform.reading import merge, read_config

    study = read_config(RECIPE)
    values = merge(merge(study["base"], study["stages"][STAGE]), {"data": {"root": str(folder)}})
    text = {**values["text"], "train_on": None}
    return run_config({**values, "text": text, **({} if model is None else {"model": model})})


def prepare(folder: Path, setting: Setting) -> None:
    """wiki.txt, start/: the recipe's fresh model as a GPT-2 folder, and views.safetensors: what its updates read."""
    import torch
    from safetensors.torch import save_file

    from isoform.checkpoints.forms import save_model
    from isoform.training.feed import Feed
    from isoform.training.prepare import prepare as preparing

    if setting.quick:
        words = [document["text"].split() for document in builtin("python-docs")[:QUICK_LINES]]
        lines = [" ".join(some[:12]).title() + "." for some in words]
    else:
        lines = setting.data("birthplaces", "wiki.txt").read_text(encoding="utf-8").splitlines()
    (folder / "wiki.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    run = preparing(config_of(folder), precision="fp32")
    save_model(folder / "start", run.model, run.tokenizer)
    assert run.batch_plan is not None
    feed = Feed(run.datasets["train"], run.objective, run.batch_plan, seed=run.config.seed, micro_batch_tokens=1 << 30)
    steps = steps_of(setting)[0]
    views: dict[str, Any] = {"rates": torch.tensor([run.factor(step) for step in range(steps)])}
    for step in feed.ahead(0, steps):
        (batch,) = step.batches
        lengths = torch.tensor(batch.sequences.lengths)[: len(step.sample_ids)]
        views |= {f"{step.step}.tokens": batch.tokens, f"{step.step}.targets": batch.targets}
        views[f"{step.step}.lengths"] = lengths
    save_file(views, folder / "views.safetensors")


def ours(folder: Path, setting: Setting) -> Done:
    """The library's own updates, its data included, as it chooses precision and kernels."""
    from isoform.training.prepare import prepare
    from isoform.training.updates import updates

    steps, warm, checked = steps_of(setting)
    run = prepare(config_of(folder, {"from": str(folder / "start")}))
    made = list(updates(run, steps))
    timed = made[warm:]
    loss = sum(update.loss for update in made[-checked:]) / checked
    tokens = sum(update.num_tokens for update in timed)
    return Done(tokens, sum(update.total_seconds for update in timed), {"loss": loss, "precision": run.precision})


def plain(longest: bool, folder: Path, setting: Setting) -> Done:
    """The plain loop; its batches lie ready in memory. longest: pads to the longest of a batch, not to all places."""
    import torch
    from benchmarks.plain_gpt import PlainGPT, muon
    from safetensors.torch import load_file
    from torch.nn.functional import pad

    steps, warm, checked = steps_of(setting)
    config = config_of(folder)
    model, train = config.model, config.train
    views = load_file(folder / "views.safetensors")
    start = load_file(next((folder / "start").glob("*.safetensors")))
    vocab, places = len(start["transformer.wte.weight"]), config.text.max_tokens
    shape = (model["num_layers"], model["num_heads"], model["width"])
    gpt = PlainGPT(vocab, places, *shape, bias=True, dropout=0.0, tied=False)
    gpt.load(folder / "start")
    optimizers = muon(gpt, train.learning_rate, train.optimizer["adamw_learning_rate"], train.optimizer["beta2"])
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    rates = views["rates"].tolist()
    losses: list[float] = []
    count, began = 0, 0.0
    for step in range(steps):
        lengths = views[f"{step}.lengths"].tolist()
        columns = max(lengths) if longest else places
        rows = [
            torch.stack([pad(part, (0, columns - len(part)), value=value) for part in parts])
            for parts, value in (
                (views[f"{step}.tokens"][: sum(lengths)].split(lengths), 0),
                (views[f"{step}.targets"][: sum(lengths)].split(lengths), -100),
            )
        ]
        if step == warm:
            began = time.perf_counter()
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group, rate in zip(optimizer.param_groups, peak, strict=True):
                group["lr"] = rate * rates[step]
        loss = gpt(*rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), train.clip_norm)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        count += sum(lengths) if step >= warm else 0
    seconds = time.perf_counter() - began
    return Done(count, seconds, {"loss": sum(losses[-checked:]) / checked, "precision": "fp32"})


ABOUT = (
    "pretraining by the recipe `birthplaces` (4 layers, 8 heads, width 256, untied, characters, Muon) on 64 views of "
    "lines about people an update"
)
SIDES: dict[str, Side] = {OURS: ours, PADDED: partial(plain, False), SHORTEST: partial(plain, True)}
WORKS = (Work("birthplaces", "g", ABOUT, "tokens", prepare, SIDES, near("loss", 0.05)),)
