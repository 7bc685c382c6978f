"""Which parameters of a model are trained."""

from __future__ import annotations

import fnmatch

from torch import nn

from isoform.errors import ConfigError
from isoform.layers.lora import LowRank
from isoform.registry import nearest


def train_only(model: nn.Module, patterns: list[str]) -> None:
    """Freezes every parameter that no pattern names.

    Raises: ConfigError for a pattern that names none, and where an adapter would stay what it is at first: nothing.
    """
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
    for name, module in model.named_modules():
        if isinstance(module, LowRank) and not module.up.requires_grad:
            raise ConfigError(
                f"train.parameters: {', '.join(patterns)} leaves out {name}.up, without which the adapter does "
                "nothing; leave the option out (`adapter` says what is trained, `adapter.train` what beside it), or "
                "add '*.adapters.*'"
            )
