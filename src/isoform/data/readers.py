"""File formats: each reader yields (row, columns) from one file, streaming, and names the place of every mistake.

A reader is a function of a path and `Layout`; `READERS` maps the ending of a file's name to it. Any of the text
formats may be gzipped (`.jsonl.gz`).
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from isoform.errors import DataError

Row = tuple[int, dict[str, Any]]

MAX_LINE_BYTES = 64_000_000
# A text file read as one document is cut, at a line's end, into documents of at most this size.
FILE_BYTES = 8_000_000
# Pieces of a text that is to be split: long beside a context, many in a book.
PIECE_BYTES = 16_000
PARQUET_BLOCK_BYTES = 16_000_000


@dataclass(frozen=True)
class Layout:
    """What a file does not say itself.

    unit: what a document is in a .txt file; columns: names for csv and tsv files without a header row; optional:
    columns that may be missing at a row's end.
    """

    unit: str = "line"
    columns: tuple[str, ...] | None = None
    optional: frozenset[str] = frozenset()


# --------------------------------------------------------------------------------------------------------------- lines


def open_bytes(path: Path) -> IO[bytes]:
    """The file's bytes, unzipped where it is gzipped. Raises: DataError where it cannot be read."""
    try:
        return cast("IO[bytes]", gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number, line with `\\n` at its end where it has one); CRLF becomes LF, a byte order mark is dropped.

    Raises: DataError naming file, line and byte where the file is not UTF-8 text.
    """
    with open_bytes(path) as file:
        number = 0
        try:
            while raw := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                yield number, _decoded(raw, path, number)
        except (EOFError, gzip.BadGzipFile) as error:
            raise DataError(f"{path}:{number + 1}: damaged gzip file: {error}") from None


def _decoded(raw: bytes, path: Path, number: int) -> str:
    if len(raw) > MAX_LINE_BYTES:
        raise DataError(f"{path}:{number}: a line of more than {MAX_LINE_BYTES} bytes; break it into shorter lines")
    skipped = 0
    if number == 1 and raw.startswith(b"\xef\xbb\xbf"):
        raw, skipped = raw[3:], 3
    if b"\0" in raw:
        raise DataError(f"{path}:{number}:{raw.index(0) + 1 + skipped}: a NUL byte; a text file is expected")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}:{number}:{error.start + 1 + skipped}: the byte 0x{raw[error.start]:02x} is not UTF-8 here; "
            "save the file as UTF-8"
        ) from None
    return text[:-2] + "\n" if text.endswith("\r\n") else text


# ------------------------------------------------------------------------------------------------------------- formats


def read_text(path: Path, layout: Layout) -> Iterator[Row]:
    """A .txt file as lines, paragraphs (parted by blank lines), pieces that end with a line, or one document.

    Blank ones are no documents. With the unit `conll` it is read as a .conll file.
    """
    if layout.unit == "conll":
        yield from read_conll(path, layout)
        return
    if layout.unit == "line":
        for number, line in read_lines(path):
            if line.strip():
                yield number, {"text": line.rstrip("\n")}
        return
    start, size = 1, 0
    most = PIECE_BYTES if layout.unit == "piece" else FILE_BYTES
    held: list[str] = []
    for number, line in read_lines(path):
        ends = not line.strip() if layout.unit == "paragraph" else size + len(line.encode()) > most
        if ends and held:
            yield start, {"text": _joined(held, layout.unit)}
            held, size = [], 0
        if layout.unit != "paragraph" or line.strip():
            start = start if held else number
            held.append(line)
            size += len(line.encode())
    if "".join(held).strip():
        yield start, {"text": _joined(held, layout.unit)}


def _joined(lines: list[str], unit: str) -> str:
    text = "".join(lines)
    return text if unit != "paragraph" else text.rstrip("\n")


def read_csv(path: Path, layout: Layout) -> Iterator[Row]:
    """Comma-separated values with quotes, a header row unless `layout.columns` names the columns."""
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.reader((line for _, line in read_lines(path)), strict=True)
    columns = layout.columns
    width = 0
    while True:
        row_starts = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: not a row of csv: {error}") from None
        if not cells:
            continue
        if columns is None:
            columns = _header(cells, path, row_starts)
            continue
        width = width or (_width(cells, columns, layout) if layout.columns else len(columns))
        if len(cells) != width:
            raise DataError(
                f"{path}:{row_starts}: {len(cells)} columns given, {width} expected ({', '.join(columns[:width])}); "
                "quote a text that contains a comma"
            )
        yield row_starts, dict(zip(columns, cells, strict=False))


def read_tsv(path: Path, layout: Layout) -> Iterator[Row]:
    """Tab-separated values; a quote is a character like any other."""
    columns = layout.columns
    width = 0
    for number, line in read_lines(path):
        if not line.strip():
            continue
        cells = line.rstrip("\n").split("\t")
        if columns is None:
            columns = _header(cells, path, number)
            continue
        width = width or _width(cells, columns, layout)
        if len(cells) != width:
            problem = "no tab" if len(cells) == 1 else f"{len(cells)} columns"
            names = ", ".join(columns[:width])
            raise DataError(f"{path}:{number}: {problem}; {width} columns parted by tabs are expected ({names})")
        yield number, dict(zip(columns, cells, strict=False))


def _width(cells: list[str], columns: tuple[str, ...], layout: Layout) -> int:
    """How many columns a file has: all, or fewer where those at the end are optional, as its first row says."""
    missing = set(columns[len(cells) :])
    return len(cells) if missing <= layout.optional and len(cells) <= len(columns) else len(columns)


def _header(cells: list[str], path: Path, number: int) -> tuple[str, ...]:
    names = tuple(cell.strip() for cell in cells)
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"{path}:{number}: the column {name!r} stands twice in the header; rename one of them")
    return names


def read_jsonl(path: Path, layout: Layout) -> Iterator[Row]:
    """One JSON object a line."""
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            value = json.loads(line.rstrip("\n"))
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", "nested too deeply")
            place = f"{path}:{number}:{getattr(error, 'colno', 1)}"
            raise DataError(f"{place}: not JSON ({reason}); one object a line is expected") from None
        if not isinstance(value, dict):
            raise DataError(f"{path}:{number}: {type(value).__name__} given, an object of columns is expected")
        yield number, value


def read_json(path: Path, layout: Layout) -> Iterator[Row]:
    """One list of JSON objects, or objects one after the other; the row is the line on which an object begins."""
    text = "".join(line for _, line in read_lines(path))
    decoder, number, place = json.JSONDecoder(), 1, 0
    listed = text.lstrip().startswith("[")
    between = re.compile(r"[\s,]*") if listed else re.compile(r"\s*")
    end = text.index("[") + 1 if listed else 0
    while True:
        begin = between.match(text, end).end()  # type: ignore[union-attr]
        number, place = number + text.count("\n", place, begin), begin
        if listed and begin == len(text):
            raise DataError(f"{path}:{number}: the list has no end; the file is not whole")
        if begin == len(text) or (listed and text[begin] == "]"):
            return
        try:
            value, end = decoder.raw_decode(text, begin)
        except (ValueError, RecursionError) as error:
            where = f"{path}:{getattr(error, 'lineno', number)}:{getattr(error, 'colno', 1)}"
            reason = getattr(error, "msg", "nested too deeply")
            raise DataError(f"{where}: not JSON ({reason}); a list of objects is expected") from None
        if not isinstance(value, dict):
            raise DataError(f"{path}:{number}: {type(value).__name__} given, an object of columns is expected")
        yield number, value


def read_parquet(path: Path, layout: Layout) -> Iterator[Row]:
    """Parquet, a block of rows at a time."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as file:
            _header(list(file.schema_arrow.names), path, 1)
            groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
            row_bytes = sum(group.total_byte_size for group in groups) // max(1, file.metadata.num_rows)
            rows_at_once = min(max(PARQUET_BLOCK_BYTES // max(1, row_bytes), 1), 4096)
            for block in file.iter_batches(batch_size=rows_at_once):
                for value in block.to_pylist():
                    number += 1
                    yield number, value
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        place = f"{path}:{number + 1}" if number else f"{path}"
        raise DataError(f"{place}: not readable as parquet: {str(error).splitlines()[0]}") from None


COMMENT = re.compile(r"# \S+ = |-DOCSTART-")


def read_conll(path: Path, layout: Layout) -> Iterator[Row]:
    """A word a line, its tag last, tabs or spaces between; a blank line ends a sentence, whose first line is its row.

    Columns between the two, comments (`# key = value`) and -DOCSTART- are left out; words alone have no tags.
    Source: Tjong Kim Sang & De Meulder 2003. Differs: nothing.
    """
    rows: list[list[str]] = []
    start = 0
    for number, line in itertools.chain(read_lines(path), [(0, "")]):
        cells = line.split("\t") if "\t" in line else line.split()
        cells = [cell.strip() for cell in cells]
        if any(cells) and not COMMENT.match(line):
            if rows and len(cells) != len(rows[0]):
                raise DataError(
                    f"{path}:{number}: {len(cells)} columns given, {len(rows[0])} in the line before; "
                    "a word and its tag are expected on each line"
                )
            start = start if rows else number
            rows.append(cells)
        elif rows:
            words, tags = [row[0] for row in rows], [row[-1] for row in rows]
            yield start, {"tokens": words, **({"tags": tags} if len(rows[0]) > 1 else {})}
            rows = []


READERS: dict[str, Callable[[Path, Layout], Iterator[Row]]] = {
    ".txt": read_text,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".conll": read_conll,
    ".parquet": read_parquet,
}


def format_of(path: Path) -> str | None:
    """The ending that says how the file is read, or None."""
    ending = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    return ending.lower() if ending.lower() in READERS else None
