"""What the machine says of itself, and that it measures only once."""

from __future__ import annotations

import json
import platform
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch

from isoform import machine
from isoform.errors import ConfigError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "isoform" / "machine.json"


def test_the_description_is_json_and_agrees_with_psutil() -> None:
    facts = machine.describe()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["torch"] == torch.__version__
    assert 0 < facts["memory_bytes"] <= psutil.virtual_memory().total
    assert 1 <= facts["cores"] <= psutil.cpu_count()
    assert facts["cpu"]


def test_threads_are_those_asked_for_else_one_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert machine.threads() == 3
    for unset in ("", "0", "many"):
        monkeypatch.setenv("OMP_NUM_THREADS", unset)
        assert machine.threads() == machine.cores()


def test_a_container_s_quota_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"cpu.max": "100000 100000", "memory.max": "1000000\n"}
    monkeypatch.setattr(machine, "_read", lambda path: limits.get(path.name, ""))
    assert machine.cores() == 1
    assert machine.memory_bytes() == 1_000_000
    limits.update({"cpu.max": "max 100000", "memory.max": "max\n"})
    assert machine.cores() >= 1
    assert machine.memory_bytes() > 1_000_000


def test_packages_have_a_version_or_none() -> None:
    versions = machine.package_versions()
    assert versions["torch"] == torch.__version__
    assert versions["isoform"]


def test_it_is_measured_once_under_a_key(own_cache: Path) -> None:
    measured = []

    def ask(key: str, value: float) -> float:
        return machine.remembered(own_cache.name, key, lambda: measured.append(value) or value)

    assert ask("a processor", 5.0) == ask("a processor", 6.0) == 5.0
    assert ask("another", 1.1) == 1.1 and measured == [5.0, 1.1]
    assert json.loads(own_cache.read_text()) == {"a processor": 5.0, "another": 1.1}
    own_cache.write_text("not JSON")
    assert ask("another", 1.2) == 1.2


def test_processes_that_ask_at_once_follow_one_answer(own_cache: Path) -> None:
    """Each would find another one; locks are of open files, so threads stand for processes."""
    answers = [2.0, 3.0, 4.0]
    begin = threading.Barrier(len(answers))

    def ask(answer: float) -> float:
        def measure() -> float:
            time.sleep(0.1)
            return answer

        begin.wait()
        return machine.remembered(own_cache.name, "key", measure)

    with ThreadPoolExecutor(len(answers)) as pool:
        told = set(pool.map(ask, answers))
    assert told == {json.loads(own_cache.read_text())["key"]}
    assert machine.remembered(own_cache.name, "key", lambda: 5.0) in told


def test_where_nothing_can_be_kept_it_is_measured_each_time(own_cache: Path) -> None:
    own_cache.parent.write_text("a file where the cache's folder should be")
    for answer in (2.0, 3.0):
        assert machine.remembered(own_cache.name, "key", lambda answer=answer: answer) == answer


def test_precision_is_what_was_asked_or_what_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(asked: str, device: str | torch.device, is_fast: bool = True) -> str:
        return machine.choose_precision(asked, device, lambda: is_fast)

    assert choose("fp32", "cpu") == "fp32"
    assert choose("bf16", "mps", False) == "bf16"
    assert choose("auto", torch.device("cpu")) == "bf16"
    assert choose("auto", "mps") == "fp32"
    assert choose("auto", "cpu", False) == "fp32"
    for supported, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, answer=supported: answer)
        assert choose("auto", "cuda:0") == expected
    with pytest.raises(ConfigError, match=r"train.precision: 'half' given; auto, fp32, bf16 or fp16 is expected"):
        choose("half", "cpu")
    assert choose("fp16", "cuda:0") == "fp16"
    with pytest.raises(ConfigError, match=r"train.precision: fp16 given, which needs a CUDA GPU, and this is cpu"):
        choose("fp16", "cpu")


def test_ways_take_turns_and_the_least_seconds_count() -> None:
    order: list[str] = []
    best = machine.race({name: lambda name=name: order.append(name) for name in "ab"}, 0.0, least_rounds=3)
    assert order == ["a", "b"] * 4 and set(best) == {"a", "b"} and all(0 <= value < 1 for value in best.values())


def test_a_round_in_which_all_are_slow_does_not_count_against_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is nine times as fast for one call of the slower way, whose least seconds are less."""
    now, speeds = [0.0], iter([1, 1, 9, 9, 9, 1, 9, 9, 9, 9, 9, 9])

    def way(work: int) -> Callable[[], None]:
        def run() -> None:
            now[0] += work * next(speeds)

        return run

    monkeypatch.setattr(machine.time, "perf_counter", lambda: now[0])
    taken = machine.shares({"fast": way(1), "slow": way(2)}, 0.0)
    assert taken["fast"] == pytest.approx(1 / 3) and taken["slow"] == pytest.approx(2 / 3)
    with pytest.raises(StopIteration):
        next(speeds)


def test_the_device_is_the_fastest_kind_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda answer=cuda: answer)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda answer=mps: answer)
        assert machine.choose_device().type == expected


def test_importing_it_does_not_load_torch() -> None:
    code = "import sys, isoform.machine, isoform.storage; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only GNU's C library can be told")
def test_a_large_block_that_was_freed_is_there_again_without_the_system() -> None:
    """Page faults of taking, touching and freeing 64 MB five times over, in a process of its own."""
    program = """
import resource, sys
from isoform import machine
if sys.argv[1] == "keep":
    machine.keep_freed_memory()
for _ in range(5):
    bytearray(b"x") * 64_000_000
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""
    faults = {}
    for way in ("keep", "leave"):
        done = subprocess.run([sys.executable, "-c", program, way], capture_output=True, check=True, text=True)
        faults[way] = int(done.stdout)
    pages = 64_000_000 // resource.getpagesize()
    assert faults["leave"] - faults["keep"] > 3 * pages
