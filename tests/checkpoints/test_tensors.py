"""Our safetensors files are those of the safetensors library, and a damaged header is refused before it is believed."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from isoform import storage
from isoform.checkpoints import tensors
from isoform.checkpoints.tensors import read_header, read_model, read_tensors, write_model, write_tensors
from isoform.errors import CheckpointError

quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool])
shapes = st.lists(st.integers(0, 4), max_size=3)
tables = st.dictionaries(st.text(min_size=1, max_size=8), st.tuples(shapes, dtypes), min_size=1, max_size=5)


def filled(shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(0, 2, shape).to(dtype) * 3 if dtype != torch.bool else torch.randint(0, 2, shape).bool()


@quick
@given(tables)
def test_the_library_reads_what_we_write_and_we_read_what_it_writes(
    tmp_path: Path, equal_tensors: Any, table: dict[str, Any]
) -> None:
    table = {name: filled(*entry) for name, entry in table.items() if name != "__metadata__"}
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    write_tensors(ours, table)
    save_file(table, theirs, metadata={"format": "pt"})
    assert equal_tensors(load_file(ours), table)
    assert equal_tensors(read_tensors(theirs), table)
    assert ours.read_bytes()[8:] == theirs.read_bytes()[8:] or read_header(ours) == read_header(theirs)
    with safe_open(ours, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_transposed_view_is_written_in_its_own_order(tmp_path: Path) -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    write_tensors(tmp_path / "a.safetensors", {"w": weight.T})
    assert torch.equal(load_file(tmp_path / "a.safetensors")["w"], weight.T)


def file_of(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def row(shape: list[Any], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "header of 0 bytes is announced in a file of 0"),
        (b"\x01", "is announced in a file of 1"),
        (struct.pack("<Q", 2**63), "header of 9223372036854775808 bytes"),
        (file_of({}, length=100), "header of 100 bytes"),
        (file_of(b"{" * 50), "not JSON"),
        (file_of(b"[" * 100_000), "not JSON"),
        (file_of(b"\xff\xfe"), "not JSON"),
        (file_of(b"[]"), "not a table"),
        (file_of(dict.fromkeys(map(str, range(50_001)))), "not a table of at most 50000"),
        (file_of(b'{"a": 1, "a": 2}'), "given twice"),
        (file_of({"a": 1}), "'a' is not dtype, shape"),
        (file_of({"a": row([1], 0, 4, "F8")}, bytes(4)), "has the type 'F8'"),
        (file_of({"a": row([1], 0, 4, [])}, bytes(4)), r"has the type \[\]"),  # type: ignore[arg-type]
        (file_of({"a": row([-1], 0, 4)}, bytes(4)), "no list of sizes"),
        (file_of({"a": row([True], 0, 4)}, bytes(4)), "no list of sizes"),
        (file_of({"a": row([1.0], 0, 4)}, bytes(4)), "no list of sizes"),
        (file_of({"a": row([2**62, 2**62], 0, 4)}, bytes(4)), "no list of sizes"),
        (file_of({"a": row([2**40] * 16, 0, 4)}, bytes(4)), "does not fill"),
        (file_of({"a": row([2], 0, 4)}, bytes(4)), "does not fill its 4 bytes"),
        (file_of({"a": row([1], 0, 4), "b": row([1], 2, 6)}, bytes(6)), "overlap or leave a hole at byte 2"),
        (file_of({"a": row([1], 0, 4), "b": row([1], 8, 12)}, bytes(12)), "hole at byte 4"),
        (file_of({"a": row([1], 0, 4)}, bytes(3)), "3 bytes of tensors are there, the header speaks of 4"),
        (file_of({"a": row([1], 0, 4)}, bytes(5)), "5 bytes of tensors are there"),
    ],
)
def test_a_header_that_does_not_fit_its_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        read_tensors(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@quick
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4), st.integers(0, 200))
def test_any_damage_is_refused_or_leaves_a_readable_file(
    tmp_path: Path, changes: list[tuple[int, int]], cut: int
) -> None:
    path = tmp_path / "model.safetensors"
    write_tensors(path, {"a": torch.ones(3, 2), "b": torch.ones(5, dtype=torch.int64)})
    data = bytearray(path.read_bytes())
    for offset, value in changes:
        data[offset % len(data)] = value
    path.write_bytes(data[: len(data) - cut] if cut < 100 else data)
    try:
        read_tensors(path)
    except CheckpointError as error:
        assert str(path) in str(error)


def test_a_large_model_is_cut_into_files_with_an_index(tmp_path: Path, equal_tensors: Any) -> None:
    table = {f"layer.{index}": torch.full((10, 10), float(index)) for index in range(5)}
    write_model(tmp_path, table, max_shard_bytes=900)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [*(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)), tensors.INDEX]
    assert storage.read_json(tmp_path / tensors.INDEX)["metadata"] == {"total_size": 2000}
    assert equal_tensors(read_model(tmp_path), table)


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..\\x.safetensors", "", "x.bin", ".x.safetensors"],
)
def test_an_index_that_leaves_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(1)})
    folder = tmp_path / "model"
    folder.mkdir()
    storage.write_json(folder / tensors.INDEX, {"weight_map": {"a": name}})
    with pytest.raises(CheckpointError, match=r"no plain name of a .safetensors file in this folder"):
        read_model(folder)


def test_an_index_that_names_the_wrong_file_for_a_tensor_is_refused_by_name(tmp_path: Path) -> None:
    tensors.write_model(tmp_path, {name: torch.ones(10) for name in "abc"}, max_shard_bytes=40)
    index = storage.read_json(tmp_path / tensors.INDEX)
    files = index["weight_map"]
    for wrong in ({"a": files["b"]}, {"a": files["b"], "b": files["a"]}, dict.fromkeys("abc", files["b"])):
        storage.write_json(tmp_path / tensors.INDEX, {"weight_map": {**files, **wrong}})
        with pytest.raises(CheckpointError, match=r"'[ab]'"):
            tensors.read_model(tmp_path)


def test_an_index_and_files_that_disagree_are_refused_by_name(tmp_path: Path) -> None:
    write_model(tmp_path, {"a": torch.ones(300), "b": torch.ones(300)}, max_shard_bytes=1200)
    index = storage.read_json(tmp_path / tensors.INDEX)
    first = tmp_path / index["weight_map"]["a"]

    storage.write_json(tmp_path / tensors.INDEX, {"weight_map": {**index["weight_map"], "c": first.name}})
    with pytest.raises(CheckpointError, match="'c' is missing"):
        read_model(tmp_path)
    storage.write_json(tmp_path / tensors.INDEX, {"weight_map": {"b": index["weight_map"]["b"]}})
    write_tensors(tmp_path / index["weight_map"]["b"], {"b": torch.ones(1), "stray": torch.ones(1)})
    with pytest.raises(CheckpointError, match="holds 'stray'"):
        read_model(tmp_path)
    storage.write_json(tmp_path / tensors.INDEX, index)
    first.unlink()
    with pytest.raises(CheckpointError, match=f"{first.name}: missing"):
        read_model(tmp_path)
    for value in ("[]", '{"weight_map": []}', "{", "\xff"):
        (tmp_path / tensors.INDEX).write_text(value, encoding="latin-1")
        with pytest.raises(CheckpointError, match=r"index.json: "):
            read_model(tmp_path)
