"""Token stores: every document comes back, in bounded memory, built once, rebuilt when anything changed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plain import Plain

from isoform import storage
from isoform.config import DataConfig
from isoform.contracts import Document, Encoded
from isoform.data import shards
from isoform.data.corpus import Dataset, build_dataset
from isoform.data.identity import content_hash
from isoform.errors import DataError
from isoform.text.tokenizers import TextTokenizer


@dataclass
class Given:
    """Documents in a list, as a source."""

    rows: list[dict[str, str]]
    name: str = "given"
    reads: int = field(default=0)

    def __iter__(self) -> Iterator[Document]:
        self.reads += 1
        for number, fields in enumerate(self.rows, start=1):
            yield Document(f"{content_hash(fields):016x}-{number}", fields, {"source": "given", "row": number})

    def fingerprint(self) -> str:
        return storage.fingerprint(self.rows)


def build(source: Given, tokenizer: TextTokenizer, cache: Path, window: int = 8, **options: Any) -> Dataset:
    keep = options.pop("keep_documents", False)
    objective = Plain(tokenizer, window, windowed=options.pop("windowed", True))
    return build_dataset(source, tokenizer, objective, DataConfig(**options), window - 1, cache, keep)  # type: ignore[arg-type]


def test_documents_come_back(tmp_path: Path, characters: TextTokenizer) -> None:
    source = Given([{"text": "abc"}, {"question": "who", "answer": "é漢"}, {"text": "x"}])
    dataset = build(source, characters, tmp_path, keep_documents=True, shard_tokens=4)
    assert len(dataset) == 3
    for encoded, document in zip(dataset, source, strict=True):
        assert encoded.id == document.id and encoded.document == document
        assert {name: characters.decode(ids) for name, ids in encoded.fields.items()} == document.fields
        assert encoded.num_bytes == sum(len(text.encode()) for text in document.fields.values())
        assert all(ids.dtype == np.int32 for ids in encoded.fields.values())
    assert dataset.ids == [document.id for document in source]
    lengths = {name: values.tolist() for name, values in dataset.field_lengths.items()}
    assert lengths == {"text": [3, 0, 1], "question": [0, 3, 0], "answer": [0, 2, 0]}
    assert dataset.report["tokens"] == 9 and dataset.report["bytes"] == dataset.num_bytes == 12
    with pytest.raises(IndexError):
        dataset[3]


def test_fields_that_no_document_has_count_nothing(tmp_path: Path, characters: TextTokenizer) -> None:
    dataset = build(Given([{"question": "who"}]), characters, tmp_path)
    assert dataset.field_lengths["answer"].tolist() == [0]
    assert "answer" not in dataset[0].fields
    assert dataset[0].document is None


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.text(alphabet="abcé漢 ☃", min_size=1, max_size=40), min_size=1, max_size=5),
    window=st.integers(2, 9),
    shard=st.integers(1, 13),
)
def test_windows_ask_every_token_once_and_share_out_every_byte(
    rows: list[str], window: int, shard: int, characters: TextTokenizer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = Given([{"text": row} for row in rows])
    dataset = build(source, characters, tmp_path_factory.mktemp("w"), window, shard_tokens=shard)
    for document in source:
        ids = characters.encode(document.fields["text"])
        parts = [encoded for encoded in dataset if encoded.id.split("#")[0] == document.id]
        assert sum(part.num_bytes for part in parts) == len(document.fields["text"].encode())
        assert all(0 < len(part.fields["text"]) <= window for part in parts)
        # what each window asks is all of it but its first token
        asked = np.concatenate([part.fields["text"][1:] for part in parts])
        assert asked.tolist() == ids[1:].tolist()
        if len(parts) > 1:
            assert [part.id for part in parts] == [f"{document.id}#{k}" for k in range(len(parts))]


def test_bytes_of_windows_are_exact_for_characters(tmp_path: Path, characters: TextTokenizer) -> None:
    dataset = build(Given([{"text": "aé漢bcde漢漢f"}]), characters, tmp_path, 4)
    texts = [characters.decode(encoded.fields["text"]) for encoded in dataset]
    assert texts == ["aé漢b", "bcde", "e漢漢f"]
    assert [encoded.num_bytes for encoded in dataset] == [len("aé漢b".encode()), 3, len("漢漢f".encode())]


def test_long_documents_are_cut_off_or_refused_as_asked(tmp_path: Path, characters: TextTokenizer) -> None:
    source = Given([{"text": "abc"}, {"text": "abcdefghijkl"}])
    short = build(source, characters, tmp_path, 8, long_documents="truncate")
    assert [len(encoded.fields["text"]) for encoded in short] == [3, 8]
    assert short[1].num_bytes == 8
    assert short.report["documents_truncated"] == 1 and short.report["tokens_dropped"] == 4
    with pytest.raises(DataError, match="given:2: the document has 12 tokens, at most 8 fit"):
        build(source, characters, tmp_path, 8, long_documents="refuse")
    assert not list((tmp_path / "tokens").glob(".*"))
    whole = build(source, characters, tmp_path, 8, windowed=False)
    assert [len(encoded.fields["text"]) for encoded in whole] == [3, 12]
    assert whole.report["documents_truncated"] == 1


def test_unknown_and_empty_are_counted(tmp_path: Path, characters: TextTokenizer) -> None:
    dataset = build(Given([{"text": "a☃b☃"}, {"text": ""}]), characters, tmp_path)
    assert dataset.report["unknown_tokens"] == 2
    assert dataset.report["documents_empty"] == 1 and len(dataset) == 1


# --------------------------------------------------------------------------------------------------------------- cache


def test_a_store_is_built_once(tmp_path: Path, characters: TextTokenizer) -> None:
    source = Given([{"text": "abc"}])
    first = build(source, characters, tmp_path)
    again = build(source, characters, tmp_path)
    assert source.reads == 1
    assert first.fingerprint == again.fingerprint


def test_whatever_matters_makes_another_store(tmp_path: Path, characters: TextTokenizer) -> None:
    rows = [{"text": "abcdefghijk"}]
    prints = {
        build(Given(rows), characters, tmp_path).fingerprint,
        build(Given([{"text": "abcdefghijK"}]), characters, tmp_path).fingerprint,
        build(Given(rows), characters, tmp_path, 5).fingerprint,
        build(Given(rows), characters, tmp_path, long_documents="truncate").fingerprint,
        build(Given(rows), characters, tmp_path, keep_documents=True).fingerprint,
    }
    assert len(prints) == 5


@pytest.mark.parametrize("name", ["text.00000.tokens", "text.lengths", "ids", "bytes", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_store_is_built_again(name: str, damage: str, tmp_path: Path, characters: TextTokenizer) -> None:
    source = Given([{"text": "abc"}, {"text": "defg"}])
    path = build(source, characters, tmp_path).folder / name
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if damage == "cut" else content[:2] + bytes([content[2] ^ 1]) + content[3:])
    dataset = build(source, characters, tmp_path)
    rebuilt = 2 if name != "manifest.json" or damage != "cut" else source.reads
    assert source.reads == rebuilt
    assert [characters.decode(encoded.fields["text"]) for encoded in dataset] == ["abc", "defg"]


def test_a_source_that_fails_leaves_nothing(tmp_path: Path, characters: TextTokenizer) -> None:
    class Failing(Given):
        def __iter__(self) -> Iterator[Document]:
            yield from super().__iter__()
            raise DataError("line 7 is broken")

    with pytest.raises(DataError, match="line 7"):
        build(Failing([{"text": "abc"}]), characters, tmp_path)
    assert not list((tmp_path / "tokens").iterdir())


def test_reading_gives_mapped_pages_back(
    tmp_path: Path, characters: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "MAPPED_BYTES", 5000)
    dataset = build(Given([{"text": "abcdefg"} for _ in range(50)]), characters, tmp_path)
    assert [len(encoded.fields["text"]) for encoded in dataset] == [7] * 50


# -------------------------------------------------------------------------------------------------------------- memory

MEASURE = """
import resource, sys
from pathlib import Path
sys.path.insert(0, {folder!r})
from plain import Plain
from isoform.config import DataConfig
from isoform.data import shards
from isoform.data.corpus import build_dataset
from isoform.data.plan import BatchPlan
from isoform.data.splits import load_splits
from isoform.registry import component
from isoform.text.tokenizers import train_tokenizer

def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1000

shards.MAPPED_BYTES = int(sys.argv[3])
path, cache = Path(sys.argv[1]), Path(sys.argv[2])
data = DataConfig(path=str(path), long_documents="windows")
_, config = component("tokenizer", {{"kind": "char"}}, "t")
before = peak()
source = load_splits(data, ("text",)).splits["train"]
tokenizer = train_tokenizer("char", config, (document.fields["text"] for document in source))
dataset = build_dataset(source, tokenizer, Plain(tokenizer, 257), data, 256, cache)
plan = BatchPlan(dataset.field_lengths["text"], seed=0, batch_sequences=16)
for step in range(200):
    epoch, chosen = plan.samples(step * plan.steps_per_epoch // 200)
    tokens = [dataset[index].fields["text"] for index in chosen.tolist()]
print(before, peak())
"""


def peak_megabytes(folder: Path, size_megabytes: int, mapped_bytes: int = shards.MAPPED_BYTES) -> float:
    """The memory that reading, encoding and batching a text of this size takes, beyond that of the libraries."""
    path = folder / f"{size_megabytes}.txt"
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for _ in range(size_megabytes):
            letters = rng.integers(97, 123, size=(1000, 999), dtype=np.uint8)
            file.write("\n".join(row.tobytes().decode() for row in letters) + "\n")
    code = MEASURE.format(folder=str(Path(__file__).parent))
    arguments = [str(path), str(folder / "cache"), str(mapped_bytes)]
    ran = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    before, after = map(float, ran.stdout.split())
    path.unlink()
    return after - before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    assert peak_megabytes(tmp_path, 16, 2_000_000) - peak_megabytes(tmp_path, 4, 2_000_000) < 10


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_a_large_corpus(tmp_path: Path) -> None:
    small, large = peak_megabytes(tmp_path, 50), peak_megabytes(tmp_path, 400)
    print(f"peak beyond the libraries: {small:.0f} MB for 50 MB of text, {large:.0f} MB for 400 MB")
    assert large - small < 60


class Marked(Plain):
    """Also notes the place of the text's last token."""

    def encode(self, document: Document) -> Encoded:
        encoded = super().encode(document)
        marks = np.array([len(encoded.fields["text"]) - 1], dtype=np.int32)
        return Encoded(encoded.id, {**encoded.fields, "_marks": marks}, encoded.num_bytes, document)


def test_places_beyond_16_bits_come_back_and_count_as_no_tokens(tmp_path: Path, characters: TextTokenizer) -> None:
    source = Given([{"text": "ab " * 30_000}])
    objective = Marked(characters, 100_001)
    dataset = build_dataset(source, characters, objective, DataConfig(), 100_000, tmp_path)  # type: ignore[arg-type]
    assert dataset[0].fields["_marks"].tolist() == [89_999]
    assert dataset.report["tokens"] == 90_000
