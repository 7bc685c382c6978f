"""Functions that stay as they are where what surrounds them is compiled: they read lengths as Python numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

# Of each such function: as it is written, and since `keep_apart` the same, closed to the compiler.
_all: list[list[Callable[..., Any]]] = []


def apart(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, which `torch.compile` leaves as it is, with all that it calls, once `keep_apart` was called.

    Differs from `torch.compiler.disable`: the compiler is loaded by those alone who compile.
    """
    ways: list[Callable[..., Any]] = [function]
    _all.append(ways)

    @wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> R:
        result: R = ways[-1](*args, **options)
        return result

    return call


def keep_apart() -> None:
    for ways in _all:
        if len(ways) == 1:
            ways.append(torch.compiler.disable(ways[0]))  # type: ignore[no-untyped-call]
