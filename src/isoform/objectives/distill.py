"""Learning from another model: what a teacher says of each label or token, and how it sees a text on the way there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from isoform.contracts import IGNORE, Batch, Document, Helper, LossPart, Model, Output, Tokenizer
from isoform.errors import ConfigError
from isoform.layers import ragged
from isoform.models.heads import Task
from isoform.objectives.classify import Classify
from isoform.objectives.crossentropy import TokenObjective, asked_places, logit_chunks, rounded_up
from isoform.objectives.tag import Tag
from isoform.objectives.teachers import Lesson, Teacher, num_real, states_of
from isoform.registry import Options, component, register


class Hidden(Options):
    """Which states of the student are drawn to which of the teacher's, and how."""

    layers: dict[int, int] | None = None
    # student's state -> teacher's: 0 before the first layer, 1 after it, ...; null: all of the student's, evenly spaced
    weight: float = Field(1.0, gt=0)
    loss: Literal["mse", "cosine"] = "mse"


@register("objective", "distill")
class Distill:
    """Another objective, learnt from its targets and from a teacher's answers to the same questions.

        loss = (1 - a) loss of `of'  +  a T^2 KL(softmax(t / T) || softmax(z / T))  +  w distance(P h, g)

    z, t `(m, c)`: scores of student and teacher, of the labels of a text or of the vocabulary at every place that has a
    target; a: `teacher_weight`; T: `temperature`; h `(n, d)`, g: states of student and teacher at the tokens of each
    pair of layers, the last ones after the last norm; P: a matrix and a shift of each pair where the widths differ,
    trained beside the student and left behind; distance: mean over channels of the squared difference, or 1 - cosine.
    Several labels a text: the mean over labels of their KL; a number: (z - t)^2. Each term is a sum with its own count.

    The teacher answers without dropout. Its labels are aligned by name, its vocabulary has to be the student's.
    Source: Hinton et al. 2015, section 2; Sanh et al. 2019; Jiao et al. 2020 (TinyBERT), section 3.1.
    Differs: TinyBERT has one P for all pairs of layers, and also compares attention weights.
    """

    class Config(Options):
        of: dict[str, Any]
        # the objective to learn: classify, tag, causal, masked, ... with its options
        teacher: str
        # a run, folder, .gguf file, hf:owner/name or pkg:NAME; in a study also arm:NAME, at the same seed
        teacher_weight: float = Field(0.5, gt=0, le=1)
        # a: share of the teacher's answers; 1: the targets are not looked at
        temperature: float = Field(2.0, gt=0)
        hidden: Hidden | None = None
        # null: the answers alone
        store: bool = False
        # whether the teacher is asked once for all epochs and seeds, its answers kept in the cache

    def __init__(self, config: Config, tokenizer: Tokenizer, max_tokens: int) -> None:
        self.config = config
        cls, options = _inner(config)
        build: Any = cls
        self.of: Any = build(options, tokenizer, max_tokens)
        if config.store and self.of.stochastic:
            raise ConfigError(
                f"objective.store: {config.of['kind']} makes another view of a document in every epoch, so that what "
                "the teacher says of one cannot be kept; leave the option out"
            )
        self.teacher = Teacher(config, self.of, max_tokens)
        self.helper: Helper | None = self.teacher

    def __getattr__(self, name: str) -> Any:
        if "of" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.of, name)

    @classmethod
    def settled(cls, config: Config, train: Iterable[Document] | None, known: Any) -> Config:
        """The options with what follows from the training documents for the inner objective."""
        inner, options = _inner(config)
        settled = inner.settled(options, train, known)
        return config.model_copy(update={"of": {"kind": config.of["kind"], **settled.model_dump(mode="json")}})

    # --------------------------------------------------------------------------------------------------------- the loss

    def counts(self, batch: Batch) -> dict[str, float]:
        """The inner objective's count, the same for the teacher's answers, and pairs of layers times real tokens."""
        counts: dict[str, float] = self.of.counts(batch)
        counts["teacher"] = counts["loss"]
        if self.config.hidden is not None:
            weights = _token_weights(batch)
            tokens = float(num_real(batch)) if weights is None else float(weights.double().sum())
            counts["hidden"] = tokens * len(self.teacher.pairs)
        return counts

    def loss(self, model: Model, batch: Batch, output: Output) -> dict[str, LossPart]:
        """The inner objective's loss, the divergence from the teacher, and the distance of states."""
        lesson = self.teacher.lesson(batch)
        share = self.config.teacher_weight
        by_token = isinstance(self.of, TokenObjective)
        answered, apart = (self._of_tokens if by_token else self._of_labels)(model, batch, output, lesson)
        scale = 1.0 if self._task == "regression" else self.config.temperature**2
        parts = {"loss": LossPart(answered, 1 - share), "teacher": LossPart(apart, share * scale)}
        if self.config.hidden is not None:
            parts["hidden"] = LossPart(self._distance(batch, output, lesson), self.config.hidden.weight)
        return parts

    @property
    def _task(self) -> Task:
        return self.of.config.task if isinstance(self.of, Classify) else "single-label"

    def _of_labels(self, model: Model, batch: Batch, output: Output, lesson: Lesson) -> tuple[Tensor, Tensor]:
        """(loss of the labels, divergence from the teacher's), sums over texts or words."""
        scores = self.of.scores(model, batch, output)
        apart = divergence(scores, lesson.answers, self.config.temperature, self._task)
        weights = self.of.row_weights(batch)
        answered: Tensor = self.of.loss(model, batch, output)["loss"].total
        return answered, (apart if weights is None else apart * weights).sum()

    def _of_tokens(self, model: Model, batch: Batch, output: Output, lesson: Lesson) -> tuple[Tensor, Tensor]:
        """(cross-entropy of the targets, divergence from the teacher), sums over the places, from the same logits."""
        asked, targets, weights = asked_places(batch)
        places, padded = rounded_up(asked, targets)
        theirs = F.pad(lesson.answers, (0, 0, 0, len(places) - len(asked)))
        answered, apart, done = [], [], 0
        for logits, some in logit_chunks(model, output.hidden[places], padded):
            answered.append(F.cross_entropy(logits, some, reduction="none", ignore_index=IGNORE))
            said = self.teacher.logits(theirs[done : done + len(some)])
            vocabulary = slice(min(logits.shape[1], said.shape[1]))  # some have more rows than there are tokens
            apart.append(divergence(logits[:, vocabulary], said[:, vocabulary], self.config.temperature))
            done += len(some)
        sums = []
        for values in (answered, apart):
            each = torch.cat(values)[: len(asked)]
            sums.append((each if weights is None else each * weights).sum())
        return sums[0], sums[1]

    def _distance(self, batch: Batch, output: Output, lesson: Lesson) -> Tensor:
        """How far the student's states are from the teacher's: a sum over pairs of layers and real tokens."""
        assert self.config.hidden is not None and output.layers is not None
        ours = states_of(output, [student for student, _ in self.teacher.pairs], num_real(batch))
        weights = _token_weights(batch)
        total = output.hidden.new_zeros(())
        for number, (state, goal) in enumerate(zip(ours, lesson.states, strict=True)):
            if self.teacher.companion is not None:
                state = self.teacher.companion[number](state)
            far = distance(state.float(), goal.to(state.device).float(), self.config.hidden.loss)
            total = total + (far if weights is None else far * weights).sum()
        return total


def _inner(config: Distill.Config) -> tuple[Any, Any]:
    """The class of the objective to learn, and its options. Raises: ConfigError."""
    cls, options = component("objective", config.of, "objective.of")
    if not issubclass(cls, TokenObjective | Classify | Tag):
        raise ConfigError(
            f"objective.of.kind: {config.of['kind']!r} cannot be learnt from a teacher; an objective whose targets are "
            "labels or tokens is expected, such as classify, causal or masked"
        )
    return cls, options


def _token_weights(batch: Batch) -> Tensor | None:
    """The weight of every real token's sample `(n,)`, None where all are 1."""
    if batch.weights is None:
        return None
    return batch.weights[ragged.rows(batch.sequences, batch.tokens.device)[: num_real(batch)]]


def divergence(student: Tensor, teacher: Tensor, temperature: float, task: Task = "single-label") -> Tensor:
    """How far the student's answer is from the teacher's, in nats: KL(teacher || student) at a temperature.

    KL = sum_j p_j (log p_j - log q_j),  p = softmax(teacher / T), q = softmax(student / T)
    Of several labels: the mean over them of the KL of each; of a number: the squared difference.

    Shapes: student and teacher `(m, c)` -> `(m,)`. Source: Hinton et al. 2015, section 2. Differs: T^2 stands outside.
    """
    teacher = teacher.to(student.device, student.dtype)
    if task == "regression":
        return (student - teacher).square().mean(dim=1)
    ours, theirs = student / temperature, teacher / temperature
    if task == "multi-label":
        sides = ((F.logsigmoid(sign * theirs), F.logsigmoid(sign * ours)) for sign in (1.0, -1.0))
        return torch.stack([p.exp() * (p - q) for p, q in sides]).sum(dim=0).mean(dim=1)
    log_p, log_q = theirs.log_softmax(dim=1), ours.log_softmax(dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def distance(student: Tensor, teacher: Tensor, kind: Literal["mse", "cosine"]) -> Tensor:
    """Of each token the mean squared difference over channels, or 1 - the cosine: `(n, d)` twice -> `(n,)`."""
    if kind == "mse":
        return (student - teacher).square().mean(dim=1)
    return 1 - F.cosine_similarity(student, teacher, dim=1)
