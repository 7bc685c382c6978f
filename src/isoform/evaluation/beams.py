"""Beam search on ragged batches, with the rules of transformers' `generate`, so that equal weights give equal answers.

Of every prompt `num_beams` continuations grow together, the most probable ones so far. A continuation that is among the
best and ends is finished; finished ones are ranked by

    score = (sum of the log-probabilities of the m new tokens, the stop token among them) / m^length_penalty

A prompt is done when its finished answers cannot be improved on, by the rule of `early_stopping`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

from isoform.config import Beams
from isoform.evaluation.reading import Growing, Reader

if TYPE_CHECKING:
    from torch import Tensor

# torch is imported where it is used: see the room's docstring.

# The score of what must not be chosen, as in transformers.
NEVER = -1.0e9


@dataclass(slots=True)
class _State:
    """b prompts with B beams each, after `grown` new tokens.

    running `(b, B, grown)`, scores `(b, B)`: the continuations that grow, best first. answers `(b, B, grown)`, filled
    up with -1, ranks `(b, B)`, ended `(b, B)`: the finished ones; a place without one has the rank NEVER. improvable
    `(b,)`: whether they can still be improved on.
    """

    grown: int
    running: Tensor
    scores: Tensor
    answers: Tensor
    ranks: Tensor
    ended: Tensor
    improvable: Tensor

    def of(self, rows: Tensor) -> _State:
        """The prompts of these rows."""
        tensors = (self.running, self.scores, self.answers, self.ranks, self.ended, self.improvable)
        return _State(self.grown, *(tensor[rows] for tensor in tensors))


def beam_search(reader: Reader, group: Sequence[Growing], beams: Beams) -> None:
    """Appends to every sequence the new tokens of its best answer, a stop token that ended it among them.

    Source: HF `GenerationMixin._beam_search`. Differs: a prompt that is done leaves the batch; prompts without room for
    a token keep none.
    """
    alive = [sequence for sequence in group if sequence.limit > 0]
    if not alive:
        return
    fresh = count(1 + max(sequence.index for sequence in alive))
    reading = alive
    state: _State | None = None
    while True:
        logits = reader.next_logits(reading)
        if state is None:
            state = _first(logits, len(alive), beams.num_beams)
        state, parents = _step(state, logits, alive, beams)
        done = _done(state, alive, beams)
        for row, sequence in enumerate(alive):
            if done[row]:
                sequence.tokens += [token for token in state.answers[row, 0].tolist() if token >= 0]
        keep = [row for row in range(len(alive)) if not done[row]]
        per_prompt = len(reading) // len(alive)
        alive = [alive[row] for row in keep]
        if not alive:
            return
        state = state.of(state.scores.new_tensor(keep).long())
        # What was read for a beam is the beginning of each of its children.
        ancestors = [reading[row * per_prompt + beam].index for row in keep for beam in parents[row].tolist()]
        reading = [
            Growing(next(fresh), sequence.prompt, sequence.limit, [*map(int, sequence.prompt.tokens), *tokens])
            for row, sequence in enumerate(alive)
            for tokens in state.running[row].tolist()
        ]
        reader.descend(ancestors, [sequence.index for sequence in reading])


def _first(logits: Tensor, num_prompts: int, num_beams: int) -> _State:
    """Before the first token there is one continuation of each prompt."""
    import torch

    device = logits.device
    scores = torch.full((num_prompts, num_beams), NEVER, device=device)
    empty = torch.zeros((num_prompts, num_beams, 0), dtype=torch.int64, device=device)
    ended = torch.zeros((num_prompts, num_beams), dtype=torch.bool, device=device)
    improvable = torch.ones(num_prompts, dtype=torch.bool, device=device)
    return _State(
        0, empty, scores.index_fill(1, torch.tensor([0], device=device), 0.0), empty, scores, ended, improvable
    )


def _step(state: _State, logits: Tensor, alive: Sequence[Growing], beams: Beams) -> tuple[_State, Tensor]:
    """The state with one more token, and from which beam each running continuation comes, `(b, B)`."""
    import torch

    b, num_beams = state.scores.shape
    log_probs = logits.float().log_softmax(-1).view(b, -1, logits.shape[-1])  # (b, 1 at first or B, v)
    whole = (log_probs + state.scores[:, : log_probs.shape[1], None]).flatten(1)
    most_stops = max(len(sequence.prompt.stop) for sequence in alive)
    # So many that num_beams of them do not end, whatever ends.
    num_candidates = min(max(2, 1 + most_stops) * num_beams, whole.shape[1])
    candidates, places = whole.topk(num_candidates)
    parent, token = places // logits.shape[-1], places % logits.shape[-1]
    grown = torch.cat([_rows(state.running, parent), token[..., None]], dim=-1)
    ends = _ends(token, alive, state.grown + 1)

    kept = (candidates + ends * NEVER).topk(min(num_beams, num_candidates)).indices
    finished = _finish(state, candidates, grown, ends, beams)
    advanced = _State(
        state.grown + 1,
        _rows(grown, kept),
        (candidates + ends * NEVER).gather(1, kept),
        *finished,
        state.improvable,
    )
    advanced.improvable = state.improvable & _improvable(advanced, alive, beams)
    return advanced, parent.gather(1, kept)


def _ends(token: Tensor, alive: Sequence[Growing], grown: int) -> Tensor:
    """bool `(b, candidates)`: whether a continuation stops with this token, or has no room for another."""
    import torch

    stops = [torch.isin(row, row.new_tensor(s.prompt.stop)) for row, s in zip(token, alive, strict=True)]
    full = token.new_tensor([grown >= sequence.limit for sequence in alive], dtype=torch.bool)
    return torch.stack(stops) | full[:, None]


def _finish(
    state: _State, candidates: Tensor, grown: Tensor, ends: Tensor, beams: Beams
) -> tuple[Tensor, Tensor, Tensor]:
    """(answers, ranks, ended): the best of those finished before and of the best candidates that end now."""
    import torch

    num_beams = beams.num_beams
    among_best = torch.arange(candidates.shape[1], device=candidates.device) < num_beams
    ending = ends & among_best
    ranks = candidates / ((state.grown + 1) ** beams.length_penalty)
    closed = ~state.improvable | (state.ended.all(dim=1) & (beams.early_stopping is True))
    ranks = ranks + closed[:, None] * NEVER + ~ending * NEVER
    before = torch.nn.functional.pad(state.answers, (0, 1), value=-1)
    all_ranks = torch.cat([state.ranks, ranks], dim=1)
    best = all_ranks.topk(num_beams).indices
    answers = _rows(torch.cat([before, grown], dim=1), best)
    return answers, all_ranks.gather(1, best), torch.cat([state.ended, ending], dim=1).gather(1, best)


def _improvable(state: _State, alive: Sequence[Growing], beams: Beams) -> Tensor:
    """bool `(b,)`: whether the best running continuation could still outrank a finished one."""
    import torch

    to_the_end = beams.early_stopping == "never" and beams.length_penalty > 0
    lengths = [sequence.limit if to_the_end else state.grown for sequence in alive]
    possible = state.scores[:, 0] / state.scores.new_tensor(lengths) ** beams.length_penalty
    worst = torch.where(state.ended, state.ranks.amin(dim=1, keepdim=True), NEVER)
    return (possible[:, None] > worst).any(dim=1)


def _done(state: _State, alive: Sequence[Growing], beams: Beams) -> list[bool]:
    full = state.ended.all(dim=1) & (beams.early_stopping is True)
    out_of_room = state.scores.new_tensor([state.grown >= sequence.limit for sequence in alive]).bool()
    done: list[bool] = (~state.improvable | full | out_of_room).tolist()
    return done


def _rows(tensor: Tensor, index: Tensor) -> Tensor:
    """`(b, x, ...)` and index `(b, y)` -> `(b, y, ...)`."""
    return tensor.gather(1, index[..., None].expand(*index.shape, tensor.shape[-1]))
