"""The loss of classifiers is that of transformers, however a batch is cut up, and long texts lose their ends alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from isoform import chance
from isoform.checkpoints.forms import save_model
from isoform.contracts import Document
from isoform.data.batches import collate
from isoform.errors import ConfigError, DataError
from isoform.models.bert import Bert
from isoform.models.heads import Classifier
from isoform.objectives.classify import Classify
from isoform.objectives.fields import cut_to_fit
from isoform.training.step import LossModule, accumulate

LABELS = ["neg", "pos", "so-so"]
MARKS = {"single-label": "pos", "multi-label": "pos; neg", "regression": "0.75"}


def objective(letters, max_tokens: int = 12, **options) -> Classify:
    given = {"labels": ["value"] if options.get("task") == "regression" else LABELS, **options}
    return Classify(Classify.Config(**given), letters, max_tokens)


def document(**fields: str) -> Document:
    return Document("d", fields, {"source": "f.csv", "row": 7})


def sample(asking: Classify, **fields: str):
    return asking.prepare(asking.encode(document(**fields)), chance.generator(0))


def batch_of(asking: Classify, task: str, **options):
    other = {"single-label": "so-so", "multi-label": "", "regression": "-2"}[task]
    texts = [("aa bb", MARKS[task]), ("a much longer one", other), ("c", MARKS[task])]
    samples = [asking.prepare(_renamed(asking, at, *pair), chance.generator(0)) for at, pair in enumerate(texts)]
    return samples, collate(samples, **options)


def _renamed(asking: Classify, at: int, text: str, label: str):
    return asking.encode(Document(str(at), {"text": text, "label": label}, {}))


def model_for(asking: Classify) -> torch.nn.Module:
    return asking.fitted(Bert.tiny(vocab_size=600), seed=1)


@pytest.mark.parametrize("task", list(MARKS))
def test_the_loss_is_that_of_transformers(task: str, letters, tmp_path) -> None:
    asking = objective(letters, task=task)
    model = model_for(asking)
    samples, batch = batch_of(asking, task)
    part = asking.loss(model, batch, model(batch))["loss"]
    mean = float(part.total.detach()) / asking.counts(batch)["loss"]
    save_model(tmp_path / "out", model, None)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    ids = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(s.tokens).long() for s in samples], batch_first=True)
    mask = torch.tensor([[int(at < len(s.tokens)) for at in range(ids.shape[1])] for s in samples])
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask, labels=batch.labels).loss
    assert mean == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("task", list(MARKS))
def test_any_micro_batch_gives_the_gradient_of_the_whole(task: str, letters) -> None:
    asking = objective(letters, task=task)
    samples, whole = batch_of(asking, task, filler_to=16)
    gradients = []
    for batches in ([whole], [collate(samples[:1]), collate(samples[1:])]):
        model = model_for(asking)
        counts = {"loss": sum(asking.counts(batch)["loss"] for batch in batches)}
        assert counts == {"loss": 3.0}
        module = LossModule(model, asking)
        accumulate(module, batches, counts, precision="fp32", device=torch.device("cpu"))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_statistics_count_what_was_said(letters) -> None:
    asking = objective(letters)
    model = model_for(asking)
    _, batch = batch_of(asking, "single-label")
    with torch.no_grad():
        found = asking.statistics(model, batch, model(batch))
        rows = asking.decided(model, batch, model(batch))
    for at, row in enumerate(rows):
        said = LABELS.index(row["label"])
        assert found[f"predicted.{said}"][at] == 1
        assert found[f"probability.{said}"][at] == pytest.approx(row["probabilities"][row["label"]])
        assert found["correct"][at] == float(said == int(batch.labels[at]))
    gaps = sum(found[f"gap.{at}"] for at in range(15))
    surest = torch.tensor([max(row["probabilities"].values()) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(gaps, surest - found["correct"])


@pytest.mark.parametrize(
    ("first", "second", "kept"),
    [
        ("abc", "de", "abc|de"),
        ("abcdefghijkl", "de", "abcdefg|de"),
        ("ab", "cdefghijklmn", "ab|cdefghi"),
        ("a" * 9, "b" * 9, "aaaaa|bbbb"),
    ],
)
def test_of_a_pair_the_longer_text_is_cut_first(first: str, second: str, kept: str, letters) -> None:
    asking = objective(letters, second="other")
    view = asking.view(asking.encode(document(text=first, other=second)))
    bos, eos = letters.special_ids["bos"], letters.special_ids["eos"]
    assert view.tokens[0] == bos and view.tokens[-1] == eos and len(view.tokens) <= 12
    texts = "|".join(
        letters.decode(piece) for piece in np.split(view.tokens, np.flatnonzero(view.tokens == eos) + 1)[:2]
    )
    assert texts == kept
    assert view.segments.tolist() == [0] * (2 + kept.index("|")) + [1] * (len(kept) - kept.index("|"))


def test_a_long_text_loses_its_end_and_the_plan_knows_its_length(letters) -> None:
    asking = objective(letters)
    encoded = asking.encode(document(text="x" * 1_000_000, label="pos"))
    assert len(asking.view(encoded).tokens) == 12
    lengths = np.array([1_000_000, 3])
    assert asking.planned_tokens({"text": lengths, "label": np.zeros(2)}).tolist() == [12, 5]


@pytest.mark.parametrize(
    ("options", "fields", "message"),
    [
        ({}, {"text": "a", "label": "poss"}, r"f.csv:7: the label 'poss' .* \(did you mean 'pos'\?\): neg, pos, so-so"),
        ({}, {"text": "a"}, "f.csv:7: no field 'label'; training and scoring need one, `isoform predict` does not"),
        ({"task": "regression"}, {"text": "a", "label": "nan"}, "'nan' is no number"),
        ({"second": "other"}, {"text": "a", "label": "pos"}, "no field 'other'"),
    ],
)
def test_a_document_that_does_not_fit_is_named(options, fields, message: str, letters) -> None:
    asking = objective(letters, **options)
    with pytest.raises(DataError, match=message):
        sample(asking, **fields)


def test_labels_come_from_training_or_from_the_model() -> None:
    train = [document(text="a", label=name) for name in ("b", "a", "b ")]
    config = Classify.Config()
    assert Classify.settled(config, train, None).labels == ["a", "b"]
    known = Classifier(labels=("b", "c", "a"))
    assert Classify.settled(config, train, known).labels == ["b", "c", "a"]
    assert Classify.settled(config, None, known).labels == ["b", "c", "a"]
    several = Classify.Config(task="multi-label", separator="|")
    assert Classify.settled(several, [document(text="a", label="x| y"), document(text="b", label="")], None).labels == [
        "x",
        "y",
    ]
    with pytest.raises(ConfigError, match="the model has no classifier"):
        Classify.settled(config, None, None)
    with pytest.raises(ConfigError, match=r"objective.task: the model's classifier has single-label"):
        Classify.settled(several, train, known)
    with pytest.raises(ConfigError, match=r"no label 'b'; it has a, c; set `objective.new_head: true`"):
        Classify.settled(config, train, Classifier(labels=("a", "c")))


def test_numbers_in_the_data_are_called_by_their_names() -> None:
    train = [document(text="a", label=name) for name in ("1", "0", "bad")]
    config = Classify.Config(label_names=["good", "bad", "ugly"])
    assert Classify.settled(config, train, None).labels == ["good", "bad", "ugly"], "in their own order"
    asking = Classify(Classify.settled(config, train, None), None, 12)
    assert [asking.label_of(each) for each in train] == [1, 0, 1]
    with pytest.raises(DataError, match=r"the label '3' is no number from 0 to 2 and none of these names"):
        asking.label_of(document(text="a", label="3"))
    several = Classify.Config(task="multi-label", label_names=["good", "bad"])
    asking = Classify(Classify.settled(several, train, None), None, 12)
    assert asking._stored(document(text="a", label="1; 0")).tolist() == [1, 0]


def test_of_several_labels_one_alone_may_be_told_from_none() -> None:
    train = [document(text="a", label="toxic"), document(text="b", label="")]
    assert Classify.settled(Classify.Config(task="multi-label"), train, None).labels == ["toxic"]
    with pytest.raises(DataError, match="one label only"):
        Classify.settled(Classify.Config(), train[:1], None)


@pytest.mark.parametrize(
    ("keep", "one", "pair"),
    [
        ("start", [0, 1, 2, 3, 4, 5, 6, 7], [[0, 1, 2, 3, 4], [50, 51, 52]]),
        ("end", [12, 13, 14, 15, 16, 17, 18, 19], [[15, 16, 17, 18, 19], [50, 51, 52]]),
        ("ends", [0, 1, 14, 15, 16, 17, 18, 19], [[0, 16, 17, 18, 19], [50, 51, 52]]),
    ],
)
def test_what_is_kept_of_a_text_that_is_too_long(keep, one, pair) -> None:
    long, short = np.arange(20, dtype=np.int32), np.arange(50, 53, dtype=np.int32)
    assert [part.tolist() for part in cut_to_fit([long], 8, keep)] == [one]
    assert [part.tolist() for part in cut_to_fit([long, short], 8, keep)] == pair
    assert [part.tolist() for part in cut_to_fit([short, long], 8, keep)] == pair[::-1]
    assert cut_to_fit([short], 8, keep)[0] is short
