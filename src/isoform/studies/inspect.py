"""`isoform data`: what is in a source, before anything is trained on it."""

from __future__ import annotations

from typing import Any

from isoform.config import DataConfig
from isoform.data.passport import passport
from isoform.data.splits import load_splits

# Any one of these sets of fields makes a document worth looking at.
FIELDS = (("question", "answer"), ("text", "label"), ("text",), ("question",))


def inspect(source: str, *, columns: list[str] | None, against: list[str], max_tokens: int) -> dict[str, Any]:
    """The passport of `source`; each source of `against` is looked at as a split that must not overlap it."""
    named = {"train": source, **{f"against-{index}": name for index, name in enumerate(against, 1)}}
    splits = {}
    for name, spec in named.items():
        config = DataConfig(path=spec, columns=columns, overlap="keep")
        splits[name] = load_splits(config, FIELDS, ("label", "answer")).splits["train"]
    values: dict[str, Any] = passport(splits, None, max_tokens)
    return values
