"""What this machine is and can: cores, memory, devices, precisions; and what was measured of it, which is kept.

torch is imported inside the functions that need it, so that a report or `--help` does without.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from isoform import storage
from isoform.errors import ConfigError, DiskError

if TYPE_CHECKING:
    import torch

K = TypeVar("K")

# Packages whose version can change a number or a file, and those that are optional; absent ones are None.
PACKAGES = (
    *("isoform", "torch", "numpy", "scipy", "accelerate", "safetensors", "tokenizers", "pydantic", "pyarrow"),
    *("transformers", "huggingface-hub", "datasets", "tensorboard", "wandb", "onnx", "onnxruntime", "gguf", "fastapi"),
)
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "bf16")
# Of glibc's mallopt: from which size on a block is the system's own, and how much may lie free at the end of the heap.
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1


def describe() -> dict[str, Any]:
    """Everything that can change a number or a time: processor, its flags, cores, threads, memory, torch, platform."""
    import torch

    return {
        "cpu": cpu_model(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "cpu_flags": sorted(cpu_flags()),
        "memory_bytes": memory_bytes(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch_build": [
            line.strip(" -") for line in torch.__config__.show().splitlines() if "Build settings" not in line
        ],
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def package_versions() -> dict[str, str | None]:
    """The installed version of each package that matters, None where it is absent."""

    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {name: version(name) for name in PACKAGES}


def cpu_model() -> str:
    """The processor's name, with family, model and stepping where the system tells: names alone are often vague."""
    rows = _cpuinfo()
    if "model name" in rows:
        numbers = [f"{word} {rows[word]}" for word in ("cpu family", "model", "stepping") if word in rows]
        return ", ".join([rows["model name"], *numbers])
    return _sysctl("machdep.cpu.brand_string") or platform.processor() or platform.machine()


def cpu_flags() -> set[str]:
    """Those of the instruction sets that speed up matrix products which this processor has."""
    rows = _cpuinfo()
    present = set((rows.get("flags") or rows.get("Features") or "").split())
    if _sysctl("hw.optional.arm.FEAT_BF16") == "1":
        present.add("bf16")
    return present & set(_FLAGS)


def cores() -> int:
    """Processors that this process may use: its affinity and the container's quota counted."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read(Path("/sys/fs/cgroup/cpu.max")).split()
    if len(quota) == 2 and quota[0].isdigit():
        usable = min(usable, max(1, round(int(quota[0]) / int(quota[1]))))
    return usable


def threads() -> int:
    """Threads that a computation should use: OMP_NUM_THREADS where it is set, else one a core."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() and int(asked) > 0 else cores()


def memory_bytes() -> int:
    """Memory that this process may use: the machine's, or the container's limit where that is lower."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _read(Path("/sys/fs/cgroup/memory.max")).strip()
    return min(total, int(limit)) if limit.isdigit() else total


def choose_device() -> torch.device:
    """`cuda`, else `mps`, else `cpu`."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def choose_precision(asked: str, device: str | torch.device, is_fast: Callable[[], bool]) -> str:
    """`fp32`, `bf16` or `fp16`: what was asked, or for `auto` bf16 where the device trains faster in it.

    is_fast: whether a CPU does. Raises: ConfigError for any other word, and for fp16 without a GPU.
    """
    kind = str(device).partition(":")[0]
    if asked in ("fp32", "bf16") or (asked == "fp16" and kind == "cuda"):
        return asked
    if asked == "fp16":
        raise ConfigError(
            f"train.precision: fp16 given, which needs a CUDA GPU, and this is {kind}; use auto, bf16 or fp32"
        )
    if asked != "auto":
        raise ConfigError(f"train.precision: {asked!r} given; auto, fp32, bf16 or fp16 is expected")
    if kind == "cuda":
        import torch

        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if kind == "cpu" and is_fast() else "fp32"


def training_block(precision: str) -> Callable[[], object]:
    """Forward and backward pass of the feed-forward layer of a small transformer, to be timed; in plain torch."""
    import torch
    from torch.nn import functional

    hidden, up, down = (
        torch.full(shape, 0.01, requires_grad=True) for shape in ((1024, 256), (1024, 256), (256, 1024))
    )

    def run() -> object:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            inner = functional.gelu(functional.linear(functional.layer_norm(hidden, (256,)), up))
            output = functional.linear(inner, down)
        return torch.autograd.grad(output, (hidden, up, down), torch.ones_like(output))

    return run


def race(ways: Mapping[K, Callable[[], object]], seconds: float, least_rounds: int = 2) -> dict[K, float]:
    """The least seconds that each way took once; they take turns, so that all see the same disturbance."""
    rounds = list(_rounds(ways, seconds, least_rounds))
    return {name: min(taken[name] for taken in rounds) for name in ways}


def shares(ways: Mapping[K, Callable[[], object]], seconds: float, least_rounds: int = 5) -> dict[K, float]:
    """The share of a round that each way takes, its median over rounds: for ratios on a machine that others use too.

    Where its speed jumps between rounds, the least seconds of two ways may be of two speeds.
    """
    rounds = list(_rounds(ways, seconds, least_rounds))
    return {name: statistics.median(taken[name] / sum(taken.values()) for taken in rounds) for name in ways}


def _rounds(ways: Mapping[K, Callable[[], object]], seconds: float, least_rounds: int) -> Iterator[dict[K, float]]:
    """The seconds that each way took, round by round, after one that does not count."""
    for way in ways.values():
        way()
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < least_rounds or time.perf_counter() < end:
        taken = {}
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            taken[name] = time.perf_counter() - began
        yield taken
        rounds += 1


def remembered(file: str, key: str, measure: Callable[[], float]) -> float:
    """What was measured under `key`, from a file in the user's cache folder; measured now where it is not there.

    Processes that ask at once wait for the first of them, and follow its answer.
    """
    cache = cache_folder() / file
    value = _stored(cache).get(key)
    if isinstance(value, float):
        return value
    with storage.in_turn(cache):
        known = _stored(cache)
        value = known.get(key)
        if not isinstance(value, float):
            value = measure()
            with contextlib.suppress(OSError, DiskError):
                storage.write_json(cache, {**known, key: value})
    return value


def _stored(cache: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        stored = storage.read_json(cache)
        return stored if isinstance(stored, dict) else {}
    return {}


def keep_freed_memory() -> None:
    """Memory that is freed stays with this process: from the system each page would come anew, and be zeroed first.

    Differs: only where the C library is GNU's. The gain is about 5 % of a training step.
    """
    if platform.system() == "Linux" and platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        for parameter, size in ((_MMAP_THRESHOLD, 2**30), (_TRIM_THRESHOLD, 2**31 - 1)):
            library.mallopt(parameter, size)


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "isoform"


def _cpuinfo() -> dict[str, str]:
    """The first processor's rows of /proc/cpuinfo, where the system has it."""
    first = _read(Path("/proc/cpuinfo")).split("\n\n")[0]
    return {key.strip(): value.strip() for key, value in re.findall(r"(?m)^([^:\n]+?)\s*:(.*)$", first)}


def _sysctl(name: str) -> str:
    """A value of macOS's sysctl, empty elsewhere."""
    if platform.system() != "Darwin":
        return ""
    done = subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
