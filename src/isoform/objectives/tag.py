"""Which tag each word of a sentence has: names of people and places, parts of speech."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from isoform.contracts import (
    IGNORE,
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
from isoform.layers import ragged
from isoform.models import heads
from isoform.models.heads import Classifier
from isoform.objectives.fields import Edged, needed, place, required_text, tokens_of
from isoform.registry import Options, nearest, register
from isoform.text.tokenizers import TextTokenizer

# Where the place of each word's first token, and its tag, are kept among a sentence's fields.
STARTS, TAGS = "_starts", "_tags"
OUTSIDE = "O"
MARKED = re.compile(r"([BIES])-(.+)", re.DOTALL)
ENTITY_METRICS = ("entity_f1", "entity_precision", "entity_recall")

Span = tuple[int, int, str]
# first word, the word after the last, kind


@register("objective", "tag")
class Tag(Edged):
    """A tag for each word: `CLS` word word ... `END`, in which a word's first token answers for it.

        loss = sum over words of  -log softmax(z)_y

    z `(c,)`: scores of the c tags at the word's first token; y: its tag. A document has the fields `tokens` and `tags`,
    lists of equal length. Each word is encoded by itself, with a space before it where the tokenizer's words have one
    and it is not the first. A sentence that is too long loses its end: words that are cut off count as wrong, and
    entities as missed. Tags are names: those of the training split, `O` first and the others sorted, or the model's.

    Source: HF `*ForTokenClassification`. Differs: nothing.
    """

    class Config(Options):
        labels: list[str] | None = None
        # tags, in the order of the scores; null: the model's, else those of the training split
        tag_names: list[str] | None = None
        # what the tags are called that stand in the data as numbers, from 0; null: tags are names
        dropout: float | None = None
        # before the scores; null: the family's own
        edges: bool | None = None
        # whether special tokens stand around a sentence; null: where the tokenizer has them
        new_head: bool = False
        # whether a fresh classifier takes the place of one that the model has

    alternatives: tuple[tuple[str, ...], ...] = (("tokens", "tags"),)
    optional_fields: tuple[str, ...] = ("tags",)
    inputs: tuple[str, ...] = ("tokens",)
    needs: frozenset[str] = frozenset({"bidirectional", "classify"})
    stochastic: bool = False
    windowed: bool = False
    helper: Helper | None = None

    def __init__(self, config: Config, tokenizer: Tokenizer, max_tokens: int) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.window_tokens = max_tokens
        self.labels: tuple[str, ...] = tuple(config.labels or ())
        marked = not self.labels or any(MARKED.fullmatch(name) for name in self.labels)
        self.metrics: tuple[str, ...] = (*(ENTITY_METRICS if marked else ()), "tag_accuracy", "loss")
        self._index = {name: index for index, name in enumerate(self.labels)}
        if tokenizer is not None and self._room < 1:
            raise ConfigError(f"text.max_tokens: {max_tokens} given, which leaves no room for a word")

    # --------------------------------------------------------------------------------------------- tags and the model

    @classmethod
    def settled(cls, config: Config, train: Iterable[Document] | None, known: Classifier | None) -> Config:
        """The options with the tags in them; train, known: see `Classify.settled`. Raises: ConfigError, DataError."""
        known = None if config.new_head else known
        if known is not None and known.pooling != "none":
            raise ConfigError(
                "objective.kind: the model's classifier decides on whole texts, tag on words; "
                "set `objective.new_head: true` for a new classifier"
            )
        if known is None and train is None:
            raise ConfigError("model.from: the model has no classifier of words; train one first (objective tag)")
        names = known.labels if known else tuple(config.labels or ())
        if train is not None:
            found = {name for document in train for name in _tags(document, config)}
            strange = sorted(found - set(names)) if names else []
            if strange:
                whose = "the model's classifier has" if known else "objective.labels names"
                raise ConfigError(
                    f"data.tags: {whose} no tag {', '.join(map(repr, strange[:5]))}; it has {', '.join(names)}; "
                    + ("set `objective.new_head: true` for a new classifier" if known else "add it, or drop the field")
                )
            names = names or tuple(sorted(found, key=lambda name: (name != OUTSIDE, name)))
            if len(found) == 1:
                raise DataError(f"the training split has one tag only, {next(iter(found))!r}: nothing to tell apart")
        return config.model_copy(update={"labels": list(names)})

    def fitted(self, model: Any, seed: int) -> Any:
        """The model with a classifier of words for these tags: its own, or a fresh one drawn from the seed."""
        if model.config.classifier is not None and not self.config.new_head:
            return heads.kept(model, self.labels, max_tokens=self.max_tokens)
        wanted = Classifier(labels=self.labels, pooling="none", max_tokens=self.max_tokens)
        rate = self.config.dropout
        shape: heads.Shape = type(model).classifier_shape.of(wanted)
        dropout = shape.dropout(model.config) if rate is None else rate
        return heads.attach(model, wanted.model_copy(update={"dropout": dropout}), seed)

    # ------------------------------------------------------------------------------------------- sentences to samples

    @property
    def _room(self) -> int:
        """Tokens of words that fit between the edges."""
        return self.max_tokens - len(self.begin) - len(self.end)

    @cached_property
    def _space(self) -> str:
        """What stands before a word that is not the first."""
        apart = np.concatenate([self.tokenizer.encode("a"), self.tokenizer.encode("b")])
        return "" if np.array_equal(self.tokenizer.encode("a b"), apart) else " "

    def encode(self, document: Document) -> Encoded:
        words = words_of(document)
        pieces = self._pieces(words)
        lengths = [len(piece) for piece in pieces]
        ids = {"tokens": tokens_of(*pieces), STARTS: (np.cumsum(lengths) - lengths).astype(np.int32)}
        if "tags" in document.fields:
            ids[TAGS] = np.array(
                [self._number(name, document) for name in _tags(document, self.config)], dtype=np.int32
            )
        return Encoded(document.id, ids, len(" ".join(words).encode()), document)

    def _pieces(self, words: Sequence[str]) -> list[IntArray]:
        """Ids of each word, at least one."""
        texts = [words[0], *(self._space + word for word in words[1:])]
        if isinstance(self.tokenizer, TextTokenizer):
            pieces = self.tokenizer.encode_many(texts)
        else:
            pieces = [self.tokenizer.encode(text) for text in texts]
        # A word of which the tokenizer leaves nothing (a lone accent) still has a tag.
        unknown = self.tokenizer.special_ids.get("unk", 0)
        return [piece if len(piece) else tokens_of(unknown) for piece in pieces]

    def _number(self, name: str, document: Document) -> int:
        if name not in self._index:
            raise DataError(
                f"{place(document)}: the tag {name!r} is none of those in training"
                f"{nearest(name, self.labels)}: {', '.join(self.labels)}"
            )
        return self._index[name]

    def encoding_key(self) -> str:
        return f"tag {self.labels} {self.config.tag_names} space={self._space!r}"

    def planned_tokens(self, field_tokens: Mapping[str, Ints]) -> Ints:
        return np.minimum(field_tokens["tokens"], self._room) + self.max_tokens - self._room

    def prepare(self, encoded: Encoded, rng: np.random.Generator) -> Sample:
        """`label`: words and entities of the whole sentence, and whether its cut goes through an entity."""
        tags = needed(encoded, TAGS)
        kept = int((encoded.fields[STARTS] < self._room).sum())
        whole = spans([self.labels[tag] for tag in tags])
        through = any(first < kept < end for first, end, _ in whole)
        return dataclasses.replace(
            self._asked(encoded, tags), label=(float(len(tags)), float(len(whole)), float(through))
        )

    def view(self, encoded: Encoded) -> Sample:
        """What the model reads of a sentence without tags; the places that answer for a word have a target."""
        return self._asked(encoded, np.zeros_like(encoded.fields[STARTS]))

    def _asked(self, encoded: Encoded, tags: IntArray) -> Sample:
        ids, starts = encoded.fields["tokens"][: self._room], encoded.fields[STARTS]
        kept = starts < self._room
        targets = np.full(len(ids), IGNORE, dtype=np.int32)
        targets[starts[kept]] = tags[kept]
        before, after = [IGNORE] * len(self.begin), [IGNORE] * len(self.end)
        tokens, asked = tokens_of(self.begin, ids, self.end), tokens_of(before, targets, after)
        return Sample(encoded.id, tokens, asked, num_bytes=encoded.num_bytes)

    def prompt(self, encoded: Encoded) -> Prompt | None:
        return None

    # -------------------------------------------------------------------------------------------- loss and statistics

    def counts(self, batch: Batch) -> dict[str, float]:
        """The weighted number of words."""
        weights = self.row_weights(batch)
        return {"loss": float(len(_places(batch))) if weights is None else float(weights.double().sum())}

    def loss(self, model: Model, batch: Batch, output: Output) -> dict[str, LossPart]:
        """The weighted sum of the words' losses."""
        assert batch.targets is not None, "a batch of this objective has targets"
        scores, weights = self.scores(model, batch, output), self.row_weights(batch)
        losses = F.cross_entropy(scores, batch.targets[_places(batch)], reduction="none")
        return {"loss": LossPart((losses if weights is None else losses * weights).sum())}

    def scores(self, model: Any, batch: Batch, output: Output) -> Tensor:
        """Scores of the tags of every word, in at least fp32: `(m, c)`."""
        scores: Tensor = model.classifier(output.hidden, batch)[_places(batch)]
        return scores if scores.dtype == torch.float64 else scores.float()

    def row_weights(self, batch: Batch) -> Tensor | None:
        """The weight of every word's sentence `(m,)`, None where all are 1."""
        if batch.weights is None:
            return None
        return batch.weights[ragged.rows(batch.sequences, batch.tokens.device)[_places(batch)]]

    def statistics(self, model: Model, batch: Batch, output: Output) -> dict[str, Tensor]:
        """Of each sentence, float64 `(b,)` on the host: nats, tokens and correct_tokens of the words that were read;
        words, gold_entities of the whole sentence; predicted_entities, hit_entities; `said.K`, the tag of word K.
        """
        assert batch.targets is not None and batch.labels is not None, "a batch of this objective has tags"
        scores = self.scores(model, batch, output).double().cpu()
        gold = batch.targets[_places(batch)].cpu()
        nats, said = F.cross_entropy(scores, gold, reduction="none"), scores.argmax(dim=1)
        sizes = _num_words(batch)
        rows = []
        for some_nats, some_gold, some_said, whole in zip(
            *(torch.split(values, sizes) for values in (nats, gold, said)), batch.labels.tolist(), strict=True
        ):
            found = self._found(some_gold.tolist(), some_said.tolist(), *whole)
            rows.append({"nats": float(some_nats.sum()), "tokens": len(some_gold), **found})
        columns = {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in rows[0]}
        table = torch.full((len(rows), max(sizes)), -1.0, dtype=torch.float64)
        for row, tags in enumerate(torch.split(said, sizes)):
            table[row, : len(tags)] = tags.double()
        return columns | {f"said.{at}": table[:, at] for at in range(max(sizes))}

    def _found(
        self, gold: list[int], said: list[int], words: float, entities: float, through: float
    ) -> dict[str, float]:
        """Counts of one sentence."""
        true, found = ({*spans([self.labels[tag] for tag in tags])} for tags in (gold, said))
        if through:  # the last entity goes on where nobody has read
            true = {span for span in true if span[1] < len(gold)}
        correct = sum(map(int.__eq__, gold, said))
        hits = len(true & found)
        counts = {"gold_entities": entities, "predicted_entities": len(found), "hit_entities": hits}
        return {"correct_tokens": correct, "words": words, **counts}

    def shown(self, encoded: Encoded, stats: Mapping[str, float]) -> dict[str, Any]:
        """What a row of predictions.jsonl says beside its statistics: words and tags with a space between."""
        gold = [self.labels[tag] for tag in encoded.fields[TAGS]]
        said = [int(stats.get(f"said.{at}", -1)) for at in range(len(gold))]
        words = words_of(encoded.document) if encoded.document else []
        tags = [self.labels[tag] if tag >= 0 else OUTSIDE for tag in said]
        return {"input": " ".join(words), "gold": " ".join(gold), "prediction": " ".join(tags)}

    def decided(self, model: Model, batch: Batch, output: Output) -> list[dict[str, Any]]:
        """{tags} of each sentence: those of the words that were read."""
        said = self.scores(model, batch, output).argmax(dim=1).cpu()
        return [{"tags": [self.labels[tag] for tag in tags.tolist()]} for tags in torch.split(said, _num_words(batch))]


def words_of(document: Document) -> list[str]:
    """The words of a sentence: the list in `tokens`, or a text divided at its spaces. Raises: DataError."""
    text = required_text(document, "tokens")
    listed = _listed(text)
    words = text.split() if listed is None else listed
    blank = [at for at, word in enumerate(words, start=1) if not (isinstance(word, str) and word.strip())]
    if blank or not words:
        which = f"word {blank[0]} of {len(words)} is {words[blank[0] - 1]!r}" if blank else "no word is given"
        raise DataError(f"{place(document)}: {which}; a list of words is expected in `tokens`")
    return words


def _tags(document: Document, config: Tag.Config) -> list[str]:
    """The tags of a sentence, by name. Raises: DataError where they are not one for each word."""
    text = required_text(document, "tags")
    listed = _listed(text)
    tags = text.split() if listed is None else listed
    words = words_of(document)
    if len(tags) != len(words):
        raise DataError(f"{place(document)}: {len(words)} tokens and {len(tags)} tags; one tag for each is expected")
    return [_name(tag, document, config) for tag in tags]


def _name(tag: Any, document: Document, config: Tag.Config) -> str:
    if config.tag_names is None:
        if isinstance(tag, str) and tag.strip():
            return tag
        hint = "; name them with `objective.tag_names`" if isinstance(tag, int) else ""
        raise DataError(f"{place(document)}: {tag!r} is no name of a tag{hint}")
    try:
        number = int(tag)
        if number >= 0:
            return config.tag_names[number]
    except (TypeError, ValueError, IndexError):
        pass
    last = len(config.tag_names) - 1
    raise DataError(f"{place(document)}: the tag {tag!r} is no number from 0 to {last} (objective.tag_names)")


def _listed(text: str) -> list[Any] | None:
    """The list that a text spells in JSON, or None."""
    if not text.lstrip().startswith("["):
        return None
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, list) else None


def spans(tags: Sequence[str]) -> list[Span]:
    """The entities that tags spell: B begins one, I goes on, O is outside; E may be the last word's, S a lone one's.

    An I of another kind than the word before, or after O, begins an entity. Tags without such a mark spell none.
    Source: Tjong Kim Sang & De Meulder 2003, `conlleval`; seqeval's default mode. Differs: nothing.
    """
    found: list[Span] = []
    first, kind, before = 0, "", OUTSIDE
    for at, tag in enumerate([*tags, OUTSIDE]):
        match = MARKED.fullmatch(tag)
        mark, its_kind = (match[1], match[2]) if match else (OUTSIDE, "")
        begins = mark in "BS" or (mark in "IE" and (before in "OES" or its_kind != kind))
        if before != OUTSIDE and (begins or mark == OUTSIDE):
            found.append((first, at, kind))
        if begins:
            first = at
        kind, before = its_kind, mark
    return found


def _places(batch: Batch) -> Tensor:
    """Places of the first tokens of words `(m,)`."""
    assert batch.targets is not None, "a batch of this objective has targets"
    return (batch.targets != IGNORE).nonzero().squeeze(1)


def _num_words(batch: Batch) -> list[int]:
    """Words of each sentence that is not filler."""
    assert batch.targets is not None, "a batch of this objective has targets"
    asked = torch.split((batch.targets != IGNORE).cpu(), list(batch.sequences.lengths))
    return [int(places.sum()) for places in asked[: len(asked) - batch.num_filler]]
