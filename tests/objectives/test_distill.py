"""What a student loses beside its teacher is a few lines of torch, however a batch is cut up."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from scipy.special import rel_entr, softmax
from torch.nn import functional as F

from isoform import chance
from isoform.contracts import Document
from isoform.data.batches import collate
from isoform.errors import ConfigError
from isoform.models.bag_of_words import NaiveBayes
from isoform.models.bert import Bert
from isoform.models.gpt2 import GPT2
from isoform.models.heads import Classifier
from isoform.models.t5 import T5
from isoform.objectives.distill import Distill, distance, divergence
from isoform.registry import build_options
from isoform.text.kinds import Char
from isoform.text.ngrams import NGrams
from isoform.text.tokenizers import train_tokenizer
from isoform.training.step import LossModule, accumulate, trained_parameters

TEXTS = ["aa bb", "a much longer one", "c d", "it ends"]
LABELS = ["neg", "pos", "so-so"]
KINDS = {
    "causal": ({"kind": "causal"}, GPT2),
    "masked": ({"kind": "masked"}, Bert),
    "classify": ({"kind": "classify", "labels": LABELS}, Bert),
    "classify-last": ({"kind": "classify", "labels": LABELS}, GPT2),
    "several": ({"kind": "classify", "labels": LABELS, "task": "multi-label"}, Bert),
    "number": ({"kind": "classify", "labels": ["value"], "task": "regression"}, Bert),
    "text-to-text": ({"kind": "text-to-text"}, T5),
}
MARKS = {"several": ["pos;neg", "", "neg", "so-so"], "number": ["0.5", "-1", "2", "0"]}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer("char", Char.Config(), TEXTS)


def asking(tokenizer, kind: str, **options) -> Distill:
    given = {"of": KINDS[kind][0], "teacher": "somewhere", **options}
    return Distill(build_options(Distill, given, "objective"), tokenizer, 24)


def pair(tokenizer, kind: str, objective: Distill, *, teacher_labels=None, dtype=torch.float64, **sizes):
    """(student of 2 layers, teacher of 4), both with dropout, the teacher joined."""
    family = KINDS[kind][1]
    size = {"vocab_size": tokenizer.vocab_size, "dropout": 0.3}
    student = objective.of.fitted(family.tiny(num_layers=2, **size), seed=1)
    theirs = objective.of
    if teacher_labels is not None:
        theirs = type(theirs)(theirs.config.model_copy(update={"labels": teacher_labels}), tokenizer, 24)
    teacher = theirs.fitted(family.tiny(num_layers=4, **{**size, **sizes}), seed=2)
    for number, parameter in enumerate([*student.parameters(), *teacher.parameters()]):
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(number))
    student, teacher = student.to(dtype), teacher.to(dtype)
    objective.helper.join({"teacher": SimpleNamespace(model=teacher, tokenizer=tokenizer)}, student, seed=5)
    if objective.helper.companion is not None:
        objective.helper.companion.to(dtype)
    return student, teacher


def samples_of(objective: Distill, kind: str):
    marks = MARKS.get(kind, ["pos", "neg", "so-so", "pos"])
    fields = [
        {"question": text, "answer": mark} if kind == "text-to-text" else {"text": text, "label": mark}
        for text, mark in zip(TEXTS, marks, strict=True)
    ]
    documents = [Document(str(at), each) for at, each in enumerate(fields)]
    return [
        objective.prepare(objective.encode(document), chance.generator(3, at)) for at, document in enumerate(documents)
    ]


def step(objective: Distill, model, batches):
    """Gradients of what is trained and the total loss, as a step makes them."""
    counts: dict[str, float] = {}
    for batch in batches:
        batch.dropout_key = 11
        if batch.source is not None:
            batch.source.dropout_key = 11
        for name, count in objective.counts(batch).items():
            counts[name] = counts.get(name, 0.0) + count
    names = trained_parameters(model, objective)
    for parameter in names.values():
        parameter.grad = None
    accumulate(LossModule(model, objective), batches, counts, precision="fp32", device=torch.device("cpu"))
    return {name: p.grad.clone() for name, p in names.items() if p.grad is not None}, counts


def plain_loss(objective: Distill, kind: str, student, teacher, batch, order=None) -> torch.Tensor:
    """The loss again, from whole score tables: means over texts or targets, no teacher's dropout, no grad."""
    temperature, share = objective.config.temperature, objective.config.teacher_weight
    ours = student(batch, all_layers=True)
    batch.dropout_key = None
    if batch.source is not None:
        batch.source.dropout_key = None
    with torch.no_grad():
        theirs = teacher(batch, all_layers=True)
    batch.dropout_key = 11
    if batch.source is not None:
        batch.source.dropout_key = 11
    if batch.targets is not None:
        asked = batch.targets >= 0
        z, t = student.logits(ours.hidden)[asked], teacher.logits(theirs.hidden)[asked].detach()
        answered = F.cross_entropy(z, batch.targets[asked])
    else:
        z = student.classifier(ours.hidden, batch)
        batch.dropout_key = None
        t = teacher.classifier(theirs.hidden, batch).detach()
        batch.dropout_key = 11
        t = t if order is None else t[:, order]
        if kind == "number":
            labels = batch.labels.double()
            return (1 - share) * F.mse_loss(z, labels) + share * F.mse_loss(z, t)
        if kind == "several":
            labels = batch.labels.double()
            answered = F.binary_cross_entropy_with_logits(z, labels)
            p, q = (t / temperature).sigmoid(), (z / temperature).sigmoid()
            apart = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
            return (1 - share) * answered + share * temperature**2 * apart
        answered = F.cross_entropy(z, batch.labels)
    apart = F.kl_div(F.log_softmax(z / temperature, -1), F.softmax(t / temperature, -1), reduction="batchmean")
    loss = (1 - share) * answered + share * temperature**2 * apart
    if objective.config.hidden is not None:
        maps, kept = objective.helper.companion, []
        for number, (mine, goal) in enumerate(objective.helper.pairs):
            h = ours.hidden if mine == 2 else ours.layers[mine]
            g = theirs.hidden if goal == 4 else theirs.layers[goal]
            h = h if maps is None else maps[number](h)
            kept.append(
                F.mse_loss(h, g) if objective.config.hidden.loss == "mse" else (1 - F.cosine_similarity(h, g)).mean()
            )
        loss = loss + objective.config.hidden.weight * torch.stack(kept).mean()
    return loss


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_plain_formula(kind: str, tokenizer) -> None:
    hidden = None if kind in ("number", "several") else {"weight": 0.7}
    objective = asking(tokenizer, kind, temperature=3.0, teacher_weight=0.4, hidden=hidden)
    student, teacher = pair(tokenizer, kind, objective, width=48)
    batch = collate(samples_of(objective, kind))
    found, _ = step(objective, student, [batch])
    names = trained_parameters(student, objective)
    expected = torch.autograd.grad(
        plain_loss(objective, kind, student, teacher, batch), list(names.values()), allow_unused=True
    )
    assert any(name.startswith("objective.") for name in found) == (hidden is not None)
    for name, gradient in zip(names, expected, strict=True):
        assert (gradient is None) == (name not in found), name
        if gradient is not None:
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("kind", ["causal", "classify", "masked", "text-to-text"])
@pytest.mark.parametrize("loss", ["mse", "cosine"])
def test_any_micro_batch_gives_the_gradient_of_the_whole(kind: str, loss: str, tokenizer) -> None:
    objective = asking(tokenizer, kind, hidden={"loss": loss, "layers": {1: 3, 2: 4}})
    student, _ = pair(tokenizer, kind, objective)
    assert objective.helper.companion is None
    samples = samples_of(objective, kind)
    whole, counts = step(objective, student, [collate(samples, filler_to=16)])
    parts, again = step(objective, student, [collate(samples[:1], filler_to=4), collate(samples[1:])])
    assert counts == again and counts["teacher"] == counts["loss"]
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-6, atol=1e-9)


def test_weights_of_samples_weigh_every_part(tokenizer) -> None:
    """Two samples of weight 1 are one of weight 2."""
    objective = asking(tokenizer, "causal", hidden={})
    student, _ = pair(tokenizer, "causal", objective)
    samples = samples_of(objective, "causal")
    twice = collate([samples[0], samples[0], samples[1]])
    heavy = collate([dataclasses.replace(samples[0], weight=2.0), samples[1]])
    (first, counts), (second, again) = (step(objective, student, [batch]) for batch in (twice, heavy))
    assert counts == again
    for name, gradient in first.items():
        torch.testing.assert_close(second[name], gradient, rtol=1e-6, atol=1e-9)


def test_labels_are_aligned_by_name(tokenizer) -> None:
    objective = asking(tokenizer, "classify", teacher_weight=1.0)
    student, teacher = pair(tokenizer, "classify", objective, teacher_labels=["so-so", "neg", "pos"])
    batch = collate(samples_of(objective, "classify"))
    found, _ = step(objective, student, [batch])
    names = trained_parameters(student, objective)
    loss = plain_loss(objective, "classify", student, teacher, batch, order=[1, 2, 0])
    expected = torch.autograd.grad(loss, list(names.values()), allow_unused=True)
    for name, gradient in zip(names, expected, strict=True):
        if gradient is not None:
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)


def test_a_student_that_is_its_teacher_loses_nothing_by_it(tokenizer) -> None:
    objective = asking(tokenizer, "causal", hidden={})
    student = GPT2.tiny(vocab_size=tokenizer.vocab_size)
    objective.helper.join(
        {"teacher": SimpleNamespace(model=GPT2.tiny(vocab_size=tokenizer.vocab_size), tokenizer=tokenizer)}, student, 0
    )
    batch = collate(samples_of(objective, "causal"))
    parts = objective.loss(student, batch, student(batch, all_layers=True))
    assert float(parts["teacher"].total.detach()) == pytest.approx(0, abs=1e-6)
    assert float(parts["hidden"].total.detach()) == 0
    assert objective.helper.pairs == [(0, 0), (1, 1), (2, 2)]


def test_divergence_is_that_of_scipy() -> None:
    draw = torch.Generator().manual_seed(0)
    z, t = (
        torch.randn(5, 7, generator=draw, dtype=torch.float64),
        torch.randn(5, 7, generator=draw, dtype=torch.float64),
    )
    expected = rel_entr(softmax(t.numpy() / 2.5, axis=1), softmax(z.numpy() / 2.5, axis=1)).sum(axis=1)
    torch.testing.assert_close(divergence(z, t, 2.5), torch.from_numpy(expected))
    far = divergence(100 * z, -100 * t, 1.0)
    assert torch.isfinite(far).all() and (far > 0).all()
    assert distance(z, 2 * z, "cosine").abs().max() < 1e-12
    assert float(distance(z, z + 2, "mse")[0]) == pytest.approx(4)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("masked", {"store": True}, r"objective.store: masked makes another view of a document in every epoch"),
        (
            "causal",
            {"of": {"kind": "distill", "of": {}, "teacher": ""}},
            r"objective.of.kind: 'distill' cannot be learnt",
        ),
        ("causal", {"of": {"kind": "causal", "bot": True}}, r"objective.of.bot: unknown key"),
        ("causal", {"temperature": 0}, r"objective.temperature: given 0"),
        ("causal", {"hidden": {"layers": {"one": 2}}}, r"objective.hidden.layers"),
    ],
)
def test_options_that_cannot_be_carried_out(kind: str, options, message: str, tokenizer) -> None:
    with pytest.raises(ConfigError, match=message):
        asking(tokenizer, kind, **options)


def test_a_teacher_that_does_not_fit_is_told_in_one_line(tokenizer) -> None:
    size = {"vocab_size": tokenizer.vocab_size}

    def join(kind: str, teacher, words=tokenizer, **options) -> None:
        objective = asking(tokenizer, kind, **options)
        student = objective.of.fitted(KINDS[kind][1].tiny(**size), seed=0)
        found = {"teacher": SimpleNamespace(model=teacher, tokenizer=words)}
        with pytest.raises(ConfigError) as caught:
            objective.helper.join(found, student, 0)
        line = str(caught.value)
        assert line.startswith("objective.") and "\n" not in line
        lines.append(line)

    lines: list[str] = []
    other = train_tokenizer("char", Char.Config(), [text.replace("a", "z") for text in TEXTS])
    join("causal", GPT2.tiny(**size), other)
    assert "has another vocabulary: 16 of 22 tokens differ, token 6 is 'b' there and 'a' here" in lines[-1]
    join("causal", Bert.tiny(**size))
    assert "is not causal; a model trained with the objective causal is expected" in lines[-1]
    join("classify", Bert.tiny(**size))
    assert "has no classifier" in lines[-1]
    join("causal", GPT2.tiny(**size), None)
    assert "has no tokenizer" in lines[-1]
    join("causal", GPT2.tiny(**size, max_positions=8))
    assert "has 8 positions, text.max_tokens is 24" in lines[-1]
    join("causal", GPT2.tiny(vocab_size=7))
    assert f"has scores for 7 tokens, the tokenizer has {tokenizer.vocab_size}" in lines[-1]
    join("causal", GPT2.tiny(**size), hidden={"layers": {1: 9}})
    assert "objective.hidden.layers: 1: 9 given; the student has states 0 to 2, the teacher 0 to 2" in lines[-1]
    named = asking(tokenizer, "classify").of
    others = type(named)(named.config.model_copy(update={"labels": ["a", "b"]}), tokenizer, 24)
    join("classify", others.fitted(Bert.tiny(**size), seed=0))
    assert "has the labels a, b; neg, pos, so-so are expected, in any order" in lines[-1]
    terms = NaiveBayes(NaiveBayes.Config(vocab_size=5, classifier=Classifier(labels=tuple(LABELS))))
    join("classify", terms, NGrams([], 1, 1))
    assert "is fitted in one go and reads terms, not the student's tokens: it cannot teach" in lines[-1]
    several = asking(tokenizer, "several").of
    join("classify", several.fitted(Bert.tiny(**size), seed=0))
    assert "is a classifier of kind multi-label; single-label is expected" in lines[-1]


def test_rows_beyond_the_vocabulary_are_no_tokens(tokenizer) -> None:
    """A table that was rounded up says nothing of the rows that no token has."""
    objective = asking(tokenizer, "causal", teacher_weight=1.0, temperature=1.0)
    student = GPT2.tiny(vocab_size=tokenizer.vocab_size)
    wide = GPT2.tiny(vocab_size=tokenizer.vocab_size + 9)
    objective.helper.join({"teacher": SimpleNamespace(model=wide, tokenizer=tokenizer)}, student, 0)
    batch = collate(samples_of(objective, "causal"))
    total = objective.loss(student, batch, student(batch))["teacher"].total.detach()
    asked = batch.targets >= 0
    with torch.no_grad():
        z, t = student.logits(student(batch).hidden)[asked], wide.logits(wide(batch).hidden)[asked]
    expected = F.kl_div(z.log_softmax(-1), t[:, : z.shape[1]].log_softmax(-1), reduction="sum", log_target=True)
    assert float(total) == pytest.approx(float(expected), rel=1e-4)
