"""Answers to many inputs: read, answered in chunks, written, in order; memory does not grow with their number."""

from __future__ import annotations

import csv
import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.live import Live

from isoform.contracts import Document
from isoform.data.batches import collate
from isoform.data.readers import read_lines
from isoform.data.sources import open_source
from isoform.errors import ConfigError
from isoform.evaluation.evaluate import token_batches
from isoform.evaluation.generate import generate
from isoform.objectives.tag import words_of
from isoform.serving.use import Opened, count_unknown, given_document, prompt_of
from isoform.storage import json_line, staged_file

# Inputs that are answered together; more only cost memory.
CHUNK = 512
# Of a batch on a CPU; what more of them make falls out of its caches.
CPU_BATCH_TOKENS = 4096
# Seconds between two looks at the rate.
LOOK_SECONDS = 1.0

# A text, or the texts of a pair by their columns.
Input = str | Mapping[str, str]


@dataclass(frozen=True)
class Decision:
    """One label, or several, or a number, with the probability of each label; `num_unknown` as in `Answer`."""

    input: Input
    label: Any
    probabilities: Mapping[str, float]
    num_unknown: int

    def as_dict(self) -> dict[str, Any]:
        given = self.input if isinstance(self.input, str) else dict(self.input)
        return {"input": given, "label": self.label, "probabilities": dict(self.probabilities)}

    @property
    def answer(self) -> str:
        """What was decided, in one line."""
        labels = self.label if isinstance(self.label, list) else [self.label]
        return ", ".join(f"{label:g}" if isinstance(label, float) else str(label) for label in labels)


@dataclass(frozen=True)
class Answer:
    """One prediction; `num_unknown` input tokens were not known to the tokenizer."""

    input: Input
    answer: str
    num_unknown: int

    def as_dict(self) -> dict[str, Any]:
        given = self.input if isinstance(self.input, str) else dict(self.input)
        return {"input": given, "answer": self.answer}


@dataclass(frozen=True)
class Tagged:
    """The tag of each word of a sentence, None of those that were cut off; `num_unknown` as in `Answer`."""

    words: Sequence[str]
    tags: Sequence[str | None]
    num_unknown: int

    def as_dict(self) -> dict[str, Any]:
        return {"tokens": list(self.words), "tags": list(self.tags)}

    @property
    def input(self) -> str:
        return " ".join(self.words)

    @property
    def answer(self) -> str:
        """`word/TAG word/TAG`."""
        return " ".join(f"{word}/{tag or '-'}" for word, tag in zip(self.words, self.tags, strict=True))

    @property
    def lines(self) -> str:
        """A word and its tag a line, and a blank line, as in CoNLL files."""
        return "".join(f"{word}\t{tag or '-'}\n" for word, tag in zip(self.words, self.tags, strict=True)) + "\n"


Prediction = Answer | Decision | Tagged


def predict(opened: Opened, inputs: Iterable[Input | Document]) -> Iterator[Prediction]:
    """One answer or decision an input, in order, streamed in chunks.

    Raises: ConfigError; DataError that names an input's place: file and row, or `input` and its number.
    """
    decides = "classify" in opened.objective.needs
    answers: Callable[[Opened, list[Document]], Iterator[Prediction]] = _decisions if decides else _answers
    chunk: list[Document] = []
    for number, given in enumerate(inputs, start=1):
        chunk.append(given if isinstance(given, Document) else given_document(opened, given, "input", number))
        if len(chunk) == CHUNK:
            yield from answers(opened, chunk)
            chunk = []
    if chunk:
        yield from answers(opened, chunk)


def _decisions(opened: Opened, documents: list[Document]) -> Iterator[Decision | Tagged]:
    objective: Any = opened.objective
    samples = [objective.view(objective.encode(document)) for document in documents]
    found: dict[int, dict[str, Any]] = {}
    most = opened.config.evaluate.batch_tokens
    most = min(most, CPU_BATCH_TOKENS) if opened.device.type == "cpu" else most
    for group in token_batches(list(enumerate(samples)), most):
        batch = collate([sample for _, sample in group]).to(opened.device)
        with torch.inference_mode(), opened.autocast():
            rows = objective.decided(opened.scoring, batch, opened.scoring(batch))
        found |= {index: row for (index, _), row in zip(group, rows, strict=True)}
    for index, (document, sample) in enumerate(zip(documents, samples, strict=True)):
        unknown = count_unknown(opened, sample.tokens)
        if "tags" in found[index]:
            words, tags = words_of(document), found[index]["tags"]
            yield Tagged(words, [*tags, *[None] * (len(words) - len(tags))], unknown)
        else:
            yield Decision(_given(opened, document), num_unknown=unknown, **found[index])


def _answers(opened: Opened, documents: list[Document]) -> Iterator[Answer]:
    prompts = [prompt_of(opened, document) for document in documents]
    generations = generate(
        opened.reading(int8=opened.int8),
        prompts,
        max_new_tokens=opened.config.evaluate.max_new_tokens,
        beams=opened.config.evaluate.beams,
        device=opened.device,
        autocast=opened.autocast,
    )
    for document, prompt, generation in zip(documents, prompts, generations, strict=True):
        said = opened.tokenizer.decode(generation.tokens)
        yield Answer(_given(opened, document), said, count_unknown(opened, prompt.tokens))


def _given(opened: Opened, document: Document) -> Input:
    """The text of a document that has the first field alone, else its texts by their names."""
    first = opened.objective.alternatives[0][0]
    return document.fields[first] if list(document.fields) == [first] else dict(document.fields)


def with_rate(answers: Iterable[Prediction], console: Console) -> Iterator[Prediction]:
    """The same answers; on a terminal it is shown how many there are and how fast they come."""
    if not console.is_terminal:
        yield from answers
        return
    began = looked = time.monotonic()
    with Live("", console=console, transient=True, auto_refresh=False) as live:
        for number, answer in enumerate(answers, start=1):
            yield answer
            if (now := time.monotonic()) - looked >= LOOK_SECONDS:
                looked = now
                live.update(f"{number:,} answers, {number / (now - began):,.0f} a second", refresh=True)


def read_inputs(opened: Opened, path: Path | None) -> Iterator[Document]:
    """Inputs from a file, or one a line from standard input.

    A .txt file has one input a line; a csv or tsv of a run that names its columns has them, or the first alone; other
    files have a header or keys, and the first fields that the run can read are. Raises: DataError with file and line.
    """
    if path is None:
        lines = ((number, line.rstrip("\r\n")) for number, line in enumerate(sys.stdin, start=1))
        yield from (given_document(opened, line, "input", number) for number, line in lines if line.strip())
        return
    if path.suffix == ".txt":
        lines = ((number, line.rstrip("\n")) for number, line in read_lines(path))
        yield from (given_document(opened, line, str(path), number) for number, line in lines if line.strip())
        return
    others = opened.objective.optional_fields
    ways = [tuple(field for field in way if field not in others) for way in opened.objective.alternatives]
    ways = list(dict.fromkeys(filter(None, ways)))
    columns = opened.config.data.model_copy(update={"max_documents": None})
    for document in open_source(str(path.resolve()), columns, tuple(ways), others):
        fields = next(way for way in ways if all(field in document.fields for field in way))
        yield dataclasses.replace(document, fields={field: document.fields[field] for field in fields})


def write_answers(answers: Iterable[Prediction], path: Path) -> tuple[int, int]:
    """Writes .csv, .jsonl, .txt (answers alone) or .conll (tags), streaming; returns (answers, unknown input tokens).

    Columns: input, answer; of a classifier each input, label, and `probability NAME` for each label; of words tokens
    and tags.
    """
    if path.suffix not in {".csv", ".jsonl", ".txt", ".conll"}:
        raise ConfigError(f"--out {path}: a name that ends in .csv, .jsonl, .txt or .conll is expected")
    count = unknown = 0
    with staged_file(path) as file:
        table = csv.writer(file) if path.suffix == ".csv" else None
        for answer in answers:
            if table is not None and count == 0:
                table.writerow(_cells(answer))
            count, unknown = count + 1, unknown + answer.num_unknown
            if table is not None:
                table.writerow(_cells(answer).values())
            elif path.suffix == ".conll":
                if not isinstance(answer, Tagged):
                    raise ConfigError(f"--out {path}: words with tags alone are written so; .csv or .jsonl is expected")
                file.write(answer.lines)
            elif path.suffix == ".txt":
                file.write(answer.answer + "\n")
            else:
                file.write(json_line(answer.as_dict()))
        if table is not None and count == 0:
            table.writerow(["input", "answer"])
    return count, unknown


def _cells(answer: Prediction) -> dict[str, Any]:
    """Column -> value of one row of a csv."""
    if isinstance(answer, Tagged):
        return {"tokens": answer.input, "tags": " ".join(tag or "-" for tag in answer.tags)}
    inputs = {"input": answer.input} if isinstance(answer.input, str) else dict(answer.input)
    if isinstance(answer, Answer):
        return {**inputs, "answer": answer.answer}
    shares = {f"probability {name}": f"{share:.6g}" for name, share in answer.probabilities.items()}
    return {**inputs, "label": answer.answer, **shares}
