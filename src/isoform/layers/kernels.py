"""The C++ kernels of `layers/native`: compiled for the processor at hand on first use, kept in the user's cache.

Where there is no compiler, or `ISOFORM_NATIVE=0` is set, `library` is None and plain torch does the same work; so it
does where `choice` has found it faster.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import tempfile
from ctypes import POINTER, Structure, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from isoform import machine, storage

SOURCES = Path(__file__).parent / "native"
# The last line is what loops need to become vectors; NaN and infinity keep their meaning.
FLAGS = [
    *("-O3", "-std=c++20", "-fPIC", "-shared"),
    *("-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros", "-freciprocal-math"),
]
# Tried in this order: what makes code fast and is not understood by every compiler.
EXTRAS = (
    ("-march=native", "-mprefer-vector-width=512", "-fopenmp"),
    ("-march=native", "-fopenmp"),
    ("-mcpu=native", "-fopenmp"),
    ("-mcpu=native",),
)
COMPILE_SECONDS = 600
SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}


class Drop(Structure):
    """Which attention weights fall out; see `Drop` in attention.cpp."""

    _fields_ = [("keys", c_void_p), ("columns", c_void_p), ("threshold", c_int32), ("factor", c_float)]


class AttentionCall(Structure):
    """One ragged attention; see `Call` in attention.cpp."""

    _fields_ = [
        *((name, c_void_p) for name in ("query", "key", "value")),
        *((f"{name}_stride", c_int64) for name in ("query", "key", "value")),
        *((name, c_void_p) for name in ("query_starts", "key_starts", "prefixes", "lean")),
        *((name, c_int64) for name in ("reach", "num_sequences", "heads", "groups", "width", "window")),
        ("causal", ctypes.c_bool),
        ("scale", c_float),
        ("drop", Drop),
        ("threads", c_int),
    ]


class AttentionGradients(Structure):
    """Where the backward pass writes; see `Gradients` in attention.cpp."""

    _fields_ = [
        *((name, c_void_p) for name in ("query", "key", "value")),
        *((f"{name}_stride", c_int64) for name in ("query", "key", "value")),
        ("lean", c_void_p),
    ]


_ARGUMENTS = {
    "norm_forward": (c_void_p,) * 6 + (c_int64, c_int64, c_float, c_int, c_int),
    "norm_backward": (c_void_p,) * 8 + (c_int64, c_int64, c_int, c_int),
    "silu": (c_void_p,) * 3 + (c_int64, c_int64, c_int),
    "gelu": (c_void_p,) * 3 + (c_int64, c_int64, c_int),
    "gelu_tanh": (c_void_p,) * 3 + (c_int64, c_int64, c_int),
    "silu_backward": (c_void_p,) * 5 + (c_int64, c_int64, c_int),
    "gelu_backward": (c_void_p,) * 5 + (c_int64, c_int64, c_int),
    "gelu_tanh_backward": (c_void_p,) * 5 + (c_int64, c_int64, c_int),
    "drop": (c_void_p,) * 4 + (c_int64, c_void_p, c_int64, c_int64, c_int32, c_float, c_int),
    "column_sums": (c_void_p,) * 2 + (c_int64,) * 2 + (c_int,),
    "rotate": (c_void_p,) * 3 + (c_int64,) * 5 + (c_float, c_int),
    "nats_forward": (c_void_p,) * 4 + (c_int64,) * 3 + (c_int,),
    "nats_backward": (c_void_p,) * 5 + (c_int64,) * 3 + (c_int,),
    "pack": (c_void_p,) * 4 + (c_int,),
    "multiply": (c_void_p, c_void_p, c_int64, c_void_p, c_int, c_int),
    "decode": (c_void_p,),
}


class Library:
    """The compiled kernels, by name and the types that they read and write."""

    def __init__(self, path: Path) -> None:
        self.key = path.stem
        self._library = ctypes.CDLL(str(path))
        self.has_tiles = bool(self._library.has_tiles())
        if self.has_tiles:
            self._library.weight_gradient.argtypes = (*(c_void_p,) * 3, *(c_int64,) * 3, c_int)
            self._library.attention_forward.argtypes = (POINTER(AttentionCall), c_void_p, c_void_p)
            self._library.attention_backward.argtypes = (
                POINTER(AttentionCall),
                *(c_void_p,) * 3,
                POINTER(AttentionGradients),
            )

    def call(self, name: str, dtypes: tuple[torch.dtype, ...], *values: Tensor | float | int | None) -> None:
        """Calls `name` of these types; tensors are given by their address."""
        function = getattr(self._library, "_".join([name, *(SUFFIXES[dtype] for dtype in dtypes)]))
        if function.argtypes is None:
            function.argtypes = _ARGUMENTS[name]
            function.restype = None
        function(*(value.data_ptr() if isinstance(value, Tensor) else value for value in values))

    def count(self, name: str, address: int) -> int:
        """The number that `name` makes of the structure at `address`."""
        function = getattr(self._library, name)
        function.argtypes, function.restype = (c_void_p,), c_int64
        return int(function(address))

    def weight_gradient(self, grad: Tensor, hidden: Tensor, into: Tensor, threads: int) -> None:
        """into `(o, d)` = grad^T hidden, of `(n, o)` and `(n, d)`."""
        addresses = [tensor.data_ptr() for tensor in (grad, hidden, into)]
        self._library.weight_gradient(*addresses, len(grad), *into.shape, threads)

    def attention_forward(self, call: AttentionCall, output: Tensor, log_sums: Tensor) -> None:
        self._library.attention_forward(ctypes.byref(call), output.data_ptr(), log_sums.data_ptr())

    def attention_backward(
        self, call: AttentionCall, output: Tensor, log_sums: Tensor, grad: Tensor, into: AttentionGradients
    ) -> None:
        addresses = [tensor.data_ptr() for tensor in (output, log_sums, grad)]
        self._library.attention_backward(ctypes.byref(call), *addresses, ctypes.byref(into))


def library() -> Library | None:
    """The kernels, compiled if this is the first use on this processor; None where plain torch must do."""
    return None if _switched_off() else loaded()


def _switched_off() -> bool:
    return os.environ.get("ISOFORM_NATIVE") == "0"


@cache
def loaded() -> Library | None:
    """The kernels, whether they are switched off or not; looked for once in a process."""
    path = _built()
    try:
        return None if path is None else Library(path)
    except OSError:
        return None


# Whether this process uses the kernels that it has; see `choice`.
_switch = {"on": True}


def switch(on: bool) -> None:
    """Whether the kernels are used from now on, where there are any."""
    _switch["on"] = on


def switched_on() -> bool:
    return _switch["on"]


def why_plain() -> str:
    """Why `library` is None."""
    if _switched_off():
        return "switched off by ISOFORM_NATIVE=0"
    if compiler() is None:
        return "no C++ compiler was found"
    return f"they could not be compiled, see {machine.cache_folder() / 'native'}"


def serves(*tensors: Tensor | None) -> Library | None:
    """The kernels, where all of these are plain tensors on a CPU, in types that they know, and not being traced."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state():
        return None
    for tensor in tensors:
        if tensor is not None and (
            type(tensor) not in (Tensor, nn.Parameter)
            or tensor.device.type != "cpu"
            or not (tensor.dtype in SUFFIXES or tensor.dtype == torch.int64)
        ):
            return None
    return library() if _switch["on"] else None


def compiler() -> str | None:
    """The C++ compiler that is here."""
    return os.environ.get("CXX") or next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)


def _built() -> Path | None:
    """The compiled file; a failure is kept too, so that it costs its seconds once."""
    command = compiler()
    if command is None:
        return None
    sources = {file.name: file.read_text(encoding="utf-8") for file in sorted(SOURCES.iterdir())}
    flags = sorted(machine.cpu_flags())
    key = storage.fingerprint([sources, FLAGS, EXTRAS, command, machine.cpu_model(), flags, torch.__version__])
    folder = machine.cache_folder() / "native"
    made, failed = folder / f"{key}.so", folder / f"{key}.failed"
    if made.exists():
        return made
    if failed.exists():
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        message = _compile(command, made)
        if message is not None:
            storage.write_text(failed, message)
    except OSError:
        return None
    return made if made.exists() else None


def _compile(compiler: str, target: Path) -> str | None:
    """Writes the library; None, or what the compiler said."""
    message = ""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        for extras in EXTRAS:
            command = [compiler, *FLAGS, *extras, *map(str, sorted(SOURCES.glob("*.cpp"))), "-o", str(made)]
            if "-fopenmp" in extras:
                command += _torch_openmp()
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False)
            except subprocess.TimeoutExpired:
                return f"no result after {COMPILE_SECONDS} s: {' '.join(command)}"
            if done.returncode == 0:
                made.replace(target)
                return None
            message += f"{' '.join(command)}\n{done.stderr}\n"
    return message


def _torch_openmp() -> list[str]:
    """Torch's own OpenMP to link with: two of them in one process would have twice the threads."""
    if platform.system() != "Linux":
        return []
    folder = Path(torch.__file__).parent / "lib"
    return [str(file) for file in sorted(folder.glob("libgomp*.so*"))][:1]
