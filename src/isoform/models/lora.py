"""Adapters of a model: where low-rank layers may stand, which of them a config names, and which one is active.

    lora = Lora(Lora.Config(rank=8, alpha=16, targets=["query", "value"]))
    lora.attach(model, seed=0)            everything but the adapter is frozen
    activate(model, None)                 the base again; activate(model, "default"): the adapted model

A place is known by our name (`blocks.0.attention.query`) and by the one of transformers
(`bert.encoder.layer.0.attention.self.query`); a pattern is the end of either, with `*` for anything.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from isoform.config import Fraction, Positive
from isoform.errors import ConfigError
from isoform.layers.block import SelfAttention
from isoform.layers.cross import CrossAttention
from isoform.layers.dropout import name_sites
from isoform.layers.lora import DropoutKeys, LowRank, LowRankLinear, require_four_bits, scale_of
from isoform.models import heads, names, t5_forms
from isoform.models.decoder import Decoder
from isoform.models.t5 import T5
from isoform.registry import Options, nearest, register

DEFAULT = "default"
EVERY = "all-linear"


@dataclass(frozen=True, slots=True)
class Place:
    """A matrix, or some rows of one, that can have a low-rank layer.

    name: ours. module: the linear layer's. part, rows: which rows of it. theirs: its name in transformers without
    `.weight`, if it has one there.
    """

    name: str
    module: str
    part: str
    rows: tuple[int, int]
    theirs: str | None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,) if self.theirs is None else (self.name, self.theirs)


@dataclass
class Adapter:
    """One adapter of a model.

    places: where its low-rank layers stand. whole: names of the base's own parameters that it trains too; values: what
    they are while another adapter is active.
    """

    options: Lora.Config
    places: tuple[Place, ...]
    whole: tuple[str, ...]
    values: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Adapters:
    """All adapters of a model. base_values: the base's own values of parameters that an active adapter trains.

    base_folder: where the base stands on the disk, for PEFT's `base_model_name_or_path`.
    """

    keys: DropoutKeys
    by_name: dict[str, Adapter] = field(default_factory=dict)
    active: str | None = None
    base_values: dict[str, Tensor] = field(default_factory=dict)
    base_folder: str = ""


@register("adapter", "lora")
class Lora:
    """Low-rank adapters on frozen weights, see `layers.lora`."""

    class Config(Options):
        rank: Positive = 8
        alpha: float = Field(16.0, gt=0)
        rank_stabilized: bool = False
        # scale alpha / sqrt(rank), not alpha / rank
        dropout: Fraction = 0.0
        # rate on what the low-rank layers read
        targets: list[str] = Field(["query", "value"], min_length=1)
        # ends of names, ours or those of transformers; `*` stands for anything; `all-linear`: every matrix in blocks
        train: list[str] = Field(default=[])
        # ends of names of modules that are trained and saved whole beside them; a new head always is
        base_bits: Literal[4] | None = None
        # 4: the frozen matrices of blocks in four bits while training (QLoRA); needs bitsandbytes and a CUDA device

    def __init__(self, options: Config) -> None:
        self.options = options

    def attach(self, model: Any, *, seed: int, name: str = DEFAULT) -> Adapter:
        """Adds the adapter to the model, active, and freezes everything else. Raises: ConfigError."""
        if self.options.base_bits is not None:
            require_four_bits()
        places = choose(model, self.options.targets)
        whole = tuple(_whole(model, self.options.train))
        adapter = add(model, name, self.options, places, whole)
        for place in places:
            low_rank(model, name, place).draw(seed, f"{place.name}.{name}")
        if self.options.base_bits is not None:
            read_in_bits(model, self.options.base_bits)
        return adapter


def read_in_bits(model: Any, bits: int) -> None:
    """From now on the frozen matrices of blocks are read in so many bits."""
    for place in find_places(model):
        _adaptable(model, place.module).bits = bits


# ------------------------------------------------------------------------------------------------ where they may stand


def tensors_in_hf(model: Any) -> dict[str, names.Place]:
    """Each tensor's name in transformers -> its place in ours; empty where the model has no form there."""
    form, _ = model.hf_form(model.config)
    if form is None:
        return {}
    with torch.device("meta"):
        stored = type(model)(model.config, seed=None).state_to_hf()
    found = {}
    for name, place in names.expand(_table(model, str(form["model_type"])), model.config.num_layers).items():
        # Tables name the encoder behind its stem, which an encoder without a head is stored without.
        written = name if name in stored else name.partition(".")[2]
        if place is not None and written in stored:
            found[written] = place
    return found


def _table(model: Any, model_type: str) -> names.Table:
    """The family's table of names, that of its classifier with it."""
    if isinstance(model, T5):
        return t5_forms.table(model.config)
    decoder = isinstance(model, Decoder)
    own = model.forms.table(model.config, model_type) if decoder else model.hugging_face.table(model.config)
    return {**own, **heads.table(model.classifier_shape, model.config)}


def find_places(model: Any) -> list[Place]:
    """Every matrix in the blocks, and each of the parts that attention keeps in one."""
    theirs = {
        (place.name, place.rows): name.removesuffix(".weight")
        for name, place in tensors_in_hf(model).items()
        if name.endswith(".weight")
    }
    found = []
    for module, layer in model.named_modules():
        # A router and the head are read as matrices, not called.
        if not isinstance(layer, nn.Linear) or "blocks." not in module or module.endswith(".router"):
            continue
        whole = (0, layer.out_features)
        stem, _, leaf = module.rpartition(".")
        found.append(Place(module, module, "whole", whole, theirs.get((f"{module}.weight", None))))
        for part, rows in _parts(model.get_submodule(stem), leaf):
            found.append(Place(f"{stem}.{part}", module, part, rows, theirs.get((f"{module}.weight", rows))))
    return found


def _parts(owner: nn.Module, leaf: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """Names and rows of the matrices that one matrix of attention holds."""
    sizes: dict[str, int] = {}
    if isinstance(owner, SelfAttention) and leaf == "qkv":
        keys = owner.num_kv_heads * owner.head_width
        sizes = {"query": owner.num_heads * owner.head_width, "key": keys, "value": keys}
    elif isinstance(owner, CrossAttention) and leaf == "key_value":
        sizes = dict.fromkeys(("key", "value"), owner.num_heads * owner.head_width)
    first = 0
    for part, size in sizes.items():
        yield part, (first, first + size)
        first += size


def choose(model: Any, patterns: list[str]) -> tuple[Place, ...]:
    """The places that the patterns name. Raises: ConfigError where one names nothing, or what cannot be adapted."""
    known = find_places(model)
    chosen: dict[str, Place] = {}
    for pattern in patterns:
        found = _every(known) if pattern == EVERY else [place for place in known if _ends(pattern, place.names)]
        if not found:
            raise ConfigError(f"adapter.targets: {pattern!r} names no matrix in the blocks{_near(pattern, known)}")
        others = [] if pattern == EVERY else _unfit(model, pattern, known)
        if others:
            better = sorted({".".join(place.names[-1].split(".")[-2:]) for place in found})
            raise ConfigError(
                f"adapter.targets: {pattern!r} also names {names.listed(others)}, which can have no low-rank layer; "
                f"name more of the path, such as {names.listed(better)}"
            )
        chosen |= {place.name: place for place in found}
    places = tuple(chosen.values())
    _refuse_overlap(places)
    return places


def _every(known: list[Place]) -> list[Place]:
    """Each matrix once: in the parts that transformers has, where it has them."""
    parted = {place.module for place in known if place.part != "whole" and place.theirs}
    return [place for place in known if (place.part == "whole") != (place.module in parted)]


def _ends(pattern: str, each: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}") for name in each)


def _unfit(model: Any, pattern: str, known: list[Place]) -> list[str]:
    """Names of other modules with parameters that the pattern names too."""
    ours = {name.rpartition(".")[0] for name, _ in model.named_parameters() if ".adapters." not in name}
    theirs = {name.rpartition(".")[0] for name in tensors_in_hf(model)}
    fit = {name for place in known for name in place.names}
    return sorted(name for name in (ours | theirs) - fit if _ends(pattern, (name,)))


def _near(pattern: str, known: list[Place]) -> str:
    """The nearest names, and all short ones that there are."""
    short = sorted({name.rpartition(".")[2] for place in known for name in place.names})
    whole = [name for place in known for name in place.names]
    return nearest(pattern, whole if "." in pattern else short) + f"; names end in: {', '.join(short)}"


def _refuse_overlap(places: tuple[Place, ...]) -> None:
    for place in places:
        for other in places:
            apart = place.rows[1] <= other.rows[0] or other.rows[1] <= place.rows[0]
            if place.module == other.module and place.part != other.part and not apart:
                raise ConfigError(
                    f"adapter.targets: {place.name} and {other.name} are rows of one matrix; name one of the two"
                )


def _whole(model: Any, patterns: list[str]) -> list[str]:
    """Names of parameters that are trained whole: a new classifier's, and what the patterns name."""
    new = getattr(model, "new_parameters", None)
    if new is None:
        new = {name for name, _ in model.named_parameters() if name.startswith("classifier.")}
    modules = {name: module for name, module in model.named_modules() if name and ".adapters" not in name}
    theirs: dict[str, set[str]] = {}
    for name, place in tensors_in_hf(model).items():
        theirs.setdefault(name.rpartition(".")[0], set()).add(place.name.rpartition(".")[0])
    chosen: set[str] = set()
    for pattern in patterns:
        found = {name for name in modules if _ends(pattern, (name,))}
        found |= {ours for name, each in theirs.items() if _ends(pattern, (name,)) for ours in each}
        if not any(next(modules[name].parameters(), None) is not None for name in found):
            known = [*modules, *theirs]
            raise ConfigError(f"adapter.train: {pattern!r} names no module with parameters{nearest(pattern, known)}")
        chosen |= found
    named = [
        name
        for name, _ in model.named_parameters()
        if ".adapters." not in name and (name in new or any(name.startswith(f"{each}.") for each in chosen))
    ]
    if "embedding.weight" in named and getattr(model.config, "tied", False):
        raise ConfigError(
            "adapter.train: the embedding is the head's matrix too (model.tied); it cannot be trained alone"
        )
    return named


# --------------------------------------------------------------------------------------------------- adding, switching


def adapters_of(model: Any) -> Adapters | None:
    """The adapters of a model, or None where it never had any."""
    found: Adapters | None = getattr(model, "adapters", None)
    return found


def active_adapter(model: Any) -> Adapter | None:
    """The adapter that is at work, or None."""
    adapters = adapters_of(model)
    return None if adapters is None or adapters.active is None else adapters.by_name[adapters.active]


def add(
    model: Any,
    name: str,
    options: Lora.Config,
    places: tuple[Place, ...],
    whole: tuple[str, ...],
    *,
    ranks: dict[str, int] | None = None,
    scales: dict[str, float] | None = None,
) -> Adapter:
    """Puts undrawn low-rank layers at the places, and makes the adapter the active one.

    ranks, scales: of single places, by name, where they differ from the options'. Raises: ConfigError.
    """
    adapters = adapters_of(model)
    if adapters is None:
        adapters = model.adapters = Adapters(DropoutKeys())
        model.register_forward_pre_hook(adapters.keys)
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ModuleDict, name):
        raise ConfigError(f"adapter {name!r}: another name is expected, of letters, digits, `_` and `-`")
    if name in adapters.by_name:
        raise ConfigError(f"adapter {name!r}: the model has one of this name; there are {', '.join(adapters.by_name)}")
    for place in places:
        layer = _adaptable(model, place.module)
        rank = (ranks or {}).get(place.name, options.rank)
        scale = scale_of(rank, options.alpha, rank_stabilized=options.rank_stabilized)
        scale = (scales or {}).get(place.name, scale)
        part = LowRank(layer.in_features, place.rows, rank, scale=scale, dropout=options.dropout)
        if name not in layer.adapters:
            layer.adapters[name] = nn.ModuleDict()
        each: Any = layer.adapters[name]
        each[place.part] = part.to(layer.weight.device)
    name_sites(model)
    adapters.by_name[name] = Adapter(options, places, whole)
    activate(model, name)
    return adapters.by_name[name]


def _adaptable(model: Any, module: str) -> LowRankLinear:
    """The linear layer of this name, made ready for adapters."""
    layer = model.get_submodule(module)
    if not isinstance(layer, LowRankLinear):
        layer = LowRankLinear(layer, model.adapters.keys, from_source=_from_source(module))
        stem, _, leaf = module.rpartition(".")
        setattr(model.get_submodule(stem), leaf, layer)
    return layer


def _from_source(module: str) -> bool:
    return module.startswith("encoder.") or module.endswith("cross_attention.key_value")


@torch.no_grad()
def activate(model: Any, name: str | None) -> None:
    """Makes an adapter the one at work, the only one whose parameters are trained; None: the base as it was.

    Raises: ConfigError where there is none of this name.
    """
    adapters = adapters_of(model)
    if adapters is None or (name is not None and name not in adapters.by_name):
        known = [] if adapters is None else list(adapters.by_name)
        raise ConfigError(f"adapter {name!r}: not one of this model's: {', '.join(known) or 'it has none'}")
    parameters = {each: parameter for each, parameter in model.named_parameters() if ".adapters." not in each}
    before = active_adapter(model)
    for each in () if before is None else before.whole:
        before.values[each] = parameters[each].detach().clone()  # type: ignore[union-attr]
        parameters[each].copy_(adapters.base_values[each])
    adapters.active = name
    after = active_adapter(model)
    whole = () if after is None else after.whole
    adapters.base_values = {each: parameters[each].detach().clone() for each in whole}
    for each in whole:
        parameters[each].copy_(after.values.get(each, parameters[each]))  # type: ignore[union-attr]
    for layer in model.modules():
        if isinstance(layer, LowRankLinear):
            layer.active = name
    mine = set(adapter_state(model))
    for each, parameter in model.named_parameters():
        parameter.requires_grad_(each in mine)


def low_rank(model: Any, name: str, place: Place) -> LowRank:
    """The low-rank layer of an adapter at a place."""
    layer: Any = model.get_submodule(f"{place.module}.adapters.{name}.{place.part}")
    assert isinstance(layer, LowRank)
    return layer


def adapter_state(model: Any) -> dict[str, Tensor]:
    """What the active adapter trained, under the model's names; all that a checkpoint needs beside the base."""
    adapters, adapter = adapters_of(model), active_adapter(model)
    if adapters is None or adapter is None:
        return {}
    inside = f".adapters.{adapters.active}."
    state = model.state_dict()
    return {name: tensor for name, tensor in state.items() if inside in name or name in adapter.whole}


def base_state(model: Any) -> dict[str, Tensor]:
    """The model's tensors as they were before any adapter, under its own names."""
    adapters = adapters_of(model)
    state = {name: tensor for name, tensor in model.state_dict().items() if ".adapters." not in name}
    return state if adapters is None else {**state, **adapters.base_values}


def base_fingerprint(model: Any) -> str:
    """A hash of the base's values, the same in every precision that holds them exactly."""
    digest = hashlib.sha256()
    adapter = active_adapter(model)
    whole = () if adapter is None else adapter.whole
    for name, tensor in sorted(base_state(model).items()):
        # What an adapter brings along itself is not the base's: a new head is drawn anew by whoever loads it.
        if name not in whole:
            digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().float().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
