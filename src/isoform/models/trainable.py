"""Which parameters of a model are trained."""

from __future__ import annotations

import fnmatch

from torch import nn

from isoform.errors import ConfigError
from isoform.registry import nearest


def train_only(model: nn.Module, patterns: list[str]) -> None:
    """Freezes every parameter that no pattern names. Raises: ConfigError for a pattern that names none."""
    named = dict(model.named_parameters())
    for pattern in patterns:
        if not fnmatch.filter(named, pattern):
            example = ", ".join(list(named)[:2] + list(named)[-2:])
            raise ConfigError(
                f"train.parameters: no parameter is called {pattern!r}{nearest(pattern, named)}; names are such as "
                f"{example}"
            )
    for name, parameter in named.items():
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)
