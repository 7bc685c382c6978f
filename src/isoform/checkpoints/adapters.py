"""Adapters on the disk in PEFT's format, and merged into their base.

    adapter_config.json           rank, alpha, targets, and `base_model_name_or_path`
    adapter_model.safetensors     base_model.model.<module>.lora_A.weight, .lora_B.weight; modules trained whole

Names are those of the model's form in transformers, so that `peft` reads them; where it has none, our own. What one of
our matrices keeps together and transformers keeps apart (queries, keys, values) is cut apart, and the other way round:

    several low-rank layers in one of their matrices    A = [A_1; A_2; ..], B = their blocks on its rows, r = sum r_i

Source: the adapter files of PEFT 0.21, whose logits agree.
"""

from __future__ import annotations

import copy
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isoform.checkpoints import tensors
from isoform.checkpoints.parity import probe_batch, relative_error
from isoform.checkpoints.sources import resolve_model
from isoform.errors import CheckpointError, ConfigError
from isoform.layers.lora import LowRank, scale_of
from isoform.models import lora, names
from isoform.registry import build_options, nearest

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
STEM = "base_model.model."
# A base that is named as of the hub: owner/name, perhaps @revision.
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")
# What a merge may change at most, relative: float32 sums in another order.
TOLERANCE = 1e-4
# Fields of adapter_config.json that change what is computed, with the values under which they do not.
OFF: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "alora_invocation_tokens": (None,),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "use_qalora": (False, None),
    "arrow_config": (None,),
    "megatron_config": (None,),
    # others change the base's own matrices
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix as the files know it. rows: of our linear layer `module`; place: how its rows are carried there."""

    name: str
    module: str
    rows: tuple[int, int]
    place: names.Place | None

    def to_theirs(self, up: Tensor) -> Tensor:
        """B in the order of their rows. A transposed matrix (Conv1D) has the low-rank layers of a plain one."""
        return up if self.place is None or self.place.write is names.transposed else self.place.write(up)

    def to_ours(self, up: Tensor) -> Tensor:
        return up if self.place is None or self.place.read is names.transposed else self.place.read(up)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter in PEFT's format."""
    return (folder / CONFIG).is_file()


def matrices(model: Any) -> dict[str, Matrix]:
    """Every matrix that an adapter file may speak of, under its name there."""
    in_hf = lora.tensors_in_hf(model)
    found = {}
    for place in lora.find_places(model):
        name = place.theirs if in_hf else place.name
        if name is not None:
            carried = in_hf.get(f"{name}.weight")
            found[name] = Matrix(name, place.module, place.rows, carried)
    return found


# ------------------------------------------------------------------------------------------------------------- writing


def peft_form(model: Any) -> tuple[dict[str, Any], dict[str, Tensor], str | None]:
    """adapter_config.json and tensors of the active adapter, and why `peft` cannot read them, if so."""
    adapter, adapters = lora.active_adapter(model), lora.adapters_of(model)
    assert adapter is not None and adapters is not None and adapters.active is not None
    options = adapter.options
    known, reason = matrices(model), model.hf_form(model.config)[1]
    written: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, matrix in known.items():
        parts = _parts_in(model, adapters.active, adapter, matrix)
        # Native names tell parts of one matrix apart; there each is written where it stands.
        if not parts or (reason is not None and [part.rows for part in parts] != [matrix.rows]):
            continue
        down, up, scale = _joined(parts, matrix)
        written[f"{STEM}{name}.lora_A.weight"], written[f"{STEM}{name}.lora_B.weight"] = down, up
        rank = ranks[name] = len(down)
        alphas[name] = scale * (math.sqrt(rank) if options.rank_stabilized else rank)
    whole = _whole_to_theirs(model, adapter)
    biases = {f"{name}.bias": whole.pop(f"{name}.bias") for name in ranks if f"{name}.bias" in whole}
    whole = {name: tensor for name, tensor in whole.items() if name.removesuffix(".weight") not in ranks}
    written |= {f"{STEM}{name[:-5]}.base_layer.bias": tensor for name, tensor in biases.items()}
    written |= {STEM + name: tensor for name, tensor in whole.items()}
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    alpha = next(alphas[name] for name, rank in ranks.items() if rank == common)
    config = {
        "peft_type": "LORA",
        "task_type": _task(model),
        "base_model_name_or_path": adapters.base_folder or None,
        "r": common,
        "lora_alpha": _plain(alpha),
        "use_rslora": options.rank_stabilized,
        "lora_dropout": options.dropout,
        "bias": "lora_only" if biases else "none",
        "fan_in_fan_out": any(m.place is not None and m.place.write is names.transposed for m in known.values()),
        "target_modules": _short(set(ranks), known, model),
        "modules_to_save": _modules(model, whole) or None,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != common},
        "alpha_pattern": {name: _plain(each) for name, each in alphas.items() if not math.isclose(each, alpha)},
        "inference_mode": True,
    }
    return config, written, reason


def _parts_in(model: Any, name: str, adapter: lora.Adapter, matrix: Matrix) -> list[LowRank]:
    """The adapter's low-rank layers that add to rows of one of their matrices."""
    places = [place for place in adapter.places if place.module == matrix.module]
    meeting = [place for place in places if place.rows[0] < matrix.rows[1] and matrix.rows[0] < place.rows[1]]
    return [lora.low_rank(model, name, place) for place in meeting]


def _joined(parts: list[LowRank], matrix: Matrix) -> tuple[Tensor, Tensor, float]:
    """A, B and scale of one low-rank layer that does what several do on the rows of their matrix."""
    scale, (first, end) = parts[0].scale, matrix.rows
    downs, ups = [], []
    for part in parts:
        begin, stop = max(part.rows[0], first), min(part.rows[1], end)
        up = part.up.new_zeros(end - first, part.up.shape[1])
        up[begin - first : stop - first] = part.up.detach()[begin - part.rows[0] : stop - part.rows[0]]
        downs.append(part.down.detach())
        ups.append(up if part.scale == scale else up * (part.scale / scale))
    return torch.cat(downs), matrix.to_theirs(torch.cat(ups, dim=1)).contiguous(), scale


def _whole_to_theirs(model: Any, adapter: lora.Adapter) -> dict[str, Tensor]:
    """Modules of which something was trained whole, under the names of the files, which want all of a module."""
    parameters, in_hf = dict(model.named_parameters()), lora.tensors_in_hf(model)
    if not in_hf:
        return {name: parameters[name].detach() for name in adapter.whole}
    modules = {name.rpartition(".")[0] for name, place in in_hf.items() if place.name in adapter.whole}
    found = {}
    for name, place in in_hf.items():
        if name.rpartition(".")[0] in modules and place.name in parameters:
            tensor = parameters[place.name].detach()
            found[name] = place.write(tensor if place.rows is None else tensor[slice(*place.rows)]).contiguous()
    return found


def _short(chosen: set[str], known: dict[str, Matrix], model: Any) -> list[str]:
    """The last parts of the names where they name the same matrices and no other module, else the names themselves."""
    ends = {name.rpartition(".")[2] for name in chosen}
    modules = {name.rpartition(".")[0] for name in lora.tensors_in_hf(model)} | set(known)
    return sorted(ends if {name for name in modules if name.rpartition(".")[2] in ends} == chosen else chosen)


def _modules(model: Any, whole: dict[str, Tensor]) -> list[str]:
    """Modules to save: a head as one, where all of it was trained, else module by module."""
    every = lora.tensors_in_hf(model) or dict(model.named_parameters())
    found = set()
    for name in whole:
        root = name.partition(".")[0]
        entire = all(other in whole for other in every if other.startswith(f"{root}."))
        found.add(root if entire else name.rpartition(".")[0])
    return sorted(found)


def _task(model: Any) -> str | None:
    """PEFT's name for what the model does; None where it has none."""
    if getattr(model, "classifier", None) is not None:
        return "TOKEN_CLS" if model.classifier.pooling == "none" else "SEQ_CLS"
    if "encoder-decoder" in model.capabilities:
        return "SEQ_2_SEQ_LM"
    return "CAUSAL_LM" if "causal" in model.capabilities else None


def _plain(value: float) -> float | int:
    return round(value) if math.isclose(value, round(value), rel_tol=1e-12) else value


# ------------------------------------------------------------------------------------------------------------- reading


def load_adapter(model: Any, folder: Path, name: str = lora.DEFAULT) -> None:
    """Adds the adapter of a folder to its base, active. Raises: CheckpointError where it is not this base's."""
    config = tensors.read_object(folder / CONFIG)
    _refuse_others(folder, config)
    if lora.adapters_of(model) is not None:  # of the first, whoever opened the base has looked
        check_base(model, folder)
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder / WEIGHTS}: missing; only .safetensors is read, save the adapter as that")
    stored = {_plain_name(key): tensor for key, tensor in tensors.read_tensors(folder / WEIGHTS).items()}
    known, chosen = matrices(model), {place.name: place for place in lora.find_places(model)}
    by_rows = {(place.module, place.rows): place for place in chosen.values()}
    places, ranks, scales, values = [], {}, {}, {}
    for key in [key for key in stored if key.endswith(".lora_A.weight")]:
        given = key.removesuffix(".lora_A.weight")
        matrix = _find(given, known, folder)
        place = by_rows[matrix.module, matrix.rows]
        down, up = stored.pop(key), stored.pop(f"{given}.lora_B.weight", None)
        expected = (matrix.rows[1] - matrix.rows[0], down.shape[0])
        inputs = model.get_submodule(matrix.module).in_features
        if up is None or up.shape != expected or down.shape[1] != inputs:
            raise CheckpointError(
                f"{folder / WEIGHTS}: {given}: A {tuple(down.shape)} and B {None if up is None else tuple(up.shape)} "
                f"do not fit a matrix of {(expected[0], inputs)}: the adapter is another base's"
            )
        places.append(place)
        ranks[place.name] = len(down)
        scales[place.name] = _scale(config, given, len(down))
        values[place] = (down, matrix.to_ours(up))
    if not places:
        raise CheckpointError(f"{folder / WEIGHTS}: holds no low-rank layers")
    whole = _whole_to_ours(model, stored, folder)
    options = build_options(lora.Lora, _options(config, places, whole), str(folder / CONFIG))
    try:
        lora.add(model, name, options, tuple(places), tuple(whole), ranks=ranks, scales=scales)
    except ConfigError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    with torch.no_grad():
        for place, (down, up) in values.items():
            layer = lora.low_rank(model, name, place)
            layer.down.copy_(down)
            layer.up.copy_(up)
        parameters = dict(model.named_parameters())
        for each, tensor in whole.items():
            parameters[each].copy_(tensor)


def _plain_name(key: str) -> str:
    """A name without PEFT's stem and without what its versions put in between."""
    key = key.replace(".base_layer.", ".")
    return (
        re.sub(r"\.(modules_to_save|original_module|lora_[AB])\.default\.", r".\1.", key)
        .replace(".modules_to_save.", ".")
        .removeprefix(STEM)
    )


def _refuse_others(folder: Path, config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{folder / CONFIG}: peft_type {config.get('peft_type')!r} given, LORA is expected")
    for field, allowed in OFF.items():
        if config.get(field, allowed[0]) not in allowed:
            raise CheckpointError(f"{folder / CONFIG}: {field} is {config[field]!r}; adapters here have no such part")


def _find(given: str, known: dict[str, Matrix], folder: Path) -> Matrix:
    """The matrix of a name, which may have more or less of a stem than ours."""
    found = [
        m for name, m in known.items() if name == given or name.endswith(f".{given}") or given.endswith(f".{name}")
    ]
    if len(found) != 1:
        raise CheckpointError(
            f"{folder / WEIGHTS}: {given} is no matrix of this base{nearest(given, known)}: "
            "the adapter is another base's"
        )
    return found[0]


def _scale(config: dict[str, Any], name: str, rank: int) -> float:
    """alpha / r, by the pattern that names the matrix, as PEFT finds it."""
    patterns = {**(config.get("alpha_pattern") or {})}
    alpha = next((each for key, each in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), config["lora_alpha"])
    return scale_of(rank, float(alpha), rank_stabilized=bool(config.get("use_rslora")))


def _options(config: dict[str, Any], places: list[lora.Place], whole: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "rank": config["r"],
        "alpha": config["lora_alpha"],
        "rank_stabilized": bool(config.get("use_rslora")),
        "dropout": config.get("lora_dropout", 0.0),
        "targets": [place.name for place in places],
        "train": sorted({name.rpartition(".")[0] for name in whole}),
    }


def _whole_to_ours(model: Any, stored: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Tensors that are no low-rank layers, as whole parameters of ours. Raises: CheckpointError."""
    parameters, in_hf = dict(model.named_parameters()), lora.tensors_in_hf(model)
    found: dict[str, Tensor] = {}
    for given, tensor in stored.items():
        exact = [given] if given in in_hf or (not in_hf and given in parameters) else []
        same = exact or [name for name in in_hf if name.endswith(f".{given}") or given.endswith(f".{name}")]
        if len(same) != 1 or ".lora_" in given:
            raise CheckpointError(f"{folder / WEIGHTS}: {given} has no place in this base{nearest(given, in_hf)}")
        place = in_hf.get(same[0]) or names.Place(given)
        ours, value = parameters[place.name], place.read(tensor)
        target = found.setdefault(place.name, ours.detach().clone())
        rows = target if place.rows is None else target[slice(*place.rows)]
        if rows.shape != value.shape:
            raise CheckpointError(
                f"{folder / WEIGHTS}: {given} has the shape {tuple(tensor.shape)}, the base's has {tuple(rows.shape)}"
            )
        rows.copy_(value)
    return found


def check_base(model: Any, folder: Path) -> None:
    """Raises: CheckpointError where isoform wrote the adapter on a base with other values."""
    about = folder / "isoform.json"
    expected = tensors.read_object(about).get("base_fingerprint") if about.is_file() else None
    if expected is not None and lora.base_fingerprint(model) != expected:
        raise CheckpointError(
            f"{folder}: the adapter was trained on another base: hash {expected[:12]} is expected, "
            f"this one has {lora.base_fingerprint(model)[:12]}; give the base that it was trained on"
        )


def find_base(folder: Path) -> Path:
    """Where an adapter's base stands: in its own folder, in `base/` of its run, or where its config says, which may be
    a name of the hub.

    Raises: CheckpointError that says how to name it.
    """
    if (folder / tensors.SINGLE).is_file() or (folder / tensors.INDEX).is_file():
        return folder
    for place in (folder, folder.parent, folder.parent.parent):
        if (place / "base" / "config.json").is_file() and (folder / "isoform.json").is_file():
            return place / "base"
    config = tensors.read_object(folder / CONFIG)
    named, why = config.get("base_model_name_or_path"), "which is not here"
    for path in (Path(str(named)), folder / str(named)) if named else ():
        if path.is_dir():
            return path
    if HUB_NAME.fullmatch(str(named)):
        revision = f"@{config['revision']}" if config.get("revision") and "@" not in str(named) else ""
        try:
            return resolve_model(f"hf:{named}{revision}")
        except CheckpointError as error:
            why = f"which is no folder here; {error}"
    raise CheckpointError(
        f"{folder / CONFIG}: base_model_name_or_path is {json.dumps(named)}, {why}; name the base: `--base FOLDER`, "
        "or `base=` in Python"
    )


# ------------------------------------------------------------------------------------------------------------- merging


@dataclass(frozen=True, slots=True)
class Merged:
    """A model without adapters that does what the adapted one did, in float32.

    max_difference: largest absolute difference between the outputs of the two on random tokens. relative_difference:
    |merged - adapted| / |adapted|.
    """

    model: Any
    max_difference: float
    relative_difference: float


@torch.no_grad()
def merge(model: Any) -> Merged:
    """W + s B A in place of every adapted matrix, proved equal on random tokens; the model itself stays as it is.

    Raises: CheckpointError where outputs differ by more than rounding, ConfigError where no adapter is active.
    """
    adapter = lora.active_adapter(model)
    if adapter is None:
        raise ConfigError("merge: the model has no active adapter")
    adapted = copy.deepcopy(model).float().eval()
    state = {name: tensor for name, tensor in adapted.state_dict().items() if ".adapters." not in name}
    for place in adapter.places:
        state[f"{place.module}.weight"] = adapted.get_submodule(place.module).merged()
    result = type(model)(model.config, seed=None).to(next(model.parameters()).device)
    result.load_state_dict(state)
    result.eval()
    expected, found = (_outputs(each) for each in (adapted, result))
    largest, relative = float((found - expected).abs().max()), relative_error(found, expected)
    if not relative < TOLERANCE:
        raise CheckpointError(
            f"merge: outputs differ by up to {largest:.2e} ({relative:.1e} relative), less than {TOLERANCE:.0e} is "
            "expected; the adapter's values are too large for its base, keep it apart"
        )
    return Merged(result, largest, relative)


def _outputs(model: Any) -> Tensor:
    """Hidden states of random tokens, and what the model makes of them."""
    batch = probe_batch(model)
    hidden = model(batch).hidden
    if getattr(model, "classifier", None) is not None:
        return torch.cat([hidden.flatten(), model.classifier(hidden, batch).flatten()])
    has_head = getattr(model.config, "head", None) != "none"
    return torch.cat([hidden.flatten(), model.logits(hidden).flatten()]) if has_head else hidden.flatten()
