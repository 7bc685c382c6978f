"""Files and folders are there whole or not at all; people's mistakes with disks are one line."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isoform import storage
from isoform.errors import DataError, DiskError, LockedError

OPERATIONS = ("write_blocks", "sync_file", "sync_folder", "rename", "remove")


def fail_at(patch: pytest.MonkeyPatch, at: int, error: BaseException) -> list[str]:
    """Makes the operation number `at` raise instead of doing its work; returns the list of those that were begun."""
    begun: list[str] = []

    def failing(name: str, real: Any) -> Any:
        def operation(*args: Any) -> None:
            begun.append(name)
            if len(begun) == at:
                raise error
            real(*args)

        return operation

    for name in OPERATIONS:
        patch.setattr(storage, name, failing(name, getattr(storage, name)))
    return begun


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_text_is_the_old_or_the_new_one_when_any_operation_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "note.txt"
    for at, expected in enumerate(["old", "old", "old", "new"], start=1):
        storage.write_text(path, "old")
        with monkeypatch.context() as patch, pytest.raises(DiskError, match=r"note\.txt: No space left"):
            fail_at(patch, at, OSError(errno.ENOSPC, "No space left on device"))
            storage.write_text(path, "new")
        assert path.read_text() == expected
        assert names(tmp_path) == ["note.txt"]


def test_a_text_is_synced_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        begun = fail_at(patch, 0, OSError())
        storage.write_text(tmp_path / "note.txt", "text")
    assert begun == ["write_blocks", "sync_file", "rename", "sync_folder"]


def test_every_file_and_folder_is_synced_before_a_folder_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    with monkeypatch.context() as patch:
        for name in ("sync_file", "sync_folder"):
            patch.setattr(storage, name, lambda path: synced.append(path.name))
        patch.setattr(
            storage, "rename", lambda path, target, real=storage.rename: (synced.append("!"), real(path, target))
        )
        with storage.staged_folder(tmp_path / "a") as staged:
            (staged / "inner").mkdir()
            (staged / "inner" / "x").write_text("x")
            (staged / "y").write_text("y")
    before = synced[: synced.index("!")]
    assert {"x", "y", "inner"} <= set(before)
    assert before[-1].startswith(".a.")
    assert synced[-1] == tmp_path.name


def test_a_folder_vanishes_when_the_block_fails_and_an_old_one_stays(tmp_path: Path) -> None:
    final = tmp_path / "model"
    for content in ("old", "new"):
        with storage.staged_folder(final) as staged:
            (staged / "x").write_text(content)
    assert (final / "x").read_text() == "new"
    with pytest.raises(KeyError), storage.staged_folder(final) as staged:
        (staged / "x").write_text("half")
        raise KeyError
    assert (final / "x").read_text() == "new"
    assert names(tmp_path) == ["model"]


def test_a_failed_replacement_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = tmp_path / "model"
    final.mkdir()
    (final / "x").write_text("old")
    calls = []

    def second_fails(path: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        path.replace(target)

    monkeypatch.setattr(storage, "rename", second_fails)
    with pytest.raises(DiskError), storage.staged_folder(final) as staged:
        (staged / "x").write_text("new")
    assert (final / "x").read_text() == "old"
    assert names(tmp_path) == ["model"]


def test_a_file_written_piece_by_piece_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    final = tmp_path / "rows.csv"
    for content in ("old", "new"):
        with storage.staged_file(final) as file:
            file.write(content)
    with pytest.raises(KeyError), storage.staged_file(final) as file:
        file.write("half")
        raise KeyError
    assert final.read_text() == "new"
    assert names(tmp_path) == ["rows.csv"]


def test_leftovers_are_removed_and_what_was_set_aside_is_put_back(tmp_path: Path) -> None:
    for name in (".model.0123abcd.tmp", ".model.89abcdef.old", ".gone.0123abcd.old", ".cache", "model"):
        (tmp_path / name).mkdir()
    (tmp_path / ".note.txt.0123abcd.tmp").write_text("half")
    assert len(storage.leftovers(tmp_path)) == 4
    storage.remove_leftovers(tmp_path)
    assert names(tmp_path) == [".cache", "gone", "model"]


def test_what_a_killed_process_staged_goes_with_the_next_and_a_living_one_keeps_its_own(tmp_path: Path) -> None:
    final = tmp_path / "model"
    kill = "import os, pathlib, sys; from isoform import storage\n"
    kill += "with storage.staged_folder(pathlib.Path(sys.argv[1])) as staged: (staged / 'x').touch(); os._exit(9)"
    subprocess.run([sys.executable, "-c", kill, str(final)], check=False)
    (tmp_path / ".model.b.0123abcd.tmp").mkdir()
    (tmp_path / ".model.0123abcd.old").mkdir()
    assert len(storage.leftovers(tmp_path)) == 3
    with storage.staged_folder(final) as first:
        kept = [".model.b.0123abcd.tmp", "model"]
        assert names(tmp_path) == sorted([*kept, first.name])
        with storage.staged_folder(final) as second:
            assert names(tmp_path) == sorted([*kept, first.name, second.name])
    assert names(tmp_path) == kept


def test_only_refusals_of_the_disk_become_disk_errors(tmp_path: Path) -> None:
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EFBIG, errno.EIO):
        with pytest.raises(DiskError) as caught, storage.disk_errors(tmp_path):
            raise OSError(number, os.strerror(number))
        assert caught.value.exit_code == 6
    with pytest.raises(FileNotFoundError), storage.disk_errors(tmp_path):
        raise FileNotFoundError(errno.ENOENT, "no such file")


def test_free_room_is_that_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    missing = tmp_path / "a" / "b"
    assert storage.free_bytes(missing) > 0
    storage.require_free(missing, 1)
    with pytest.raises(DiskError, match=r"GB are needed, .* GB are free"):
        storage.require_free(missing, 1 << 62)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(values, max_size=4), st.integers(1, 30))
def test_rows_come_back_and_a_torn_last_one_is_left_out(tmp_path: Path, rows: list[Any], cut: int) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(map(storage.json_line, rows)), encoding="utf-8")
    expected = [storage.finite(row) for row in rows]
    assert storage.read_jsonl(path) == expected
    line = storage.json_line({"x": "ä" * 40}).encode()
    path.write_bytes(path.read_bytes() + line[:-cut])
    assert storage.read_jsonl(path) == expected


def test_a_damaged_row_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"a": \n{"a": 2}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:3: not a line of JSON"):
        storage.read_jsonl(path)
    assert storage.read_jsonl(tmp_path / "absent.jsonl") == []


def test_numbers_that_json_has_not_become_null(tmp_path: Path) -> None:
    storage.write_json(tmp_path / "a.json", {"x": [float("nan"), float("inf"), 1.5], 2: (1,)})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == {"x": [None, None, 1.5], "2": [1]}


def test_a_folder_is_held_against_another_process_and_freed_by_its_death(tmp_path: Path) -> None:
    code = "from pathlib import Path; from isoform import storage\n"
    code += f"with storage.locked(Path({str(tmp_path)!r})):\n    pass"
    with storage.locked(tmp_path):
        held = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert f"process {os.getpid()} is working in this folder" in held.stderr
        with pytest.raises(LockedError) as caught, storage.locked(tmp_path):
            pass
        assert caught.value.exit_code == 5
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
    killed = code.replace("pass", "import os; os.kill(os.getpid(), 9)")
    assert subprocess.run([sys.executable, "-c", killed], check=False).returncode == -9
    with storage.locked(tmp_path):
        pass


def test_hashes_depend_on_content_alone(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 3_000_000)
    (tmp_path / "b").write_bytes(b"x" * 3_000_000)
    assert storage.sha256_file(tmp_path / "a") == storage.sha256_file(tmp_path / "b")
    assert (
        storage.fingerprint({"a": 1, "b": 2}) == storage.fingerprint({"b": 2, "a": 1}) != storage.fingerprint({"a": 1})
    )
