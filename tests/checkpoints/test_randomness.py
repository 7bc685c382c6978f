"""Global random streams go through JSON and come back where they were."""

from __future__ import annotations

import json
import random

import numpy as np
import torch

from isoform.checkpoints.randomness import random_streams, restore_random_streams


def draws() -> list[float]:
    return [random.gauss(0, 1), random.random(), np.random.normal(), np.random.rand(), *torch.randn(3).tolist()]  # noqa: NPY002


def test_draws_repeat_after_a_restore_from_json() -> None:
    before = random_streams()
    try:
        for _ in range(4):  # odd and even numbers of normal draws: half of them leave a spare value in the stream
            random.gauss(0, 1)
            np.random.normal()  # noqa: NPY002
            text = json.dumps(random_streams())
            expected = draws()
            restore_random_streams(json.loads(text))
            assert draws() == expected
    finally:
        restore_random_streams(before)
