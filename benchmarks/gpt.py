"""(a) Training a GPT on characters: ours against a plain PyTorch loop, in fp32 and under bf16 autocast.

Both start from the same weights, take as many updates of as many characters at the same rate, and must come to the same
loss. Sizes: nanoGPT's published `train_shakespeare_char`, and the smaller one that its page gives for a CPU.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.pairs import OURS, Done, Setting, Work, builtin, near

RATE, CLIP_NORM = 1e-3, 1.0


@dataclass(frozen=True)
class Size:
    layers: int
    heads: int
    width: int
    length: int
    batch: int
    dropout: float
    warm: int
    steps: int
    # of which the first `warm` are not timed
    checked: int
    # the last so many steps whose mean loss is compared


BABY = Size(6, 6, 384, 256, 64, 0.2, 2, 10, 4)
SMALL = Size(4, 4, 128, 64, 12, 0.0, 20, 320, 100)
QUICK = Size(2, 2, 32, 32, 16, 0.0, 2, 60, 30)


def size_of(size: Size, setting: Setting) -> Size:
    return QUICK if setting.quick else size


def config_of(size: Size, folder: Path, model: dict[str, Any]) -> Any:
    from isoform.config import run_config

    text = (
        {"max_tokens": size.length} if "from" in model else {"tokenizer": {"kind": "char"}, "max_tokens": size.length}
    )
    return run_config(
        {
            "name": "gpt",
            "data": {"path": str(folder / "text.txt"), "unit": "piece", "splits": {"train": 1.0}, "overlap": "keep"},
            "text": text,
            "model": model,
            "objective": {"kind": "causal"},
            "train": {
                "max_steps": size.steps,
                "batch_sequences": size.batch,
                "learning_rate": RATE,
                "optimizer": {"kind": "adamw", "beta2": 0.99, "weight_decay": 0.1, "decay_embeddings": True},
                "schedule": {"kind": "constant"},
                "clip_norm": CLIP_NORM,
            },
        }
    )


def prepare(size: Size, folder: Path, setting: Setting) -> None:
    """text.txt, and start/: a fresh model with its tokenizer as a GPT-2 folder."""
    from isoform.checkpoints.forms import save_model
    from isoform.training import prepare as preparing

    size = size_of(size, setting)
    if setting.quick:
        text = "\n".join(document["text"] for document in builtin("python-docs")[:200])
    else:
        text = setting.data("tinyshakespeare", "input.txt").read_text(encoding="utf-8")
    (folder / "text.txt").write_text(text, encoding="utf-8")
    sizes = {"num_layers": size.layers, "num_heads": size.heads, "width": size.width, "dropout": size.dropout}
    model = {"family": "gpt2", **sizes, "bias": False, "feedforward": {"kind": "gelu"}}
    run = preparing.prepare(config_of(size, folder, model), precision="fp32")
    save_model(folder / "start", run.model, run.tokenizer)


def ours(size: Size, folder: Path, setting: Setting) -> Done:
    """The library's own updates, its data included, as it chooses precision and kernels."""
    from isoform.training.prepare import prepare
    from isoform.training.updates import updates

    size = size_of(size, setting)
    run = prepare(config_of(size, folder, {"from": str(folder / "start")}))
    made = list(updates(run, size.steps))
    timed = made[size.warm :]
    return Done(
        sum(update.num_tokens for update in timed),
        sum(update.total_seconds for update in timed),
        {"loss": sum(update.loss for update in made[-size.checked :]) / size.checked, "precision": run.precision},
    )


def plain(size: Size, precision: str, folder: Path, setting: Setting) -> Done:
    """The plain loop; its batches are slices of one tensor, which take no time worth measuring."""
    import torch
    from benchmarks.plain_gpt import PlainGPT, adamw, windows

    from isoform.text.tokenizers import load_tokenizer

    size = size_of(size, setting)
    tokenizer = load_tokenizer(folder / "start")
    text = (folder / "text.txt").read_text(encoding="utf-8")
    data = torch.tensor(tokenizer.encode(text), dtype=torch.int64)
    model = PlainGPT(
        tokenizer.vocab_size, size.length, size.layers, size.heads, size.width, bias=False, dropout=size.dropout
    )
    model.load(folder / "start")
    model.train()
    optimizer, draw = adamw(model, RATE), torch.Generator().manual_seed(0)
    losses: list[float] = []
    began = 0.0
    for step in range(size.steps):
        if step == size.warm:
            began = time.perf_counter()
        tokens, targets = windows(data, size.batch, size.length, draw)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    seconds = time.perf_counter() - began
    count = (size.steps - size.warm) * size.batch * size.length
    return Done(count, seconds, {"loss": sum(losses[-size.checked :]) / size.checked, "precision": precision})


def _work(name: str, size: Size) -> Work:
    sides = {
        OURS: partial(ours, size),
        "plain PyTorch, fp32": partial(plain, size, "fp32"),
        "plain PyTorch, bf16": partial(plain, size, "bf16"),
    }
    about = (
        f"training a GPT of {size.layers} layers, {size.heads} heads, width {size.width} on {size.batch} windows of "
        f"{size.length} characters, dropout {size.dropout:g}"
    )
    return Work(name, "a", about, "tokens", partial(prepare, size), sides, near("loss", 0.05))


WORKS = (_work("gpt-baby", BABY), _work("gpt-small", SMALL))
