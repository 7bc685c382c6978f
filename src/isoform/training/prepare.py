"""From a config to everything that a run needs: splits, tokenizer, datasets, objective, model, plan of batches.

Nothing is written to the run folder here; token stores go to the cache. `resolve` spells out every default.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from isoform import machine
from isoform.checkpoints.adapters import merge
from isoform.checkpoints.folders import identified, load_model
from isoform.config import DataConfig, RunConfig
from isoform.contracts import Objective, Source
from isoform.data.corpus import Dataset, build_dataset
from isoform.data.plan import BatchPlan
from isoform.data.splits import SplitSources, load_splits
from isoform.errors import ConfigError
from isoform.evaluation.evaluate import GENERATED_COLUMNS
from isoform.layers import choice
from isoform.layers.recompute import recompute_blocks
from isoform.models.depth import keep_layers
from isoform.models.lora import active_adapter, base_fingerprint
from isoform.models.trainable import train_only
from isoform.objectives.fields import at_length
from isoform.objectives.routing import with_routing
from isoform.registry import build_options, component, lookup, names
from isoform.storage import fingerprint
from isoform.text.conversations import spoken
from isoform.text.ngrams import NGrams
from isoform.text.tokenizers import TextTokenizer, load_tokenizer, train_tokenizer
from isoform.training.fresh import check_parts, fresh_model
from isoform.training.optimizers import Optimizer
from isoform.training.origins import model_section, other_models, shape_of
from isoform.training.ranks import firsts
from isoform.training.schedules import Schedule

# What a stage falls back to when the config names neither a number of steps nor of epochs, nor a batch size.
DEFAULT_EPOCHS = 1.0
DEFAULT_BATCH_SEQUENCES = 32


def cache_folder() -> Path:
    """Where token stores are kept: $ISOFORM_CACHE, or ~/.cache/isoform."""
    return Path(os.environ.get("ISOFORM_CACHE") or Path.home() / ".cache" / "isoform")


@dataclass
class Prepared:
    """Everything that the loop and the evaluation receive."""

    config: RunConfig
    resolved: dict[str, Any]
    # the config with every default spelled out
    splits: SplitSources
    tokenizer: TextTokenizer
    objective: Objective
    datasets: dict[str, Dataset]
    model: Any
    # a torch module that keeps to contracts.Model
    batch_plan: BatchPlan | None
    # None where nothing is trained
    num_steps: int
    schedule: Schedule
    optimizer: Optimizer
    precision: str
    kernels: dict[str, Any]
    # which this process uses, and why; see `layers.choice`
    device: torch.device
    fingerprints: dict[str, str]
    # data, tokenizer, and each model that the objective needs beside the trained one
    objectives: dict[str, Objective] = field(default_factory=dict)
    # of the splits that are scored at a length of their own
    generation: Mapping[str, Any] | None = None
    # generation_config.json of the model that this one begins as

    def factor(self, step: int) -> float:
        """The schedule's share of the peak rate at `step`."""
        return self.schedule.factor(step, self.num_steps)


def prepare(
    config: RunConfig,
    *,
    start: Path | None = None,
    precision: str | None = None,
    kernels: Mapping[str, Any] | None = None,
    device: torch.device | None = None,
    accelerator: Accelerator | None = None,
    for_training: bool = True,
) -> Prepared:
    """Reads, splits, encodes and builds; of a model that is fitted in one go, what it is fitted on (`classical.fit`).

    start: a model folder that takes the place of `model` and `text.tokenizer` (the stage before).
    precision: the choice of the study, if one was made. kernels: the choice that the run was begun with.
    accelerator: of a run on several ranks, where all follow the first one's choice of both.

    Raises: ConfigError, DataError, CheckpointError.
    """
    schedule_class, schedule_options = component("schedule", config.train.schedule, "train.schedule")
    optimizer_class, optimizer_options = component("optimizer", config.train.optimizer, "train.optimizer")
    objective_class, objective_options = component("objective", config.objective, "objective")
    adapter = None if config.adapter is None else component("adapter", config.adapter, "adapter")
    for tracker in config.track:
        lookup("tracker", tracker, "track")
    family, options, start = model_section(config, start)
    layers = options.pop("layers", None) if family is None else None
    draft: Objective = objective_class(objective_options, None, config.text.max_tokens)
    if family is not None:
        _check_ability(config, draft, family, str(config.model["family"]))
        check_parts(config, family, options)
    else:
        _check_origin(config, draft, start)
    device = device or machine.choose_device()
    shapes = [] if precision and kernels else shape_of(config, start)
    precision = firsts(precision or choice.choose_precision(config.train.precision, device, shapes), accelerator)
    chosen = choice.choose(precision, device, kernels, shapes)
    leading = firsts(chosen, accelerator)
    if leading != chosen:
        chosen = choice.choose(precision, device, leading)

    # Master weights are float32, whatever the folder holds.
    loaded = load_model(start, dtype=torch.float32) if start is not None else None
    splits = load_splits(config.data, draft.alternatives)
    if for_training and "train" not in splits.splits:
        raise ConfigError("data: no training split; give `data.path` or `data.train`")
    known = None if loaded is None else getattr(loaded.config, "classifier", None)
    texts = splits.splits["train"] if for_training else None
    objective_options = objective_class.settled(objective_options, texts, known)
    if family is not None and "fits" in family.capabilities:
        _check_fits(config, objective_options)
        no_terms: Any = NGrams([], 1, 1)
        unlimited: Objective = objective_class(objective_options, no_terms, family.max_positions)
        _check_scoring(config, unlimited, set(splits.splits), for_training)
        bag = build_options(family, options, "model")
        return Prepared(
            config=config,
            resolved=_resolved(config, objective_options, schedule_options, optimizer_options, bag, None),
            splits=splits,
            tokenizer=no_terms,
            objective=unlimited,
            datasets={},
            model=None,
            batch_plan=None,
            num_steps=0,
            schedule=schedule_class(schedule_options),
            optimizer=optimizer_class(optimizer_options),
            precision=precision,
            kernels=chosen,
            device=device,
            fingerprints={"data": splits.fingerprint},
        )
    tokenizer = loaded.tokenizer if loaded is not None else _tokenizer(config, splits, draft)
    if tokenizer is None:
        raise ConfigError(f"model.from: {start} has no tokenizer; put its tokenizer.json into the folder")
    max_tokens = config.text.max_tokens
    if loaded is not None and "fits" in loaded.model.capabilities:
        if for_training:
            raise ConfigError(f"model.from: {start} holds {loaded.family}, which is fitted once and never tuned")
        max_tokens = loaded.model.max_positions  # it reads texts whole
    if loaded is None:
        model = fresh_model(config, family, options, tokenizer, config.seed)
        family_name = str(config.model["family"])
    else:
        model, family_name = loaded.model, loaded.family
    if for_training and active_adapter(model) is not None:
        model = merge(model).model  # what an earlier stage has learned is part of this one's base
    if layers is not None:
        model = keep_layers(model, layers)
    limit = model.max_positions
    if limit is not None and limit < max_tokens:
        raise ConfigError(f"text.max_tokens: {max_tokens} given, but the model has {limit} positions; lower it")
    objective: Objective = objective_class(objective_options, tokenizer, max_tokens)
    _check_scoring(config, objective, set(splits.splits), for_training)
    _check_ability(config, objective, model, family_name)
    model = objective.fitted(model, config.seed)
    frame = getattr(objective, "frame", None)
    if frame is not None and isinstance(tokenizer, TextTokenizer):
        tokenizer = tokenizer.framed(frame)  # whoever reads its file puts the same around a text
    others = other_models(config, objective) if for_training else {}
    if objective.helper is not None and for_training:
        objective.helper.join(others, model, config.seed)
    lengths = {name: length for name, length in config.evaluate.max_tokens.items() if length is not None}
    objectives: dict[str, Objective] = {name: at_length(objective, length) for name, length in lengths.items()}
    objective = with_routing(objective, model)
    datasets = _datasets(
        config,
        {name: source for name, source in splits.splits.items() if for_training or name != "train"},
        tokenizer,
        lambda split: objectives.get(split, objective),
        lengths,
        model,
    )
    if adapter is not None and for_training:
        adapter_class, adapter_options = adapter
        adapter_class(adapter_options).attach(model, seed=config.seed)
    if config.train.parameters is not None and for_training:
        train_only(model, config.train.parameters)
    if config.train.recompute and for_training:
        recompute_blocks(model, family_name)
    batch_plan, num_steps = _batches(config, objective, datasets.get("train")) if for_training else (None, 0)
    if batch_plan is not None:
        schedule_options.warmup(num_steps)
    return Prepared(
        config=config,
        resolved=_resolved(config, objective_options, schedule_options, optimizer_options, model.config, adapter),
        splits=splits,
        tokenizer=tokenizer,
        objective=objective,
        objectives=objectives,
        datasets=datasets,
        model=model.to(device),
        generation=None if loaded is None else loaded.info.get("generation"),
        batch_plan=batch_plan,
        num_steps=num_steps,
        schedule=schedule_class(schedule_options),
        optimizer=optimizer_class(optimizer_options),
        precision=precision,
        kernels=chosen,
        device=device,
        fingerprints={
            "data": _data_fingerprint(datasets, splits),
            "tokenizer": tokenizer.fingerprint(),
            **{option: base_fingerprint(other.model) for option, other in others.items()},
        },
    )


def fits(config: RunConfig) -> bool:
    """Whether the run's model is fitted in one go (`training.classical`), not trained step by step."""
    family = config.model.get("family")
    return family is not None and "fits" in lookup("model", str(family), "model.family").capabilities


def _check_fits(config: RunConfig, objective: Any) -> None:
    """Raises: ConfigError for what a model that is fitted in one go cannot do."""
    family = config.model["family"]
    task = getattr(objective, "task", None)
    if task != "single-label":
        raise ConfigError(f"objective.task: {task} given, {family} tells one label of several: single-label")
    if config.adapter is not None:
        raise ConfigError(f"adapter: {family} has no layers to adapt; remove the section")


def _check_ability(config: RunConfig, objective: Objective, model: Any, family_name: str) -> None:
    """What is asked of the model must be what its family does; known before any text is read."""
    missing = objective.needs - model.capabilities
    if missing:
        able = [name for name in names("model") if objective.needs <= lookup("model", name).capabilities]
        raise ConfigError(
            f"objective.kind: {config.objective['kind']} needs a model that is {' and '.join(sorted(missing))}; "
            f"{family_name} is {', '.join(sorted(model.capabilities))}; families that can: {', '.join(able) or 'none'}"
        )


def _check_origin(config: RunConfig, objective: Objective, start: Path | None) -> None:
    """`_check_ability` of a model that is read, without its weights; of a .gguf file nothing is known before these."""
    found = None if start is None else identified(start)
    if found is not None:
        _check_ability(config, objective, lookup("model", found[0]), found[0])


def _datasets(
    config: RunConfig,
    sources: dict[str, Source],
    tokenizer: TextTokenizer,
    objective_for: Callable[[str], Objective],
    lengths: Mapping[str, int],
    model: Any,
) -> dict[str, Dataset]:
    """Each split's token store, at its own length where `lengths` (`evaluate.max_tokens`) names one.

    Raises: ConfigError where the model cannot tell so many positions apart.
    """
    position = getattr(model, "position", None)
    limit = model.max_positions if position is None else position.limit
    for name, length in lengths.items():
        where = f"evaluate.max_tokens.{name}"
        if name not in sources or name == "train":
            raise ConfigError(f"{where}: no split of that name is scored; the data has {', '.join(sorted(sources))}")
        if limit is not None and length > limit:
            raise ConfigError(f"{where}: {length} given, but the model has {limit} positions; leave the split out")
    datasets = {}
    for name, source in sources.items():
        length = lengths.get(name, config.text.max_tokens)
        objective, keep = objective_for(name), name != "train"
        datasets[name] = build_dataset(
            source, tokenizer, objective, config.data, length, cache_folder(), keep_documents=keep
        )
    return datasets


def _check_scoring(config: RunConfig, objective: Objective, splits: set[str], for_training: bool) -> None:
    """Metrics and splits that are asked for after hours of training must be there before."""
    wanted = config.evaluate.metrics or objective.metrics
    task = getattr(getattr(objective, "config", None), "task", None)
    for metric in config.evaluate.metrics or ():
        wanted_task = getattr(lookup("metric", metric, "evaluate.metrics"), "task", task)
        if wanted_task != task:
            raise ConfigError(f"evaluate.metrics: {metric} is of {wanted_task} classifiers; objective.task is {task}")
    for split in config.evaluate.splits or ():
        if split not in splits:
            raise ConfigError(f"evaluate.splits: no split {split!r}; the data has {', '.join(sorted(splits))}")
    select = config.train.select
    if not for_training or select.metric == "last":
        return
    selecting = lookup("metric", select.metric, "train.select.metric")
    if config.evaluate.metrics is None and GENERATED_COLUMNS & set(selecting.columns):
        raise ConfigError(
            f"train.select.metric: {select.metric} needs generated answers, which are made at the end alone unless "
            f"`evaluate.metrics` names it: [{', '.join(objective.metrics)}]"
        )
    if select.metric not in wanted:
        raise ConfigError(
            f"train.select.metric: {select.metric} is not measured; measured are {', '.join(wanted)} (evaluate.metrics)"
        )
    if select.split not in splits - {"train"}:
        known = ", ".join(sorted(splits - {"train"})) or "none beside train"
        raise ConfigError(f"train.select.split: no split {select.split!r}; the data has {known}")


def _tokenizer(config: RunConfig, splits: SplitSources, objective: Objective) -> TextTokenizer:
    options = dict(config.text.tokenizer)
    if options.get("kind") == "from-model":
        raise ConfigError(
            "text.tokenizer: from-model needs `model.from`; name a kind: " + ", ".join(names("tokenizer"))
        )
    if "path" in options:
        return load_tokenizer(Path(config.data.root or ".") / str(options["path"]))
    _, checked = component("tokenizer", options, "text.tokenizer")
    return train_tokenizer(str(options["kind"]), checked, _training_texts(config, splits, objective))


def _training_texts(config: RunConfig, splits: SplitSources, objective: Objective) -> Iterator[str]:
    """Texts of the training split alone, or of `text.train_on`, field by field."""
    source: Source = splits.splits["train"]
    if config.text.train_on is not None:
        data = DataConfig(
            **{
                **config.data.model_dump(),
                "path": config.text.train_on,
                **dict.fromkeys(("train", "dev", "test", "holdout", "holdout_from")),
                "splits": {"train": 1.0},
            }
        )
        source = load_splits(data, (*objective.alternatives, ("text",))).splits["train"]
    for document in source:
        yield from map(spoken, document.fields.values())


def _batches(config: RunConfig, objective: Objective, dataset: Dataset | None) -> tuple[BatchPlan, int]:
    assert dataset is not None
    train = config.train
    sequences = train.batch_sequences
    if sequences is None and train.batch_tokens is None:
        sequences = DEFAULT_BATCH_SEQUENCES
    plan = BatchPlan(
        objective.planned_tokens(dataset.field_lengths),
        seed=config.seed,
        batch_sequences=sequences,
        batch_tokens=train.batch_tokens,
    )
    if train.max_steps is not None:
        return plan, train.max_steps
    return plan, max(1, math.ceil((train.max_epochs or DEFAULT_EPOCHS) * plan.steps_per_epoch - 1e-9))


def _data_fingerprint(datasets: dict[str, Dataset], splits: SplitSources) -> str:
    return fingerprint(
        {"splits": splits.fingerprint, "datasets": {n: d.fingerprint for n, d in sorted(datasets.items())}}
    )


def _resolved(
    config: RunConfig,
    objective: Any,
    schedule: Any,
    optimizer: Any,
    model_config: Any,
    adapter: tuple[type[Any], Any] | None,
) -> dict[str, Any]:
    """The config as plain values with the defaults of every component in it."""
    values = config.model_dump(mode="json")
    values["objective"] = {"kind": config.objective["kind"], **objective.model_dump(mode="json")}
    values["train"]["schedule"] = {"kind": config.train.schedule["kind"], **schedule.model_dump(mode="json")}
    values["train"]["optimizer"] = {"kind": config.train.optimizer["kind"], **optimizer.model_dump(mode="json")}
    if config.adapter is not None and adapter is not None:
        values["adapter"] = {"kind": config.adapter["kind"], **adapter[1].model_dump(mode="json")}
    if "from" not in config.model:
        values["model"] = {"family": config.model["family"], **model_config.model_dump(mode="json")}
    return values
