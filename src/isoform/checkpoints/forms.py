"""Model folders, out: what `save_model` writes, Hugging Face reads wherever it has a form for the model.

config.json              the Hugging Face config, or `model_type: isoform-<family>` where there is none
model.safetensors        weights under the names of that form (several files and an index for a large model)
tokenizer.json ...       the tokenizer
generation_config.json   the ids that begin, end and pad a text; the longest text
isoform.json             family and Config, so that loading is exact in either case; why there is no HF form, if so
adapter_config.json ...  in place of config.json and weights: an adapter alone, see `adapters`
manifest.json            size and SHA-256 of each file, written last
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isoform import registry, storage
from isoform.checkpoints import adapters, manifest, tensors
from isoform.checkpoints.tensors import read_object
from isoform.contracts import Tokenizer
from isoform.errors import CheckpointError
from isoform.models.lora import active_adapter, adapter_state, adapters_of, base_fingerprint, base_state
from isoform.text.chat import ends

NATIVE_PREFIX = "isoform-"


@dataclass(frozen=True, slots=True)
class Form:
    """A model as it goes to disk: config.json, tensors under that config's names, why it is not HF's form if so.

    adapter: whether that is its active adapter alone, without its base.
    """

    config: dict[str, Any]
    weights: dict[str, Tensor]
    native_because: str | None
    adapter: bool = False


def save_model(
    folder: Path,
    model: Any,
    tokenizer: Tokenizer | None,
    *,
    extra: dict[str, Any] | None = None,
    generation: Mapping[str, Any] | None = None,
    ids: Mapping[str, Any] | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
    max_shard_bytes: int = tensors.MAX_SHARD_BYTES,
) -> None:
    """Writes a model folder, whole or not at all; `extra` is kept in isoform.json (label names, where it came from).

    generation: the generation_config.json of the model that this one was; its sampling and its ids go on.
    ids: the special ids of config.json where there is no tokenizer to ask. dtypes: of tensors, by their names on disk;
        the others as they are in the model.
    Of an adapted model: the folder of its active adapter; its base stands elsewhere.

    Raises: DiskError where it does not fit or may not be written.
    """
    form = disk_form(model, tokenizer, ids)
    for name, dtype in (dtypes or {}).items():
        if name in form.weights:
            form.weights[name] = form.weights[name].to(dtype)
    storage.require_free(folder, tensors.num_bytes(form.weights) + 10_000_000)
    with storage.staged_folder(folder) as staged:
        write_files(staged, model, tokenizer, form, extra=extra, generation=generation, max_shard_bytes=max_shard_bytes)
        manifest.write(staged)


def save_base(folder: Path, model: Any, tokenizer: Tokenizer | None) -> None:
    """Writes the frozen base of an adapted model, once; of any other model, nothing.

    Raises: CheckpointError where the folder holds another base: the adapter would go on from other weights.
    """
    adapted = adapters_of(model)
    if active_adapter(model) is None or adapted is None:
        return
    adapted.base_folder = str(folder.resolve())
    fingerprint, about = base_fingerprint(model), folder / "isoform.json"
    if about.is_file():
        if read_object(about)["extra"].get("base_fingerprint") != fingerprint:
            raise CheckpointError(f"{folder}: holds another base than this run's; use another --out")
        return
    base = type(model)(model.config, seed=None)
    base.load_state_dict(base_state(model))
    save_model(folder, base, tokenizer, extra={"base_fingerprint": fingerprint})


def disk_form(model: Any, tokenizer: Tokenizer | None, ids: Mapping[str, Any] | None = None) -> Form:
    """The Hugging Face form of a model where its family has one, else its own names under a native config."""
    if active_adapter(model) is not None:
        return Form(*adapters.peft_form(model), adapter=True)
    config, reason = model.hf_form(model.config)
    weights = dict(model.state_to_hf()) if config is not None else base_state(model)
    if config is None:
        config = {"model_type": NATIVE_PREFIX + family_of(model), **model.config.model_dump(mode="json")}
    else:
        config = dict(config)
        reason = None
    config["dtype"] = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    # What the model's own form says of an id (RoBERTa's positions hang on the padding's) is not the tokenizer's.
    config = {**(_special_ids(tokenizer, model) if tokenizer is not None else ids or {}), **config}
    return Form(config, weights, reason)


def write_files(
    folder: Path,
    model: Any,
    tokenizer: Tokenizer | None,
    form: Form,
    *,
    extra: dict[str, Any] | None = None,
    generation: Mapping[str, Any] | None = None,
    max_shard_bytes: int = tensors.MAX_SHARD_BYTES,
) -> None:
    """Writes every file of a model folder but its manifest; arguments as of `save_model`."""
    if form.adapter:
        storage.write_json(folder / adapters.CONFIG, form.config)
        tensors.write_tensors(folder / adapters.WEIGHTS, form.weights)
    else:
        storage.write_json(folder / "config.json", form.config)
        tensors.write_model(folder, form.weights, max_shard_bytes=max_shard_bytes)
    if tokenizer is not None:
        tokenizer.save(folder)
        if not form.adapter and model.capabilities & {"causal", "encoder-decoder"}:
            storage.write_json(folder / "generation_config.json", _generation(tokenizer, model, generation or {}))
    about = {
        "family": family_of(model),
        "config": model.config.model_dump(mode="json"),
        "native_because": form.native_because,
        "tokenizer": None if tokenizer is None else tokenizer.fingerprint(),
        "extra": extra or {},
        **({"base_fingerprint": base_fingerprint(model)} if form.adapter else {}),
    }
    storage.write_json(folder / "isoform.json", about)


def _generation(tokenizer: Tokenizer, model: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json: what was given, and each id that ends a text, by that, the tokenizer or its template."""
    longest = {} if model.max_positions is None else {"max_length": model.max_positions}
    made = {**_special_ids(tokenizer, model), **ends(tokenizer), **longest}
    said = {name: value for name, value in given.items() if value is not None and not name.startswith("_")}
    stops = [ids for ids in (said.get("eos_token_id"), made["eos_token_id"]) if ids is not None]
    every = list(dict.fromkeys(index for ids in stops for index in (ids if isinstance(ids, list) else [ids])))
    return {**made, **said, "eos_token_id": every if len(every) > 1 else every[0] if every else None}


def family_of(model: Any) -> str:
    """The registered name of a model's family."""
    return next(name for name in registry.names("model") if registry.lookup("model", name) is type(model))


def _special_ids(tokenizer: Tokenizer, model: Any) -> dict[str, int | None]:
    # An absent id is written as null: left out, transformers would assume the ids of the published model.
    ids = {f"{name}_token_id": tokenizer.special_ids.get(name) for name in ("bos", "eos", "pad")}
    if "encoder-decoder" in model.capabilities:
        start = getattr(model.config, "start_id", None)
        ids["decoder_start_token_id"] = ids["pad_token_id"] if start is None else start
    return ids


def weights_file(folder: Path) -> Path:
    """The file with what was trained in it, of a folder that `save_model` wrote."""
    return folder / (adapters.WEIGHTS if adapters.is_adapter(folder) else tensors.SINGLE)


def kept_tensors(model: Any) -> dict[str, Tensor]:
    """What a training state holds, under the model's own names: everything, or what its adapter trains."""
    return dict(model.state_dict()) if active_adapter(model) is None else adapter_state(model)
