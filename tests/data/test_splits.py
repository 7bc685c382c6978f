"""Splits: disjoint, exact in number, the same whatever the order; overlap between given files is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isoform.config import DataConfig
from isoform.data.splits import SplitSources, load_splits
from isoform.errors import ConfigError, DataError

NAMES = ("train", "dev", "test")
SPLITS = {"train": 0.8, "dev": 0.1, "test": 0.1}
LONG = "the old house by the river stood empty for many years until a family of painters moved in one spring"


def rows_of(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def load(folder: Path, required: Any = ("text",), optional: tuple[str, ...] = (), **options: Any) -> SplitSources:
    return load_splits(DataConfig(root=str(folder), **options), required, optional)


def texts(loaded: SplitSources, split: str) -> list[str]:
    return [document.fields["text"] for document in loaded.splits[split]]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(st.integers(0, 400), min_size=60, max_size=150),
    seed=st.integers(0, 3),
    holdout=st.sampled_from([None, 5, 0.2]),
)
def test_equal_documents_never_part(values: list[int], seed: int, holdout: Any, tmp_path: Path) -> None:
    rows_of(tmp_path, "a.jsonl", [{"text": str(value), "label": place % 2} for place, value in enumerate(values)])
    try:
        loaded = load(tmp_path, path="a.jsonl", splits=SPLITS, split_seed=seed, holdout=holdout)
    except DataError as error:
        assert "has no documents" in str(error)
        return
    parts = {name: texts(loaded, name) for name in loaded.splits}
    assert sorted(text for part in parts.values() for text in part) == sorted(map(str, values))
    for first in parts:
        for second in parts:
            assert first == second or not set(parts[first]) & set(parts[second])
    ids = [document.id for source in loaded.splits.values() for document in source]
    assert len(set(ids)) == len(ids) == len(values)


def test_numbers_are_exact_and_order_does_not_matter(tmp_path: Path) -> None:
    rows = [{"text": f"document {number}"} for number in range(1000)]
    rows_of(tmp_path, "a.jsonl", rows)
    rows_of(tmp_path, "b.jsonl", rows[::-1])
    splits = {"train": 0.81, "dev": 0.09, "test": 0.1}
    a, b = (load(tmp_path, path=name, splits=splits) for name in ("a.jsonl", "b.jsonl"))
    assert a.report["documents"] == {"train": 810, "dev": 90, "test": 100}
    for name in NAMES:
        assert sorted(texts(a, name)) == sorted(texts(b, name))
    other = load(tmp_path, path="a.jsonl", splits=splits, split_seed=1)
    assert set(texts(other, "test")) != set(texts(a, "test"))
    assert other.fingerprint != a.fingerprint
    assert load(tmp_path, path="a.jsonl", splits=splits).fingerprint == a.fingerprint


def test_shares_of_labels_are_kept(tmp_path: Path) -> None:
    rows = [{"text": f"document {number}", "label": "rare" if number % 10 == 0 else "common"} for number in range(500)]
    rows_of(tmp_path, "a.jsonl", rows)
    loaded = load(tmp_path, ("text", "label"), path="a.jsonl", splits=SPLITS, stratify="label")
    for name, number in (("train", 40), ("dev", 5), ("test", 5)):
        assert [document.fields["label"] for document in loaded.splits[name]].count("rare") == number


def test_a_group_never_crosses(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [{"text": f"document {number}", "author": f"a{rng.integers(40)}"} for number in range(400)]
    rows_of(tmp_path, "a.jsonl", rows)
    loaded = load(tmp_path, path="a.jsonl", splits=SPLITS, group="author", holdout=0.1)
    groups = [{document.meta["author"] for document in source} for source in loaded.splits.values()]
    assert len(groups) == 4
    assert sum(map(len, groups)) == len(set().union(*groups)) == 40
    assert 280 <= loaded.report["documents"]["train"] + loaded.report["documents"]["holdout"] <= 360
    with pytest.raises(DataError, match=r"no column 'writer' for `data\.group`"):
        load(tmp_path, path="a.jsonl", splits=SPLITS, group="writer")


def test_the_holdout_is_the_same_whatever_else_train_holds(tmp_path: Path) -> None:
    pairs = [{"question": f"who is number {number}", "answer": "me"} for number in range(100)]
    rows_of(tmp_path, "qa.jsonl", pairs)
    rows_of(tmp_path, "wiki.jsonl", [{"text": f"text {number}"} for number in range(50)])
    required = (("text",), ("question", "answer"))

    def held(train: Any, **options: Any) -> list[str]:
        loaded = load(tmp_path, required, train=train, holdout=20, **options)
        left = [document.fields.get("question") for document in loaded.splits["train"]]
        chosen = [document.fields["question"] for document in loaded.splits["holdout"]]
        assert not set(chosen) & set(left)
        return sorted(chosen)

    alone = held("qa.jsonl")
    assert len(alone) == 20
    assert held(["wiki.jsonl", "qa.jsonl"], holdout_from="qa.jsonl") == alone
    assert held(["qa.jsonl", "wiki.jsonl"], holdout_from="qa.jsonl") == alone
    assert held("qa.jsonl", split_seed=1) != alone
    with pytest.raises(ConfigError, match=r"holdout_from: 'qa.json' is none .* \(did you mean 'qa.jsonl'\?\)"):
        held(["wiki.jsonl", "qa.jsonl"], holdout_from="qa.json")


def test_a_holdout_document_stands_nowhere_else_in_train(tmp_path: Path) -> None:
    rows_of(tmp_path, "a.jsonl", [{"text": f"document {number}"} for number in range(50)])
    rows_of(tmp_path, "b.jsonl", [{"text": f"document {number}"} for number in range(25, 75)])
    loaded = load(tmp_path, train=["a.jsonl", "b.jsonl"], holdout=10, holdout_from="a.jsonl")
    assert not set(texts(loaded, "train")) & set(texts(loaded, "holdout"))
    assert len(texts(loaded, "holdout")) == 10


# ----------------------------------------------------------------------------------------------- overlap of given files


@pytest.fixture
def overlapping(tmp_path: Path) -> Path:
    near = LONG.replace("empty", "silent").replace("painters", "writers")
    rows_of(tmp_path, "train.jsonl", [{"text": "only in train"}, {"text": "stands in both"}, {"text": LONG}])
    rows_of(tmp_path, "dev.jsonl", [{"text": "stands in both"}, {"text": near}, {"text": "only in dev"}])
    rows_of(tmp_path, "test.jsonl", [{"text": "only in test"}, {"text": "only in dev"}])
    return tmp_path


FILES = {"train": "train.jsonl", "dev": "dev.jsonl", "test": "test.jsonl"}


def test_overlap_is_refused_unless_asked_for(overlapping: Path) -> None:
    with pytest.raises(DataError, match=r"1 documents of dev stand exactly in train, 1 nearly") as caught:
        load(overlapping, **FILES)
    assert "dev.jsonl:1 in train.jsonl:2 exactly" in str(caught.value)
    kept = load(overlapping, **FILES, overlap="keep")
    counts = {tuple(row["splits"]): (row["exact"], row["near"]) for row in kept.report["overlap"]}
    assert counts == {("train", "dev"): (1, 1), ("train", "test"): (0, 0), ("dev", "test"): (1, 0)}
    assert len(texts(kept, "train")) == 3


def test_overlap_is_dropped_from_train(overlapping: Path) -> None:
    dropped = load(overlapping, **FILES, overlap="drop_from_train")
    assert texts(dropped, "train") == ["only in train"]
    assert dropped.report["dropped_from_train"] == 2
    assert dropped.report["documents"] == {"train": 1, "dev": 3, "test": 2}
    assert dropped.fingerprint != load(overlapping, **FILES, overlap="keep").fingerprint


def test_a_stricter_likeness_finds_less(overlapping: Path) -> None:
    kept = load(overlapping, **FILES, overlap="keep", near_fraction=0.99)
    assert kept.report["overlap"][0]["near"] == 0


def test_clean_files_pass(tmp_path: Path) -> None:
    for number, name in enumerate(NAMES):
        rows_of(tmp_path, f"{name}.jsonl", [{"text": f"text {number} {row}"} for row in range(5)])
    loaded = load(tmp_path, **FILES)
    assert loaded.report["documents"] == {"train": 5, "dev": 5, "test": 5}
    assert all(row["exact"] == row["near"] == 0 for row in loaded.report["overlap"])
    assert list(loaded.report["sources"]["dev"]) == ["dev.jsonl"]
    json.dumps(loaded.report)


def test_splits_without_training_overlap_too(overlapping: Path) -> None:
    files = {"dev": "dev.jsonl", "test": "test.jsonl"}
    with pytest.raises(DataError, match="1 documents of test stand exactly in dev"):
        load(overlapping, **files)
    loaded = load(overlapping, **files, overlap="drop_from_train")
    assert loaded.report["dropped_from_train"] == 0 and loaded.report["overlap"][0]["exact"] == 1


def test_the_same_input_with_another_label_is_overlap(tmp_path: Path) -> None:
    rows_of(tmp_path, "train.jsonl", [{"text": "a text", "label": "pos"}])
    rows_of(tmp_path, "test.jsonl", [{"text": "a text", "label": "neg"}])
    with pytest.raises(DataError, match="1 documents of test stand exactly in train"):
        load(tmp_path, ("text", "label"), train="train.jsonl", test="test.jsonl")


# --------------------------------------------------------------------------------------------------------------- config


def test_sections_that_contradict_themselves(tmp_path: Path) -> None:
    rows_of(tmp_path, "a.jsonl", [{"text": "one"}, {"text": "two"}])
    with pytest.raises(ConfigError, match="no source is named"):
        load(tmp_path)
    with pytest.raises(ConfigError, match=r"given beside `data\.path`"):
        load(tmp_path, path="a.jsonl", dev="a.jsonl")
    with pytest.raises(ConfigError, match="nothing is split"):
        load(tmp_path, train="a.jsonl", stratify="label")
    with pytest.raises(ConfigError, match="no training split"):
        load(tmp_path, dev="a.jsonl", holdout=1)
    with pytest.raises(DataError, match="the split dev has no documents"):
        load(tmp_path, path="a.jsonl", splits={"train": 0.9, "dev": 0.05, "test": 0.05})
    with pytest.raises(DataError, match="the split train has no documents"):
        load(tmp_path, train="a.jsonl", holdout=2)


def test_answers_may_be_missing_outside_training_only(tmp_path: Path) -> None:
    rows_of(tmp_path, "a.jsonl", [{"question": "who?"}])
    loaded = load(tmp_path, ("question", "answer"), ("answer",), test="a.jsonl")
    assert [dict(document.fields) for document in loaded.splits["test"]] == [{"question": "who?"}]
    with pytest.raises(DataError, match="no column 'answer'"):
        load(tmp_path, ("question", "answer"), ("answer",), train="a.jsonl")
