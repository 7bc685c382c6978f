"""The passport of a data set: what is in it, before anything is trained on it."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from isoform.contracts import Document, IntArray, Source
from isoform.data.blocks import blocks
from isoform.data.identity import Occurrences, input_hash
from isoform.data.near import near_pairs, sketch
from isoform.data.overlap import find_overlap, input_text, place
from isoform.data.splits import SplitSources
from isoform.errors import DataError
from isoform.text.chat import TEMPLATE, chat_tokens, conversation
from isoform.text.conversations import conversation_of
from isoform.text.tokenizers import TextTokenizer

if TYPE_CHECKING:
    from rich.console import Console

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
MAX_LABELS = 50
MAX_EXAMPLES = 5
# Near duplicates within a source are looked for among so many documents: the first ones, where there are more.
MAX_COMPARED = 200_000
EXCERPT_CHARACTERS = 160
# Fields that together are a conversation.
CONVERSATIONS = (("messages",), ("conversations",), ("instruction", "output"))
SPOKEN = {
    "documents": "conversations",
    "without_answer": "conversations without an answer",
    "answer_tokens": "answer tokens",
    "answer_tokens_lost": "answer tokens beyond max_tokens",
}


def passport(
    data: Source | SplitSources,
    tokenizer: TextTokenizer | None = None,
    max_tokens: int | None = None,
    *,
    near_fraction: float = 0.8,
) -> dict[str, Any]:
    """What is in a source or in splits, as plain values.

    {sources: [{name, split, fingerprint, documents, empty_documents, characters, bytes, fields, labels, tokens,
    tokens_per_byte, unknown_fraction, lengths: {unit, quantiles}, longer_than_max: {max_tokens, documents, fraction,
    tokens_lost_fraction}, conversations: {documents, without_answer, answer_tokens, answer_tokens_lost},
    exact_duplicates, near_duplicates, compared_documents, examples}], overlap: [...]}

    Conversations are measured as the tokenizer's chat template writes them, or ours where it has none but could end an
    answer; their tokens that are lost are those of answers beyond max_tokens.
    near_fraction: share of words in common from which two documents are near duplicates.
    """
    splits = data.splits if isinstance(data, SplitSources) else {"": data}
    sources = [
        _passport(name, source, tokenizer, max_tokens, near_fraction) for name, source in sorted_splits(splits).items()
    ]
    overlap = find_overlap(splits, near_fraction).report if len(splits) > 1 else []
    return {"near_fraction": near_fraction, "sources": sources, "overlap": overlap}


def sorted_splits(splits: Mapping[str, Source]) -> dict[str, Source]:
    """The splits in their usual order."""
    order = ("train", "holdout", "dev", "test")
    return {name: splits[name] for name in sorted(splits, key=lambda name: order.index(name) if name in order else 9)}


class _Counts:
    """What one pass over the documents counts."""

    def __init__(self, tokenizer: TextTokenizer | None, max_tokens: int | None) -> None:
        self._tokenizer = tokenizer
        self._speaking = None if tokenizer is None else _speaking(tokenizer)
        self._max_tokens = max_tokens
        self.conversations = self.without_answer = self.answer_tokens = self.answer_tokens_lost = 0
        self._occurrences = Occurrences()
        self.documents = self.empty = self.characters = self.bytes = self.tokens = self.unknown = self.repeated = 0
        self.fields: Counter[str] = Counter()
        self.labels: Counter[str] = Counter()
        self.lengths: array[int] = array("q")
        self.places: list[str] = []
        self.excerpts: list[str] = []

    def texts(self, source: Source) -> Iterator[str]:
        """Counts everything; gives back the first documents' texts, to be compared."""
        for block in blocks(source):
            hashes = np.array([input_hash(document) for document in block], dtype=np.uint64)
            repeated = self._occurrences.number(hashes)
            self._count_tokens(block)
            for document, number in zip(block, repeated, strict=True):
                self._count(document)
                self.repeated += number > 0
                if number == 0 and len(self.places) < MAX_COMPARED:
                    text = input_text(document)
                    self.places.append(place(document))
                    self.excerpts.append(text[:EXCERPT_CHARACTERS])
                    yield text

    def _count(self, document: Document) -> None:
        texts = [text for name, text in document.fields.items() if name != "label"]
        self.documents += 1
        self.empty += not any(text.strip() for text in texts)
        self.characters += sum(len(text) for text in texts)
        self.bytes += sum(len(text.encode()) for text in texts)
        self.fields.update(document.fields.keys())
        if "label" in document.fields:
            self.labels[document.fields["label"]] += 1
        if self._tokenizer is None:
            self.lengths.append(sum(len(text) for text in texts))

    def _count_tokens(self, block: list[Document]) -> None:
        if self._tokenizer is None:
            return
        spoken = [self._conversation(document) for document in block]
        texts = [
            [] if written is not None else [text for name, text in document.fields.items() if name != "label"]
            for document, written in zip(block, spoken, strict=True)
        ]
        encoded = iter(self._tokenizer.encode_many([text for some in texts for text in some]))
        for some, written in zip(texts, spoken, strict=True):
            ids = [next(encoded) for _ in some] if written is None else [written]
            self.lengths.append(sum(len(one) for one in ids))
            self.unknown += sum(self._tokenizer.count_unknown(one) for one in ids)
        self.tokens += sum(self.lengths[-len(block) :])

    def _conversation(self, document: Document) -> IntArray | None:
        """The ids of a document that is a conversation, its answers counted. Raises: DataError with source and row."""
        if self._speaking is None or not any(set(way) <= document.fields.keys() for way in CONVERSATIONS):
            return None
        try:
            messages = conversation_of(document.fields)
            written = conversation(self._speaking, messages)
            ids = written.ids if written.answers else chat_tokens(self._speaking, messages)
        except DataError as error:
            raise DataError(f"{place(document)}: {error}") from None
        limit = len(ids) if self._max_tokens is None else self._max_tokens
        self.conversations += 1
        self.without_answer += not written.answers
        for first, end in written.answers.values():
            self.answer_tokens += end - first
            self.answer_tokens_lost += max(0, end - max(first, limit))
        return ids


def _speaking(tokenizer: TextTokenizer) -> TextTokenizer | None:
    """The tokenizer with a chat template, its own or ours; None where ours could not end an answer."""
    if tokenizer.chat_template is None and "eos" not in tokenizer.special:
        return None
    return TextTokenizer(tokenizer.backend, tokenizer.special, tokenizer.chat_template or TEMPLATE)


def _passport(
    split: str, source: Source, tokenizer: TextTokenizer | None, max_tokens: int | None, near_fraction: float
) -> dict[str, Any]:
    counts = _Counts(tokenizer, max_tokens)
    sketches = sketch(counts.texts(source))
    pairs = near_pairs(sketches, near_fraction)
    lengths = np.array(counts.lengths)
    result: dict[str, Any] = {
        "name": source.name,
        "split": split,
        "fingerprint": source.fingerprint(),
        "documents": counts.documents,
        "empty_documents": counts.empty,
        "characters": counts.characters,
        "bytes": counts.bytes,
        "fields": dict(counts.fields),
        "labels": dict(counts.labels.most_common(MAX_LABELS)),
        "num_labels": len(counts.labels),
        "lengths": {
            "unit": "tokens" if tokenizer else "characters",
            "quantiles": {str(share): int(np.quantile(lengths, share, method="lower")) for share in QUANTILES},
        },
        "exact_duplicates": counts.repeated,
        "near_duplicates": len({max(pair.first, pair.second) for pair in pairs}),
        "compared_documents": len(counts.places),
        "examples": [
            {
                "first": counts.places[pair.first],
                "second": counts.places[pair.second],
                "similarity": round(pair.similarity, 3),
                "texts": [counts.excerpts[pair.first], counts.excerpts[pair.second]],
            }
            for pair in pairs[:MAX_EXAMPLES]
        ],
    }
    if tokenizer is not None:
        result["tokens"] = counts.tokens
        result["tokens_per_byte"] = counts.tokens / max(1, counts.bytes)
        if counts.conversations:
            result["conversations"] = {
                "documents": counts.conversations,
                "without_answer": counts.without_answer,
                "answer_tokens": counts.answer_tokens,
                "answer_tokens_lost": counts.answer_tokens_lost,
            }
        result["unknown_fraction"] = counts.unknown / max(1, counts.tokens)
        if max_tokens is not None:
            over = np.maximum(lengths - max_tokens, 0)
            result["longer_than_max"] = {
                "max_tokens": max_tokens,
                "documents": int(np.count_nonzero(over)),
                "fraction": float(np.mean(over > 0)),
                "tokens_lost_fraction": float(over.sum() / max(1, counts.tokens)),
            }
    return result


# ---------------------------------------------------------------------------------------------------------- for people


def render(value: Mapping[str, Any], console: Console) -> None:
    """Prints a passport: one column a source, then duplicates and overlap with examples."""
    from rich.table import Table

    sources = value["sources"]
    table = Table(title="What is in the data")
    table.add_column("")
    for source in sources:
        table.add_column(source["split"] or source["name"], justify="right", overflow="fold")
    for label, cells in _rows(sources):
        if any(cells):
            table.add_row(label, *cells)
    console.print(table)
    for source in sources:
        for example in source["examples"]:
            first, second = example["texts"]
            console.print(f"near ({example['similarity']:.2f})  {example['first']}: {first}", markup=False)
            console.print(f"             {example['second']}: {second}", markup=False)
    for row in value["overlap"]:
        first, second = row["splits"]
        console.print(f"{second} in {first}: {row['exact']} exactly, {row['near']} nearly", markup=False)
        for example in row["examples"]:
            how = "exactly" if example["similarity"] is None else f"{example['similarity']:.2f}"
            console.print(f"  {example['second']} = {example['first']} ({how}): {example['text']}", markup=False)


def _rows(sources: list[dict[str, Any]]) -> Iterator[tuple[str, list[str]]]:
    """(label, one cell a source) of the table."""

    def row(label: str, cell: Any) -> tuple[str, list[str]]:
        return label, [cell(source) for source in sources]

    yield row("source", lambda source: source["name"])
    yield row("documents", lambda source: f"{source['documents']:,}")
    yield row("empty", lambda source: f"{source['empty_documents']:,}" if source["empty_documents"] else "")
    yield row("characters", lambda source: f"{source['characters']:,}")
    yield row("bytes", lambda source: f"{source['bytes']:,}")
    yield row("tokens", lambda source: f"{source['tokens']:,}" if "tokens" in source else "")
    yield row("tokens per byte", lambda source: f"{source['tokens_per_byte']:.3f}" if "tokens" in source else "")
    yield row("unknown tokens", lambda source: f"{source['unknown_fraction']:.3%}" if "tokens" in source else "")
    unit = sources[0]["lengths"]["unit"] if sources else ""
    for share in map(str, QUANTILES):
        name = {"0.0": "shortest", "0.5": "median", "1.0": "longest"}.get(share, f"{float(share):.0%} at most")
        yield row(f"length, {name} ({unit})", lambda source, share=share: f"{source['lengths']['quantiles'][share]:,}")
    yield row("longer than max_tokens", lambda source: _longer(source.get("longer_than_max")))
    for name, words in SPOKEN.items():
        yield row(words, lambda source, name=name: _spoken(source.get("conversations"), name))
    yield row("exact duplicates", lambda source: f"{source['exact_duplicates']:,}")
    yield row("near duplicates", lambda source: _near(source))
    labels = dict.fromkeys(label for source in sources for label in source["labels"])
    for label in labels:
        yield row(f"label {label}", lambda source, label=label: f"{source['labels'].get(label, 0):,}")
    yield row("fingerprint", lambda source: source["fingerprint"])


def _spoken(conversations: dict[str, int] | None, name: str) -> str:
    return f"{conversations[name]:,}" if conversations else ""


def _longer(longer: dict[str, Any] | None) -> str:
    if longer is None:
        return ""
    return f"{longer['documents']:,} ({longer['fraction']:.1%}, {longer['tokens_lost_fraction']:.1%} of tokens)"


def _near(source: dict[str, Any]) -> str:
    among = source["documents"] - source["exact_duplicates"]
    note = f" among {source['compared_documents']:,}" if source["compared_documents"] < among else ""
    return f"{source['near_duplicates']:,}{note}"
