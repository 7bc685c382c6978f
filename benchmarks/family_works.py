"""(i) Each family against transformers' own model, update by update in one process; see `families`, which measures."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.pairs import OURS, Done, Setting, Work

# The families by name, as `families.FAMILIES` has them, which needs torch to be asked.
NAMES = (
    *("gpt2", "gpt-neox", "llama", "llama grouped", "mixtral", "bert", "roberta", "distilbert", "modernbert"),
    *("xlnet", "t5", "t5 v1.1"),
)
SIZES = {"layers": 4, "heads": 4, "width": 256, "vocab": 8192, "tokens": 4096, "length": 256, "rounds": 7, "warm": 2}
QUICK_SIZES = {**SIZES, "layers": 1, "width": 32, "vocab": 128, "tokens": 128, "length": 32, "rounds": 2, "warm": 1}


def side(family: str, folder: Path, setting: Setting) -> Done:
    """Both models' rates at equal and at mixed lengths, in the precision that training chooses here."""
    import torch
    import transformers
    from benchmarks import families

    from isoform.layers import choice

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    sizes = QUICK_SIZES if setting.quick else SIZES
    options = argparse.Namespace(**sizes, precision="fp32")
    if not setting.quick:
        shape = choice.Shape.of(families.build(family, options)[0].config)
        options.precision = choice.choose_precision("auto", torch.device("cpu"), [shape])
    rows: list[dict[str, Any]] = []
    for lengths in families.LENGTHS:
        row = families.measure(family, lengths, options)
        rates = {
            name: [tokens / each for tokens, each in zip(row.tokens, seconds, strict=True)]
            for name, seconds in (("our_rates", row.ours), ("their_rates", row.theirs))
        }
        told = f"losses of one batch within {families.TOLERANCE[options.precision]:g} before the first update"
        rows.append({"theirs": f"transformers, {options.precision}, {lengths} lengths", "told": told, **rates})
    return Done(len(rows), 1.0, {"rows": rows})


def nothing(folder: Path, setting: Setting) -> None:
    """Both sides make what they start from themselves."""


def agreed(ours: Any, theirs: Any) -> tuple[bool, str]:
    raise AssertionError("both sides are checked where they run")


def _work(family: str) -> Work:
    about = (
        f"one update of {family} and of transformers' own model with the same weights and texts: 4 layers of width "
        "256, 4,096 tokens, a vocabulary of 8,192"
    )
    name = f"family-{family.replace(' ', '-')}"
    return Work(name, "i", about, "tokens", nothing, {OURS: partial(side, family)}, agreed, together=True)


WORKS = tuple(map(_work, NAMES))
