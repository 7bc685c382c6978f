"""A teacher's answers that were kept are those that it gives, and are looked up by sample alone."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from isoform import chance, storage
from isoform.contracts import Document
from isoform.data.batches import collate
from isoform.errors import DataError, DiskError
from isoform.models.bert import Bert
from isoform.models.gpt2 import GPT2
from isoform.objectives import lessons
from isoform.objectives.distill import Distill
from isoform.registry import build_options
from isoform.text.kinds import Char
from isoform.text.tokenizers import train_tokenizer

TEXTS = ["aa bb", "a much longer one", "c d", "it ends", "x"]
CPU = torch.device("cpu")


class Examples(list):
    """Encoded documents with what a dataset says of itself."""

    fingerprint = "of these texts"

    @property
    def field_lengths(self):
        return {"text": np.array([len(one.fields["text"]) for one in self])}


def taught(kind: str, **options) -> tuple[Distill, Examples]:
    words = train_tokenizer("char", Char.Config(), TEXTS)
    of = {"kind": kind, **({"labels": ["b", "a"]} if kind == "classify" else {})}
    given = {"of": of, "teacher": "somewhere", "store": True, **options}
    objective = Distill(build_options(Distill, given, "objective"), words, 24)
    family = GPT2 if kind == "causal" else Bert
    student, teacher = (
        objective.of.fitted(family.tiny(vocab_size=words.vocab_size, width=width, num_layers=2), seed=width)
        for width in (16, 32)
    )
    objective.helper.join({"teacher": SimpleNamespace(model=teacher, tokenizer=words)}, student, 0)
    documents = [Document(str(at), {"text": text, "label": "ab"[at % 2]}) for at, text in enumerate(TEXTS)]
    return objective, Examples(objective.encode(document) for document in documents)


def rehearse(objective: Distill, train: Examples, cache, precision: str = "fp32") -> None:
    objective.helper.rehearse(train, cache, CPU, precision, nullcontext)


def batch_of(objective: Distill, train: Examples, order, **options):
    return collate([objective.prepare(train[at], chance.generator(0)) for at in order], **options)


@pytest.mark.parametrize("hidden", [None, {}])
@pytest.mark.parametrize("kind", ["causal", "classify"])
def test_what_was_kept_is_what_is_said(kind: str, hidden, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(lessons, "POOL_SAMPLES", 2)
    objective, train = taught(kind, hidden=hidden)
    rehearse(objective, train, tmp_path)
    batch = batch_of(objective, train, [3, 0, 4, 1], filler_to=16)
    batch.dropout_key = 5
    told = objective.teacher.ask(batch)
    monkeypatch.setattr(objective.teacher, "ask", None)  # a second epoch asks nobody
    kept = objective.teacher.lesson(batch)
    torch.testing.assert_close(kept.answers, told.answers, rtol=1e-5, atol=1e-6)
    assert len(kept.states) == (0 if hidden is None else 3)
    for ours, theirs in zip(kept.states, told.states, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_second_seed_asks_nobody_and_another_teacher_is_asked_anew(tmp_path, monkeypatch) -> None:
    first, train = taught("classify")
    rehearse(first, train, tmp_path)
    second, _ = taught("classify")
    with monkeypatch.context() as patch:
        patch.setattr(second.teacher, "ask", None)
        rehearse(second, train, tmp_path)
    assert len(list((tmp_path / "lessons").iterdir())) == 1
    for change in ("weights", "precision", "damage"):
        other, _ = taught("classify")
        if change == "weights":
            other.teacher.model.embedding.weight.data[0, 0] += 1
        if change == "damage":
            for folder in (tmp_path / "lessons").iterdir():
                (folder / "values").write_bytes(b"")
        told = []
        ask = other.teacher.ask
        monkeypatch.setattr(other.teacher, "ask", lambda batch, told=told, ask=ask: told.append(1) or ask(batch))
        rehearse(other, train, tmp_path, "bf16" if change == "precision" else "fp32")
        assert told, change
    assert len(list((tmp_path / "lessons").iterdir())) == 3


def test_a_sample_that_asks_nothing_has_no_rows(tmp_path) -> None:
    """A rank without a sample of its own joins in with a silent one."""
    objective, train = taught("causal", hidden={})
    rehearse(objective, train, tmp_path)
    batch = batch_of(objective, train, [1, 2])
    batch.targets[: batch.sequences.lengths[0]] = -100
    kept = objective.teacher.lesson(batch)
    torch.testing.assert_close(kept.answers, objective.teacher.ask(batch).answers, rtol=1e-5, atol=1e-6)


def test_an_unknown_sample_and_a_full_disk_are_told(tmp_path, monkeypatch) -> None:
    objective, train = taught("causal")
    rehearse(objective, Examples(train[:2]), tmp_path)
    with pytest.raises(DataError, match="the teacher was not asked about sample 3; remove the folder"):
        objective.teacher.lesson(batch_of(objective, train, [3]))
    monkeypatch.setattr(storage, "free_bytes", lambda path: 10)
    with pytest.raises(DiskError, match=r"GB are needed"):
        rehearse(objective, train, tmp_path / "other")
