"""Parts that are a family's own and are not swapped, or do not go together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from isoform.errors import ConfigError


def check_experts(feedforward: Mapping[str, Any], *, biases: bool, otherwise: str) -> None:
    """Raises: ConfigError where experts are asked for in a model with biases; otherwise: what to change."""
    if biases and feedforward["kind"] == "moe":
        raise ConfigError(f"model.feedforward: experts have no biases; {otherwise}")


def refuse_swaps(values: Mapping[str, Any], fields: Iterable[str], reason: str) -> None:
    """Raises: ConfigError naming the first of the fields that is given, and why the family fixes it."""
    for field in fields:
        if field in values:
            raise ConfigError(f"model.{field}: {reason}")
