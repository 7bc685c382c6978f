"""Classifiers on top of every family: a text becomes one vector, and that a score for each label; or each token does.

    logits = scores dropout(norm(act(dense pooled)))        pooled: its first token, its last, the mean of all, or each

Which of the parts between pooling and scores there are is the family's choice, as in its `*ForSequenceClassification`
and `*ForTokenClassification` in transformers; `Shape` tells them apart. A model has a classifier where its config says
so, so that folders carry it like any other part, its labels in `id2label`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from isoform.contracts import Batch, Sequences
from isoform.errors import ConfigError
from isoform.layers import ragged
from isoform.layers.attention import Padded
from isoform.layers.dropout import Dropout, token_keys
from isoform.layers.init import linear
from isoform.layers.norm import LayerNorm
from isoform.models.names import Place, Table
from isoform.registry import Options

Task = Literal["single-label", "multi-label", "regression"]
Pooling = Literal["cls", "mean", "last", "none"]
Keep = Literal["start", "end", "ends"]
# Ours -> `problem_type` of config.json.
PROBLEMS: dict[Task, str] = {
    "single-label": "single_label_classification",
    "multi-label": "multi_label_classification",
    "regression": "regression",
}
CLASS_ENDING = re.compile(r"(Model|LMHeadModel|ForCausalLM|ForMaskedLM)$")
CLASSIFIES, TAGS = "ForSequenceClassification", "ForTokenClassification"


class Classifier(Options):
    """What a classifier decides: its labels, in the order of its scores."""

    labels: tuple[str, ...] = Field(min_length=1)
    # names; of a regression the name of its number
    task: Task = "single-label"
    pooling: Pooling = "cls"
    # cls: the first token stands for the text; last: the last one; mean: all of them; none: each token for itself
    dropout: float = Field(0.0, ge=0, lt=1)
    # before the scores
    second: str | None = None
    # column of the second text that it was trained on; None: one text
    max_tokens: int | None = None
    # to which texts were cut
    keep: Keep = "start"
    # what was read of texts that were cut: their start, their end, or both ends

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if len(set(self.labels)) < len(self.labels):
            raise ValueError(f"labels {', '.join(self.labels)}: a name stands there twice")
        if self.task == "single-label" and len(self.labels) < 2:
            raise ValueError(f"one label, {self.labels[0]!r}: there is nothing to tell apart")
        return self


@dataclass(frozen=True, slots=True)
class Shape:
    """What a family's classifier is made of, and what transformers calls it.

    poolings: those that its class in transformers has, its own first; pooling_field: where config.json names one.
    activation: None where there is no dense layer. norm: whether a norm follows it. drops_input: whether dropout also
    stands before the dense layer. dropout: the family's rate, from its config; dropout_field: its name in config.json;
    stored_dropout: the rate that a config.json means.
    names: our layer -> theirs. carried: a layer of other heads of ours -> the layer here that begins with its weights.
    unused: layers of theirs that old folders have and no score depends on. tokens: the shape where each token is scored
    for itself; None: the family has none.
    """

    names: Mapping[str, str]
    poolings: tuple[Pooling, ...] = ("cls",)
    pooling_field: str | None = None
    activation: Callable[[Tensor], Tensor] | None = None
    dense_bias: bool = True
    norm: bool = False
    scores_bias: bool = True
    drops_input: bool = False
    dropout: Callable[[Any], float] = lambda config: 0.0
    dropout_field: str | None = None
    stored_dropout: Callable[[Mapping[str, Any]], float] = lambda given: 0.0
    carried: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    tokens: Shape | None = None

    def of(self, classifier: Classifier) -> Shape:
        """This shape, or that of tokens. Raises: ConfigError where the family has none."""
        if classifier.pooling != "none":
            return self
        if self.tokens is None:
            raise ConfigError("model.classifier.pooling: none: each token is scored for itself in encoders alone")
        return self.tokens


class ClassificationHead(nn.Module):
    """Scores of each sequence's labels, or of each token's.

    logits = scores dropout(norm(act(dense pooled))), without the parts that the family has not

    Shapes: hidden `(n, d)` -> `(b, c)`, or without pooling `(n, c)`, c the labels; filler gets scores too.
    Source: the `*ForSequenceClassification` and `*ForTokenClassification` of HF, with which logits agree.
    Differs: what is pooled has no padding in it.
    """

    def __init__(self, shape: Shape, config: Classifier, width: int, norm_eps: float) -> None:
        super().__init__()
        self.pooling = config.pooling
        self.activation = shape.activation
        self.input_dropout = Dropout(config.dropout if shape.drops_input else 0.0)
        self.dense = linear(width, width, bias=shape.dense_bias) if shape.activation is not None else None
        self.norm = LayerNorm(LayerNorm.Config(eps=norm_eps, bias=False), width) if shape.norm else None
        self.dropout = Dropout(config.dropout)
        self.scores = linear(width, len(config.labels), bias=shape.scores_bias)

    def forward(self, hidden: Tensor, batch: Batch) -> Tensor:
        keys = token_keys(batch)
        if keys is not None and self.pooling != "none":
            keys = keys[torch.tensor(ragged.starts(batch.sequences), device=keys.device)]  # (n,) -> (b,)
        pooled = hidden if self.pooling == "none" else pool(hidden, batch.sequences, self.pooling)
        if self.dense is not None and self.activation is not None:
            pooled = self.activation(self.dense(self.input_dropout(pooled, keys)))
        if self.norm is not None:
            pooled = self.norm(pooled)
        logits: Tensor = self.scores(self.dropout(pooled, keys))
        return logits


def pool(hidden: Tensor, sequences: Sequences, pooling: Pooling) -> Tensor:
    """One vector for each sequence: its first token's, its last token's, or the mean of all: `(n, d)` -> `(b, d)`."""
    if isinstance(sequences, Padded):
        rectangle: Tensor = hidden.unflatten(0, sequences.real.shape)  # type: ignore[no-untyped-call]
        return _pool_padded(rectangle, sequences.real, pooling)
    if pooling == "cls":
        return hidden[torch.tensor(ragged.starts(sequences), device=hidden.device)]
    if pooling == "last":
        return hidden[ragged.last_tokens(sequences, hidden.device)]
    sums = hidden.new_zeros(len(sequences), hidden.shape[1])
    sums = sums.index_add(0, ragged.rows(sequences, hidden.device), hidden)
    return sums / torch.tensor(sequences.lengths, dtype=hidden.dtype, device=hidden.device)[:, None]


def _pool_padded(hidden: Tensor, real: Tensor, pooling: Pooling) -> Tensor:
    """The same of a rectangle, for a graph that must not know lengths: `(b, t, d)`, real `(b, t)` -> `(b, d)`."""
    if pooling == "mean":
        return (hidden * (real / real.sum(dim=1, keepdim=True))[..., None].to(hidden.dtype)).sum(dim=1)
    rank = torch.arange(1, real.shape[1] + 1, device=real.device)
    place = ((rank if pooling == "last" else rank.flip(0)) * real).argmax(dim=1)
    return hidden.gather(1, place[:, None, None].expand(-1, 1, hidden.shape[2])).squeeze(1)


def build(shape: Shape, config: Any) -> ClassificationHead | None:
    """The classifier that a family's config asks for."""
    if config.classifier is None:
        return None
    own = shape.of(config.classifier)
    return ClassificationHead(own, config.classifier, config.width, getattr(config, "norm_eps", 1e-5))


def kept(model: Any, labels: tuple[str, ...], **reading: Any) -> Any:
    """The model with the classifier that it has, which remembers how texts were read this time.

    Raises: ConfigError where it decides among other labels.
    """
    has: Classifier = model.config.classifier
    if has.labels != labels:
        raise ConfigError(f"model.classifier.labels: {has.labels} given, {labels} is expected")
    model.config = model.config.model_copy(update={"classifier": has.model_copy(update=reading)})
    return model


def attach(model: Any, wanted: Classifier, seed: int) -> Any:
    """The model with a classifier in place of its other heads; what is new is drawn from the seed.

    Layers of other heads that the family's classifier begins with (BERT's pooler) keep their weights.
    """
    cls = type(model)
    changes = {"classifier": wanted, **without_heads(cls.Config)}
    return _grown(model, changes, seed, cls.classifier_shape.of(wanted).carried)


def attach_token_head(model: Any, seed: int) -> Any:
    """The encoder with a head that guesses tokens, drawn from the seed; as it is where it has one."""
    if getattr(model.config, "head", None) != "none":
        return model
    cls = type(model)
    return _grown(model, {"head": cls.Config.model_fields["head"].default, "classifier": None}, seed, {})


def _grown(model: Any, changes: dict[str, Any], seed: int, carried: Mapping[str, str]) -> Any:
    """The model under a changed config, with the weights that both have; all others are drawn from the seed."""
    grown = type(model)(model.config.model_copy(update=changes), seed=seed)
    state = grown.state_dict()
    new = set(state)
    for name, tensor in model.state_dict().items():
        layer, _, kind = name.rpartition(".")
        place = f"{carried.get(layer, layer)}.{kind}"
        if place in state and not name.startswith("classifier."):
            state[place] = tensor
            new.discard(place)
    grown.load_state_dict(state)
    grown.new_parameters = frozenset(new)  # an adapter trains them too
    return grown


def without_heads(options: type[Any]) -> dict[str, str]:
    """The options by which a family leaves out its other heads; options: its `Config`."""
    return {name: "none" for name in ("head", "pooler") if name in options.model_fields}


# ------------------------------------------------------------------------------------------------------ Hugging Face


def why_not(shape: Shape, config: Any) -> list[str]:
    """What the classifier has and that of transformers has not."""
    if config.classifier is None:
        return []
    pooling, shape = config.classifier.pooling, shape.of(config.classifier)
    others = [name for name in without_heads(type(config)) if getattr(config, name) != "none"]
    reasons = [] if pooling in shape.poolings else [f"pooling {pooling} (its own: {', '.join(shape.poolings)})"]
    return reasons + [f"{name} beside a classifier" for name in others]


def written(shape: Shape, config: Any, form: dict[str, Any]) -> dict[str, Any]:
    """config.json of a model, with its classifier."""
    classifier = config.classifier
    if classifier is None:
        return form
    shape, tags = shape.of(classifier), classifier.pooling == "none"
    fields = {shape.pooling_field: classifier.pooling, shape.dropout_field: classifier.dropout}
    return {
        **form,
        "architectures": [CLASS_ENDING.sub("", form["architectures"][0]) + (TAGS if tags else CLASSIFIES)],
        "id2label": {str(place): name for place, name in enumerate(classifier.labels)},
        "label2id": {name: place for place, name in enumerate(classifier.labels)},
        **({} if tags else {"problem_type": PROBLEMS[classifier.task]}),
        **{name: value for name, value in fields.items() if name is not None},
    }


def read(shape: Shape, family: type[Any], given: Mapping[str, Any], stored: list[str] | None) -> dict[str, Any]:
    """Our options of a classifier, where config.json names one and its tensors, if known, are there."""
    named = str(next(iter(given.get("architectures") or [""])))
    tags = named.endswith(TAGS)
    found = shape.tokens if tags else shape if named.endswith(CLASSIFIES) else None
    if found is None or (stored is not None and f"{found.names['scores']}.weight" not in stored):
        return {}
    labels = given.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}  # what transformers does not write down
    names = [str(labels[place]) for place in sorted(labels, key=int)]
    task = next((ours for ours, theirs in PROBLEMS.items() if theirs == given.get("problem_type")), None)
    guessed = "regression" if len(names) == 1 else "single-label"
    classifier = {
        "labels": names,
        "task": "single-label" if tags else task or guessed,
        "pooling": given.get(found.pooling_field or "", found.poolings[0]),
        "dropout": found.stored_dropout(given),
    }
    return {"classifier": classifier, **without_heads(family.Config)}


def table(shape: Shape, config: Any) -> Table:
    """Their names -> our places, of the classifier alone."""
    if config.classifier is None:
        return {}
    shape = shape.of(config.classifier)
    unused: dict[str, Place | None] = {f"{name}.{kind}": None for name in shape.unused for kind in ("weight", "bias")}
    return unused | {
        f"{theirs}.{kind}": Place(f"classifier.{ours}.{kind}")
        for ours, theirs in shape.names.items()
        for kind in ("weight", "bias")
        if (ours, kind) not in _without_bias(shape)
    }


def _without_bias(shape: Shape) -> set[tuple[str, str]]:
    layers = {"dense": shape.dense_bias, "norm": False, "scores": shape.scores_bias}
    return {(layer, "bias") for layer, bias in layers.items() if not bias}


def _bert_dropout(given: Mapping[str, Any]) -> float:
    rate = given.get("classifier_dropout")
    return float(given.get("hidden_dropout_prob", 0.1) if rate is None else rate)


BERT = Shape(
    names={"dense": "bert.pooler.dense", "scores": "classifier"},
    activation=torch.tanh,
    dropout=lambda config: float(config.dropout),
    dropout_field="classifier_dropout",
    stored_dropout=_bert_dropout,
    carried={"pooler": "classifier.dense"},
    tokens=Shape(
        names={"scores": "classifier"},
        poolings=("none",),
        dropout=lambda config: float(config.dropout),
        dropout_field="classifier_dropout",
        stored_dropout=_bert_dropout,
        unused=("bert.pooler.dense",),
    ),
)
ROBERTA = Shape(
    names={"dense": "classifier.dense", "scores": "classifier.out_proj"},
    activation=torch.tanh,
    drops_input=True,
    dropout=lambda config: float(config.dropout),
    dropout_field="classifier_dropout",
    stored_dropout=_bert_dropout,
    tokens=Shape(
        names={"scores": "classifier"},
        poolings=("none",),
        dropout=lambda config: float(config.dropout),
        dropout_field="classifier_dropout",
        stored_dropout=_bert_dropout,
        unused=("roberta.pooler.dense",),
    ),
)
DISTILBERT = Shape(
    names={"dense": "pre_classifier", "scores": "classifier"},
    activation=F.relu,
    dropout=lambda config: 0.2,
    dropout_field="seq_classif_dropout",
    stored_dropout=lambda given: float(given.get("seq_classif_dropout", 0.2)),
    tokens=Shape(
        names={"scores": "classifier"},
        poolings=("none",),
        dropout=lambda config: float(config.dropout),
        stored_dropout=lambda given: float(given.get("dropout", 0.1)),
    ),
)
_MODERNBERT = Shape(
    names={"dense": "head.dense", "norm": "head.norm", "scores": "classifier"},
    poolings=("none",),
    activation=F.gelu,
    dense_bias=False,
    norm=True,
    dropout_field="classifier_dropout",
    stored_dropout=lambda given: float(given.get("classifier_dropout", 0.0)),
    carried={"head.dense": "classifier.dense", "head.norm": "classifier.norm"},
)
MODERNBERT = replace(_MODERNBERT, poolings=("cls", "mean"), pooling_field="classifier_pooling", tokens=_MODERNBERT)
DECODER = Shape(names={"scores": "score"}, poolings=("last",), scores_bias=False)
