"""Models that are drawn, not read: built from the options of their family and the sizes of a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from isoform.config import RunConfig
from isoform.registry import build_options, recording


class Vocabulary(Protocol):
    """What a model's sizes follow from: a tokenizer, or the numbers of one that is not trained yet."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def special_ids(self) -> Mapping[str, int]: ...


def fresh_model(
    config: RunConfig, family: Any, options: dict[str, Any], tokenizer: Vocabulary, seed: int | None
) -> Any:
    """A model of the family, with the tokenizer's sizes where its options leave them out; seed None: not drawn."""
    values = {**options, "vocab_size": tokenizer.vocab_size}
    if "max_positions" in family.Config.model_fields:
        values.setdefault("max_positions", config.text.max_tokens)
    if "padding_id" in family.Config.model_fields:
        values.setdefault("padding_id", tokenizer.special_ids.get("pad"))
    return family(build_options(family, values, "model"), seed=seed)


@dataclass(frozen=True, slots=True)
class Numbers:
    """Of a tokenizer that is not trained: how many ids it will have, and those of its special tokens."""

    vocab_size: int
    special_ids: dict[str, int]


def check_parts(config: RunConfig, family: Any, options: dict[str, Any]) -> None:
    """Raises: ConfigError where the model's parts do not go together; known before any text is read."""
    if "fits" in family.capabilities:
        return
    # No option is in use because of this; what texts tell does not matter here.
    with recording(None), torch.device("meta"):
        fresh_model(config, family, options, Numbers(1, {"pad": 0}), None)
