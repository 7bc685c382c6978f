"""What a run and a study are: pydantic sections, unknown keys refused with the nearest name, units under each field.

A component's own options (`position: {kind: rope, base: 10000}`) stay plain values here; `registry.component` checks
them against the registered class's `Config` when the run is resolved, so a new class needs no line in this file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from isoform.errors import ConfigError
from isoform.registry import explain, nearest, note_read

NAME = r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,99}$"
# Fields of `train` of which one at most is given.
EITHER = (
    ("max_epochs", "max_steps"),
    ("batch_sequences", "batch_tokens"),
    ("evaluate_every_steps", "evaluate_every_epochs"),
)
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]


def _kind(value: Any) -> Any:
    """`tokenizer: char` means `tokenizer: {kind: char}`."""
    return {"kind": value} if isinstance(value, str) else value


Component = Annotated[dict[str, Any], BeforeValidator(_kind)]


class Section(BaseModel):
    """A part of a config: unknown keys are errors, an instance does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)
    if not TYPE_CHECKING:
        __getattribute__ = note_read


class Splits(Section):
    """Shares of the documents, cut before any window is; they need not add up to 1."""

    train: Fraction = 1.0
    dev: Fraction = 0.0
    test: Fraction = 0.0

    @model_validator(mode="after")
    def _sum(self) -> Splits:
        if self.train + self.dev + self.test > 1 + 1e-9:
            raise ValueError(f"train + dev + test is {self.train + self.dev + self.test:.4g}, at most 1 is expected")
        return self


Files = str | list[str]


class DataConfig(Section):
    """Where documents come from, which field is which, and how they are split."""

    root: str | None = None
    # folder that relative paths start from; null: the folder of the config file or the working folder
    path: Files | None = None
    # one source (or several) to be split by `splits`; or name the files of each split:
    train: Files | None = None
    dev: Files | None = None
    test: Files | None = None
    unit: Literal["line", "paragraph", "piece", "file", "conll"] = "line"
    # what a document is in a .txt file; piece: about 16 kB, cut at line ends, so that one long text can be split;
    # conll: a sentence, a word and its tag a line, as in .conll files
    columns: list[str] | None = None
    # names of the columns of csv and tsv files without a header row; null: the first row is the header
    text: str = "text"
    label: str = "label"
    question: str = "question"
    answer: str = "answer"
    messages: str = "messages"
    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"
    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    tokens: str = "tokens"
    tags: str = "tags"
    # the column that holds each field
    splits: Splits = Splits()
    # used with `path`; by hash of the content, so equal texts never stand in two splits
    holdout: float | int | None = None
    # carved from train: a fraction, or a number of documents
    holdout_from: str | None = None
    # the one of several train sources that the holdout is carved from
    split_seed: int = 0
    # seed of every split; the same for all seeds of a study
    stratify: str | None = None
    # column whose shares are kept equal in every split
    group: str | None = None
    # column whose equal values stay in one split
    overlap: Literal["refuse", "drop_from_train", "keep"] = "refuse"
    # what happens with documents of one split that stand, exactly or nearly, in another
    near_fraction: Fraction = 0.8
    # share of words in common, estimated from 3-word shingles, from which two documents are near duplicates
    long_documents: Literal["windows", "truncate", "refuse"] = "windows"
    # documents longer than text.max_tokens: cut into windows, cut off and counted, or refused
    max_documents: Positive | None = None
    # documents read from each source; null: all
    shard_tokens: Positive = 16_777_216
    # tokens per memory-mapped shard file

    @model_validator(mode="after")
    def _one_way(self) -> DataConfig:
        if self.path is not None and self.train is not None:
            raise ValueError("`path` and `train` are both given; name one source with `path`, or each split's files")
        if self.holdout is not None and (self.holdout <= 0 or (isinstance(self.holdout, float) and self.holdout >= 1)):
            expected = "a fraction between 0 and 1 or a number of documents"
            raise ValueError(f"`holdout` is {self.holdout}, {expected} is expected")
        return self


class TextConfig(Section):
    """The tokenizer and the context length."""

    tokenizer: Component = {"kind": "char"}
    # char | word | bpe | wordpiece with their options; `from-model`; or {path: folder or tokenizer.json}
    train_on: Files | None = None
    # what the tokenizer is trained on; null: the training split
    max_tokens: Positive = 256
    # context length in tokens


class TrainConfig(Section):
    """The optimisation: how long, how much at once, how fast, and which checkpoint is kept."""

    max_epochs: float | None = Field(None, gt=0)
    max_steps: Positive | None = None
    # one of the two; a step is one optimiser update
    batch_sequences: Positive | None = None
    batch_tokens: Positive | None = None
    # one of the two; the global batch over all ranks and micro-batches
    micro_batch_tokens: Positive = 16_384
    # tokens that pass through the model at once; changes memory and speed, never the result beyond rounding
    learning_rate: float = Field(3e-4, gt=0)
    schedule: Component = {"kind": "cosine"}
    # constant | linear | cosine | inverse-sqrt | wsd, with warmup_steps or warmup_fraction
    optimizer: Component = {"kind": "adamw"}
    # adamw | muon
    parameters: list[str] | None = Field(None, min_length=1)
    # names of the parameters that are trained, `*` standing for anything, such as `classifier*`; null: all
    clip_norm: float | None = Field(1.0, gt=0)
    # largest global gradient norm; null: no clipping
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    # auto: bf16 where this machine trains faster in it than in fp32; fp16, with scaled gradients: on a GPU alone
    compile: Literal["auto", "on", "off"] = "auto"
    # blocks by torch.compile; auto: where a run is long and the run's first batch goes faster with it
    recompute: bool = False
    # whether blocks keep their inputs alone and make the rest again in the backward pass: less memory, more work
    checkpoint_every_steps: Positive | None = None
    # null: by time alone, every `checkpoint_every_seconds`
    checkpoint_every_seconds: float = Field(120.0, ge=0)
    # also saved at evaluations that improve, at the end, and on a signal
    keep_checkpoints: Positive = 2
    # full training states kept on disk
    step_minutes: float | None = Field(60.0, gt=0)
    # a step that takes longer hangs: the run is ended, with what it was doing in its folder; null: wait for ever
    evaluate_every_steps: Positive | None = None
    evaluate_every_epochs: float | None = Field(None, gt=0)
    # null, null: only at the end
    select: Select = Field(default_factory=lambda: Select())
    patience: Positive | None = None
    # evaluations without improvement of the selected metric before stopping; null: never
    log_every_steps: Positive = 1

    @model_validator(mode="after")
    def _one_way(self) -> TrainConfig:
        for first, second in EITHER:
            if getattr(self, first) is not None and getattr(self, second) is not None:
                raise ValueError(f"`{first}` and `{second}` are both given; keep one")
        return self


class Select(Section):
    """Which checkpoint becomes `final/`: the best by a metric on a split, or the last."""

    metric: str = "last"
    # `last`, or a metric of the objective
    split: str = "dev"
    max_examples: Positive | None = None
    # of the split, evenly spaced, that are scored on the way; null: all


class Beams(Section):
    """Beam search: the best of several continuations that grow together. Source: HF `generate`."""

    num_beams: Positive = 4
    length_penalty: float = 1.0
    # a finished answer's log-probability is divided by its tokens to this power: above 0 favours long answers
    early_stopping: bool | Literal["never"] = False
    # true: stop at num_beams finished answers; false: when a running one could not beat them at its present length;
    # never: when it could not at any length


def _beams(value: Any) -> Any:
    """`beams: 4` means `beams: {num_beams: 4}`."""
    return {"num_beams": value} if isinstance(value, int) and not isinstance(value, bool) else value


class EvaluateConfig(Section):
    """What is measured, on which splits, and how answers are generated."""

    splits: list[str] | None = None
    # splits scored at the end; null: every one but train; []: none
    metrics: list[str] | None = None
    # null: the objective's own
    max_examples: Positive | None = None
    # of each split, evenly spaced and so the same for every model, that are scored at the end; null: all
    batch_tokens: Positive = 32_768
    max_tokens: dict[str, Positive | None] = {}
    # split -> context length that its texts are scored at; null, and for splits not named: text.max_tokens
    max_new_tokens: Positive = 64
    beams: Annotated[Beams | None, BeforeValidator(_beams)] = None
    # of generated answers: a number, or {num_beams, length_penalty, early_stopping}; null: greedy
    confidence: float = Field(0.95, gt=0, lt=1)
    max_predictions: Positive | None = None
    # rows kept in predictions.jsonl for each split; null: all
    train_examples: Positive | None = None
    # training documents, evenly spaced, that are scored too at every evaluation on the way; null: none

    def scored(self, there: Iterable[str]) -> list[str]:
        """The splits to score at the end, of those that are there where none are named."""
        return [split for split in there if split != "train"] if self.splits is None else self.splits


TrainConfig.model_rebuild()


class RunConfig(Section):
    """One training stage plus its evaluation."""

    name: str = Field("run", pattern=NAME)
    about: str = ""
    # what the run is for, in a sentence
    data: DataConfig = DataConfig()
    text: TextConfig = TextConfig()
    model: dict[str, Any] = {"family": "gpt2"}
    # family and its options; or `from:` a run, folder, .gguf file, hf:owner/name or pkg:NAME, with `layers:` to keep
    objective: Component = {"kind": "causal"}
    adapter: Component | None = None
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    track: list[str] = []
    # tensorboard, wandb; JSONL is always written
    seed: int = Field(0, ge=0)


class Question(Section):
    """One comparison: second minus first, and what must be equal for it to be fair."""

    pair: tuple[str, str]
    metric: str | None = None
    split: str | None = None
    # null: those of `compare`
    margin: float | None = Field(None, gt=0)
    # difference that would not matter, in the metric's unit: allows the verdict `equivalent`
    equal: dict[str, float] = {}
    # data_tokens (those that the model reads), target_tokens, updates, parameters, flops, seconds, tuning_trials
    # -> tolerated relative difference
    published: str | None = None
    # what somebody else claimed, for the report


class Compare(Section):
    """The metric and split on which arms are compared, once."""

    metric: str
    split: str = "dev"
    confidence: float = Field(0.95, gt=0, lt=1)
    exclude_diverged: bool = False
    # the rule for diverged runs, stated beforehand


class ArmConfig(Section):
    """A list of stages, each starting from the one before, and what this arm changes in them."""

    stages: list[str] = []
    # empty: the model as it is
    results: str | None = None
    # folder with eval.json and predictions.jsonl, or a predictions.csv of another tool: nothing is trained
    tune: dict[str, list[Any]] = {}
    # field -> values tried on the selection split with the first seed; every arm gets the same budget of trials
    changes: dict[str, Any] = {}
    # section or stage name -> overrides; any other key of the arm lands here


class StudyConfig(Section):
    """Arms x seeds, and the questions that they answer."""

    name: str = Field("study", pattern=NAME)
    question: str = ""
    published: list[dict[str, Any]] = []
    # rows of published figures, shown beside ours: {arm, metric, split, value, source}
    base: dict[str, Any] = {}
    stages: dict[str, dict[str, Any]]
    arms: dict[str, ArmConfig]
    trials: dict[str, Any] = {}
    # field -> value in every trial of `tune`, whose own values come after it: fewer epochs, say
    seeds: Positive = 3
    seed: int = Field(0, ge=0)
    # the first of the seeds, shared by all arms
    jobs: Positive | Literal["auto"] = 1
    # runs side by side, each with its share of the cores; auto: one a core
    compare: Compare
    questions: list[Question] = []

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, value: Any) -> Any:
        """An arm's other keys are its changes."""
        if not isinstance(value, dict) or not isinstance(value.get("arms"), dict):
            return value
        known = {"stages", "results", "tune", "changes"}
        arms = {}
        for name, arm in value["arms"].items():
            if not isinstance(arm, dict):
                raise ValueError(f"arms.{name}: {arm!r} given, a mapping with `stages` is expected")
            changes = {**arm.get("changes", {}), **{key: item for key, item in arm.items() if key not in known}}
            arms[name] = {**{key: item for key, item in arm.items() if key in known}, "changes": changes}
        return {**value, "arms": arms}

    @model_validator(mode="after")
    def _names(self) -> StudyConfig:
        sections = set(RunConfig.model_fields)
        for name, arm in self.arms.items():
            if not re.match(NAME, name):
                raise ValueError(f"arms.{name}: a name of letters, digits, `.`, `_`, `-` is expected")
            for stage in arm.stages:
                if stage not in self.stages:
                    raise ValueError(f"arms.{name}.stages: {stage!r} is not a stage{nearest(stage, self.stages)}")
            for key in arm.changes:
                if key not in sections and key not in self.stages:
                    known = [*sorted(sections), *self.stages, "stages", "tune", "results"]
                    raise ValueError(f"arms.{name}.{key}: unknown key{nearest(key, known)}")
        for index, question in enumerate(self.questions):
            for arm_name in question.pair:
                if arm_name not in self.arms:
                    close = nearest(arm_name, self.arms)
                    raise ValueError(f"questions.{index}.pair: {arm_name!r} is not an arm{close}")
        return self


# ---------------------------------------------------------------------------------------------------- checked configs


def run_config(values: dict[str, Any]) -> RunConfig:
    """A checked run. Raises: ConfigError, one line."""
    config: RunConfig = _checked(RunConfig, values)
    return config


def study_config(values: dict[str, Any]) -> StudyConfig:
    """A checked study. Raises: ConfigError, one line."""
    config: StudyConfig = _checked(StudyConfig, values)
    return config


def _checked(model: type[Any], values: dict[str, Any]) -> Any:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, "", model)) from None


def to_yaml(config: BaseModel) -> str:
    """Every value, defaults spelled out, in the order of the sections."""
    return yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True, width=110)
