"""The state of every global random stream as integers, so that it can stand in JSON and come back bit by bit.

isoform's own choices are keyed (see `chance`) and need none of this; a library that draws from a global stream does.
"""

from __future__ import annotations

import random
import struct

import numpy as np
import torch


def random_streams() -> dict[str, list[int]]:
    """The streams of Python, numpy, torch and each CUDA device, as they stand now."""
    version, words, python_spare = random.getstate()
    _, keys, position, has_spare, numpy_spare = np.random.get_state()  # noqa: NPY002 - the global stream is meant
    streams = {
        "python": [version, *words, *([] if python_spare is None else [_bits(python_spare)])],
        "numpy": [*map(int, keys), int(position), int(has_spare), _bits(float(numpy_spare))],
        "torch": torch.get_rng_state().tolist(),
    }
    for index in range(torch.cuda.device_count()):
        streams[f"cuda:{index}"] = torch.cuda.get_rng_state(index).tolist()
    return streams


def restore_random_streams(streams: dict[str, list[int]]) -> None:
    """Sets the streams to a state that `random_streams` gave; devices that are not here any more are left out."""
    version, *words = streams["python"]
    random.setstate((version, tuple(words[:625]), _number(words[625]) if len(words) > 625 else None))
    *keys, position, has_spare, spare = streams["numpy"]
    state = ("MT19937", np.array(keys, dtype=np.uint32), position, has_spare, _number(spare))
    np.random.set_state(state)  # noqa: NPY002
    torch.set_rng_state(torch.tensor(streams["torch"], dtype=torch.uint8))
    for index in range(torch.cuda.device_count()):
        if f"cuda:{index}" in streams:
            torch.cuda.set_rng_state(torch.tensor(streams[f"cuda:{index}"], dtype=torch.uint8), index)


def _bits(value: float) -> int:
    return int.from_bytes(struct.pack("<d", value), "little")


def _number(bits: int) -> float:
    return float(struct.unpack("<d", bits.to_bytes(8, "little"))[0])
