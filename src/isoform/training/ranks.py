"""What the ranks of a run must do alike, though each would find out by itself: they follow one of them, or the mean."""

from __future__ import annotations

import json
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

Value = TypeVar("Value")


def firsts(value: Value, accelerator: Accelerator | None) -> Value:
    """The first rank's value, which is JSON, on every rank; each of them has to ask. None: there is but one process."""
    if accelerator is None or accelerator.num_processes == 1:
        return value
    text = torch.tensor(list(json.dumps(value).encode()), device=accelerator.device)
    length = broadcast(torch.tensor(len(text), device=accelerator.device))
    text = text if accelerator.is_main_process else text.new_zeros(int(length))
    told: Value = json.loads(bytes(broadcast(text).tolist()))
    return told


def mean(value: float, accelerator: Accelerator) -> float:
    """The mean over ranks."""
    if accelerator.num_processes == 1:
        return value
    return float(accelerator.reduce(torch.tensor(value, device=accelerator.device), reduction="mean"))
