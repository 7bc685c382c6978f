"""The few types that carry everything, and the protocols by which rooms meet without importing each other.

    Document --objective.encode--> Encoded --objective.prepare(encoded, rng)--> Sample --collate--> Batch
    Batch --model--> Output --objective.loss--> loss parts --loop--> weights

Dimension letters (`docs/letters.md`): n tokens in the ragged batch, b sequences, d model width, v vocabulary.
This file imports neither torch nor another room, so that a report can be made without either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

IntArray = npt.NDArray[np.int32]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# A target that asks for nothing. Only positions whose target is not IGNORE ever see a logit.
IGNORE = -100


# ---------------------------------------------------------------------------------------------------- text and tokens


@dataclass(frozen=True, slots=True)
class Document:
    """Named text fields, metadata and a stable id: the only thing that a data source yields.

    `id` follows from the content alone (see `data.sources`), so it survives reordering and added rows.
    `meta` says where it came from: `{"source": path or name, "row": line or row number}` and any further columns.
    """

    id: str
    fields: Mapping[str, str]
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Encoded:
    """One document, or one window of it, as token ids: made once, cached, the same for every epoch and seed.

    `fields` maps a field's name to its ids, int32 `(t,)`; one whose name begins with `_` holds places in another field,
    not tokens, and is counted nowhere. `num_bytes` is the UTF-8 size of the text that these tokens stand for (the
    denominator of bits per byte). `document` is kept where an evaluation needs the raw text.
    """

    id: str
    fields: Mapping[str, IntArray]
    num_bytes: int
    document: Document | None = None

    @property
    def token_fields(self) -> list[IntArray]:
        """The ids of every field that holds tokens."""
        return [ids for name, ids in self.fields.items() if not name.startswith("_")]


@dataclass(frozen=True, slots=True)
class Sample:
    """Token ids and targets of one sequence, ready to be batched.

    tokens: `(t,)` what the model reads; targets: `(t,)` what it should say at each place, `IGNORE` where nothing is
    asked (for a causal model already shifted: targets[i] is the token after tokens[i]).
    segments: `(t,)` segment ids where the family has them. label: a class, several classes or numbers of the sequence.
    source: the encoder's sequence of an encoder-decoder. rival: a second sequence that this one is compared with, such
    as another answer to the same question; it has targets of its own, and the two are never parted.
    prefix: how many of the first tokens see one another even in a causal model. num_bytes: text bytes that the targets
    stand for. ranks: `(t,)` of a permutation: 0 for tokens that are known, 1, 2, ... in the order in which the others
    are guessed.
    """

    id: str
    tokens: IntArray
    targets: IntArray | None = None
    segments: IntArray | None = None
    label: int | tuple[float, ...] | None = None
    source: Sample | None = None
    rival: Sample | None = None
    weight: float = 1.0
    num_bytes: int = 0
    prefix: int = 0
    ranks: IntArray | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that the model reads, the source's and the rival's among them."""
        return sum(len(one.tokens) for one in (self, self.source, self.rival) if one is not None)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a generative evaluation gives to the model, and how its answer is read.

    tokens: `(t,)`; stop: ids that end the answer; gold: the expected text or None where it is unknown. source `(s,)`:
    what an encoder reads; `tokens` is then what the decoder begins with. prefix: see `Sample`.
    """

    id: str
    tokens: IntArray
    stop: tuple[int, ...]
    max_new_tokens: int
    text: str
    gold: str | None = None
    source: IntArray | None = None
    prefix: int = 0


# ------------------------------------------------------------------------------------------------------------ batches


class Sequences:
    """Where the sequences of a ragged tensor begin and end; `derived` keeps index tensors that attention makes once.

    prefixes: how many tokens at the beginning of each sequence see one another even in a causal model; empty: none.
    """

    __slots__ = ("derived", "lengths", "prefixes")

    def __init__(self, lengths: Sequence[int], prefixes: Sequence[int] = ()) -> None:
        self.lengths: tuple[int, ...] = tuple(lengths)
        self.prefixes: tuple[int, ...] = tuple(prefixes) if any(prefixes) else ()
        self.derived: dict[Any, Any] = {}

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def max_length(self) -> int:
        return max(self.lengths, default=0)

    @property
    def equal(self) -> bool:
        """Whether all lengths are the same, so that `(n, ...)` may be viewed as `(b, t, ...)`."""
        return len(set(self.lengths)) <= 1

    def __len__(self) -> int:
        return len(self.lengths)


# The fields of a batch that are tensors.
_TENSORS = ("tokens", "positions", "sample_keys", "targets", "segments", "labels", "weights", "ranks")


@dataclass(slots=True)
class Batch:
    """All tokens of all sequences end to end; nothing is padded.

    tokens, positions, targets, segments, ranks: int64 `(n,)`; positions count from 0 in each sequence. sample_keys:
    int64 `(b,)`, a 64-bit hash of each sample's id, the key of its dropout masks. labels: `(b,)` or `(b, c)`.
    weights: `(b,)`.
    num_filler: how many of the last sequences only round n up; they are in no count, target or statistic.
    dropout_key: hash of (seed, step), or None: no dropout. source: the encoder's stream. rival: the stream of what the
    sequences are compared with, one for each, which the model reads in a pass of its own.
    """

    tokens: Tensor
    positions: Tensor
    sequences: Sequences
    sample_keys: Tensor
    targets: Tensor | None = None
    segments: Tensor | None = None
    labels: Tensor | None = None
    weights: Tensor | None = None
    source: Batch | None = None
    rival: Batch | None = None
    dropout_key: int | None = None
    num_filler: int = 0
    num_bytes: int = 0
    sample_ids: tuple[str, ...] = ()
    ranks: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that the model reads, filler, the source's and the rival's among them."""
        return sum(stream.sequences.num_tokens for stream in self.streams)

    @property
    def longest_tokens(self) -> int:
        """The most tokens that one sequence, its source and its rival have together."""
        return max(map(sum, zip(*(stream.sequences.lengths for stream in self.streams), strict=True)), default=0)

    @property
    def streams(self) -> tuple[Batch, ...]:
        """This one, its source and its rival, as far as there are such."""
        return tuple(stream for stream in (self, self.source, self.rival) if stream is not None)

    def to(self, device: Any) -> Batch:
        """The same batch with its tensors on `device`; from pinned memory the host does not wait for the copies."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """The same batch in page-locked memory, from which a GPU copies by itself."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with every tensor changed; what was derived from its sequences is derived anew."""
        tensors: dict[str, Any] = {n: change(value) for n in _TENSORS if (value := getattr(self, n)) is not None}
        return replace(
            self,
            **tensors,
            sequences=Sequences(self.sequences.lengths, self.sequences.prefixes),
            source=None if self.source is None else self.source._each(change),
            rival=None if self.rival is None else self.rival._each(change),
        )


@dataclass(slots=True)
class Output:
    """What a model returns for a batch: `hidden (n, d)` after the last norm, the rest on request.

    layers: hidden states `(n, d)` before each block and after the last. router_logits: one `(n, e)` a layer.
    encoder: `(n_source, d)`. second: the second stream `(n, d)` of a two-stream model, 0 where nothing is guessed.
    """

    hidden: Tensor
    layers: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None
    encoder: Tensor | None = None
    second: Tensor | None = None


@dataclass(slots=True)
class LossPart:
    """A named share of the loss: `total`, a sum (never a mean) over what `count` counts, times `weight`.

    The step's loss is sum over parts of weight x (total over all micro-batches and ranks) / (count over the same).
    A part whose name begins with `_` is a statistic: divided and logged like the others, and no part of the loss.
    """

    total: Tensor
    weight: float = 1.0


@dataclass(slots=True)
class RunState:
    """Where a run stands, beside its weights: all of it is written at a checkpoint and restored bit by bit.

    step: optimiser updates done; tokens: target tokens seen; cursor: the data position (epoch and step in it, for the
    reader: order is a pure function of step); rng: each random stream's state as integers; optimizer: parameter name
    -> state name -> tensor; scalars: anything small that must survive (best value so far, patience, tracker ids).
    """

    step: int = 0
    tokens: int = 0
    cursor: dict[str, int] = field(default_factory=dict)
    rng: dict[str, list[int]] = field(default_factory=dict)
    optimizer: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    scalars: dict[str, Any] = field(default_factory=dict)


# ---------------------------------------------------------------------------------------------------------- protocols


@runtime_checkable
class Source(Protocol):
    """Something that yields documents, any number of times, always in the same order."""

    name: str

    def __iter__(self) -> Iterator[Document]: ...

    def fingerprint(self) -> str:
        """A hash of the content: changes when a byte changes, not when a file is moved or touched."""
        ...


class Tokenizer(Protocol):
    """Text to ids and back. Special tokens have names: unk, bos, eos, pad, mask, sep, cls; absent ones are None.

    sentinel_ids: ids of the tokens that stand for cut-out spans, `<extra_id_0>` first; empty where there are none.
    """

    @property
    def kind(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def special_ids(self) -> Mapping[str, int]: ...

    @property
    def sentinel_ids(self) -> Sequence[int]: ...

    def encode(self, text: str) -> IntArray:
        """Ids of the text alone: no special token is added, and text that looks like one is plain text."""
        ...

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str: ...

    def fingerprint(self) -> str: ...

    def save(self, folder: Path) -> None: ...


class Cache(Protocol):
    """Keys and values of the tokens so far, for decoding: made by the model, opaque to everyone else."""

    lengths: list[int]

    def select(self, rows: Sequence[int]) -> Cache:
        """The cache of some of the sequences, in the order given (finished ones are dropped, beams are copied)."""
        ...


class Model(Protocol):
    """A family's network. `config` is the family's `Config`; `capabilities` says what objectives may ask of it.

    capabilities: subset of {"causal", "bidirectional", "two-stream", "encoder-decoder", "cache", "classify"}. One that
    classifies has a part `classifier`, None until an objective brings it: `classifier(hidden, batch)` is `(b, c)`.
    """

    config: Any
    capabilities: ClassVar[frozenset[str]]
    max_positions: int | None

    def __call__(self, batch: Batch, *, cache: Cache | None = None, all_layers: bool = False) -> Output: ...

    def logits(self, hidden: Tensor) -> Tensor:
        """`(m, d)` -> `(m, v)`: scores over the vocabulary at chosen places only."""
        ...

    def new_cache(self, num_sequences: int) -> Cache: ...


class Helper(Protocol):
    """What a loss needs beside the model that is trained: another model, and parts that are trained and left behind.

    sources: option of the objective -> where a model comes from, such as a teacher. companion: a torch module that is
    trained beside the model and kept with the run's checkpoints, and is no part of what is exported; None: nothing.
    reads_layers: whether the loss reads `Output.layers`.
    """

    sources: Mapping[str, str]
    companion: Any
    reads_layers: bool

    def join(self, others: Mapping[str, Any], model: Any, seed: int) -> None:
        """Takes the models of `sources`, each with `model` and `tokenizer`, to the side of the trained one.

        Raises: ConfigError where one does not fit to it.
        """
        ...

    def rehearse(self, train: Any, cache: Path, device: Any, precision: str, autocast: Callable[[], Any]) -> None:
        """Computes what is to be computed once of the training documents, and keeps it in the cache."""
        ...


class Objective(Protocol):
    """What the model is asked to do: how a document becomes a sample, and what is lost where it answers wrongly.

    Built as `cls(config, tokenizer, max_tokens)`. `alternatives` are sets of document fields, any one of which is
    enough to train; `optional_fields` may be missing where nothing is scored; `needs` are the model capabilities.
    `stochastic`: whether `prepare` draws (then evaluation uses fixed draws). `windowed`: whether a long document may be
    cut into windows of `window_tokens` tokens of its `text` field before `prepare` sees it.
    `helper`: what the loss needs beside the model, None: nothing.
    Some have `shown(encoded, stats)` too: what a row of predictions says where nothing is generated. Some have
    `asked(encoded)`: how many targets a document has, and how many of them its sample keeps; raises DataError where it
    has none. Some have `compares`: a document becomes two sequences, each as long as the context.
    """

    alternatives: tuple[tuple[str, ...], ...]
    optional_fields: tuple[str, ...]
    needs: frozenset[str]
    stochastic: bool
    windowed: bool
    window_tokens: int
    metrics: tuple[str, ...]  # names of the metrics that make sense, the first being the default
    helper: Helper | None
    tokenizer: Tokenizer

    @classmethod
    def settled(cls, config: Any, train: Iterable[Document] | None, known: Any) -> Any:
        """The options with what follows from the training documents (None: nothing is trained), such as label names.

        known: the classifier that the model has, if any. Raises: ConfigError, DataError where they do not fit.
        """
        ...

    def fitted(self, model: Any, seed: int) -> Any:
        """The model with the parts that this objective asks of it; new ones are drawn from the seed."""
        ...

    def encode(self, document: Document) -> Encoded:
        """The document's fields as ids; pure, so that it may be cached.

        Raises: DataError naming the document's source and row (an empty answer, a missing field).
        """
        ...

    def encoding_key(self) -> str:
        """What `encode` depends on beside the tokenizer, as a string for the cache key."""
        ...

    def planned_tokens(self, field_tokens: Mapping[str, Ints]) -> Ints:
        """An upper bound of each sample's length from its fields' lengths `(N,)`, vectorised, for the batch plan."""
        ...

    def prepare(self, encoded: Encoded, rng: np.random.Generator) -> Sample:
        """One view of the document; all chance comes from `rng`, which is keyed by (seed, epoch, document id)."""
        ...

    def prompt(self, encoded: Encoded) -> Prompt | None:
        """The question to generate from, or None where the objective does not generate."""
        ...

    def counts(self, batch: Batch) -> dict[str, float]:
        """Loss part name -> count, known from the batch alone (filler excluded)."""
        ...

    def loss(self, model: Model, batch: Batch, output: Output) -> dict[str, LossPart]:
        """Loss part name -> its sum over the batch, in nats."""
        ...

    def statistics(self, model: Model, batch: Batch, output: Output) -> Mapping[str, Tensor]:
        """Column that metrics read -> float64 `(b,)` on the host, one additive number a sequence."""
        ...


class Metric(Protocol):
    """A number made from additive statistics of examples, so that it streams, pairs and bootstraps.

    Each example contributes a row of `columns`, `hits.*` being all that begin with `hits.`; `value` maps summed columns
    (scalars or arrays of equal shape) to the metric. `mean_column`: the column that is itself the per-example score
    where the metric is their mean, else None.

    What an interval needs to know of some metrics only, a metric may have: `limits`, the ends of its range; `slopes`,
    its derivative by each column's sum; `bounds`, those of a value and its error on a scale of the metric's own;
    `weights`, how much of each column an example weighs with; `at_share`, its value where a share of all is right.
    """

    name: ClassVar[str]
    higher_is_better: ClassVar[bool]
    columns: ClassVar[tuple[str, ...]]
    mean_column: ClassVar[str | None]
    unit: ClassVar[str]  # "fraction", "nats", "bits", "perplexity", "number"

    def value(self, sums: Mapping[str, Any]) -> Any: ...
