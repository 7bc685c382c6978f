"""The teacher of a distillation: whether it fits to its student, what it says of a batch, and its answers kept."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from isoform.contracts import Batch, Output
from isoform.errors import ConfigError, IsoformWarning
from isoform.layers.init import linear, normal
from isoform.models.lora import base_fingerprint
from isoform.objectives.crossentropy import TokenObjective, asked_places
from isoform.objectives.lessons import Lessons, kept_lessons
from isoform.storage import fingerprint
from isoform.text.tokenizers import TextTokenizer


class Lesson(NamedTuple):
    """What a teacher says of a batch.

    answers: its scores `(m, c)`, in the student's order of labels; of tokens its last states `(m, d)` at the places
    that have a target, from which `Teacher.logits` makes scores. states: of each pair of layers `(n, d)`, without
    filler.
    """

    answers: Tensor
    states: tuple[Tensor, ...]


class Teacher:
    """A model that is asked what a student should say; implements `contracts.Helper`.

    pairs: (student's state, teacher's) for each pair of layers to be compared. companion: a map from the student's
    states to the teacher's for each pair, where their widths differ.
    """

    def __init__(self, settings: Any, objective: Any, max_tokens: int) -> None:
        self.settings = settings
        self.objective = objective
        self.max_tokens = max_tokens
        self.sources: Mapping[str, str] = {"teacher": settings.teacher}
        self.reads_layers: bool = settings.hidden is not None
        self.companion: nn.ModuleList | None = None
        self.pairs: list[tuple[int, int]] = []
        self.model: Any = None
        self.by_token = isinstance(objective, TokenObjective)
        self._order: list[int] = []
        # of the teacher's labels, as the student has them
        self._lessons: Lessons | None = None

    # ------------------------------------------------------------------------------------------------ before the start

    def join(self, others: Mapping[str, Any], model: Any, seed: int) -> None:
        """Takes the teacher in. Raises: ConfigError naming what the student has and it has not."""
        found = others["teacher"]
        teacher = found.model
        self._check_abilities(teacher)
        self._check_vocabulary(found.tokenizer, teacher, model)
        if not self.by_token:
            self._order = self._aligned(teacher.config.classifier)
        self.model = teacher.requires_grad_(False).eval()
        if self.settings.hidden is not None:
            self.pairs = self._paired(_num_layers(model), _num_layers(teacher))
            if model.config.width != teacher.config.width:
                self.companion = _maps(len(self.pairs), model.config.width, teacher.config.width, seed)

    def _refused(self, why: str, advice: str) -> ConfigError:
        return ConfigError(f"objective.teacher: {self.settings.teacher} {why}; {advice}")

    def _check_abilities(self, teacher: Any) -> None:
        if "fits" in teacher.capabilities:
            raise self._refused(
                "is fitted in one go and reads terms, not the student's tokens: it cannot teach",
                "a transformer is expected",
            )
        missing = self.objective.needs - teacher.capabilities
        if missing or (not self.by_token and teacher.config.classifier is None):
            kind = self.settings.of["kind"]
            what = "has no classifier" if not missing else f"is not {' and '.join(sorted(missing))}"
            raise self._refused(what, f"a model trained with the objective {kind} is expected")
        if teacher.max_positions is not None and teacher.max_positions < self.max_tokens:
            raise self._refused(
                f"has {teacher.max_positions} positions, text.max_tokens is {self.max_tokens}", "lower text.max_tokens"
            )

    def _check_vocabulary(self, theirs: Any, teacher: Any, model: Any) -> None:
        """The student's token ids must mean the same to the teacher; how a text is cut into tokens is the student's."""
        ours = self.objective.tokenizer
        advice = "give the student the teacher's tokenizer (`text.tokenizer: {path: ...}`, or `model.from`)"
        if theirs is None:
            raise self._refused("has no tokenizer", "put its tokenizer.json into the folder")
        if ours.fingerprint() != theirs.fingerprint():
            there, here = (_words(tokenizer) for tokenizer in (theirs, ours))
            others = sorted(place for place in there | here if there.get(place) != here.get(place))
            if others:
                first = others[0]
                raise self._refused(
                    f"has another vocabulary: {len(others)} of {len(there | here)} tokens differ, token {first} is "
                    f"{there.get(first)!r} there and {here.get(first)!r} here",
                    advice,
                )
        sizes = {teacher.config.vocab_size, model.config.vocab_size}
        if min(sizes) < ours.vocab_size:
            raise self._refused(f"has scores for {min(sizes)} tokens, the tokenizer has {ours.vocab_size}", advice)

    def _aligned(self, theirs: Any) -> list[int]:
        """Where the teacher has each of the student's labels."""
        task = getattr(self.objective.config, "task", theirs.task)
        labels: tuple[str, ...] = self.objective.labels
        if (theirs.pooling == "none") != (self.settings.of["kind"] == "tag"):
            raise self._refused(
                "is a classifier of " + ("words" if theirs.pooling == "none" else "whole texts"),
                f"a model trained with the objective {self.settings.of['kind']} is expected",
            )
        if theirs.task != task:
            raise self._refused(f"is a classifier of kind {theirs.task}", f"{task} is expected (objective.of.task)")
        if set(theirs.labels) != set(labels):
            raise self._refused(
                f"has the labels {', '.join(theirs.labels)}", f"{', '.join(labels)} are expected, in any order"
            )
        ours = getattr(self.objective.config, "keep", None)
        if ours is not None and ours != theirs.keep:
            warnings.warn(
                f"objective.teacher: {self.settings.teacher} has read the {theirs.keep} of long texts, the student "
                f"reads the {ours}; set objective.of.keep: {theirs.keep}",
                IsoformWarning,
                stacklevel=2,
            )
        return [theirs.labels.index(name) for name in labels]

    def _paired(self, ours: int, theirs: int) -> list[tuple[int, int]]:
        """Pairs of states; ours, theirs: layers of student and teacher."""
        wanted = self.settings.hidden.layers
        if wanted is None:
            return [(layer, round(layer * theirs / ours)) for layer in range(ours + 1)]
        for student, teacher in wanted.items():
            if not (0 <= student <= ours and 0 <= teacher <= theirs):
                raise ConfigError(
                    f"objective.hidden.layers: {student}: {teacher} given; the student has states 0 to {ours}, the "
                    f"teacher 0 to {theirs}"
                )
        return sorted(wanted.items())

    # ------------------------------------------------------------------------------------------------------ its answers

    def lesson(self, batch: Batch) -> Lesson:
        """What the teacher says of the batch, asked now or once before."""
        if self._lessons is None:
            return self.ask(batch)
        widths = [self._width, *(self.model.config.width for _ in self.pairs)]
        answers, *states = self._lessons.of(batch, [self._rows(batch), *(_lengths(batch) for _ in self.pairs)], widths)
        return Lesson(answers, tuple(states))

    def ask(self, batch: Batch) -> Lesson:
        """A pass of the teacher, without dropout and without gradients."""
        assert self.model is not None, "a teacher has joined before it is asked"
        self._move(batch.tokens.device)
        source = None if batch.source is None else dataclasses.replace(batch.source, dropout_key=None)
        quiet = dataclasses.replace(batch, dropout_key=None, source=source)
        with torch.no_grad():
            output = self.model(quiet, all_layers=self.reads_layers)
            if self.by_token:
                answers = output.hidden[asked_places(batch)[0]]
            else:
                answers = self.objective.scores(self.model, quiet, output)[:, self._order]
            return Lesson(answers, states_of(output, [theirs for _, theirs in self.pairs], num_real(batch)))

    def logits(self, states: Tensor) -> Tensor:
        """Scores over the vocabulary of last states, in at least fp32: `(m, d)` -> `(m, v)`."""
        self._move(states.device)
        with torch.no_grad():
            logits: Tensor = self.model.logits(states)
        return logits if logits.dtype == torch.float64 else logits.float()

    def _move(self, device: torch.device) -> None:
        if next(self.model.parameters()).device != device:
            self.model.to(device)

    # ------------------------------------------------------------------------------------------------ its answers, kept

    def rehearse(
        self, train: Any, cache: Path, device: torch.device, precision: str, autocast: Callable[[], Any]
    ) -> None:
        """Asks the teacher once about every training document, where `store` says so and nobody has done it before."""
        if not self.settings.store:
            return
        layers = [theirs for _, theirs in self.pairs]
        asked = [self.settings.of, self.max_tokens, self._order, layers, precision]
        key = fingerprint([base_fingerprint(self.model), train.fingerprint, asked])

        def ask(batch: Batch) -> tuple[Lesson, list[int]]:
            with autocast():
                return self.ask(batch.to(device)), self._rows(batch)

        tokens = int(self.objective.planned_tokens(train.field_lengths).sum())
        numbers = tokens * self.model.config.width * len(self.pairs)
        numbers += (tokens if self.by_token else len(train)) * self._width
        self._lessons = kept_lessons(cache, key, train, self.objective, ask, most_bytes=4 * numbers)

    @property
    def _width(self) -> int:
        """Numbers of an answer at one place."""
        return int(self.model.config.width) if self.by_token else len(self._order)

    def _rows(self, batch: Batch) -> list[int]:
        """How many places of each sequence are asked, filler left out."""
        lengths = _lengths(batch)
        if batch.targets is None:
            return [1] * len(lengths)
        asked = torch.split(batch.targets >= 0, list(batch.sequences.lengths))
        return [int(places.sum()) for places in asked[: len(lengths)]]


def num_real(batch: Batch) -> int:
    """Tokens of the sequences that are not filler, which stand at the end."""
    return sum(_lengths(batch))


def _lengths(batch: Batch) -> list[int]:
    return list(batch.sequences.lengths[: len(batch.sequences) - batch.num_filler])


def states_of(output: Output, layers: list[int], num_tokens: int) -> tuple[Tensor, ...]:
    """Of each layer the states of the first tokens `(num_tokens, d)`; those of the last are after the last norm."""
    if not layers:
        return ()
    assert output.layers is not None, "a loss that compares states reads all layers"
    every = (*output.layers[:-1], output.hidden)
    return tuple(every[layer][:num_tokens] for layer in layers)


def _num_layers(model: Any) -> int:
    """Of an encoder-decoder those of the decoder, whose states are compared."""
    return len(getattr(model, "decoder", model).blocks)


def _maps(number: int, width: int, their_width: int, seed: int) -> nn.ModuleList:
    """Linear maps `(their_width, width)` whose images have about the size of what they map, with a shift of 0."""
    maps = nn.ModuleList(linear(width, their_width, bias=True) for _ in range(number))
    with torch.no_grad():
        for name, parameter in maps.named_parameters():
            drawn = normal(parameter.shape, seed, f"companion.{name}") * width**-0.5
            parameter.copy_(drawn if parameter.ndim == 2 else torch.zeros_like(parameter))
    return maps


def _words(tokenizer: Any) -> dict[int, str]:
    """Id -> token."""
    assert isinstance(tokenizer, TextTokenizer), "tokenizers that differ are compared word by word"
    return {place: token for token, place in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
