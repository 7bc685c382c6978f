"""Every recipe that tunes pretrained weights goes its whole way, an update long, from weights and files as they ask."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from isoform.checkpoints.forms import save_model
from isoform.config import study_config
from isoform.models.bert import Bert
from isoform.models.distilbert import DistilBert
from isoform.models.llama import Llama
from isoform.models.modernbert import ModernBert
from isoform.models.roberta import Roberta
from isoform.reading import merge, read_config
from isoform.registry import lookup
from isoform.studies import audit
from isoform.studies.forecast import attempt_study
from isoform.studies.layout import Layout, flat, some_arms
from isoform.studies.study import study
from isoform.text.tokenizers import train_tokenizer

WORDS = "a film of great charm dull tired story an actor this scene with and long short ending music war".split()  # noqa: SIM905
NEWS = ("World", "Sports", "Business", "Sci/Tech")
FILES = {
    "imdb": ("train", "test"),
    "imdb-one-split": ("train", "test"),
    "imdb-base": (),
    "distill": ("train", "test"),
    "domain": ("train", "test", "unsupervised"),
    "effective-batch": ("train_phrases_glue", "validation_glue", "test"),
    "agnews": ("train_4k", "test"),
    "agnews-8k": ("train_desc_8k", "test_desc"),
    "agnews-base": ("train_4k", "test"),
}
CHATS = {"chat": "instruction-data.json", "chat-preference": "instruction-data-with-preference.json"}
# The small model that stands for the one that is named.
PLACES = {"smollm2": "decoder", "ModernBERT": "modern", "distilbert": "distilled", "roberta": "roberta", "": "encoder"}
# Arms of recipes whose others are tried by another recipe.
SOME = {
    "imdb-one-split": ("full", "naive-bayes"),
    "agnews-8k": ("full-tuned", "naive-bayes"),
    "agnews-base": ("distilbert-full", "distilbert-rslora", "roberta-rslora", "roberta-full-fast"),
}
# Texts are longer than what is read, so that it matters which of their ends is kept.
PARTS = {"base": {"text": {"max_tokens": 10}}}


def texts(number: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=12)) for _ in range(number)]


def table(number: int, seed: int, classes: int | None) -> dict[str, list[Any]]:
    labels = {} if classes is None else {"label": [at % classes for at in range(number)]}
    return {"text": texts(number, seed), **labels}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Bare encoders and a decoder in small: what `pkg:` names, and what `hf:` would fetch."""
    kinds = (
        ("encoder", "wordpiece", Bert),
        ("distilled", "wordpiece", DistilBert),
        ("roberta", "bpe", Roberta),
        ("modern", "bpe", ModernBert),
        ("decoder", "bpe", Llama),
    )
    for name, kind, model in kinds:
        options = lookup("tokenizer", kind).Config(vocab_size=400)
        tokenizer = train_tokenizer(kind, options, texts(40, 9))
        parts = {"head": "none", "pooler": "plain"} if model is Bert else {}
        sizes = {"num_layers": 6, "num_heads": 2, "width": 16, "max_positions": 512, "vocab_size": tokenizer.vocab_size}
        save_model(tmp_path / name, model.tiny(**sizes, **parts), tokenizer)
    return tmp_path


@pytest.fixture
def fetched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """What was asked of the hub, which has small models, and film reviews whose classes have names."""
    asked: set[str] = set()

    def snapshot_download(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.add(f"hf:{repository}@{revision}")
        return str(folder / next(name for part, name in PLACES.items() if part in repository))

    def load_dataset(repository: str, config: str | None, *, revision: str) -> Any:
        features = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
        )
        found = {}
        for at, split in enumerate(("train", "test")):
            asked.add(f"hf:{repository}@{revision}#{split}")
            found[split] = datasets.Dataset.from_dict(table(120, at, 2), features=features)
        return datasets.DatasetDict(found)

    info = SimpleNamespace(dataset_info=lambda name, revision: SimpleNamespace(sha=revision))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def named(values: Any) -> set[str]:
    """Every `hf:` of a config."""
    return {item for item in flat(values).values() if str(item).startswith("hf:")}


def shrunk(recipe: str, folder: Path) -> dict[str, Any]:
    """The recipe over files of its names, with weights of the hub, which are small, in the place of those it names."""
    values = read_config(recipe)
    for at, name in enumerate(FILES.get(recipe, ())):
        classes = None if name == "unsupervised" else len(NEWS) if recipe.startswith("agnews") else 2
        pq.write_table(pa.table(table(120, at, classes)), folder / f"{name}.parquet")
    if recipe in CHATS:
        draws = [texts(160, at) for at in range(3)]
        keys = ("instruction", "chosen", "rejected") if recipe == "chat-preference" else ("instruction", "output")
        pairs = [
            {**dict(zip(keys, row, strict=False)), "output": row[1], "input": ""} for row in zip(*draws, strict=True)
        ]
        (folder / CHATS[recipe]).write_text(json.dumps(pairs))
    _shrink_batches(values)
    if "model" in values["base"]:
        values["base"]["model"] = {"from": values["base"]["model"]["from"].replace("pkg:", "hf:someone/") + "@0123abc"}
    small = {"data": {"root": str(folder)}, "train": {"precision": "fp32"}, "evaluate": {"max_new_tokens": 2}}
    return merge(values, {"base": small, "seeds": 1, "jobs": 1})


def _shrink_batches(values: dict[str, Any]) -> None:
    for key, item in values.items():
        if isinstance(item, dict):
            _shrink_batches(item)
        elif key in ("batch_sequences", "batch_tokens"):
            values[key] = max(4, item // 16) if key == "batch_sequences" else 256


@pytest.mark.parametrize("recipe", sorted([*FILES, *CHATS]))
def test_each_stage_of_each_arm_makes_an_update_is_scored_and_saved(
    recipe: str, folder: Path, fetched: set[str]
) -> None:
    values = shrunk(recipe, folder)
    layout = Layout(some_arms(study_config(values), SOME.get(recipe)), [0], "fp32", "sources")
    done = attempt_study(layout)
    compared = values["compare"]
    scored = [row for row in done["rows"] if (row["metric"], row["split"]) == (compared["metric"], compared["split"])]
    ends = {layout.chain(arm, 0)[-1].key for arm, options in layout.arms() if options.stages}
    assert len(scored) == len(ends)
    assert fetched == named(layout.study.model_dump()) != set()


def test_the_audit_refuses_no_arm_where_nothing_overlaps(folder: Path, fetched: set[str]) -> None:
    values = merge(shrunk("imdb-one-split", folder), PARTS)
    layout = Layout(study_config(values), [0], "fp32", "sources")
    assert [row["message"] for row in audit.before(layout) if row["level"] == "refuse"] == []


@pytest.mark.parametrize(
    ("recipe", "arms"),
    [
        ("agnews", ["full-tuned", "rslora-key-tuned"]),
        ("distill", ["teacher", "three-taught"]),
        ("domain", ["tuned", "read-tuned"]),
        ("imdb-base", ["bert-full", "modernbert-full"]),
    ],
)
def test_arms_find_their_rate_and_answer(recipe: str, arms: list[str], folder: Path, fetched: set[str]) -> None:
    values = merge(shrunk(recipe, folder), PARTS)
    for places in (values["base"], *values["stages"].values()):
        if "train" in places:
            places["train"] |= {"max_epochs": 0.1}
    values["trials"] = {name: value and (2 if "steps" in name else 0.1) for name, value in values["trials"].items()}
    results = study(values, folder / "study", arms=arms, quiet=True)
    for arm in results["arms"]:
        tune = values["arms"][arm["name"]]["tune"]
        assert [trial["setting"] for trial in arm["tuning"]] == [
            {name: value} for name, grid in tune.items() for value in grid
        ]
        assert sum(trial["chosen"] for trial in arm["tuning"]) == 1
    assert arms in [list(question["pair"]) for question in results["questions"]]
