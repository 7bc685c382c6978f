"""Every format gives the documents that stand in it; every mistake is named with its place."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isoform.config import DataConfig
from isoform.contracts import Source
from isoform.data import hub, readers
from isoform.data.identity import Occurrences, content_hash
from isoform.data.sources import open_source
from isoform.errors import DataError

QA = ("question", "answer")


def read(path: Path, required: Any = (), optional: tuple[str, ...] = (), **options: Any) -> list[dict[str, str]]:
    source = open_source(path.name, DataConfig(root=str(path.parent), **options), required, optional)
    return [dict(document.fields) for document in source]


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def texts(path: Path, **options: Any) -> list[str]:
    return [fields["text"] for fields in read(path, **options)]


# ------------------------------------------------------------------------------------------------------------- formats


def test_lines_paragraphs_and_whole_files(tmp_path: Path) -> None:
    path = written(tmp_path, "a.txt", "\ufeffone\r\ntwo\n\n  \nthree ")
    assert texts(path) == ["one", "two", "three "]
    assert texts(path, unit="paragraph") == ["one\ntwo", "three "]
    assert texts(path, unit="file") == ["one\ntwo\n\n  \nthree "]


@pytest.mark.parametrize(("unit", "limit"), [("file", "FILE_BYTES"), ("piece", "PIECE_BYTES")])
def test_a_large_file_is_cut_at_line_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit: str, limit: str
) -> None:
    monkeypatch.setattr(readers, limit, 20)
    content = "".join(f"line {number}\n" for number in range(30))
    pieces = texts(written(tmp_path, "a.txt", content), unit=unit)
    assert "".join(pieces) == content
    assert len(pieces) > 5 and all(len(piece) <= 20 and piece.endswith("\n") for piece in pieces)


def test_csv_with_quotes_and_line_breaks(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", 'text,label,more\n"a, ""b""\r\nc",pos,1\r\n\nd,neg,2\n')
    assert read(path, ("text", "label")) == [{"text": 'a, "b"\nc', "label": "pos"}, {"text": "d", "label": "neg"}]
    first = next(iter(open_source("a.csv", DataConfig(root=str(tmp_path)), ("text", "label"))))
    assert first.meta == {"more": "1", "source": "a.csv", "row": 2}


def test_tsv_with_and_without_a_header(tmp_path: Path) -> None:
    bare = written(tmp_path, "a.tsv", 'Where was "X" born?\tParis\nWhere was Y born?\tRome\n')
    assert read(bare, QA, columns=["question", "answer"])[0] == {"question": 'Where was "X" born?', "answer": "Paris"}
    header = written(tmp_path, "b.tsv", "q\tanswer\nwho?\tme\n")
    assert read(header, QA, question="q") == [{"question": "who?", "answer": "me"}]


def test_questions_alone_where_the_answer_is_optional(tmp_path: Path) -> None:
    path = written(tmp_path, "a.tsv", "who?\nwhen?\n")
    options: dict[str, Any] = {"columns": ["question", "answer"]}
    assert read(path, QA, ("answer",), **options) == [{"question": "who?"}, {"question": "when?"}]
    with pytest.raises(DataError, match=r"a\.tsv:1: no tab"):
        read(path, QA, **options)


def test_jsonl_parquet_and_gzip(tmp_path: Path) -> None:
    rows = [{"text": f"row {number}", "label": number % 2, "n": number} for number in range(50)]
    content = "".join(json.dumps(row) + "\n" for row in rows)
    plain = written(tmp_path, "a.jsonl", content)
    zipped = written(tmp_path, "b.jsonl.gz", gzip.compress(content.encode()))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet", row_group_size=7)
    expected = [{"text": row["text"], "label": str(row["label"])} for row in rows]
    assert read(plain) == read(zipped) == read(tmp_path / "c.parquet") == expected


@pytest.mark.parametrize("indent", [None, 2])
def test_json_is_a_list_or_objects_one_after_the_other(tmp_path: Path, indent: int | None) -> None:
    rows = [{"text": f"row {number}", "label": "a, [b]"} for number in range(5)]
    listed = written(tmp_path, "a.json", json.dumps(rows, indent=indent))
    loose = written(tmp_path, "b.json", "\n".join(json.dumps(row, indent=indent) for row in rows))
    expected = [{"text": row["text"], "label": row["label"]} for row in rows]
    assert read(listed) == read(loose) == expected
    lines = [document.meta["row"] for document in open_source(str(listed), DataConfig(), ("text",))]
    assert lines == ([2, 6, 10, 14, 18] if indent else [1] * 5)


def test_lists_of_messages_travel_as_their_json(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Grüße"}, {"role": "assistant", "content": "hi"}]
    row = {"messages": messages, "input": None, "text": "plain"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "c.parquet")
    for path in (written(tmp_path, "a.jsonl", json.dumps(row)), tmp_path / "c.parquet"):
        (document,) = read(path, ("messages", "text", "input"))
        assert document.keys() == {"messages", "text"} and "Grüße" in document["messages"]
        assert json.loads(document["messages"]) == messages
    named = read(tmp_path / "a.jsonl", ("prompt",), prompt="messages")
    assert json.loads(named[0]["prompt"]) == messages


def test_what_is_missing_is_told_of_the_nearest_way(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", '{"instruction": "x", "outptu": "y"}\n')
    with pytest.raises(DataError, match=r"no column 'output' .did you mean 'outptu'"):
        read(path, (("messages",), ("instruction", "output")))


def test_a_folder_is_its_files_in_order(tmp_path: Path) -> None:
    written(tmp_path, "set/b.txt", "two\n")
    written(tmp_path, "set/a/x.jsonl", '{"text": "one"}\n')
    written(tmp_path, "set/.hidden.txt", "no\n")
    written(tmp_path, "set/readme.md", "no\n")
    written(tmp_path, "set/about.json", '{"text": "no"}')
    source = open_source("set", DataConfig(root=str(tmp_path)), ("text",))
    assert [document.fields["text"] for document in source] == ["one", "two"]
    assert [document.meta["source"] for document in source] == [str(Path("set/a/x.jsonl")), str(Path("set/b.txt"))]
    assert isinstance(source, Source)


def test_alternatives_let_each_file_have_its_own_fields(tmp_path: Path) -> None:
    written(tmp_path, "wiki.txt", "some text\n")
    written(tmp_path, "qa.tsv", "who?\tme\n")
    data = DataConfig(root=str(tmp_path), columns=["question", "answer"])
    source = open_source(["wiki.txt", "qa.tsv"], data, (("text",), QA), ("answer",))
    assert [set(document.fields) for document in source] == [{"text"}, {"question", "answer"}]


def test_max_documents_counts_for_each_source(tmp_path: Path) -> None:
    written(tmp_path, "a.txt", "1\n2\n3\n")
    written(tmp_path, "b.txt", "4\n5\n6\n")
    source = open_source(["a.txt", "b.txt"], DataConfig(root=str(tmp_path), max_documents=2))
    assert [document.fields["text"] for document in source] == ["1", "2", "4", "5"]


# ------------------------------------------------------------------------------------------------------------ mistakes

MISTAKES = [
    ("a.txt", b"", "a.txt: empty"),
    ("a.txt", b"\n \n", "a.txt: empty"),
    ("a.txt", b"one\ntw\xffo\n", "a.txt:2:3: the byte 0xff is not UTF-8"),
    ("a.txt", b"\xef\xbb\xbfab\xff\n", "a.txt:1:6: the byte 0xff"),
    ("a.txt", b"one\nab\0\n", "a.txt:2:3: a NUL byte"),
    ("a.csv", b"text,label\na,b\nc\n", "a.csv:3: 1 columns given, 2 expected"),
    ("a.csv", b"text,text\na,b\n", "a.csv:1: the column 'text' stands twice"),
    ("a.csv", b'text\n"a', "a.csv:2: not a row of csv"),
    ("a.csv", b"txt\na\n", "a.csv: no column 'text' (did you mean 'txt'?); the columns are 'txt'; name it"),
    ("a.csv", b"text\n", "a.csv: empty"),
    ("a.tsv", b"text\tlabel\na\tb\nc\n", "a.tsv:3: no tab"),
    ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl:2:10: not JSON"),
    ("a.jsonl", b"[1]\n", "a.jsonl:1: list given"),
    ("a.jsonl", b'{"text": ["a"]}\n', "a.jsonl:1: list in the column 'text'"),
    ("a.jsonl", b'{"text": null}\n', "a.jsonl:1: nothing in the column 'text'"),
    ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl:1: half of a surrogate pair"),
    ("a.jsonl", b'{"text": "a\\u0000"}\n', "a.jsonl:1: a NUL character"),
    ("a.jsonl", b'{"other": "a"}\n', "no column 'text'"),
    ("a.jsonl", b"[" * 100_000 + b"\n", "a.jsonl:1:1: not JSON"),
    ("a.json", b'[{"text": "a"},\n {"text" "b"}]', "a.json:2:10: not JSON"),
    ("a.json", b'[{"text": "a"},\n 7]', "a.json:2: int given, an object of columns"),
    ("a.json", b'[{"text": "a"}', "a.json:1: the list has no end"),
    ("a.jsonl.gz", b"not gzip", "a.jsonl.gz:1: damaged gzip"),
    ("a.parquet", b"not parquet", "a.parquet: not readable as parquet"),
    ("a.docx", b"x", "a.docx: .docx is not read; .txt"),
]


@pytest.mark.parametrize(("name", "content", "message"), MISTAKES)
def test_mistakes_are_named_with_their_place(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, name, content)
    with pytest.raises(DataError) as caught:
        read(path, ("text",))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("nothing", ["nan", "NaN"])
def test_a_missing_value_that_became_a_word_is_refused(nothing: str, tmp_path: Path) -> None:
    refused = rf"my\.(csv|tsv):3: '{nothing}' in the column '(review|label)', .* remove the row; .* as \.jsonl or"
    for name, text in (
        ("my.csv", f"review,label\nfine,pos\n{nothing},neg\n"),
        ("my.tsv", f"review\tlabel\nfine\tpos\ndull\t{nothing}\n"),
    ):
        (tmp_path / name).write_text(text)
        data = DataConfig(root=str(tmp_path), text="review")
        with pytest.raises(DataError, match=refused):
            list(open_source(name, data, ("text", "label")))
    # Where it is one word of several, or in a column that nothing says must be a text, or in a file that knows better.
    (tmp_path / "fine.csv").write_text(f"text,label,note\na {nothing} bread,pos,{nothing}\n")
    (tmp_path / "fine.jsonl").write_text(json.dumps({"text": nothing, "label": "pos"}) + "\n")
    found = list(open_source(["fine.csv", "fine.jsonl"], DataConfig(root=str(tmp_path)), ("text", "label")))
    assert [document.fields["text"] for document in found] == [f"a {nothing} bread", nothing]
    unlabelled = written(tmp_path, "new.csv", f"text,label\nfine,{nothing}\n")
    assert texts(unlabelled, required=("text",), optional=("label",)) == ["fine"]


def test_missing_file_and_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.txt: no such file"):
        read(tmp_path / "none.txt")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="no file to read"):
        read(tmp_path / "folder")


def test_a_tsv_without_header_says_what_to_set(tmp_path: Path) -> None:
    path = written(tmp_path, "a.tsv", "Where?\tHere\nWhen?\tNow\n")
    with pytest.raises(DataError, match=r"data\.columns: \[question, answer\]"):
        read(path, QA, ("answer",))


def test_a_line_without_end_is_refused_before_it_fills_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 100)
    with pytest.raises(DataError, match=r"a\.txt:2: a line of more than 100 bytes"):
        read(written(tmp_path, "a.txt", "short\n" + "x" * 200))


# ------------------------------------------------------------------------------------------------- ids and fingerprints


def test_ids_survive_reordering_and_are_unique(tmp_path: Path) -> None:
    written(tmp_path, "a.txt", "one\ntwo\none\none\n")
    written(tmp_path, "b.txt", "zero\none\ntwo\n")
    data = DataConfig(root=str(tmp_path))
    first = [document.id for document in open_source("a.txt", data)]
    second = [document.id for document in open_source("b.txt", data)]
    assert len(set(first)) == 4 and first[2:] == [f"{first[0]}-1", f"{first[0]}-2"]
    assert second[1:] == first[:2]


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.lists(st.integers(0, 8), max_size=8), max_size=12))
def test_occurrences_count_earlier_equals(values: list[list[int]]) -> None:
    import numpy as np

    occurrences, seen = Occurrences(), []
    for block in values:
        numbers = occurrences.number(np.array(block, dtype=np.uint64))
        for value, number in zip(block, numbers, strict=True):
            assert number == seen.count(value)
            seen.append(value)


def test_content_hash_knows_names_and_borders() -> None:
    assert content_hash({"a": "x", "b": "y"}) == content_hash({"b": "y", "a": "x"})
    assert len({content_hash({"a": "xy"}), content_hash({"ax": "y"}), content_hash({"a": "x", "y": ""})}) == 3


def test_the_fingerprint_follows_bytes_not_names_or_times(tmp_path: Path) -> None:
    a, b = written(tmp_path, "a.txt", "one\ntwo\n"), written(tmp_path, "b.txt", "one\ntwo\n")
    stamp = a.stat()

    def fingerprint(path: Path, **options: Any) -> str:
        return open_source(path.name, DataConfig(root=str(tmp_path), **options)).fingerprint()

    before = fingerprint(a)
    assert fingerprint(b) == before
    assert fingerprint(a, unit="file") != before
    a.write_bytes(b"one\ntwO\n")
    os.utime(a, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert a.stat().st_size == stamp.st_size
    assert fingerprint(a) != before


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=20)))
def test_jsonl_and_parquet_give_back_any_text(rows: list[str], tmp_path: Path) -> None:
    if not rows:
        return
    content = "".join(json.dumps({"text": row}) + "\n" for row in rows)
    assert texts(written(tmp_path, "h.jsonl", content)) == rows
    pq.write_table(pa.table({"text": rows}), tmp_path / "h.parquet")
    assert texts(tmp_path / "h.parquet") == rows


# ------------------------------------------------------------------------------------------------------------- the hub


def hub_of(monkeypatch: pytest.MonkeyPatch, splits: dict[str, list[dict[str, str]]], calls: list[Any]) -> None:
    import datasets
    import huggingface_hub

    def load_dataset(name: str, config: str | None, *, revision: str) -> Any:
        calls.append((name, config, revision))
        return datasets.DatasetDict({key: datasets.Dataset.from_list(rows) for key, rows in splits.items()})

    info = SimpleNamespace(dataset_info=lambda name, revision: SimpleNamespace(sha=f"sha-of-{revision}"))
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_the_hub_is_read_at_a_resolved_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    hub_of(monkeypatch, {"train": [{"text": "a"}], "test": [{"text": "b"}]}, calls)
    source = open_source("hf:owner/name@v1:small#test", DataConfig(), ("text",))
    assert [document.fields["text"] for document in source] == ["b"]
    assert calls == [("owner/name", "small", "sha-of-v1")]
    assert source.fingerprint() != open_source("hf:owner/name@v2:small#test", DataConfig(), ("text",)).fingerprint()
    assert [document.fields["text"] for document in open_source("hf:owner/name", DataConfig())] == ["a"]


def test_classes_of_the_hub_come_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    hub_of(monkeypatch, {}, [])
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    rows = {"text": ["a", "b", "c"], "label": [1, 0, -1]}
    found = {"train": datasets.Dataset.from_dict(rows, features=features)}
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: datasets.DatasetDict(found))
    source = open_source("hf:owner/name", DataConfig(), (("text", "label"),))
    assert [document.fields["label"] for document in source] == ["pos", "neg", "-1"]


def test_what_the_hub_cannot_give(monkeypatch: pytest.MonkeyPatch) -> None:
    hub_of(monkeypatch, {"validation": [{"text": "a"}], "test": [{"text": "b"}]}, [])
    with pytest.raises(DataError, match="no split 'train'; add one of #validation, #test"):
        list(open_source("hf:owner/name", DataConfig()))
    with pytest.raises(DataError, match="is expected"):
        open_source("hf:", DataConfig())

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nand more")

    monkeypatch.setattr("huggingface_hub.HfApi", lambda: SimpleNamespace(dataset_info=offline))
    with pytest.raises(DataError, match=r"hub does not give it: no route$"):
        hub.open_table("hf:owner/name")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DataError, match="pip install"):
        hub.open_table("hf:owner/name")
