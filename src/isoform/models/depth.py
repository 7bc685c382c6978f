"""A model made of some layers of another: where the student of a distillation begins."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from isoform.errors import ConfigError

NUMBERED = re.compile(r"(?<=blocks\.)(\d+)(?=\.)")


def keep_layers(model: Any, layers: Sequence[int]) -> Any:
    """The model with these of its blocks alone, numbered from 0; every other part (tables, norms, heads) is as it was.

    Of an encoder-decoder both stacks keep them. With all layers the model is the same bit by bit.
    Source: Sanh et al. 2019, section 3. Raises: ConfigError naming `model.layers` where there are no such layers, or
    where the family has no model with these alone.
    """
    fewest = min(len(part) for name, part in model.named_modules() if _is_stack(name, part))
    if not layers or list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < fewest:
        raise ConfigError(
            f"model.layers: {list(layers)} given; rising numbers of layers to keep are expected, each from 0 to "
            f"{fewest - 1}"
        )
    kept = type(model)(model.config.model_copy(update=_options(model.config, layers)), seed=None)
    ours = model.state_dict()
    kept.load_state_dict({name: ours[_origin(name, layers)] for name in kept.state_dict()})
    return kept


def _is_stack(name: str, part: nn.Module) -> bool:
    return isinstance(part, nn.ModuleList) and name.rpartition(".")[2] == "blocks"


def _options(config: Any, layers: Sequence[int]) -> dict[str, Any]:
    """The options that change; a family whose layers are of several kinds, or in two stacks, says so itself."""
    own = getattr(config, "keeping", None)
    return {"num_layers": len(layers)} if own is None else dict(own(layers))


def _origin(name: str, layers: Sequence[int]) -> str:
    """The name that a tensor of the shallower model has in the deeper one."""
    return NUMBERED.sub(lambda number: str(layers[int(number[1])]), name, count=1)
