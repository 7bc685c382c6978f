"""Parts that are a family's own and are not swapped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from isoform.errors import ConfigError


def refuse_swaps(values: Mapping[str, Any], fields: Iterable[str], reason: str) -> None:
    """Raises: ConfigError naming the first of the fields that is given, and why the family fixes it."""
    for field in fields:
        if field in values:
            raise ConfigError(f"model.{field}: {reason}")
