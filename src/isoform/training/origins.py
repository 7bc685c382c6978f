"""Where models come from that are read, not drawn: a run's own, and those that its objective needs beside it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from isoform.checkpoints.adapters import merge
from isoform.checkpoints.folders import LoadedModel, identified, load_model
from isoform.checkpoints.sources import is_named
from isoform.config import RunConfig
from isoform.contracts import Objective
from isoform.errors import ConfigError
from isoform.layers.choice import Shape
from isoform.models.lora import active_adapter
from isoform.registry import build_options, lookup, names, recording


def model_section(config: RunConfig, start: Path | None) -> tuple[type[Any] | None, dict[str, Any], Path | None]:
    """(family to build, its options, folder to start from): exactly one of the first and the last is given.

    Beside a folder that the config names the options may say which layers are kept of it.
    """
    options = dict(config.model)
    origin = options.pop("from", None)
    if start is None and origin is None:
        name = options.pop("family", None)
        if name is None:
            raise ConfigError(f"model: `family` or `from` is expected; families: {', '.join(names('model'))}")
        return lookup("model", name, "model.family"), options, None
    if start is not None:
        return None, {}, start
    given = next((name for name in options if name != "layers"), None)
    if given is not None:
        raise ConfigError(
            f"model.{given}: given beside `from: {origin}`; the shape of existing weights is fixed but for `layers`, "
            "those that are kept; remove one of the two"
        )
    return None, options, _placed(config, str(origin))


def shape_of(config: RunConfig, start: Path | None = None) -> list[Shape]:
    """That of the model's blocks, for which precision and kernels are chosen; none where only its weights tell."""
    with recording(None):  # no option is in use because of this
        family, options, folder = model_section(config, start)
        if family is not None:
            return [] if "fits" in family.capabilities else [Shape.of(build_options(family, options, "model"))]
        found = None if folder is None else identified(folder)
        return [] if found is None or not hasattr(found[1], "num_heads") else [Shape.of(found[1])]


def _placed(config: RunConfig, source: str) -> Path:
    """Where a model is that the config speaks of: a path may start from `data.root`."""
    path = Path(source)
    if config.data.root is not None and not path.exists() and not is_named(path):
        return Path(config.data.root) / path
    return path


def other_models(config: RunConfig, objective: Objective) -> dict[str, LoadedModel]:
    """The models that the objective needs beside the trained one, by the options that name them."""
    found = {}
    for option, source in (objective.helper.sources if objective.helper else {}).items():
        loaded = load_model(_placed(config, source), dtype=torch.float32)
        model = loaded.model if active_adapter(loaded.model) is None else merge(loaded.model).model
        found[option] = dataclasses.replace(loaded, model=model)
    return found
