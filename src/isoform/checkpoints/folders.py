"""Model folders, in: run, isoform and Hugging Face folders, adapters and .gguf files, checked before anything is built.

What stands in a folder is told by `forms`, which writes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isoform import registry
from isoform.checkpoints import adapters, manifest, tensors
from isoform.checkpoints.forms import NATIVE_PREFIX, save_model
from isoform.checkpoints.gguf import read_gguf
from isoform.checkpoints.sources import pickle_error, pickles, resolve_model
from isoform.checkpoints.tensors import Progress, read_object
from isoform.errors import CheckpointError, IsoformError
from isoform.text import ngrams
from isoform.text.tokenizers import TextTokenizer, load_tokenizer

GGUF_SUFFIX = ".gguf"


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model with its tokenizer (None where the folder has none).

    info: `path`; `extra`, what `save_model` was given; `verified`, whether a manifest was there to check the files by;
    `hf_config`, the config.json that was read; `tokenizer`, why there is no tokenizer; `generation`, the folder's
    generation_config.json; `dtypes`, of each stored tensor, where there are several; `packed`, how many tensors of a
    .gguf file are packed in which way.
    """

    model: Any
    tokenizer: TextTokenizer | None
    family: str
    config: Any
    info: dict[str, Any]

    def save(self, folder: str | Path) -> None:
        """Writes the model folder that this is, Hugging Face's wherever there is such a form; whole or not at all.

        Label names, generation config, the precision of each tensor where there were several, and the special ids of
        its config.json where there is no tokenizer go along. Raises: DiskError where it does not fit or may not be
        written.
        """
        info = self.info
        ids = {name: value for name, value in info["hf_config"].items() if name.endswith("_token_id")}
        extra, generation, dtypes = info["extra"], info.get("generation"), info.get("dtypes")
        save_model(Path(folder), self.model, self.tokenizer, extra=extra, generation=generation, ids=ids, dtypes=dtypes)


def load_model(
    path: str | Path,
    *,
    base: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> LoadedModel:
    """A model from any source of `checkpoints.sources`: run, isoform or Hugging Face folder, package, hub.

    base: of an adapter, where its folder does not say or no longer rightly. dtype: of the parameters; None: as stored,
        the widest where there are several.
    Damaged files, pickles, remote code, and tensors that are unknown,
    missing or of another shape are refused by name. Raises: CheckpointError.
    """
    folder = resolve_model(path)
    if base is not None and not adapters.is_adapter(folder):
        raise CheckpointError(f"{path}: a whole model and no adapter, which has no base {base}; leave the base out")
    if folder.suffix == GGUF_SUFFIX and folder.is_file():
        return _load_gguf(folder, dtype, device)
    if adapters.is_adapter(folder):
        return _load_adapted(folder, base, dtype, device)
    return _load_whole(folder, dtype, device)


def identified(path: str | Path) -> tuple[str, Any] | None:
    """Family and its config of what `load_model` loads from there, without the weights; None of a .gguf file.

    Raises: CheckpointError.
    """
    folder = resolve_model(path)
    place = adapters.find_base(folder) if adapters.is_adapter(folder) else folder
    if place.is_file():
        return None
    return _identify(place, _trusted_config(place))[:2]


def _load_adapted(
    folder: Path, base: str | Path | None, dtype: torch.dtype | None, device: str | torch.device
) -> LoadedModel:
    """The base of an adapter, with the adapter on it."""
    verified = (folder / manifest.NAME).is_file()
    if verified:
        manifest.verify(folder)
    place = resolve_model(base) if base is not None else adapters.find_base(folder)
    if place != folder and adapters.is_adapter(place):
        raise CheckpointError(f"{folder}: its base {place} is an adapter too; merge that first")
    is_file = place.is_file()
    loaded = _load_gguf(place, dtype, device) if is_file else _load_whole(place, dtype, device)
    adapters.load_adapter(loaded.model, folder)
    adapters.check_base(loaded.model, folder)
    loaded.model.adapters.base_folder = str(place.resolve())
    loaded.model.eval()
    own, _ = _load_tokenizer(folder, loaded.config)
    about = read_object(folder / "isoform.json") if (folder / "isoform.json").is_file() else {}
    changed = {"path": str(folder), "base": str(place), "verified": verified, "extra": about.get("extra") or {}}
    return replace(loaded, tokenizer=own or loaded.tokenizer, info={**loaded.info, **changed})


def _load_whole(folder: Path, dtype: torch.dtype | None, device: str | torch.device) -> LoadedModel:
    """The model of a folder with a config.json and weights."""
    verified = (folder / manifest.NAME).is_file()
    if verified:
        manifest.verify(folder)
    hf_config = _trusted_config(folder)
    family, config, extra = _identify(folder, hf_config)
    cls = registry.lookup("model", family)
    weights = read_weights(folder)
    model = _filled(cls(config, seed=None), weights, str(folder), dtype, device)
    tokenizer, reason = _load_tokenizer(folder, config)
    info = {"path": str(folder), "extra": extra, "verified": verified, "hf_config": hf_config, "tokenizer": reason}
    if len({tensor.dtype for tensor in weights.values()}) > 1:
        info["dtypes"] = tensors.stored_dtypes(folder)
    if (folder / "generation_config.json").is_file():
        info["generation"] = read_object(folder / "generation_config.json")
    return LoadedModel(model, tokenizer, family, config, info)


def _load_gguf(path: Path, dtype: torch.dtype | None, device: str | torch.device) -> LoadedModel:
    """The model of a .gguf file; parameters are float32 unless told."""
    found = read_gguf(path)
    family = family_for(found.hf_config["model_type"])
    assert family is not None, "what is read from GGUF has a family"
    cls = registry.lookup("model", family)
    with _about(path):
        config = cls.from_hf(found.hf_config)
        weights = cls.state_from_hf(found.hf_config, found.tensors)
    found.tensors.clear()
    # What was unpacked becomes the model's own: a copy would need as much memory again.
    model = _filled(cls(config, seed=None), weights, str(path), dtype, device, assign=True)
    if found.tokenizer is not None:
        _check_ids(path, found.tokenizer, config)
    info = {"path": str(path), "extra": {}, "verified": False, "hf_config": found.hf_config, "packed": found.kinds}
    if found.generation:
        info["generation"] = found.generation
    return LoadedModel(model, found.tokenizer, family, config, {**info, "tokenizer": found.no_tokenizer})


def _filled(
    model: Any,
    weights: Mapping[str, Tensor],
    where: str,
    dtype: torch.dtype | None,
    device: str | torch.device,
    *,
    assign: bool = False,
) -> Any:
    """The model with these weights, in one precision, ready to be used."""
    load_weights(model, weights, where, assign=assign)
    # Of several precisions the widest, which holds them all: one pass computes in one.
    stored = [tensor.dtype for tensor in weights.values() if tensor.is_floating_point()]
    wanted = dtype or (reduce(torch.promote_types, stored) if stored else None)
    for parameter in model.parameters():
        # Buffers (tables of angles, slopes) keep their precision, as they do in transformers.
        parameter.data = parameter.data.to(device=device, dtype=wanted)
    model.to(device)
    model.eval()
    return model


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a model folder under the model's own names. Raises: CheckpointError."""
    hf_config = read_object(folder / "config.json")
    family, _, _ = _identify(folder, hf_config)
    weights = tensors.read_model(folder)
    if str(hf_config.get("model_type")).startswith(NATIVE_PREFIX):
        return weights
    with _about(folder):
        return dict(registry.lookup("model", family).state_from_hf(hf_config, weights))


def load_weights(model: Any, weights: Mapping[str, Tensor], where: str, *, assign: bool = False) -> None:
    """Copies weights into a model by name, or with `assign` makes them its own, laid out in order.

    Raises: CheckpointError that names what is missing, unknown or misshapen.
    """
    expected = model.state_dict()
    missing, unknown = sorted(set(expected) - set(weights)), sorted(set(weights) - set(expected))
    if missing or unknown:
        parts = [("missing", missing), ("unknown", unknown)]
        raise CheckpointError(
            f"{where}: the tensors are not those of the config: "
            + "; ".join(f"{len(names)} {word}: {_some(names)}" for word, names in parts if names)
        )
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{where}: {name} has the shape {tuple(tensor.shape)}, "
                f"{tuple(expected[name].shape)} is expected from the config"
            )
    if assign:
        model.load_state_dict({name: tensor.contiguous() for name, tensor in weights.items()}, assign=True)
        return
    # A file is mapped, so that its bytes are read here.
    progress = Progress(f"reading {Path(where).name}", "tensors")
    with torch.no_grad():
        for number, (name, tensor) in enumerate(weights.items()):
            progress.at(number, len(weights))
            expected[name].copy_(tensor)
    progress.done()


def _identify(folder: Path, hf_config: dict[str, Any]) -> tuple[str, Any, dict[str, Any]]:
    """Family, its Config, and what was saved beside them: from isoform.json if it is there, else from config.json."""
    if (folder / "isoform.json").is_file():
        about = read_object(folder / "isoform.json")
        family = str(about.get("family"))
        with _about(folder / "isoform.json"):
            cls = registry.lookup("model", family, "family")
            config = registry.build_options(cls, about.get("config") or {}, "config")
        return family, config, about.get("extra") or {}
    model_type = hf_config.get("model_type")
    if str(model_type).startswith(NATIVE_PREFIX):
        raise CheckpointError(f"{folder / 'isoform.json'}: missing; a folder of type {model_type!r} needs it")
    found = family_for(model_type)
    if found is not None:
        with _about(folder):
            # Which heads a folder has is told by its tensors; `architectures` is often wrong.
            config = {**hf_config, "tensor_names": tensors.stored_names(folder)}
            return found, registry.lookup("model", found).from_hf(config), {}
    known = sorted(
        {str(kind) for name in registry.names("model") for kind in registry.lookup("model", name).hf_model_types}
    )
    raise CheckpointError(
        f"{folder / 'config.json'}: model_type {model_type!r:.60} is not known"
        f"{registry.nearest(str(model_type), known)}; known: {', '.join(known)}"
    )


def family_for(model_type: Any) -> str | None:
    """The registered name of the family that reads a model_type of transformers.

    A family reads the types that its own class names: a variant that is derived from it does not take them over.
    """
    own = {name: vars(registry.lookup("model", name)).get("hf_model_types", ()) for name in registry.names("model")}
    return next((name for name, types in own.items() if model_type in types), None)


def _load_tokenizer(folder: Path, config: Any) -> tuple[Any, str | None]:
    """The folder's tokenizer, or why there is none. Raises: CheckpointError where it has ids that the model has not."""
    if (folder / ngrams.FILE).is_file():
        with _about(folder):
            return ngrams.load_ngrams(folder), None
    if not (folder / "tokenizer.json").is_file():
        return None, f"{folder}: there is no tokenizer.json"
    with _about(folder):
        tokenizer = load_tokenizer(folder)
    _check_ids(folder, tokenizer, config)
    return tokenizer, None


def _check_ids(path: Path, tokenizer: TextTokenizer, config: Any) -> None:
    highest = max([tokenizer.vocab_size - 1, *tokenizer.special_ids.values()])
    if highest >= config.vocab_size:
        raise CheckpointError(
            f"{path}: the tokenizer has the id {highest}, the model has rows for ids 0 to {config.vocab_size - 1}; "
            "tokenizer and model do not belong together"
        )


@contextmanager
def _about(path: Path) -> Iterator[None]:
    """Whatever is wrong with a part of a folder is wrong with the folder: the error names it and its exit code is 4."""
    try:
        yield
    except IsoformError as error:
        message = str(error)
        raise CheckpointError(message if str(path) in message else f"{path}: {message}") from None


def _trusted_config(folder: Path) -> dict[str, Any]:
    """The config.json of a folder that asks for no code and holds no pickle in place of weights."""
    hf_config = read_object(folder / "config.json")
    _refuse_code(folder, hf_config)
    _refuse_pickle(folder)
    return hf_config


def _refuse_code(folder: Path, hf_config: dict[str, Any]) -> None:
    tokenizer_config = folder / "tokenizer_config.json"
    settings = read_object(tokenizer_config) if tokenizer_config.is_file() else {}
    for file_name, table in (("config.json", hf_config), ("tokenizer_config.json", settings)):
        if "auto_map" in table:
            raise CheckpointError(
                f"{folder / file_name}: `auto_map` asks for code from the folder to be run, which is never done; "
                "use a model whose family isoform has"
            )


def _refuse_pickle(folder: Path) -> None:
    if (folder / tensors.SINGLE).is_file() or (folder / tensors.INDEX).is_file():
        return
    for path in pickles(folder):
        raise pickle_error(path)
    raise CheckpointError(f"{folder / tensors.SINGLE}: missing; the folder has a config.json but no weights")


def _some(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
