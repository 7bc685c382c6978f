"""The built-in sets are there, are what they say, and do not leak."""

from __future__ import annotations

from collections import Counter

import pytest

from isoform.config import DataConfig
from isoform.contracts import Document
from isoform.data import builtin
from isoform.data.sources import open_source
from isoform.data.splits import load_splits
from isoform.errors import DataError


def documents(name: str) -> list[Document]:
    return list(open_source(f"builtin:{name}", DataConfig()))


@pytest.mark.parametrize("name", builtin.names())
def test_every_set_can_be_read_and_says_whose_it_is(name: str) -> None:
    item = builtin.describe(name)
    assert item.licence and item.attribution and item.description
    found = documents(name)
    assert len({document.id for document in found}) == len(found) >= 60
    assert not any("-" in document.id for document in found), "a text stands twice"


def test_unknown_names() -> None:
    with pytest.raises(DataError, match=r"builtin:city-fact: no such set \(did you mean 'city-facts'\?\)"):
        documents("city-fact")


def test_city_questions_are_answered_by_the_text_and_by_no_other_split() -> None:
    sentences = [document.fields["text"] for document in documents("city-facts")]
    cities: dict[str, set[str]] = {}
    for split in ("train", "dev", "test"):
        pairs = [document.fields for document in documents(f"city-facts/{split}")]
        cities[split] = {pair["question"].removeprefix("In which country is ").rstrip("?") for pair in pairs}
        for pair in pairs:
            city = pair["question"].removeprefix("In which country is ").rstrip("?")
            assert sum(city in text and pair["answer"] in text for text in sentences) >= 8, city
        common = Counter(pair["answer"] for pair in pairs).most_common(1)[0][1]
        assert common <= 0.05 * len(pairs)
    assert not cities["train"] & cities["dev"] and not cities["dev"] & cities["test"]
    assert not cities["train"] & cities["test"]


def test_city_questions_pass_the_overlap_check() -> None:
    names = {split: f"builtin:city-facts/{split}" for split in ("train", "dev", "test")}
    loaded = load_splits(DataConfig(**names, holdout=20), ("question", "answer"))
    assert loaded.report["documents"]["holdout"] == 20
    assert all(row["exact"] == row["near"] == 0 for row in loaded.report["overlap"])


def test_movie_snippets_are_balanced() -> None:
    labels = Counter(document.fields["label"] for document in documents("movie-snippets"))
    assert labels == {"pos": 2000, "neg": 2000}
