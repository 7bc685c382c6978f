"""Sources: where documents come from, named by a text.

    reviews.parquet                         a file: txt, csv, tsv, json, jsonl, conll, parquet; all but this also as .gz
    novels/                                 a folder of such files, in the order of their names
    hf:owner/name@revision:config#split     a dataset of the Hugging Face hub; all but owner/name may be left out
    builtin:city-facts                      a set that comes with isoform

A source streams: it holds a few hundred documents at a time, whatever it reads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from isoform.config import DataConfig
from isoform.contracts import Document
from isoform.data import builtin, hub
from isoform.data.blocks import blocks
from isoform.data.identity import Occurrences, content_hash
from isoform.data.readers import READERS, Layout, Row, format_of, open_bytes
from isoform.errors import DataError
from isoform.registry import nearest
from isoform.storage import fingerprint

# What a document's fields are called, and by which setting of `data` a column becomes one.
PLAIN, CHATS = ("text", "label", "question", "answer"), ("messages", "instruction", "input", "output")
KNOWN_FIELDS = (*PLAIN, *CHATS, "prompt", "chosen", "rejected", "tokens", "tags")
# Fields that may hold a list or an object: it travels as its JSON text.
NESTED_FIELDS = frozenset({"messages", "conversations", "prompt", "chosen", "rejected", "tokens", "tags"})
# What pandas and numpy write for nothing where a csv is made of texts; in these columns it is hardly ever meant.
NOTHING, GIVEN_FIELDS = frozenset({"nan", "NaN"}), frozenset({"text", "label"})
# Fields that add to another one, in which nothing is no mistake.
ADDED_FIELDS = frozenset({"input"})

Alternatives = tuple[tuple[str, ...], ...]


class Table(Protocol):
    """Rows of named columns: a file, or a set of the hub."""

    @property
    def name(self) -> str: ...

    def rows(self) -> Iterator[Row]: ...

    def digest(self) -> str:
        """A hash of the content."""
        ...


@dataclass(frozen=True)
class FileTable:
    """A file as rows; `name` is how the person called it."""

    name: str
    path: Path
    layout: Layout

    def rows(self) -> Iterator[Row]:
        ending = format_of(self.path)
        assert ending is not None
        return READERS[ending](self.path, self.layout)

    def digest(self) -> str:
        """A hash of the bytes, not of the name or the time: every byte is read, once in the life of this object."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        with open_bytes(self.path) as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return f"{format_of(self.path)} {digest.hexdigest()}"


@dataclass(frozen=True)
class Origin:
    """One source as the config names it, and its tables."""

    spec: str
    tables: tuple[Table, ...]

    def digest(self) -> str:
        """A hash of the content; for a set of the hub its name and commit."""
        digests = [table.digest() for table in self.tables]
        return digests[0] if len(digests) == 1 else fingerprint(digests)


class DocumentSource:
    """Documents of one or several origins; implements `contracts.Source`.

    A document's id is the hash of its fields, with `-1`, `-2`, ... for exact repetitions.
    """

    def __init__(self, origins: Sequence[Origin], data: DataConfig, required: Alternatives, optional: tuple[str, ...]):
        self.name = " + ".join(origin.spec for origin in origins)
        self.origins = tuple(origins)
        self._data = data
        self._required = required
        self._optional = optional

    def __iter__(self) -> Iterator[Document]:
        occurrences = Occurrences()
        empty = True
        for block in blocks(self._unnumbered()):
            empty = False
            hashes = np.array([int(document.id, 16) for document in block], dtype=np.uint64)
            for document, number in zip(block, occurrences.number(hashes), strict=True):
                identity = f"{document.id}-{number}" if number else document.id
                yield Document(identity, document.fields, document.meta)
        if empty:
            raise DataError(f"{self.name}: empty; at least one document is expected")

    def _unnumbered(self) -> Iterator[Document]:
        for origin in self.origins:
            found = (document for table in origin.tables for document in self._documents(table, origin))
            yield from islice(found, self._data.max_documents)

    def _documents(self, table: Table, origin: Origin) -> Iterator[Document]:
        mappings: dict[tuple[str, ...], dict[str, str]] = {}
        for row, values in table.rows():
            columns = tuple(values)
            if columns not in mappings:
                mappings[columns] = self._fields(columns, table)
            fields = {}
            for field, column in mappings[columns].items():
                text = self._text(values[column], field, f"{table.name}:{row}", column)
                if text in NOTHING and field in GIVEN_FIELDS and field not in self._optional and _in_cells(table):
                    raise DataError(
                        f"{table.name}:{row}: {text!r} in the column {column!r}, which is how a missing value is "
                        "written; give it a text or remove the row; if the word is meant, give the data as .jsonl or "
                        ".parquet"
                    )
                if text is not None:
                    fields[field] = text
            taken = set(mappings[columns].values())
            meta = {name: value for name, value in values.items() if name not in taken}
            meta.update(source=table.name, row=row)
            try:
                identity = f"{content_hash(fields):016x}"
            except UnicodeEncodeError:
                raise DataError(f"{table.name}:{row}: half of a surrogate pair, which is no character") from None
            yield Document(identity, fields, meta)

    def _fields(self, columns: tuple[str, ...], table: Table) -> dict[str, str]:
        """Field -> column of the rows of a table."""
        wanted = list(dict.fromkeys([field for fields in self._required for field in fields] + list(self._optional)))
        found = {field: self._column(field) for field in wanted or KNOWN_FIELDS if self._column(field) in columns}
        needed = [[field for field in fields if field not in self._optional] for fields in self._required]
        if found and (not needed or any(all(field in found for field in fields) for fields in needed)):
            return found
        raise DataError(self._missing(columns, table, needed or [["text"]]))

    def _missing(self, columns: tuple[str, ...], table: Table, needed: list[list[str]]) -> str:
        nearest_way = max(needed, key=lambda fields: sum(self._column(field) in columns for field in fields))
        field = next(field for field in nearest_way if self._column(field) not in columns)
        column = self._column(field)
        there = ", ".join(repr(name if len(name) <= 40 else name[:37] + "...") for name in columns) or "none"
        hint = f"name it with `data.{field}`" if field in KNOWN_FIELDS else "rename one"
        if _in_cells(table):
            names = ", ".join(self._column(name) for name in (self._required[0] if self._required else needed[0]))
            hint += f"; if the first row is no header, set `data.columns: [{names}]`"
        return f"{table.name}: no column {column!r}{nearest(column, columns)}; the columns are {there}; {hint}"

    def _column(self, field: str) -> str:
        return str(getattr(self._data, field)) if field in KNOWN_FIELDS else field

    def _text(self, value: Any, field: str, place: str, column: str) -> str | None:
        if value is None and (field in self._optional or field in ADDED_FIELDS):
            return None
        if isinstance(value, list | dict) and field in NESTED_FIELDS:
            value = json.dumps(value, ensure_ascii=False, default=str)
        if isinstance(value, str | int | float) and value == value:  # NaN is what a table calls nothing
            text = str(value)
            if "\0" in text:
                raise DataError(f"{place}: a NUL character in the column {column!r}; a text is expected")
            return text
        given = "nothing" if value is None else "NaN" if isinstance(value, float) else type(value).__name__
        raise DataError(f"{place}: {given} in the column {column!r}, a text is expected")

    @cached_property
    def _fingerprint(self) -> str:
        data = self._data
        reading = [data.unit, data.columns, data.max_documents, [self._column(field) for field in KNOWN_FIELDS]]
        digests = [[table.digest() for table in origin.tables] for origin in self.origins]
        return fingerprint([digests, reading, self._required, self._optional])

    def fingerprint(self) -> str:
        return self._fingerprint


def open_source(
    specs: str | Iterable[str],
    data: DataConfig,
    required: tuple[str, ...] | Alternatives = (),
    optional: tuple[str, ...] = (),
) -> DocumentSource:
    """The documents of a source, or of several end to end.

    required: the fields that a document needs, or alternatives of which any one suffices; empty: whatever known
    fields there are. optional: those of them that may be missing.

    Raises: DataError where a file is missing, empty, or not of a known kind; mistakes inside come with iteration.
    """
    alternatives = alternatives_of(required)
    layout = Layout(
        unit=data.unit,
        columns=None if data.columns is None else tuple(data.columns),
        optional=frozenset(getattr(data, field, field) for field in optional),
    )
    origins = [_origin(spec, data, layout) for spec in ([specs] if isinstance(specs, str) else specs)]
    if not origins:
        raise DataError("data: no source is named; give a path, hf:owner/name or builtin:name")
    return DocumentSource(origins, data, alternatives, optional)


def alternatives_of(required: tuple[str, ...] | Alternatives) -> Alternatives:
    """`("question", "answer")` means `(("question", "answer"),)`."""
    if not required:
        return ()
    names = [item for item in required if isinstance(item, str)]
    return (tuple(names),) if names else tuple(item for item in required if not isinstance(item, str))


def _origin(spec: str, data: DataConfig, layout: Layout) -> Origin:
    if spec.startswith("hf:"):
        return Origin(spec, (hub.open_table(spec),))
    if spec.startswith("builtin:"):
        path = builtin.path(spec.removeprefix("builtin:"))
        return Origin(spec, (FileTable(spec, path, Layout()),))
    path = Path(data.root or ".") / Path(spec).expanduser()
    if not path.exists():
        under = f"; `data.root` is {data.root}" if data.root and not Path(spec).is_absolute() else ""
        raise DataError(f"{path}: no such file or folder{under}")
    return Origin(spec, tuple(_files(spec, path, layout)))


def _in_cells(table: Table) -> bool:
    """Whether the table is a csv or tsv, which knows neither kinds of values nor the lack of one."""
    return isinstance(table, FileTable) and format_of(table.path) in (".csv", ".tsv")


def _is_data(file: Path) -> bool:
    """Whether a file of a folder is read; a .json there mostly says something about the others."""
    return format_of(file) not in (None, ".json")


def _files(spec: str, path: Path, layout: Layout) -> Iterator[FileTable]:
    known = ", ".join(READERS)
    if path.is_dir():
        files = sorted(
            file
            for file in path.rglob("*")
            if file.is_file() and _is_data(file) and not any(part[0] == "." for part in file.relative_to(path).parts)
        )
        if not files:
            raise DataError(f"{path}: no file to read in this folder; {known} are read")
    elif format_of(path) is None:
        raise DataError(f"{path}: {path.suffix or 'a file without ending'} is not read; {known} are")
    else:
        files = [path]
    for file in files:
        if file.stat().st_size == 0:
            raise DataError(f"{file}: empty; at least one document is expected")
        yield FileTable(spec if file == path else str(Path(spec) / file.relative_to(path)), file, layout)
