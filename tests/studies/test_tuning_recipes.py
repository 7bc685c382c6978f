"""Every recipe that tunes pretrained weights goes its whole way, an update long, from weights and files as they ask."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from isoform.checkpoints.folders import save_model
from isoform.config import study_config
from isoform.models.bert import Bert
from isoform.models.llama import Llama
from isoform.models.modernbert import ModernBert
from isoform.reading import merge, read_config
from isoform.registry import lookup
from isoform.studies.forecast import attempt_study
from isoform.studies.layout import Layout
from isoform.text.tokenizers import train_tokenizer

WORDS = "a film of great charm dull tired story an actor this scene with and long short ending music war".split()  # noqa: SIM905
LABELS = {"agnews": 4}
FILES = {
    "imdb": ("train", "test"),
    "imdb-bert-base": ("train", "test"),
    "imdb-modernbert-base": ("train", "test"),
    "distill": ("train", "test"),
    "domain": ("train", "test", "unsupervised"),
    "effective-batch": ("train_phrases_glue", "validation_glue", "test"),
    "agnews": ("train_4k", "test"),
}
# The small model that stands for the one that is named.
PLACES = {"smollm2": "decoder", "ModernBERT": "modern", "": "encoder"}
CHATS = {"chat": "instruction-data.json", "chat-preference": "instruction-data-with-preference.json"}


def texts(number: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=12)) for _ in range(number)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bare encoder and a decoder in small: what `pkg:` names, and what `hf:` would fetch."""
    kinds = (("encoder", "wordpiece", Bert), ("modern", "bpe", ModernBert), ("decoder", "bpe", Llama))
    for name, kind, model in kinds:
        options = lookup("tokenizer", kind).Config(vocab_size=400)
        tokenizer = train_tokenizer(kind, options, texts(40, 9))
        parts = {"head": "none", "pooler": "plain"} if model is Bert else {}
        sizes = {"num_layers": 6, "num_heads": 2, "width": 16, "max_positions": 512, "vocab_size": tokenizer.vocab_size}
        save_model(tmp_path / name, model.tiny(**sizes, **parts), tokenizer)
    return tmp_path


def shrunk(recipe: str, folder: Path) -> dict[str, Any]:
    """The recipe over files of its names, with small weights in the place of those it names."""
    values = read_config(recipe)
    for at, name in enumerate(FILES.get(recipe, ())):
        rows: dict[str, list[Any]] = {"text": texts(120, at)}
        if name != "unsupervised":
            rows["label"] = [number % LABELS.get(recipe, 2) for number in range(120)]
        pq.write_table(pa.table(rows), folder / f"{name}.parquet")
    if recipe in CHATS:
        draws = [texts(160, at) for at in range(3)]
        keys = ("instruction", "chosen", "rejected") if recipe == "chat-preference" else ("instruction", "output")
        pairs = [
            {**dict(zip(keys, row, strict=False)), "output": row[1], "input": ""} for row in zip(*draws, strict=True)
        ]
        (folder / CHATS[recipe]).write_text(json.dumps(pairs))
    _shrink_batches(values)
    small = {"data": {"root": str(folder)}, "train": {"precision": "fp32"}, "evaluate": {"max_new_tokens": 2}}
    fetched = {
        name: f"{name}.parquet" for name, source in values["base"]["data"].items() if str(source).startswith("hf:")
    }
    return merge(values, {"base": {**small, "data": {**small["data"], **fetched}}, "seeds": 1, "jobs": 1})


def _shrink_batches(values: dict[str, Any]) -> None:
    for key, item in values.items():
        if isinstance(item, dict):
            _shrink_batches(item)
        elif key in ("batch_sequences", "batch_tokens"):
            values[key] = max(4, item // 16) if key == "batch_sequences" else 256


@pytest.mark.parametrize("recipe", sorted([*FILES, *CHATS]))
def test_each_stage_of_each_arm_makes_an_update_is_scored_and_saved(
    recipe: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = shrunk(recipe, folder)
    named = values["base"]["model"]["from"]
    fetched = []

    def snapshot_download(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        fetched.append((repository, revision))
        return str(folder / next(name for part, name in PLACES.items() if part in named))

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    values["base"]["model"] = {"from": "hf:someone/small@0123abc"}
    layout = Layout(study_config(values), [0], "fp32", "sources")
    done = attempt_study(layout)
    compared = values["compare"]
    scored = [row for row in done["rows"] if (row["metric"], row["split"]) == (compared["metric"], compared["split"])]
    ends = {layout.chain(arm, 0)[-1].key for arm, options in layout.arms() if options.stages}
    assert len(scored) == len(ends)
    assert set(fetched) == {("someone/small", "0123abc")}
