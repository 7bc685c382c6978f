"""The one place that writes: atomic files and folders, hashes, locks.

A file or folder is complete or absent: it is written under a temporary name beside its place, flushed to the disk,
and renamed. A full disk or a missing permission becomes a `DiskError` that names the path. Everything passes through
four operations, `write_blocks`, `sync_file`, `rename` and `remove`; tests inject faults by patching these.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from isoform.errors import DataError, DiskError, LockedError

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG, errno.EIO}


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns an operating-system refusal to write into one line that names the path and the free space."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise DiskError(
            f"cannot write {path}: {error.strerror}; free there: {free_bytes(path) / 1e9:.2f} GB"
        ) from error


def free_bytes(path: Path) -> int:
    """Free bytes of the file system that holds `path` or would hold it."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def require_free(path: Path, needed_bytes: int) -> None:
    """Raises: DiskError where the file system of `path` has less room than that, before anything is written."""
    free = free_bytes(path)
    if free < needed_bytes:
        raise DiskError(
            f"cannot write {path}: about {needed_bytes / 1e9:.3f} GB are needed, {free / 1e9:.3f} GB are free; "
            "free some space or write elsewhere"
        )


# ------------------------------------------------------------------------------------------------ the four operations


def write_blocks(path: Path, blocks: Iterable[bytes | memoryview]) -> None:
    """Writes a file block by block; neither atomic nor durable by itself."""
    with path.open("wb") as file:
        for block in blocks:
            file.write(block)


def sync_file(path: Path) -> None:
    """Waits until the file, or the folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


sync_folder = sync_file


def rename(path: Path, target: Path) -> None:
    """Gives a file or folder its place; an existing file is replaced."""
    path.replace(target)


def remove(path: Path) -> None:
    """Removes a file or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------------------- files and folders


def write_text(path: Path, text: str) -> None:
    """Writes a small file atomically."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = _beside(path, "tmp")
        try:
            write_blocks(staged, [text.encode("utf-8")])
            sync_file(staged)
            rename(staged, path)
        except BaseException:
            remove(staged)
            raise
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
    """The rows one by one; a last line that was torn by a crash is left out.

    Raises: DataError that names the line where a complete line is not JSON.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n") or not line.strip():
                continue
            try:
                yield json.loads(line)
            except ValueError:
                raise DataError(f"{path}:{number}: not a line of JSON; delete the line if it is not needed") from None


@contextmanager
def staged_folder(final: Path) -> Iterator[Path]:
    """A temporary folder that becomes `final` when the block ends without an error, and vanishes otherwise.

    An existing `final` is replaced; readers see the old or the new one, whole. What killed processes left of the same
    folder goes first.
    """
    with ExitStack() as held, disk_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(final)
        staged, retired = _beside(final, "tmp"), _beside(final, "old")
        staged.mkdir()
        # The lock dies with the process, and so tells its work from what it has left.
        held.enter_context(_lock_on(staged))
        try:
            yield staged
            for path in sorted(staged.rglob("*")):
                sync_file(path)
            sync_folder(staged)
            if final.exists():
                rename(final, retired)
            rename(staged, final)
            sync_folder(final.parent)
        except BaseException:
            if retired.exists() and not final.exists():
                rename(retired, final)
            remove(staged)
            raise
        remove(retired)


@contextmanager
def staged_file(final: Path) -> Iterator[IO[str]]:
    """A text file written piece by piece that stands at `final` when the block ends without an error, or not at all."""
    with disk_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        staged = _beside(final, "tmp")
        try:
            with staged.open("w", encoding="utf-8", newline="") as file:
                yield file
            sync_file(staged)
            rename(staged, final)
        except BaseException:
            remove(staged)
            raise
        sync_folder(final.parent)


def remove_folder(path: Path) -> None:
    """Removes a folder so that a crash on the way leaves no half of it under its name."""
    with disk_errors(path):
        retired = _beside(path, "tmp")
        rename(path, retired)
        remove(retired)


def remove_leftovers(folder: Path) -> None:
    """Removes what a killed process left half-written in `folder`, and puts back what it had set aside."""
    with disk_errors(folder):
        _clear(leftovers(folder))


def _clear(paths: list[Path]) -> None:
    for path in paths:
        original = path.with_name(path.name[1:].rsplit(".", 2)[0])
        if path.suffix == ".old" and not original.exists():
            rename(path, original)
        else:
            remove(path)


def leftovers(folder: Path) -> list[Path]:
    """The temporary files and folders that a killed process left in `folder`."""
    return sorted(path for path in folder.glob(".*") if re.fullmatch(r"\..+\.[0-9a-f]{8}\.(tmp|old)", path.name))


def _remove_abandoned(final: Path) -> None:
    """`remove_leftovers` of `final` alone, where no living process is at work on it."""
    own = [path for path in leftovers(final.parent) if path.name.rsplit(".", 2)[0] == f".{final.name}"]
    # What was staged keeps its lock under its final name, until what it replaced is gone.
    places = [*(path for path in own if path.suffix == ".tmp"), *([final] if final.exists() else [])]
    with ExitStack() as held:
        if own and all(held.enter_context(_lock_on(path)) for path in places):
            # What cannot be removed is in nobody's way.
            with suppress(OSError):
                _clear(own)


@contextmanager
def _lock_on(path: Path) -> Iterator[bool]:
    """Holds a file or folder that stays where it is; whether it could be had."""
    with ExitStack() as held:
        try:
            descriptor = os.open(path, os.O_RDONLY)
            held.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.{suffix}")


def sha256_file(path: Path, told: Callable[[int], None] = lambda num_bytes: None) -> str:
    """The hash of a file; told: is called with the bytes that have been read so far."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            told(file.tell())
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
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError, FileNotFoundError) as error:
            raise DiskError(f"cannot make the folder {folder}: {error.strerror}; choose another --out") from error
        file: IO[str] = (folder / ".lock").open("a+")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise LockedError(
                f"{folder}: process {holder} is working in this folder; wait for it or use another --out"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


@contextmanager
def in_turn(path: Path) -> Iterator[None]:
    """One process after another, as long as it takes; where no lock can be had, such as for want of rights, at once."""
    with ExitStack() as held:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = held.enter_context(path.with_name(f".{path.name}.lock").open("a"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
