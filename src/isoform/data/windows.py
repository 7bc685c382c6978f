"""Long documents: cut into windows, cut off, or refused, as `data.long_documents` says."""

from __future__ import annotations

import numpy as np

from isoform.contracts import Document, Encoded, IntArray, Ints, Objective, Tokenizer
from isoform.errors import DataError
from isoform.text.tokenizers import TextTokenizer


class Windower:
    """Divides the `text` of documents that are longer than the context, and the bytes that it stands for.

    Windows have `objective.window_tokens` ids. Unless they stand end to end (`objective.window_overlap` is 0), each
    begins with the last id of the one before, which it reads but is not asked, so that every token but the first is
    asked exactly once. An objective that is not `windowed` shortens its long samples itself; here they are counted, or
    refused.
    """

    def __init__(self, tokenizer: Tokenizer, objective: Objective, policy: str, max_tokens: int) -> None:
        self._widths = np.ones(tokenizer.vocab_size, dtype=np.int64)
        if isinstance(tokenizer, TextTokenizer):
            self._widths = tokenizer.token_widths
        self._windowed = objective.windowed
        self._objective = objective
        self._window = objective.window_tokens if objective.windowed else max_tokens
        # An objective that asks from both sides has windows end to end.
        self._overlap: int = getattr(objective, "window_overlap", 1)
        self._policy = policy
        self._max_tokens = max_tokens
        self.key = [policy, self._window, max_tokens, objective.windowed, *([] if self._overlap else ["end to end"])]

    def cut(self, document: Document, encoded: Encoded) -> tuple[list[tuple[int, int]], list[int], int]:
        """((start, length) of each window in the document's text, bytes of each, tokens that are dropped).

        Raises: DataError where the document is too long and the policy is `refuse`.
        """
        ids = encoded.fields.get("text")
        # An encoder-decoder reads two sequences, each as long as the context; so does who compares two.
        apart = "encoder-decoder" in self._objective.needs or getattr(self._objective, "compares", False)
        together = max if apart else sum
        num_tokens = together(map(len, encoded.token_fields))
        if not self._windowed or ids is None:
            over = num_tokens - self._max_tokens
            if over > 0 and self._policy == "refuse":
                raise self._too_long(document, num_tokens, self._max_tokens)
            return [(0, len(ids) if ids is not None else 0)], [encoded.num_bytes], max(over, 0)
        if len(ids) <= self._window:
            return [(0, len(ids))], [encoded.num_bytes], 0
        if self._policy == "refuse":
            raise self._too_long(document, len(ids), self._window)
        if self._policy == "truncate":
            before = self._bytes_before(ids, encoded.num_bytes, np.array([self._window]))
            return [(0, self._window)], before.tolist(), len(ids) - self._window
        starts = np.arange(0, len(ids) - self._overlap, max(1, self._window - self._overlap))
        ends = np.minimum(starts + self._window, len(ids))
        before = self._bytes_before(ids, encoded.num_bytes, ends)
        ranges = list(zip(starts.tolist(), (ends - starts).tolist(), strict=True))
        return ranges, np.diff(before, prepend=0).tolist(), 0

    def _bytes_before(self, ids: IntArray, num_bytes: int, ends: Ints) -> Ints:
        """UTF-8 bytes of the text before each end, in the proportion of the tokens' own widths."""
        widths = self._widths[ids]
        total = int(widths.sum())
        if total == 0:
            widths, total = np.ones(len(ids), dtype=np.int64), len(ids)
        before: Ints = np.concatenate([[0], np.cumsum(widths)])[ends]
        return (before * num_bytes + total // 2) // total

    @staticmethod
    def _too_long(document: Document, num_tokens: int, limit: int) -> DataError:
        place = f"{document.meta.get('source', document.id)}:{document.meta.get('row', '')}".rstrip(":")
        return DataError(
            f"{place}: the document has {num_tokens} tokens, at most {limit} fit; raise `text.max_tokens`, or set "
            "`data.long_documents: windows` or `truncate`"
        )
