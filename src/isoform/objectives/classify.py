"""Which label a text has, or a pair of texts; or several labels, or a number."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from isoform.contracts import (
    Batch,
    Document,
    Encoded,
    Helper,
    IntArray,
    Ints,
    LossPart,
    Model,
    Output,
    Prompt,
    Sample,
    Tokenizer,
)
from isoform.errors import ConfigError, DataError
from isoform.models import heads
from isoform.models.heads import Classifier, Keep, Pooling, Task
from isoform.objectives.fields import Edged, cut_to_fit, needed, place, required_text
from isoform.registry import Options, nearest, register

# Where the labels of an example, or the bits of its number, are kept among its fields.
LABEL = "_label"
# Equal parts of the range of confidence, in which it is compared with the share of right answers.
BINS = 15
AVERAGES = tuple(f"{average}_{score}" for average in ("macro", "weighted") for score in ("f1", "precision", "recall"))
METRICS: dict[Task, tuple[str, ...]] = {
    "single-label": ("accuracy", *AVERAGES, "mcc", "loss", "calibration_error"),
    "multi-label": ("accuracy", *AVERAGES, "loss"),
    "regression": ("mse", "mae", "pearson", "loss"),
}


@register("objective", "classify")
class Classify(Edged):
    """The label of a text: `CLS text END`, or of a pair: `CLS text END second END`.

        single-label   loss = -log softmax(z)_y
        multi-label    loss = -mean over labels of  y log sigmoid(z) + (1 - y) log(1 - sigmoid(z))
        regression     loss = (z - y)^2

    z `(c,)`: scores of the c labels from the model's classifier; y: the label, one 0 or 1 a label, or the number.
    Labels are names: those of the training split in sorted order, or those that the model was trained with, in its
    order. Of a text that is too long `keep` is read, of a pair the longer text is shortened first, unless
    `data.long_documents` refuses it.

    Source of `keep: ends`: Sun et al. 2019, who found it best on film reviews. Source of the rest: HF
    `*ForSequenceClassification`. Differs: RoBERTa's pairs have one END between them, as all others.
    """

    class Config(Options):
        task: Task = "single-label"
        # single-label | multi-label | regression
        second: str | None = None
        # column of a pair's second text; null: one text
        labels: list[str] | None = None
        # names, in the order of the scores; null: the model's, else those of the training split, sorted
        label_names: list[str] | None = None
        # what the labels are called that stand in the data as numbers, from 0; null: they are called as they stand
        separator: str = ";"
        # multi-label: what stands between the labels of a text
        pooling: Pooling | None = None
        # cls | mean | last: what stands for the text; null: the model's, else its family's own
        dropout: float | None = None
        # before the scores; null: the family's own
        keep: Keep | None = None
        # start | end | ends: what is read of a text that is too long; ends: a quarter from its start, the rest its end;
        # null: what the model has read, else the start
        edges: bool | None = None
        # whether special tokens stand around each text; null: where the tokenizer has them
        new_head: bool = False
        # whether a fresh classifier takes the place of one that the model has

    optional_fields: tuple[str, ...] = ("label",)
    needs: frozenset[str] = frozenset({"classify"})
    stochastic: bool = False
    windowed: bool = False
    helper: Helper | None = None

    def __init__(self, config: Config, tokenizer: Tokenizer, max_tokens: int) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.window_tokens = max_tokens
        self.inputs: tuple[str, ...] = ("text",) if config.second is None else ("text", config.second)
        self.alternatives: tuple[tuple[str, ...], ...] = ((*self.inputs, "label"),)
        self.metrics = METRICS[config.task]
        self.labels: tuple[str, ...] = tuple(config.labels or ())
        self._index = {name: index for index, name in enumerate(self.labels)}
        if tokenizer is not None and self._room < len(self.inputs):
            raise ConfigError(f"text.max_tokens: {max_tokens} given, which leaves no room for a text")

    # ------------------------------------------------------------------------------------------- labels and the model

    @classmethod
    def settled(cls, config: Config, train: Iterable[Document] | None, known: Classifier | None) -> Config:
        """The options with the label names in them.

        train: the training documents, None where nothing is trained; known: the classifier that the model has.
        Raises: ConfigError where the two do not fit, or the model has none and nothing is trained; DataError where
        there is nothing to tell apart.
        """
        if config.new_head:
            known = None
        config = config.model_copy(update={"keep": config.keep or (known.keep if known else "start")})
        if known is not None:
            _check_known(config, known)
        elif train is None:
            raise ConfigError("model.from: the model has no classifier; train one first (`isoform train classify`)")
        if config.task == "regression":
            names = known.labels if known else tuple(config.labels or ("value",))
            if len(names) != 1:
                raise ConfigError(f"objective.labels: {', '.join(names)} given, a regression has one number")
            return config.model_copy(update={"labels": list(names)})
        names = known.labels if known else tuple(config.labels or config.label_names or ())
        if train is not None:
            found = _counted(train, config)
            strange = sorted(set(found) - set(names)) if names else []
            if strange:
                whose = "the model's classifier has" if known else "objective.labels names"
                raise ConfigError(
                    f"data.label: {whose} no label {', '.join(map(repr, strange[:5]))}; it has {', '.join(names)}; "
                    + ("set `objective.new_head: true` for a new classifier" if known else "add it, or drop the field")
                )
            names = names or tuple(sorted(found))
            if len(found) == 1 and config.task == "single-label":
                raise DataError(f"the training split has one label only, {next(iter(found))!r}: nothing to tell apart")
        if not names:
            raise DataError("the training split has no label at all")
        return config.model_copy(update={"labels": list(names)})

    def fitted(self, model: Any, seed: int) -> Any:
        """The model with a classifier for these labels: its own, or a fresh one drawn from the seed."""
        reading: dict[str, Any] = {"second": self.config.second, "max_tokens": self.max_tokens, "keep": self._keep}
        if model.config.classifier is not None and not self.config.new_head:
            return heads.kept(model, self.labels, **reading)
        shape: heads.Shape = type(model).classifier_shape
        rate = self.config.dropout
        wanted = Classifier(
            labels=self.labels,
            task=self.config.task,
            pooling=self.config.pooling or shape.poolings[0],
            dropout=shape.dropout(model.config) if rate is None else rate,
            **reading,
        )
        return heads.attach(model, wanted, seed)

    # ----------------------------------------------------------------------------------------------- texts to samples

    @property
    def _room(self) -> int:
        """Tokens of text that fit between the edges."""
        return self.max_tokens - self.frame.num_added(len(self.inputs))

    @property
    def _keep(self) -> Keep:
        return self.config.keep or "start"

    def encode(self, document: Document) -> Encoded:
        texts = {field: required_text(document, field) for field in self.inputs}
        ids = {field: self.tokenizer.encode(text) for field, text in texts.items()}
        if "label" in document.fields:
            ids[LABEL] = self._stored(document)
        return Encoded(document.id, ids, sum(len(text.encode()) for text in texts.values()), document)

    def encoding_key(self) -> str:
        named = self.config.label_names
        return f"classify {self.config.task} {self.inputs} {self.labels} {named} {self.config.separator!r}"

    def planned_tokens(self, field_tokens: Mapping[str, Ints]) -> Ints:
        texts: Ints = np.sum([field_tokens[field] for field in self.inputs], axis=0)
        return np.minimum(texts, self._room) + self.max_tokens - self._room

    def prepare(self, encoded: Encoded, rng: np.random.Generator) -> Sample:
        return dataclasses.replace(self.view(encoded), label=self._label(needed(encoded, LABEL)))

    def view(self, encoded: Encoded) -> Sample:
        """What the model reads of a text or a pair, without its label."""
        parts = cut_to_fit([encoded.fields[field] for field in self.inputs], self._room, self._keep)
        tokens, segments = self.frame.around(parts)
        return Sample(encoded.id, tokens, segments=segments if len(parts) > 1 or segments.any() else None)

    def prompt(self, encoded: Encoded) -> Prompt | None:
        return None

    def _stored(self, document: Document) -> IntArray:
        """Numbers of the document's labels, or the bits of its number. Raises: DataError with source and row."""
        if self.config.task == "regression":
            return np.array([_number(document)], dtype=np.float32).view(np.int32)
        names = _names(document, self.config)
        for name in names:
            if name not in self._index:
                raise DataError(
                    f"{place(document)}: the label {name!r} is none of those in training"
                    f"{nearest(name, self.labels)}: {', '.join(self.labels)}{_unlike(name, self.labels)}"
                )
        return np.array([self._index[name] for name in names], dtype=np.int32)

    def label_of(self, document: Document) -> int:
        """The number of the document's one label. Raises: DataError with source and row."""
        return int(self._stored(document)[0])

    def _label(self, stored: IntArray) -> int | tuple[float, ...]:
        if self.config.task == "single-label":
            return int(stored[0])
        if self.config.task == "regression":
            return (float(stored.view(np.float32)[0]),)
        return tuple(float(index in stored) for index in range(len(self.labels)))

    # --------------------------------------------------------------------------------------------- loss and statistics

    def counts(self, batch: Batch) -> dict[str, float]:
        """The weighted number of sequences; filler is none."""
        assert batch.labels is not None, "a batch of this objective has labels"
        weights = batch.weights
        return {"loss": float(len(batch.labels)) if weights is None else float(weights.double().sum())}

    def loss(self, model: Model, batch: Batch, output: Output) -> dict[str, LossPart]:
        """The weighted sum of the sequences' losses."""
        assert batch.labels is not None, "a batch of this objective has labels"
        losses = self._losses(self.scores(model, batch, output), batch.labels)
        weights = self.row_weights(batch)
        return {"loss": LossPart((losses if weights is None else losses * weights).sum())}

    def row_weights(self, batch: Batch) -> Tensor | None:
        """The weights of the sequences that have a label `(b,)`, None where all are 1."""
        assert batch.labels is not None, "a batch of this objective has labels"
        return None if batch.weights is None else batch.weights[: len(batch.labels)]

    def scores(self, model: Any, batch: Batch, output: Output) -> Tensor:
        """Scores of the labels of the sequences that have one, in at least fp32: `(b, c)`; filler stands at the end."""
        assert batch.labels is not None, "a batch of this objective has labels"
        scores: Tensor = model.classifier(output.hidden, batch)[: len(batch.labels)]
        return scores if scores.dtype == torch.float64 else scores.float()

    def _losses(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Shapes: scores `(b, c)`, labels `(b,)` or `(b, c)` -> `(b,)`."""
        if self.config.task == "single-label":
            return F.cross_entropy(scores, labels, reduction="none")
        if self.config.task == "regression":
            return (scores - labels).square().mean(dim=1)
        return F.binary_cross_entropy_with_logits(scores, labels.to(scores.dtype), reduction="none").mean(dim=1)

    def statistics(self, model: Model, batch: Batch, output: Output) -> dict[str, Tensor]:
        """Of each sequence, float64 `(b,)` on the host: nats, tokens (1), examples, correct; of each label K
        `gold.K`, `predicted.K`, `hits.K`, and `probability.K`; `gap.B`, by how much the answer was surer than right,
        in its bin of confidence. Of a number: its square and absolute error, and the sums of a correlation.
        """
        assert batch.labels is not None, "a batch of this objective has labels"
        scores, labels = self.scores(model, batch, output).double().cpu(), batch.labels.cpu()
        ones = torch.ones(len(labels), dtype=torch.float64)
        shared = {"nats": self._losses(scores, labels), "tokens": ones, "examples": ones}
        if self.config.task == "regression":
            return shared | _numbers(scores[:, 0], labels[:, 0].double())
        single = self.config.task == "single-label"
        gold = (F.one_hot(labels, len(self.labels)) if single else labels).double()
        shares = self.probabilities(scores)
        said = self._said(shares)
        correct = (said == gold).all(dim=1).double()
        each = {"gold": gold, "predicted": said, "hits": gold * said, "probability": shares}
        columns = {f"{name}.{at}": values[:, at] for name, values in each.items() for at in range(values.shape[1])}
        gaps = _gaps(shares.max(dim=1).values, correct) if single else {}
        return {**shared, "correct": correct, **columns, **gaps}

    @property
    def choices(self) -> tuple[str, ...]:
        """The labels of which each text has exactly one; none where a text has several, or a number."""
        return self.labels if self.config.task == "single-label" else ()

    def probabilities(self, scores: Tensor) -> Tensor:
        """Of each label: `(b, c)` -> `(b, c)`; of a regression nothing."""
        if self.config.task == "single-label":
            return scores.softmax(dim=1)
        return scores.sigmoid() if self.config.task == "multi-label" else scores[:, :0]

    def _said(self, probabilities: Tensor) -> Tensor:
        """1 for each label that is said, `(b, c)`."""
        if self.config.task == "single-label":
            return F.one_hot(probabilities.argmax(dim=1), probabilities.shape[1]).double()
        return (probabilities >= 0.5).double()

    def shown(self, encoded: Encoded, stats: Mapping[str, float]) -> dict[str, Any]:
        """What a row of predictions.jsonl says beside its statistics."""
        fields = encoded.document.fields if encoded.document else {}
        texts = [fields.get(field) or self.tokenizer.decode(encoded.fields[field].tolist()) for field in self.inputs]
        row: dict[str, Any] = {"input": "\n".join(texts)}
        if self.config.task == "regression":
            return {**row, "gold": f"{stats['expected']:g}", "prediction": f"{stats['said']:g}"}
        names = {
            key: self.config.separator.join(
                name for at, name in enumerate(self.labels) if stats[f"{column}.{at}"] > 0.5
            )
            for key, column in (("gold", "gold"), ("prediction", "predicted"))
        }
        shares = {name: stats[f"probability.{at}"] for at, name in enumerate(self.labels)}
        return {**row, **names, "probabilities": shares}

    def decided(self, model: Model, batch: Batch, output: Output) -> list[dict[str, Any]]:
        """{label, probabilities} of each sequence: a name, a list of names, or a number."""
        classifier: Any = model
        scores = classifier.classifier(output.hidden, batch).double().cpu()
        if self.config.task == "regression":
            return [{"label": value, "probabilities": {}} for value in scores[:, 0].tolist()]
        rows = []
        for shares, said in zip(
            self.probabilities(scores).tolist(), self._said(self.probabilities(scores)), strict=True
        ):
            names = [self.labels[at] for at in said.nonzero().flatten().tolist()]
            label = names[0] if self.config.task == "single-label" else names
            rows.append({"label": label, "probabilities": dict(zip(self.labels, shares, strict=True))})
        return rows


def _check_known(config: Classify.Config, known: Classifier) -> None:
    """Raises: ConfigError where the options contradict the classifier that the model has."""
    if known.pooling == "none":
        raise ConfigError(
            "objective.kind: the model's classifier decides on words, classify on whole texts; "
            "set `objective.new_head: true` for a new classifier"
        )
    wanted = {"task": config.task, "pooling": config.pooling, "labels": config.labels and set(config.labels)}
    has = {"task": known.task, "pooling": known.pooling, "labels": set(known.labels)}
    for field, value in wanted.items():
        if value is not None and value != has[field]:
            words = ", ".join(known.labels) if field == "labels" else has[field]
            raise ConfigError(
                f"objective.{field}: the model's classifier has {words}; leave the field out, or set "
                "`objective.new_head: true` for a new classifier"
            )


def _counted(documents: Iterable[Document], config: Classify.Config) -> dict[str, int]:
    """Label -> how many documents have it."""
    counts: dict[str, int] = {}
    for document in documents:
        for name in _names(document, config):
            counts[name] = counts.get(name, 0) + 1
    return counts


def _names(document: Document, config: Classify.Config) -> list[str]:
    """The document's label, or its labels. Raises: DataError where there is none."""
    text = document.fields.get("label", "").strip()
    if config.task == "multi-label":
        names = filter(None, map(str.strip, text.split(config.separator)))
        return sorted({_called(name, document, config) for name in names})
    return [_called(required_text(document, "label").strip(), document, config)]


def _called(label: str, document: Document, config: Classify.Config) -> str:
    """Its name in `label_names`. Raises: DataError where it is no number of one."""
    if config.label_names is None or label in config.label_names:
        return label
    if label.isdecimal() and int(label) < len(config.label_names):
        return config.label_names[int(label)]
    last = len(config.label_names) - 1
    raise DataError(
        f"{place(document)}: the label {label!r} is no number from 0 to {last} and none of these names "
        "(objective.label_names)"
    )


def _unlike(name: str, labels: Sequence[str]) -> str:
    """What to do where labels are numbers on one side and names on the other."""
    numbers = [label.lstrip("-").isdigit() for label in (name, *labels)]
    if any(numbers[1:]) == numbers[0] or not any(numbers):
        return ""
    here, there = ("a number", "names") if numbers[0] else ("a name", "numbers")
    return f"; here it is {here}, in training they are {there}: write them alike in every file"


def _number(document: Document) -> float:
    text = required_text(document, "label")
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not np.isfinite(value):
        raise DataError(f"{place(document)}: the label {text!r} is no number; a regression needs one (objective.task)")
    return value


def _gaps(confidence: Tensor, correct: Tensor) -> dict[str, Tensor]:
    """Confidence minus right or wrong in the bin of the confidence, 0 in the others."""
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1  # (low, high]
    placed = F.one_hot(bins, BINS) * (confidence - correct)[:, None]
    return {f"gap.{at}": placed[:, at] for at in range(BINS)}


def _numbers(said: Tensor, expected: Tensor) -> dict[str, Tensor]:
    return {
        "squared_error": (said - expected).square(),
        "absolute_error": (said - expected).abs(),
        "said": said,
        "expected": expected,
        "said_squared": said.square(),
        "expected_squared": expected.square(),
        "product": said * expected,
    }
