"""A finished run or a model folder, opened for use: score new data, answer questions, continue prompts."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from isoform import machine
from isoform.checkpoints.folders import LoadedModel, load_model
from isoform.config import Beams, DataConfig, RunConfig, run_config
from isoform.contracts import Document, IntArray, Objective, Prompt
from isoform.data.corpus import build_dataset
from isoform.data.identity import content_hash
from isoform.data.splits import load_splits
from isoform.errors import CheckpointError, ConfigError, IsoformWarning
from isoform.evaluation.evaluate import Evaluation, evaluate
from isoform.evaluation.generate import GREEDY, Sampling, generate, generate_stream, reading, text_stream
from isoform.layers import choice
from isoform.layers.choice import Shape
from isoform.layers.init import served
from isoform.layers.quantized import in_int8
from isoform.models.lora import active_adapter
from isoform.objectives.fields import at_length
from isoform.registry import component
from isoform.storage import locked, read_json, write_json
from isoform.text.chat import chat_tokens, closing_ids
from isoform.text.tokenizers import TextTokenizer


@dataclass
class Opened:
    """A model with its tokenizer and the objective that it was trained for."""

    path: Path
    model: Any
    tokenizer: TextTokenizer
    objective: Objective
    config: RunConfig
    device: torch.device
    autocast: Callable[[], AbstractContextManager[Any]]
    stop: tuple[int, ...]
    # ids that end a text
    int8: bool = False
    # whether labels, answers and scores come from weights of 8 bits
    readings: dict[bool, Any] = field(default_factory=dict)

    @cached_property
    def scoring(self) -> Any:
        """The model as labels and losses read it, made once: its weights do not change."""
        if self.int8 and self.config.objective["kind"] == "preference" and active_adapter(self.model) is not None:
            raise ConfigError(
                "int8: preference measures against the model with its adapter off, and weights of 8 bits have it "
                "merged; score this run without int8"
            )
        return in_int8(self.model) if self.int8 else served(self.model)

    def reading(self, *, int8: bool = False) -> Any:
        """The model as decoding reads it, made once: its weights do not change."""
        if int8 not in self.readings:
            self.readings[int8] = reading(self.model, self.autocast, int8=int8)
        return self.readings[int8]


def open_model(
    path: str | Path,
    *,
    base: str | Path | None = None,
    precision: str | None = None,
    max_tokens: int | None = None,
    int8: bool = False,
) -> Opened:
    """Opens a run folder or a model folder; a model that no run trained is taken as a language model,
    causal or masked, or from text to text, as its family is.

    base: of an adapter whose folder does not say. int8: labels, answers and scores come from weights of 8 bits.

    Raises: CheckpointError, ConfigError.
    """
    device = machine.choose_device()
    loaded = load_model(path, base=base, device=device)
    if loaded.tokenizer is None:
        raise CheckpointError(f"{path}: {loaded.info['tokenizer']}; put the model's tokenizer.json into the folder")
    config = _run_of(Path(path))
    if config is None:
        limit = max_tokens or loaded.model.max_positions or RunConfig().text.max_tokens
        kinds = {"bidirectional": "masked", "encoder-decoder": "text-to-text"}
        kind = next((kinds[ability] for ability in kinds if ability in loaded.model.capabilities), "causal")
        objective_section: dict[str, Any] = {"kind": kind, **_start(loaded)}
        classifier = getattr(loaded.config, "classifier", None)
        if classifier is not None:
            objective_section = {"kind": "classify", "task": classifier.task, "labels": list(classifier.labels)}
            objective_section |= {"second": classifier.second, "keep": classifier.keep}
            limit = max_tokens or classifier.max_tokens or limit
            if classifier.pooling == "none":
                objective_section = {"kind": "tag", "labels": list(classifier.labels)}
            if (
                getattr(loaded.tokenizer, "frame", None) is None
                and not (Path(loaded.info["path"]) / "isoform.json").is_file()
            ):
                objective_section["edges"] = False  # others put around a text what its tokenizer does: nothing
        values = {"text": {"max_tokens": int(limit)}, "model": {"from": str(path)}, "objective": objective_section}
        config = run_config(values)
    if "fits" in loaded.model.capabilities:  # it reads texts whole
        text = config.text.model_copy(update={"max_tokens": loaded.model.max_positions})
        config = config.model_copy(update={"text": text})
    cls, options = component("objective", config.objective, "objective")
    objective: Objective = cls(options, loaded.tokenizer, config.text.max_tokens)
    # What was trained in fp16 on a GPU may be used without one.
    asked = "auto" if config.train.precision == "fp16" and device.type != "cuda" else config.train.precision
    shapes = [Shape.of(loaded.config)] if hasattr(loaded.config, "num_heads") else []
    chosen = precision or choice.choose_precision(asked, device, shapes)
    choice.choose(chosen, device, shapes=shapes)

    def autocast() -> AbstractContextManager[Any]:
        dtype = torch.float16 if chosen == "fp16" else torch.bfloat16
        return contextlib.nullcontext() if chosen == "fp32" else torch.autocast(device.type, dtype)

    stop = _stop(loaded)
    return Opened(Path(path), loaded.model, loaded.tokenizer, objective, config, device, autocast, stop, int8)


def _stop(loaded: LoadedModel) -> tuple[int, ...]:
    """The ids that end a text: the tokenizer's `eos`, and those that the model's own files name."""
    assert loaded.tokenizer is not None
    named: list[Any] = [loaded.tokenizer.special_ids.get("eos")]
    for table in (loaded.info["hf_config"], loaded.info.get("generation", {})):
        ids = table.get("eos_token_id")
        named += ids if isinstance(ids, list) else [ids]
    return tuple(sorted({index for index in named if isinstance(index, int)}))


def _start(loaded: LoadedModel) -> dict[str, str]:
    """The option of an objective that says with what the decoder begins, where it is not padding."""
    assert loaded.tokenizer is not None
    start, special = getattr(loaded.config, "start_id", None), loaded.tokenizer.special_ids
    if start is None or start == special.get("pad"):
        return {}
    roles = [role for role, index in special.items() if index == start]
    if not roles:
        raise ConfigError(f"{loaded.info['path']}: decoder_start_token_id {start} is no special token of the tokenizer")
    return {"start": roles[0]}


def _run_of(path: Path) -> RunConfig | None:
    """The config of the run that a run folder, or a folder inside it, belongs to."""
    for folder in (path, path.parent):
        if (folder / "config.yaml").is_file() and (folder / "manifest.json").is_file():
            return run_config(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
    return None


def score(
    opened: Opened,
    data: str | None = None,
    *,
    split: str | None = None,
    metrics: list[str] | None = None,
    cache: Path,
) -> Evaluation:
    """Metrics of a source (`data`, scored as a whole), or of one of the run's own splits.

    Scoring a run's test split is entered in its manifest. Raises: ConfigError, DataError.
    """
    settings = opened.config.evaluate
    asked = opened.config.data if data is None else outside_data(opened.config.data, data)
    splits = load_splits(asked, opened.objective.alternatives)
    # Nothing asked: the split that is kept for the end, or else the one that there is.
    name = (split if data is None else "train") or next(
        (kept for kept in ("test", "dev", "holdout") if kept in splits.splits), "test"
    )
    if name not in splits.splits:
        known = ", ".join(splits.splits) or "no split"
        raise ConfigError(f"--split {name}: the run's data has {known}; or give --data SOURCE")
    shown = split or ("data" if data is not None else name)
    own = settings.max_tokens.get(name) if data is None else None
    length = own or opened.config.text.max_tokens
    objective: Objective = opened.objective if own is None else at_length(opened.objective, own)
    dataset = build_dataset(splits.splits[name], opened.tokenizer, objective, asked, length, cache, keep_documents=True)
    evaluation = evaluate(
        opened.scoring,
        objective,
        dataset,
        split=shown,
        metrics=metrics or settings.metrics,
        batch_tokens=settings.batch_tokens,
        max_new_tokens=settings.max_new_tokens,
        beams=settings.beams,
        confidence=settings.confidence,
        device=opened.device,
        autocast=opened.autocast,
        keep=lambda row: None,
    )
    if data is None and name == "test":
        _enter_test_score(opened.path)
    return evaluation


def outside_data(config: DataConfig, source: str) -> DataConfig:
    """The run's columns over another source, read as one split."""
    values = config.model_dump()
    values |= dict.fromkeys(("train", "dev", "test", "holdout", "holdout_from", "stratify", "group", "max_documents"))
    values |= {"path": source, "root": None, "splits": {"train": 1.0}, "overlap": "keep"}
    return DataConfig(**values)


def _enter_test_score(folder: Path) -> None:
    path = folder / "manifest.json"
    if not path.is_file():
        return
    with locked(folder):
        manifest = read_json(path)
        manifest["test_scored"] = int(manifest.get("test_scored", 0)) + 1
        write_json(path, manifest)


def count_unknown(opened: Opened, tokens: IntArray) -> int:
    """Tokens of an input that stand for what the tokenizer does not know."""
    unknown = opened.tokenizer.special_ids.get("unk")
    return 0 if unknown is None else int(np.count_nonzero(tokens == unknown))


def given_document(opened: Opened, given: str | Mapping[str, str], source: str, row: int | None) -> Document:
    """A document of a text, which is the first field that the objective reads, or of several by their names."""
    fields = {opened.objective.alternatives[0][0]: given} if isinstance(given, str) else dict(given)
    return Document(str(content_hash(fields)), fields, {"source": source, "row": row})


def tell_unknown(count: int) -> None:
    """Warns where input tokens are not known."""
    if count:
        warnings.warn(
            f"{count} input tokens were unknown to the tokenizer and read as <unk>", IsoformWarning, stacklevel=3
        )


def prompt_of(opened: Opened, document: Document) -> Prompt:
    """What the model is asked by a document. Raises: ConfigError, DataError."""
    prompt = opened.objective.prompt(opened.objective.encode(document))
    if prompt is None:
        raise ConfigError(f"objective.kind: {opened.config.objective['kind']} does not answer; use `isoform eval`")
    return prompt


def continue_text(
    opened: Opened,
    text: str,
    *,
    chat: bool = False,
    sampling: Sampling = GREEDY,
    beams: Beams | None = None,
    seed: int = 0,
    max_new_tokens: int = 200,
    int8: bool = False,
) -> Iterator[str]:
    """The prompt's continuation, piece by piece; chat: the prompt is a person's message, what follows the answer.

    An encoder-decoder reads the prompt and says what it makes of it. beams: more than one say their text at the end, in
    one piece. int8: with weights of 8 bits. Raises: ConfigError, DataError where the model cannot do it.
    """
    if "fits" in opened.model.capabilities:
        raise ConfigError(f"{opened.path}: a bag of words, which cannot continue a text; use `isoform predict`")
    if "bidirectional" in opened.model.capabilities:
        raise ConfigError(f"{opened.path}: an encoder, which reads a text from both sides and cannot continue one")
    prompt = _continued(opened, text, chat=chat, max_new_tokens=max_new_tokens)
    tell_unknown(count_unknown(opened, opened.tokenizer.encode(text)))
    model = opened.reading(int8=int8)
    # One token at a time is bound by reading the weights once, and autocast would convert all of them each time.
    autocast = contextlib.nullcontext if model is opened.model else opened.autocast
    way: dict[str, Any] = {"max_new_tokens": max_new_tokens, "device": opened.device, "autocast": autocast}
    if beams is not None and beams.num_beams > 1:
        found = generate(model, [prompt], beams=beams, **way)
        return iter([opened.tokenizer.decode(found[0].tokens)])
    stream = generate_stream(model, prompt, sampling=sampling, seed=seed, **way)
    return text_stream(lambda ids: opened.tokenizer.decode(ids), stream)


def _continued(opened: Opened, text: str, *, chat: bool, max_new_tokens: int) -> Prompt:
    """What the model is given of a text, or of a message."""
    if "encoder-decoder" in opened.model.capabilities:
        if not text.strip():
            raise ConfigError("--prompt: empty, and an encoder needs something to read; give some text")
        asked = prompt_of(opened, given_document(opened, text, "--prompt", None))
        return dataclasses.replace(asked, max_new_tokens=max_new_tokens)
    special = opened.tokenizer.special_ids
    stop = opened.stop
    if chat:
        tokens = chat_tokens(opened.tokenizer, [{"role": "user", "content": text}])
        stop = tuple(sorted({*stop, *closing_ids(opened.tokenizer)}))
    else:
        tokens = np.array([*opened.tokenizer.first_ids, *opened.tokenizer.encode(text)], dtype=np.int32)
    if not len(tokens):
        start = special.get("bos", special.get("eos"))
        if start is None:
            raise ConfigError("--prompt: empty, and this tokenizer has no token to begin with; give some text")
        tokens = np.array([start], dtype=np.int32)
    return Prompt("prompt", tokens, stop, max_new_tokens, text)
