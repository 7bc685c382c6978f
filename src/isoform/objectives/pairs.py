"""Questions with their answers: what `answers` (in one stream) and `text-to-text` (in two) have in common."""

from __future__ import annotations

from isoform.contracts import Document, Encoded, Tokenizer
from isoform.errors import DataError
from isoform.objectives.fields import place, required_text


def encode_pair(document: Document, tokenizer: Tokenizer, max_tokens: int, *, prefix: str = "") -> Encoded:
    """Ids of `question` behind the prefix, and of `answer` where there is one; the answer's bytes.

    Raises: DataError naming source and row where a text is missing or empty, or the answer and its end do not fit.
    """
    ids = {"question": tokenizer.encode(prefix + required_text(document, "question"))}
    num_bytes = 0
    if "answer" in document.fields:
        answer = required_text(document, "answer")
        ids["answer"] = tokenizer.encode(answer)
        num_bytes = len(answer.encode())
    if len(ids.get("answer", ())) + 1 > max_tokens:
        raise DataError(
            f"{place(document)}: the answer has {len(ids['answer'])} tokens, at most {max_tokens - 1} fit; "
            "raise `text.max_tokens` or remove the row"
        )
    return Encoded(document.id, ids, num_bytes, document)


def texts_of(encoded: Encoded, tokenizer: Tokenizer) -> tuple[str, str | None]:
    """The question and the expected answer as they were written, or else as their tokens spell them."""
    written = encoded.document.fields if encoded.document else {}
    question = written.get("question", tokenizer.decode(encoded.fields["question"].tolist()))
    answer = written.get("answer")
    if answer is None and "answer" in encoded.fields:
        answer = tokenizer.decode(encoded.fields["answer"].tolist())
    return question, answer
