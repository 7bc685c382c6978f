"""Token stores: documents encoded once, kept as memory-mapped shards, read by index.

A store is a folder under the cache, named by a hash of everything that decides its content: the source's bytes, the
tokenizer, what the objective's encoding depends on, and the options. It is built in one streaming pass, appears whole
or not at all, and is checked by hash when it is opened; a damaged one is built again.

    manifest.json            counts, report, sha256 of each file
    FIELD.00000.tokens ...   ids end to end, uint16 or uint32, `shard_tokens` a file
    FIELD.starts, .lengths   where each sample's ids begin, int64, and how many they are, int32 (-1: no such field)
    ids, ids.ends            each sample's id, UTF-8 end to end
    bytes                    UTF-8 bytes of text that each sample stands for
    documents, .starts       raw documents as JSON lines, where they are kept
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from isoform import storage
from isoform.config import DataConfig
from isoform.contracts import Document, Encoded, Ints, Objective, Source, Tokenizer
from isoform.data.shards import FieldReader, FieldWriter, GrowingNumbers, MappedNumbers, Pages
from isoform.data.windows import Windower
from isoform.errors import LockedError

FORMAT = 2


class Dataset:
    """Encoded documents, or windows of them, by index.

    report: {documents, samples, tokens, bytes, unknown_tokens, documents_cut, documents_truncated, tokens_dropped,
    documents_empty, longest_tokens}; where the objective counts what it asks of a document also {targets, targets_lost,
    documents_unasked}, the last being those that lose every target and are left out. fingerprint: the hash of
    everything that decides the content. fields: those that `field_lengths` names even where no document has them.
    """

    def __init__(self, folder: Path, fields: Sequence[str] = ()) -> None:
        manifest = storage.read_json(folder / "manifest.json")
        self.folder = folder
        self.report: dict[str, int] = manifest["report"]
        self.fingerprint: str = manifest["key"]
        self._num: int = manifest["samples"]
        self._expected = fields
        pages = Pages()
        dtype, shard_tokens = manifest["dtype"], manifest["shard_tokens"]
        self._fields = {
            name: FieldReader(folder, name, _dtype(name, dtype), shard_tokens, pages) for name in manifest["fields"]
        }
        self._bytes = MappedNumbers(folder / "bytes", "i8", pages)
        self._ids = MappedNumbers(folder / "ids", "u1", pages)
        self._id_ends = MappedNumbers(folder / "ids.ends", "i8", pages)
        keeps = manifest["keeps_documents"]
        self._documents = MappedNumbers(folder / "documents", "u1", pages) if keeps else None
        self._document_starts = MappedNumbers(folder / "documents.starts", "i8", pages) if keeps else None

    def __len__(self) -> int:
        return self._num

    def __getitem__(self, index: int) -> Encoded:
        if not 0 <= index < self._num:
            raise IndexError(index)
        fields = {name: ids for name, stored in self._fields.items() if (ids := stored.ids(index)) is not None}
        return Encoded(self.id(index), fields, self._bytes.number(index), self.document(index))

    def __iter__(self) -> Iterator[Encoded]:
        return (self[index] for index in range(len(self)))

    def id(self, index: int) -> str:
        """The sample's id: its document's, with `#k` for the k-th window."""
        start = self._id_ends.number(index - 1) if index else 0
        return self._ids.read(start, self._id_ends.number(index)).decode()

    @property
    def ids(self) -> list[str]:
        """Every sample's id, in order."""
        return [self.id(index) for index in range(len(self))]

    @cached_property
    def field_lengths(self) -> dict[str, Ints]:
        """Field -> number of ids of each sample `(N,)`, 0 where the field is missing."""
        absent = {name: np.zeros(self._num, dtype=np.int64) for name in self._expected}
        return absent | {
            name: np.maximum(stored.lengths.array(0, self._num).astype(np.int64), 0)
            for name, stored in self._fields.items()
        }

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of text that all samples together stand for."""
        return self.report["bytes"]

    def document(self, index: int) -> Document | None:
        """The raw document, where it was kept and was not cut into windows."""
        if self._documents is None or self._document_starts is None:
            return None
        start = self._document_starts.number(index)
        if start < 0:
            return None
        size = int.from_bytes(self._documents.read(start, start + 8), "little")
        identity, fields, meta = json.loads(self._documents.read(start + 8, start + 8 + size))
        return Document(identity, fields, meta)


# ------------------------------------------------------------------------------------------------------------ building


def build_dataset(
    source: Source,
    tokenizer: Tokenizer,
    objective: Objective,
    data: DataConfig,
    max_tokens: int,
    cache: Path,
    keep_documents: bool = False,
) -> Dataset:
    """The source's documents encoded for the objective: opened where the cache has them, else built.

    keep_documents: also keep the raw text, which an evaluation shows. Memory does not grow with the source, but for
    some tens of bytes a document.

    Raises: DataError from the source, from the objective's `encode`, and for a long document that is refused.
    """
    windower = Windower(tokenizer, objective, data.long_documents, max_tokens)
    settings = [FORMAT, source.fingerprint(), tokenizer.fingerprint(), objective.encoding_key(), windower.key]
    key = storage.fingerprint([*settings, keep_documents, data.shard_tokens])
    folder = cache / "tokens" / key
    if not whole(folder, key):
        with waited(cache / "locks" / key):
            if not whole(folder, key):
                _build(folder, key, source, tokenizer, objective, windower, data.shard_tokens, keep_documents)
    return Dataset(folder, [name for fields in objective.alternatives for name in fields])


def whole(folder: Path, key: str) -> bool:
    """Whether a store is there with every byte that it was built with."""
    try:
        manifest = storage.read_json(folder / "manifest.json")
        return manifest["key"] == key and all(
            storage.sha256_file(folder / name) == digest for name, digest in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


class waited:
    """A lock that waits: processes of one run that need the same store build it once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()

    def __enter__(self) -> None:
        while True:
            try:
                self._stack.enter_context(storage.locked(self._folder))
                return
            except LockedError:
                time.sleep(0.1)

    def __exit__(self, *error: object) -> None:
        self._stack.close()


def _dtype(field: str, tokens: str) -> str:
    """How a field is stored: places (`_field`) may exceed any token id."""
    return "uint32" if field.startswith("_") else tokens


@dataclass
class _Writer:
    """All files of a store that is being built."""

    folder: Path
    dtype: str
    shard_tokens: int
    keep_documents: bool
    fields: dict[str, FieldWriter] = field(default_factory=dict)
    num_samples: int = 0

    def __post_init__(self) -> None:
        self._bytes = GrowingNumbers(self.folder / "bytes", "i8")
        self._ids = GrowingNumbers(self.folder / "ids", "u1")
        self._id_ends = GrowingNumbers(self.folder / "ids.ends", "i8")
        self._id_end = self._document_end = 0
        self._columns = [self._bytes, self._ids, self._id_ends]
        if self.keep_documents:
            self._documents = GrowingNumbers(self.folder / "documents", "u1")
            self._document_starts = GrowingNumbers(self.folder / "documents.starts", "i8")
            self._columns += [self._documents, self._document_starts]

    def add(
        self, document: Document, encoded: Encoded, ranges: Sequence[tuple[int, int]], num_bytes: list[int]
    ) -> None:
        """One document: one sample, or a window of its text for each of several ranges."""
        for name, ids in encoded.fields.items():
            if name not in self.fields:
                kind = _dtype(name, self.dtype)
                self.fields[name] = FieldWriter(self.folder, name, kind, self.shard_tokens)
                self.fields[name].fill(self.num_samples)
            self.fields[name].add(ids, ranges if name == "text" else [(0, len(ids))] * len(ranges))
        self.num_samples += len(ranges)
        for tokens in self.fields.values():
            tokens.fill(self.num_samples)
        for number in range(len(ranges)):
            identity = (f"{encoded.id}#{number}" if len(ranges) > 1 else encoded.id).encode()
            self._ids.write(identity)
            self._id_end += len(identity)
            self._id_ends.append([self._id_end])
        self._bytes.append(num_bytes)
        if self.keep_documents:
            self._keep(document, len(ranges))

    def _keep(self, document: Document, num_samples: int) -> None:
        if num_samples > 1:
            self._document_starts.append([-1] * num_samples)
            return
        line = json.dumps([document.id, dict(document.fields), dict(document.meta)], default=str).encode()
        self._document_starts.append([self._document_end])
        self._documents.write(len(line).to_bytes(8, "little") + line)
        self._document_end += 8 + len(line)

    def close(self) -> None:
        for column in self._columns:
            column.close()
        for tokens in self.fields.values():
            tokens.close()


def _build(
    folder: Path,
    key: str,
    source: Source,
    tokenizer: Tokenizer,
    objective: Objective,
    windower: Windower,
    shard_tokens: int,
    keep_documents: bool,
) -> None:
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    with storage.staged_folder(folder) as staged:
        writer = _Writer(staged, dtype, shard_tokens, keep_documents)
        try:
            report = _fill(writer, source, tokenizer, objective, windower)
        finally:
            writer.close()
        files = {path.name: storage.sha256_file(path) for path in sorted(staged.iterdir())}
        manifest = {
            "format": FORMAT,
            "key": key,
            "source": source.name,
            "samples": writer.num_samples,
            "fields": list(writer.fields),
            "dtype": dtype,
            "shard_tokens": shard_tokens,
            "keeps_documents": keep_documents,
            "report": report,
            "files": files,
        }
        storage.write_json(staged / "manifest.json", manifest)


def _fill(
    writer: _Writer, source: Source, tokenizer: Tokenizer, objective: Objective, windower: Windower
) -> dict[str, int]:
    report = dict.fromkeys(
        ("documents", "samples", "tokens", "bytes", "unknown_tokens", "documents_cut", "documents_truncated"), 0
    ) | {"tokens_dropped": 0, "documents_empty": 0, "longest_tokens": 0}
    asked_of = getattr(objective, "asked", None)
    if asked_of is not None:
        report |= {"targets": 0, "targets_lost": 0, "documents_unasked": 0}
    unknown = tokenizer.special_ids.get("unk", -1)
    for document in source:
        encoded = objective.encode(document)
        num_tokens = sum(map(len, encoded.token_fields))
        report["documents"] += 1
        report["longest_tokens"] = max(report["longest_tokens"], num_tokens)
        if num_tokens == 0:
            report["documents_empty"] += 1
            continue
        ranges, num_bytes, dropped = windower.cut(document, encoded)
        if asked_of is not None:
            asked, kept = asked_of(encoded)
            report["targets"] += asked
            report["targets_lost"] += asked - kept
            if kept == 0:
                report["documents_unasked"] += 1
                continue
        writer.add(document, encoded, ranges, num_bytes)
        report["tokens"] += num_tokens
        report["bytes"] += sum(num_bytes)
        report["unknown_tokens"] += sum(int(np.count_nonzero(ids == unknown)) for ids in encoded.token_fields)
        report["documents_cut"] += len(ranges) > 1
        report["documents_truncated"] += dropped > 0
        report["tokens_dropped"] += dropped
    report["samples"] = writer.num_samples
    return report
