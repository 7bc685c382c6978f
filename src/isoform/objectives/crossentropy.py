"""The cross-entropy of tokens, for every objective whose targets are tokens.

    loss = sum over asked places i of  w_i (log sum_j exp(z_ij) - z_i,y_i)        in nats

z `(m, v)`: logits at the m places that have a target; y `(m,)`: their targets; w `(m,)`: the weight of their sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from isoform.contracts import IGNORE, Batch, Document, Helper, LossPart, Model, Output, Tokenizer
from isoform.layers import fused, ragged
from isoform.models import heads

# Logits made at once: 16 MB in fp32, which malloc gives again and again where larger pieces come from the system anew.
CHUNK_LOGITS = 1 << 22
# oneDNN builds a kernel for each new number of rows, so the places that are asked are rounded up to one in so many.
FRIENDLY_PLACES = 64


def logit_chunks(model: Model, hidden: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits in at least fp32 and targets, a few rows at a time; at least one chunk, so that the graph is whole.

    Shapes: hidden (m, d), targets (m,); yields (c, v) and (c,).
    """
    for logits, some_targets in _chunks(model, hidden, targets):
        yield _wide(logits), some_targets


def _chunks(model: Model, hidden: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The same in the precision that the model gives them."""
    rows = max(1, CHUNK_LOGITS // model.config.vocab_size)
    for some_hidden, some_targets in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True):
        yield model.logits(some_hidden), some_targets


def target_nats(model: Model, hidden: Tensor, asked: Tensor, targets: Tensor) -> Tensor:
    """-log p(target) at each asked place `(m,)`, at least in fp32."""
    places, padded = rounded_up(asked, targets)
    return torch.cat([_nats(logits, some) for logits, some in _chunks(model, hidden[places], padded)])[: len(asked)]


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _nats(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p(target) of each row `(m,)`, at least in fp32; 0 where it is IGNORE."""
    fast = fused.nats(logits, targets)
    if fast is not None:
        return fast
    return functional.cross_entropy(_wide(logits), targets, reduction="none", ignore_index=IGNORE)


class TokenObjective:
    """Counts, loss and statistics where every target is a token: one part, `loss`, in nats.

    A sample's weight multiplies its targets in both the total and the count.
    """

    helper: Helper | None = None

    def __init__(self, config: Any, tokenizer: Tokenizer, max_tokens: int) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.window_tokens = max_tokens

    @classmethod
    def settled(cls, config: Any, train: Iterable[Document] | None, known: Any) -> Any:
        """The options as they are: nothing in them follows from the documents."""
        return config

    def fitted(self, model: Any, seed: int) -> Any:
        """The model, with a fresh head where it is an encoder alone: every other guesses tokens as it is."""
        return heads.attach_token_head(model, seed)

    def counts(self, batch: Batch) -> dict[str, float]:
        """The weighted number of targets; filler has none."""
        asked, _, weights = asked_places(batch)
        return {"loss": float(len(asked)) if weights is None else float(weights.double().sum())}

    def loss(self, model: Model, batch: Batch, output: Output) -> dict[str, LossPart]:
        """The weighted sum of -log p(target), in nats."""
        asked, targets, weights = asked_places(batch)
        losses = target_nats(model, output.hidden, asked, targets)
        return {"loss": LossPart((losses if weights is None else losses * weights).sum())}

    def statistics(self, model: Model, batch: Batch, output: Output) -> dict[str, Tensor]:
        """Unweighted sums of each sequence, float64 `(b,)` on the host: nats, tokens, correct_tokens."""
        asked, targets, _ = asked_places(batch)
        nats, correct = [], []
        places, padded = rounded_up(asked, targets)
        for logits, some in _chunks(model, output.hidden[places], padded):
            nats.append(_nats(logits, some))
            correct.append(logits.argmax(-1) == some)
        sequence = ragged.rows(batch.sequences, torch.device("cpu"))[asked.cpu()]

        def by_sequence(values: Tensor) -> Tensor:
            sums = torch.zeros(len(batch.sequences), dtype=torch.float64)
            return sums.index_add(0, sequence, values[: len(asked)].cpu().double())

        return {
            "nats": by_sequence(torch.cat(nats)),
            "tokens": by_sequence(torch.ones_like(padded)),
            "correct_tokens": by_sequence(torch.cat(correct)),
        }


def asked_places(batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
    """Places that have a target `(m,)`, their targets `(m,)`, and their samples' weights `(m,)` if any."""
    assert batch.targets is not None, "a batch of this objective has targets"
    asked = (batch.targets != IGNORE).nonzero().squeeze(1)
    weights = None
    if batch.weights is not None:
        weights = batch.weights[ragged.rows(batch.sequences, batch.tokens.device)[asked]]
    return asked, batch.targets[asked], weights


def rounded_up(asked: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Both with some more places, the first token's, whose target is IGNORE: `(m,)` -> `(m rounded up,)`."""
    more = -len(asked) % min(FRIENDLY_PLACES, max(1, len(asked)))
    return functional.pad(asked, (0, more)), functional.pad(targets, (0, more), value=IGNORE)
