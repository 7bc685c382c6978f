"""The one place that writes: atomic files and folders, hashes, locks. Faults are injected in tests by patching it.

A file or folder is complete or absent: it is written under a temporary name beside its place, flushed to the disk,
and renamed. A full disk or a missing permission becomes a `DiskError` that names the path.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from isoform.errors import DiskError, LockedError

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG, errno.EIO}


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns an operating-system refusal to write into one line that names the path and the free space."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise DiskError(f"cannot write {path}: {error.strerror}; free there: {free_bytes(path) / 1e9:.2f} GB") from error


def free_bytes(path: Path) -> int:
    """Free bytes of the file system that holds `path` or would hold it."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def write_text(path: Path, text: str) -> None:
    """Writes a small file atomically."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            with staged.open("w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            staged.replace(path)
        finally:
            staged.unlink(missing_ok=True)
        sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON with sorted keys, atomically; non-finite numbers are written as null."""
    write_text(path, json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def finite(value: Any) -> Any:
    """The value with NaN and infinities replaced by None, for JSON."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def json_line(value: Any) -> str:
    """One row of a JSONL file, with its newline."""
    return json.dumps(finite(value), ensure_ascii=False, allow_nan=False) + "\n"


def read_jsonl(path: Path) -> list[Any]:
    """Every complete row; a last line that was torn by a crash is left out."""
    return list(iterate_jsonl(path))


def iterate_jsonl(path: Path) -> Iterator[Any]:
    """The rows one by one; a last line that was torn by a crash is left out."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n") and line.strip():
                yield json.loads(line)


@contextmanager
def staged_folder(final: Path) -> Iterator[Path]:
    """A temporary folder that becomes `final` when the block ends without an error, and vanishes otherwise.

    An existing `final` is replaced; readers see the old or the new one, whole.
    """
    with disk_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        staged = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.tmp")
        staged.mkdir()
        try:
            yield staged
            for path in sorted(staged.rglob("*")):
                if path.is_file():
                    sync_file(path)
            sync_folder(staged)
            if final.exists():
                retired = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.old")
                final.rename(retired)
                staged.rename(final)
                shutil.rmtree(retired)
            else:
                staged.rename(final)
            sync_folder(final.parent)
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Removes what a killed process left half-written in `folder`."""
    for path in folder.glob(".*.tmp"):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    for path in folder.glob(".*.old"):
        original = folder / path.name[1:].rsplit(".", 2)[0]
        shutil.rmtree(path, ignore_errors=True) if original.exists() else path.rename(original)


def sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


sync_folder = sync_file


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(value: Any) -> str:
    """A short hash of any JSON value: 16 hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder against every other process; the lock dies with the process.

    Raises: LockedError with the holder's process id.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file: IO[str] = (folder / ".lock").open("a+")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise LockedError(f"{folder}: process {holder} is working in this folder; wait for it or use another --out") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
