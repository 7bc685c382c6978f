"""From another library's tensor names to ours and back, by one table a family.

A table maps a template of theirs to a `Place` of ours; `{}` stands for the number of the layer, None for a buffer
that nobody needs. The same table is read both ways, so that what can be read can be written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from isoform.errors import CheckpointError
from isoform.registry import nearest


def same(tensor: Tensor) -> Tensor:
    """The tensor as it is."""
    return tensor


def transposed(tensor: Tensor) -> Tensor:
    """Rows and columns exchanged: GPT-2's Conv1D keeps `(inputs, outputs)`."""
    return tensor.t().contiguous()


@dataclass(frozen=True, slots=True)
class Place:
    """Our name for one of their tensors, and how values are carried there and back.

    rows: (first, end) where theirs is a part of ours, as one of the three matrices of queries, keys and values.
    fill: what stands in their tensor where our model has no such parameter (a bias of zeros, a fixed position table, a
    tied head), as a function of our parameters; None: no such tensor. write_fill: whether it is written too.
    """

    name: str
    read: Callable[[Tensor], Tensor] = same
    write: Callable[[Tensor], Tensor] = same
    fill: Callable[[Mapping[str, Tensor]], Tensor] | None = None
    write_fill: bool = True
    rows: tuple[int, int] | None = None


Table = Mapping[str, Place | None]

# Under this key `checkpoints.folders` adds the names of the stored tensors to a config.json: they say which heads a
# folder has, which its `architectures` often does not.
TENSOR_NAMES = "tensor_names"


def expand(table: Table, num_layers: int) -> dict[str, Place | None]:
    """The table with every `{}` replaced by each layer's number."""
    expanded: dict[str, Place | None] = {}
    for theirs, place in table.items():
        for layer in range(num_layers) if "{}" in theirs else [0]:
            named = place and replace(place, name=place.name.replace("{}", str(layer)))
            expanded[theirs.replace("{}", str(layer))] = named
    return expanded


def to_ours(
    tensors: Mapping[str, Tensor], table: Table, num_layers: int, ours: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Their tensors under our names, dtypes kept.

    ours: our parameters, for their names and shapes. Raises: CheckpointError naming tensors that are unknown (with the
    missing one that each is most like), missing, of another shape, or that hold values which our model has no parameter
    for.
    """
    places, wanted = expand(table, num_layers), set(ours)
    unknown = sorted(set(tensors) - set(places))
    needed = {theirs: place for theirs, place in places.items() if place and place.name in wanted}
    missing = sorted(set(needed) - set(tensors))
    unnamed = sorted(wanted - {place.name for place in needed.values()})
    if unknown or missing or unnamed:
        guessed = [name + nearest(name, missing) for name in unknown]
        lists = {"unknown": guessed, "missing": missing, "without a name in this format": unnamed}
        raise CheckpointError("; ".join(f"tensors {word}: {listed(names)}" for word, names in lists.items() if names))
    result = _joined({theirs: (place, place.read(tensors[theirs])) for theirs, place in needed.items()}, ours)
    for theirs, tensor in tensors.items():
        unused = places[theirs]
        if unused is not None and unused.name not in wanted:
            _check_fill(theirs, tensor, unused, result)
    return result


def _joined(read: Mapping[str, tuple[Place, Tensor]], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters from their tensors. Raises: CheckpointError where one has not the shape of its place."""
    parts: dict[str, dict[int, Tensor]] = {}
    for theirs, (place, tensor) in read.items():
        whole = ours[place.name]
        expected = whole.shape if place.rows is None else whole[slice(*place.rows)].shape
        if tensor.shape != expected:
            raise CheckpointError(
                f"{theirs}: has the shape {tuple(tensor.shape)}, {tuple(expected)} is expected from config.json"
                + ("; is vocab_size the number of its rows?" if place.name == "embedding.weight" else "")
            )
        parts.setdefault(place.name, {})[place.rows[0] if place.rows else 0] = tensor
    return {
        name: torch.cat([some[first] for first in sorted(some)]) if len(some) > 1 else next(iter(some.values()))
        for name, some in parts.items()
    }


def _check_fill(theirs: str, tensor: Tensor, place: Place, ours: Mapping[str, Tensor]) -> None:
    expected = None if place.fill is None else place.fill(ours)
    if expected is None or not torch.equal(place.read(tensor), expected.to(tensor.dtype)):
        raise CheckpointError(
            f"{theirs}: holds values that this model has no parameter for; a config with `{place.name}` is expected"
        )


def to_theirs(parameters: Mapping[str, Tensor], table: Table, num_layers: int) -> dict[str, Tensor]:
    """Our parameters under their names, dtypes kept, with what they expect and we do not have filled in."""
    dtype = next(iter(parameters.values())).dtype
    result = {}
    for theirs, place in expand(table, num_layers).items():
        if place is None:
            continue
        if place.name in parameters:
            parameter = parameters[place.name]
            result[theirs] = place.write(parameter if place.rows is None else parameter[slice(*place.rows)])
        elif place.fill is not None and place.write_fill:
            result[theirs] = place.write(place.fill(parameters).to(dtype)).contiguous()
    return result


def listed(names: list[str], most: int = 5) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
