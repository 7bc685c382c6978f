"""`isoform data`: what is in a source, before anything is trained on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from isoform.config import DataConfig
from isoform.contracts import Source
from isoform.data.passport import passport
from isoform.data.splits import SplitSources, load_splits
from isoform.errors import ConfigError
from isoform.registry import component, names
from isoform.text.tokenizers import TextTokenizer, load_tokenizer, train_tokenizer

# Any one of these sets of fields makes a document worth looking at.
FIELDS = (
    ("question", "answer"),
    ("text", "label"),
    ("messages",),
    ("conversations",),
    ("instruction", "input", "output"),
    ("instruction", "output"),
    ("prompt", "chosen", "rejected"),
    ("chosen", "rejected"),
    ("text",),
    ("question",),
)


def inspect(
    source: str, *, columns: list[str] | None, against: list[str], max_tokens: int, tokenizer: str
) -> dict[str, Any]:
    """The passport of `source`; each source of `against` is looked at as a split that must not overlap it.

    tokenizer: a kind, trained on the source for the occasion, or a folder or tokenizer.json.
    """
    named = {"data": source, **{f"against {name}": name for name in against}}
    splits = {}
    for name, spec in named.items():
        config = DataConfig(path=spec, columns=columns, overlap="keep")
        splits[name] = load_splits(config, FIELDS).splits["train"]
    return passport(SplitSources(splits), _tokenizer(tokenizer, splits["data"]), max_tokens)


def _tokenizer(name: str, source: Source) -> TextTokenizer:
    if name not in names("tokenizer"):
        if not Path(name).exists():
            kinds = ", ".join(names("tokenizer"))
            raise ConfigError(f"--tokenizer: {name!r} is neither one of {kinds} nor a file or folder with a tokenizer")
        return load_tokenizer(Path(name))
    _, options = component("tokenizer", {"kind": name}, "--tokenizer")
    return train_tokenizer(name, options, (text for document in source for text in document.fields.values()))
