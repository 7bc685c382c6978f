"""The passport counts what is there, and is plain JSON."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from isoform.config import DataConfig
from isoform.data.passport import passport, render
from isoform.data.sources import open_source
from isoform.data.splits import load_splits
from isoform.errors import DataError
from isoform.text.kinds import Bpe
from isoform.text.tokenizers import TextTokenizer

LONG = "the old house by the river stood empty for many years until a family of painters moved in one spring"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [
        {"text": "abc", "label": "pos"},
        {"text": "abc", "label": "neg"},
        {"text": "é漢", "label": "pos"},
        {"text": LONG, "label": "pos"},
        {"text": LONG.replace("river", "sea"), "label": "pos"},
        {"text": " ", "label": "neg"},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": LONG, "label": "neg"}) + "\n")
    return tmp_path


def test_answers_of_conversations_are_counted_as_the_template_writes_them(tmp_path: Path) -> None:
    words = ["user assistant hi Hello there and so on"] * 3
    tokenizer = Bpe.train(Bpe.Config(vocab_size=300, special=("pad", "bos", "eos")), words)
    turn = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello there"}]
    rows = [{"messages": turn}, {"messages": turn * 3}, {"messages": turn[:1]}]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_source(str(path), DataConfig(), ("messages",))
    answer = len(tokenizer.encode("Hello there")) + 1
    whole = passport(source, tokenizer)["sources"][0]["conversations"]
    assert whole == {"documents": 3, "without_answer": 1, "answer_tokens": 4 * answer, "answer_tokens_lost": 0}
    one = len(tokenizer.encode("user\nhi")) + len(tokenizer.encode("\n")) + len(tokenizer.encode("assistant\n")) + 3
    cut = passport(source, tokenizer, one + answer)["sources"][0]
    assert cut["conversations"]["answer_tokens_lost"] == 2 * answer
    assert cut["lengths"]["quantiles"]["0.5"] == one + answer
    path.write_text(json.dumps({"messages": turn[1:]}))
    with pytest.raises(DataError, match=r"chat.jsonl:1: message 1 is of the role assistant"):
        passport(source, tokenizer)


def test_counts(folder: Path, characters: TextTokenizer) -> None:
    source = open_source("a.jsonl", DataConfig(root=str(folder)), ("text", "label"))
    found = passport(source, characters, 50)["sources"][0]
    json.dumps(found)
    sea = len(LONG) - 2
    assert found["documents"] == 6 and found["empty_documents"] == 1
    assert found["characters"] == 3 + 3 + 2 + len(LONG) + sea + 1
    assert found["bytes"] == found["characters"] + 3
    assert found["tokens"] == found["characters"] and found["tokens_per_byte"] == found["tokens"] / found["bytes"]
    assert found["labels"] == {"pos": 4, "neg": 2}
    assert found["exact_duplicates"] == 1 and found["near_duplicates"] == 1
    assert found["examples"][0]["first"] == "a.jsonl:4" and found["examples"][0]["second"] == "a.jsonl:5"
    assert found["lengths"]["quantiles"]["0.0"] == 1 and found["lengths"]["quantiles"]["1.0"] == len(LONG)
    assert found["longer_than_max"]["documents"] == 2
    lost = (len(LONG) + sea - 100) / found["tokens"]
    assert found["longer_than_max"]["tokens_lost_fraction"] == pytest.approx(lost)
    assert found["fingerprint"] == source.fingerprint()
    without = passport(source)["sources"][0]
    assert "tokens" not in without and without["lengths"]["unit"] == "characters"


def test_rendered_for_people(folder: Path, characters: TextTokenizer) -> None:
    data = DataConfig(root=str(folder), train="a.jsonl", test="b.jsonl", overlap="keep")
    value = passport(load_splits(data, ("text", "label")), characters, 50)
    assert [source["split"] for source in value["sources"]] == ["train", "test"]
    assert value["overlap"][0]["exact"] == 1
    console = Console(file=io.StringIO(), width=120, color_system=None)
    render(value, console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    for expected in ("label pos", "near duplicates", "test in train: 1 exactly", "longer than max_tokens", "a.jsonl:5"):
        assert expected in printed
