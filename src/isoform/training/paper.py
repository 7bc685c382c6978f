"""A plan by arithmetic alone, for a run that this machine cannot try: its model is too large, or its text elsewhere.

    memory = (weights + gradient + two moments) x 4 bytes x parameters        activations come on top

The model is built without values, so that its parameters and operations are counted and nothing is allocated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from isoform import machine
from isoform.checkpoints.sources import is_named
from isoform.config import RunConfig
from isoform.errors import ConfigError
from isoform.layers import choice
from isoform.models.accounting import accounts
from isoform.registry import component, lookup
from isoform.text.tokenizers import load_tokenizer
from isoform.training.fresh import Numbers, Vocabulary, fresh_model
from isoform.training.origins import shape_of
from isoform.training.plan import CHECKPOINT_BYTES, MODEL_BYTES
from isoform.training.prepare import DEFAULT_BATCH_SEQUENCES, fits

# Of a parameter while it is trained: its value, its gradient and two moments, in float32.
TRAINING_BYTES = 16
# About so many rates are told, enough to draw.
NUM_RATES = 200


def why_on_paper(config: RunConfig) -> str | None:
    """Why a run from scratch cannot be tried on this machine, or None."""
    if "from" in config.model or fits(config) or _vocabulary(config) is None:
        return None
    missing = _missing_text(config) if config.train.max_steps is not None else None
    needed, there = TRAINING_BYTES * _sizes(config)["total"], machine.memory_bytes()
    if needed > there:
        return f"training takes {needed / 1e9:.1f} GB without activations, this machine has {there / 1e9:.1f} GB"
    return None if missing is None else f"{missing}: no such file or folder"


def plan_on_paper(config: RunConfig, reason: str) -> dict[str, Any]:
    """Parameters, FLOPs, memory, disk and rates of a run; no time, for nothing is run.

    Tokens are those of sequences as long as `text.max_tokens`. Units: FLOPs, bytes, tokens.
    Raises: ConfigError where the number of steps is not in the config.
    """
    train = config.train
    if train.max_steps is None:
        raise ConfigError(f"train.max_epochs: {reason}; without its text only `train.max_steps` says how long it takes")
    batch_tokens = train.batch_tokens or (train.batch_sequences or DEFAULT_BATCH_SEQUENCES) * config.text.max_tokens
    sizes = _sizes(config)
    cls, options = component("schedule", train.schedule, "train.schedule")
    options.warmup(train.max_steps)
    schedule, every = cls(options), max(1, train.max_steps // NUM_RATES)
    steps = sorted({*range(0, train.max_steps, every), train.max_steps - 1})
    device = machine.choose_device()
    evaluated = train.evaluate_every_steps is not None or train.select.metric != "last"
    folders = 3 if evaluated else 2
    return {
        "steps": train.max_steps,
        "tokens": train.max_steps * batch_tokens,
        "mean_batch_tokens": batch_tokens,
        "model": sizes,
        "precision": choice.choose_precision(train.precision, device, shape_of(config)),
        "device": str(device),
        "disk_bytes": sizes["total"] * (MODEL_BYTES * folders + CHECKPOINT_BYTES * train.keep_checkpoints),
        "peak_memory_bytes": TRAINING_BYTES * sizes["total"],
        "learning_rates": [[step, train.learning_rate * schedule.factor(step, train.max_steps)] for step in steps],
        "warnings": [f"planned on paper, no time is measured: {reason}"],
    }


def _sizes(config: RunConfig) -> dict[str, int]:
    """Parameters and operations, see `accounts`. Raises: ConfigError."""
    options, vocabulary = dict(config.model), _vocabulary(config)
    assert vocabulary is not None, "why_on_paper has looked"
    family = lookup("model", str(options.pop("family")), "model.family")
    with torch.device("meta"):
        model = fresh_model(config, family, options, vocabulary, None)
    return accounts(model, config.text.max_tokens)


def _vocabulary(config: RunConfig) -> Vocabulary | None:
    """The tokenizer's numbers, where the config tells them before any text is read."""
    options = dict(config.text.tokenizer)
    if "path" in options:
        path = Path(config.data.root or ".") / str(options["path"])
        return load_tokenizer(path) if path.exists() else None
    if options.get("kind") == "from-model":
        return None
    _, checked = component("tokenizer", options, "text.tokenizer")
    if options["kind"] == "char" and "vocab_size" not in options:
        return None  # as many as there are characters
    return Numbers(checked.vocab_size, {role: index for index, role in enumerate(checked.special)})


def _missing_text(config: RunConfig) -> Path | None:
    """The first of the training files that is not here."""
    named = config.data.path if config.data.path is not None else config.data.train
    for source in [named] if isinstance(named, str) else named or []:
        path = Path(config.data.root or ".") / Path(source).expanduser()
        if not is_named(Path(source)) and not source.startswith("builtin:") and not path.exists():
            return path
    return None
