"""Scores of a model on a split: what it loses on true text, and what it answers.

Every draw is fixed by the sample's id, every sum runs over examples in their order, so batch size, order and ranks
change nothing beyond the rounding of the model itself; no random stream of the training is touched. Examples pass in
pools: memory does not grow with their number, but for eight bytes of each id.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from isoform import chance
from isoform.config import Beams
from isoform.contracts import IGNORE, Encoded, Metric, Model, Objective, Prompt, Sample
from isoform.data.identity import Occurrences, content_hash
from isoform.errors import ConfigError
from isoform.evaluation.generate import generate
from isoform.evaluation.metrics import Judge, StreamingMetrics, build_metrics

if TYPE_CHECKING:
    import torch

# Columns that a greedy answer can be judged by without being generated.
TOLD_COLUMNS = frozenset({"correct", "examples"})
# Columns that only a generated answer has.
GENERATED_COLUMNS = frozenset({"ended"})
# Columns of texts whose tokens are hidden one at a time.
PSEUDO_COLUMNS = frozenset({"pseudo_nats", "pseudo_tokens"})
# Samples prepared at once: enough to batch like lengths together, few enough to stream.
POOL_SAMPLES = 4096


class Examples(Protocol):
    """Encoded documents by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Encoded: ...


class Thinned:
    """At most `most` examples of a dataset, evenly spaced: the same ones for every model."""

    def __init__(self, dataset: Examples, most: int | None) -> None:
        self.dataset = dataset
        self._num = len(dataset) if most is None else min(most, len(dataset))

    def __len__(self) -> int:
        return self._num

    def __getitem__(self, index: int) -> Encoded:
        if not 0 <= index < self._num:
            raise IndexError(index)
        return self.dataset[index * len(self.dataset) // self._num]


@dataclass(slots=True)
class Evaluation:
    """Rows of eval.json ({metric, split, value, n, low, high}) and of predictions.jsonl."""

    rows: list[dict[str, Any]]
    predictions: list[dict[str, Any]] = field(default_factory=list)


class Watch(Protocol):
    """Sees every example that is scored, with what was said of it and all its statistics, kept or not."""

    def add(self, row: Mapping[str, Any], stats: Mapping[str, float]) -> None: ...


@dataclass(frozen=True, slots=True)
class _Way:
    """How the model is run."""

    model: Model
    batch_tokens: int
    device: torch.device | str
    autocast: Callable[[], AbstractContextManager[Any]]
    max_new_tokens: int | None
    beams: Beams | None


@dataclass(frozen=True, slots=True)
class _Asked:
    """What is measured. wanted: columns; tells: judged without being generated; talks: it is noted how answers end;
    shows: rows say more than numbers.
    """

    split: str
    judges: Sequence[Judge]
    wanted: set[str]
    answer_columns: set[str]
    tells: bool
    talks: bool
    shows: bool
    watch: Watch | None


def evaluate(
    model: Model,
    objective: Objective,
    dataset: Examples,
    *,
    split: str,
    metrics: Sequence[str] | None = None,
    batch_tokens: int = 32_768,
    max_new_tokens: int | None = None,
    beams: Beams | None = None,
    confidence: float = 0.95,
    device: torch.device | str = "cpu",
    autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    keep_predictions: int | None = None,
    keep: Callable[[dict[str, Any]], Any] | None = None,
    watch: Watch | None = None,
    rank: int = 0,
    world: int = 1,
    gather: Callable[[list[Any]], list[Any]] = lambda rows: rows,
) -> Evaluation:
    """The metrics of one split, token-weighted, with intervals over examples.

    metrics: names; None: the objective's own. keep_predictions: the most rows to keep; None: all. keep: where kept rows
    go, one by one in the order of the examples; None: into the result. rank, world: this process scores every world-th
    example; gather: the lists of all ranks end to end.

    Where no prediction is kept, answers are judged without being generated, in the one pass over the true text: greedy
    decoding says the expected tokens if and only if each is the first choice after those before it. Only an answer
    that spells the expected text in other tokens than the tokenizer's own is then missed.

    Raises: ConfigError where a metric needs answers that the objective does not generate.
    """
    chosen = build_metrics(objective.metrics if metrics is None else metrics)
    if metrics is None and keep_predictions == 0:
        # Nobody reads the answers, and to generate them takes long: what they alone tell is left for the end.
        chosen = [metric for metric in chosen if not GENERATED_COLUMNS & set(metric.columns)]
    asked = _asked(chosen, split, beams, keep_predictions, watch)
    way = _Way(model, batch_tokens, device, autocast, max_new_tokens, beams)
    totals, seen = StreamingMetrics(chosen), Occurrences()
    result = Evaluation([])
    keep = result.predictions.append if keep is None else keep
    room = len(dataset) if keep_predictions is None else keep_predictions
    for first in range(0, len(dataset), POOL_SAMPLES * world):
        mine = range(first + rank, min(first + POOL_SAMPLES * world, len(dataset)), world)
        rows = [row for _, row in sorted(gather(list(_scored(way, objective, dataset, mine, asked).items())))]
        _make_distinct(rows, seen)
        totals.add(_columns(rows))
        for row in rows[:room]:
            keep(row)
        room = max(0, room - len(rows))
    result.rows = totals.rows(split, confidence)
    return result


def _asked(
    metrics: Sequence[Metric], split: str, beams: Beams | None, keep_predictions: int | None, watch: Watch | None
) -> _Asked:
    judges = [metric for metric in metrics if isinstance(metric, Judge)]
    answer_columns = {column for judge in judges for column in judge.columns}
    greedy = beams is None or beams.num_beams == 1
    wanted = {column for metric in metrics for column in metric.columns}
    talks = bool(wanted & GENERATED_COLUMNS)
    return _Asked(
        split=split,
        judges=judges,
        wanted=wanted,
        answer_columns=answer_columns,
        tells=keep_predictions == 0 and greedy and bool(judges) and answer_columns <= TOLD_COLUMNS and not talks,
        talks=talks,
        shows=keep_predictions != 0 or watch is not None,
        watch=watch,
    )


def _scored(
    way: _Way, objective: Objective, dataset: Examples, indices: Sequence[int], asked: _Asked
) -> dict[int, dict[str, Any]]:
    """Index -> row of predictions.jsonl, of one pool."""
    rows: dict[int, dict[str, Any]] = {index: _empty_row(dataset[index], asked.split) for index in indices}
    judged: set[int] = set()
    seen: dict[int, Mapping[str, float]] = {}
    # What an objective that does not generate says of each example.
    shown: Callable[[Encoded, Mapping[str, float]], dict[str, Any]] | None = getattr(objective, "shown", None)
    if asked.wanted & PSEUDO_COLUMNS:
        for index, stats in _one_by_one(way, objective, dataset, indices):
            rows[index]["stats"].update(stats)
    if asked.wanted - asked.answer_columns - PSEUDO_COLUMNS - GENERATED_COLUMNS or asked.tells:
        for index, stats in _likelihoods(way, objective, dataset, indices):
            if asked.tells and _is_told(objective, dataset[index], way.max_new_tokens):
                stats |= {"correct": float(stats["correct_tokens"] == stats["tokens"]), "examples": 1.0}
                judged.add(index)
            if shown is not None and asked.shows:
                rows[index].update(shown(dataset[index], stats))
            rows[index]["stats"].update({name: value for name, value in stats.items() if _reads(asked.wanted, name)})
            seen[index] = stats
    if asked.watch is not None:
        for index in sorted(seen):  # like lengths are scored together; what is shown should not hang on that
            asked.watch.add(rows[index], seen[index])
    if asked.judges or asked.talks:
        _answers(way, objective, dataset, {index: rows[index] for index in indices if index not in judged}, asked)
    return rows


def _reads(wanted: set[str], column: str) -> bool:
    """Whether a column is wanted, by its name or as one of many: `hits.*`."""
    return column in wanted or f"{column.partition('.')[0]}.*" in wanted


def _empty_row(encoded: Encoded, split: str) -> dict[str, Any]:
    return {"id": encoded.id, "split": split, "input": None, "gold": None, "prediction": None, "stats": {}}


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Column -> numbers of the rows `(b,)`, NaN where a row lacks one."""
    names = rows[0]["stats"] if rows else {}
    return {name: np.array([row["stats"].get(name, np.nan) for row in rows]) for name in names}


def _make_distinct(rows: Sequence[dict[str, Any]], seen: Occurrences) -> None:
    """Equal documents have equal ids; the second of them becomes `id#2`, so that rows pair one to one."""
    hashes = np.array([content_hash({"id": row["id"]}) for row in rows], dtype=np.uint64)
    for row, before in zip(rows, seen.number(hashes), strict=True):
        if before:
            row["id"] = f"{row['id']}#{before + 1}"


# ------------------------------------------------------------------------------------------------- on the true answers


def _likelihoods(
    way: _Way, objective: Objective, dataset: Examples, indices: Sequence[int]
) -> Iterator[tuple[int, dict[str, float]]]:
    """(index, statistics of the example) in no particular order."""
    import torch

    from isoform.data.batches import collate

    pool = [(index, _fixed_sample(objective, dataset[index])) for index in indices]
    for group in token_batches(pool, way.batch_tokens):
        batch = collate([sample for _, sample in group]).to(way.device)
        with torch.no_grad(), way.autocast():
            found = objective.statistics(way.model, batch, way.model(batch))
        columns = {name: values.tolist() for name, values in found.items()}
        for row, (index, sample) in enumerate(group):
            stats = {name: float(values[row]) for name, values in columns.items()}
            yield index, {**stats, "bytes": float(sample.num_bytes)}


def _one_by_one(
    way: _Way, objective: Objective, dataset: Examples, indices: Sequence[int]
) -> Iterator[tuple[int, dict[str, float]]]:
    """(index, nats and tokens of the example where each of its tokens is hidden alone), in order."""
    import torch

    from isoform.data.batches import collate

    views = getattr(objective, "one_by_one", None)
    if views is None:
        raise ConfigError(
            "evaluate.metrics: pseudo_perplexity hides tokens one by one, which only the objective `masked` does"
        )
    for index in indices:
        stats = dict.fromkeys(PSEUDO_COLUMNS, 0.0)
        for group in token_batches([(index, sample) for sample in views(dataset[index])], way.batch_tokens):
            batch = collate([sample for _, sample in group]).to(way.device)
            with torch.no_grad(), way.autocast():
                found = objective.statistics(way.model, batch, way.model(batch))
            stats["pseudo_nats"] += float(found["nats"].sum())
            stats["pseudo_tokens"] += float(found["tokens"].sum())
        yield index, stats


def _fixed_sample(objective: Objective, encoded: Encoded) -> Sample:
    return objective.prepare(encoded, chance.generator("evaluation", encoded.id))


def token_batches(pool: Sequence[tuple[int, Sample]], batch_tokens: int) -> Iterator[list[tuple[int, Sample]]]:
    """Samples of like length together, at most `batch_tokens` tokens a batch."""
    group: list[tuple[int, Sample]] = []
    size = 0
    for index, sample in sorted(pool, key=lambda item: item[1].num_tokens):
        if group and size + sample.num_tokens > batch_tokens:
            yield group
            group, size = [], 0
        group.append((index, sample))
        size += sample.num_tokens
    if group:
        yield group


# -------------------------------------------------------------------------------------------------- on its own answers


def _answers(
    way: _Way, objective: Objective, dataset: Examples, rows: Mapping[int, dict[str, Any]], asked: _Asked
) -> None:
    """Generates the answer to every question, and writes what was asked, expected and said into the rows."""
    prompts = [_question(objective, dataset[index]) for index in rows]
    generations = generate(
        way.model,
        prompts,
        beams=way.beams,
        max_new_tokens=way.max_new_tokens,
        batch_tokens=way.batch_tokens,
        device=way.device,
        autocast=way.autocast,
    )
    for row, prompt, generation in zip(rows.values(), prompts, generations, strict=True):
        said = objective.tokenizer.decode(generation.tokens)
        row.update(input=prompt.text, gold=prompt.gold, prediction=said)
        if asked.talks:
            row["stats"].update(ended=float(generation.stopped), examples=1.0)
        for judge in asked.judges:
            row["stats"].update(judge.judge(said, prompt.gold or ""))


def _is_told(objective: Objective, encoded: Encoded, max_new_tokens: int | None) -> bool:
    """Whether what is asked of the example is its prompt's answer, from the first token to the stop token."""
    prompt, sample = _question(objective, encoded), _fixed_sample(objective, encoded)
    size = len(prompt.tokens)
    if sample.targets is None or not np.array_equal(sample.tokens[:size], prompt.tokens):
        return False
    if sample.source is not None and not np.array_equal(
        sample.source.tokens, () if prompt.source is None else prompt.source
    ):
        return False
    if sample.prefix != prompt.prefix:
        return False
    answer, stop = sample.targets[size - 1 : -1], int(sample.targets[-1])
    limit = prompt.max_new_tokens if max_new_tokens is None else min(prompt.max_new_tokens, max_new_tokens)
    return (
        bool((sample.targets[: size - 1] == IGNORE).all())
        and not np.isin(answer, [IGNORE, *prompt.stop]).any()
        and stop in prompt.stop
        and len(answer) <= limit
        and objective.tokenizer.decode(answer) == prompt.gold
    )


def _question(objective: Objective, encoded: Encoded) -> Prompt:
    prompt = objective.prompt(encoded)
    if prompt is None or prompt.gold is None:
        raise ConfigError(
            "evaluate.metrics: metrics of answers need questions with known answers; this objective asks none; "
            f"its metrics: {', '.join(objective.metrics)}"
        )
    return prompt
