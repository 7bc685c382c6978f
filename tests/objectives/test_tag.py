"""Words, their tags and the entities that tags spell; the loss is that of transformers, however a batch is cut up."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from transformers import AutoModelForTokenClassification, PreTrainedTokenizerFast

from isoform import chance
from isoform.checkpoints.forms import save_model
from isoform.contracts import IGNORE, Document
from isoform.data.batches import collate
from isoform.errors import ConfigError, DataError
from isoform.evaluation.evaluate import evaluate
from isoform.evaluation.metrics import StreamingMetrics, build_metrics
from isoform.models.bert import Bert
from isoform.models.heads import Classifier
from isoform.objectives.tag import Tag, spans
from isoform.text.kinds import Bpe, WordPiece
from isoform.text.tokenizers import train_tokenizer
from isoform.training.step import LossModule, accumulate

TAGS = ["O", "B-LOC", "B-PER", "I-PER"]
SENTENCES = [
    (["Ada", "Lovelace", "lived", "in", "London"], ["B-PER", "I-PER", "O", "O", "B-LOC"]),
    (["Paris"], ["B-LOC"]),
    (["nobody", "lived", "there", "unforgettably"], ["O", "O", "O", "O"]),
]


@pytest.fixture(scope="module")
def pieces():
    texts = [" ".join(words) for words, _ in SENTENCES] * 3
    return train_tokenizer("wordpiece", WordPiece.Config(vocab_size=60), texts)


def objective(tokenizer, max_tokens: int = 48, **options) -> Tag:
    return Tag(Tag.Config(**{"labels": TAGS, **options}), tokenizer, max_tokens)


def document(words, tags=None, at: int = 0) -> Document:
    fields = {"tokens": words if isinstance(words, str) else json.dumps(words)}
    if tags is not None:
        fields["tags"] = tags if isinstance(tags, str) else json.dumps(tags)
    return Document(f"d{at}", fields, {"source": "f.jsonl", "row": 7})


def samples_of(asking: Tag):
    documents = [document(words, tags, at) for at, (words, tags) in enumerate(SENTENCES)]
    return [asking.prepare(asking.encode(each), chance.generator(0)) for each in documents]


def model_for(asking: Tag, tokenizer) -> torch.nn.Module:
    return asking.fitted(Bert.tiny(vocab_size=tokenizer.vocab_size), seed=1)


def test_first_tokens_answer_for_their_words_as_in_transformers(pieces) -> None:
    asking = objective(pieces)
    theirs = PreTrainedTokenizerFast(tokenizer_object=Backend.from_str(pieces.backend.to_str()))
    for words, tags in SENTENCES:
        sample = asking.prepare(asking.encode(document(words, tags)), chance.generator(0))
        found = theirs(words, is_split_into_words=True, add_special_tokens=False)
        assert sample.tokens[1:-1].tolist() == found["input_ids"]
        assert sample.tokens[0] == asking.begin[0] and sample.tokens[-1] == asking.end[0]
        places = [None, *found.word_ids(), None]
        expected = [
            IGNORE if word is None or word == before else TAGS.index(tags[word])
            for before, word in zip([None, *places], places, strict=False)
        ]
        assert sample.targets.tolist() == expected


def test_words_of_bytes_have_their_space() -> None:
    texts = [" ".join(words) for words, _ in SENTENCES] * 5
    words = train_tokenizer("bpe", Bpe.Config(vocab_size=300), texts)
    asking = objective(words, edges=False)
    for given_words, tags in SENTENCES:
        encoded = asking.encode(document(given_words, tags))
        assert encoded.fields["tokens"].tolist() == words.encode(" ".join(given_words)).tolist()
        firsts = [words.decode([token]) for token in encoded.fields["tokens"][encoded.fields["_starts"]]]
        assert all(word.startswith(first.strip()) for word, first in zip(given_words, firsts, strict=True))


def test_the_loss_is_that_of_transformers(pieces, tmp_path) -> None:
    asking = objective(pieces)
    model, samples = model_for(asking, pieces), samples_of(asking)
    batch = collate(samples)
    mean = float(asking.loss(model, batch, model(batch))["loss"].total.detach()) / asking.counts(batch)["loss"]
    save_model(tmp_path / "out", model, None)
    theirs = AutoModelForTokenClassification.from_pretrained(tmp_path / "out").eval()
    ids, targets = (
        torch.nn.utils.rnn.pad_sequence(
            [torch.from_numpy(getattr(one, name)).long() for one in samples], batch_first=True, padding_value=fill
        )
        for name, fill in (("tokens", 0), ("targets", IGNORE))
    )
    mask = torch.tensor([[int(at < len(one.tokens)) for at in range(ids.shape[1])] for one in samples])
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask, labels=targets).loss
    assert mean == pytest.approx(float(expected), rel=1e-4)


def test_any_micro_batch_gives_the_gradient_of_the_whole(pieces) -> None:
    asking = objective(pieces)
    samples = samples_of(asking)
    samples[1] = dataclasses.replace(samples[1], weight=2.0)
    gradients = []
    for batches in ([collate(samples, filler_to=16)], [collate(samples[:1], filler_to=8), collate(samples[1:])]):
        model = model_for(asking, pieces).double()
        counts = {"loss": sum(asking.counts(batch)["loss"] for batch in batches)}
        assert counts == {"loss": 11.0}
        accumulate(LossModule(model, asking), batches, counts, precision="fp32", device=torch.device("cpu"))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------ entities


def by_the_book(tags: list[str]) -> list[tuple[int, int, str]]:
    """The two rules of `conlleval`, word by word, for marks B, I and O."""
    found, start = [], None
    for at, tag in enumerate([*tags, "O"]):
        before = tags[at - 1] if at else "O"
        ends = before != "O" and (tag == "O" or tag[0] == "B" or tag[2:] != before[2:])
        begins = tag != "O" and (tag[0] == "B" or before == "O" or tag[2:] != before[2:])
        if ends:
            found.append((start, at, before[2:]))
        if begins:
            start = at
    return found


@given(st.lists(st.sampled_from(["O", "B-A", "I-A", "B-B", "I-B"]), max_size=12))
def test_entities_are_those_of_conlleval(tags: list[str]) -> None:
    assert spans(tags) == by_the_book(tags)


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("B-A E-A S-A", [(0, 2, "A"), (2, 3, "A")]),
        ("B-A I-A E-A I-A", [(0, 3, "A"), (3, 4, "A")]),
        ("E-A E-A", [(0, 1, "A"), (1, 2, "A")]),
        ("B-first-name I-first-name", [(0, 2, "first-name")]),
        ("NOUN VERB", []),
    ],
)
def test_other_marks(tags: str, found) -> None:
    assert spans(tags.split()) == found


class Answers(torch.nn.Module):
    """A model that says what it is told: `classifier` scores of each token from a list of tags."""

    def __init__(self, tags: list[str]) -> None:
        super().__init__()
        self.tags = [TAGS.index(tag) for tag in tags]

    def forward(self, batch, *, cache=None, all_layers=False):
        from isoform.contracts import Output

        return Output(batch.tokens[:, None].double())

    def classifier(self, hidden, batch):
        scores = torch.zeros(len(hidden), len(TAGS), dtype=torch.float64)
        places = (batch.targets != IGNORE).nonzero().squeeze(1)
        scores[places, torch.tensor(self.tags[: len(places)])] = 5.0
        return scores


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (["B-PER", "I-PER", "O", "O", "B-LOC"], {"tag_accuracy": 1, "entity_f1": 1}),
        (
            ["B-PER", "B-PER", "O", "O", "B-LOC"],
            {"tag_accuracy": 0.8, "entity_precision": 1 / 3, "entity_recall": 1 / 2, "entity_f1": 0.4},
        ),
        (
            ["O", "O", "O", "O", "O"],
            {"tag_accuracy": 0.4, "entity_precision": None, "entity_recall": 0, "entity_f1": 0},
        ),
    ],
)
def test_scores_of_one_sentence(said, expected, pieces) -> None:
    asking = objective(pieces)
    found = evaluate(Answers(said), asking, [asking.encode(document(*SENTENCES[0]))], split="dev")
    values = {row["metric"]: row["value"] for row in found.rows}
    for metric, value in expected.items():
        assert values[metric] == (None if value is None else pytest.approx(value)), metric
    row = found.predictions[0]
    assert row["prediction"] == " ".join(said) and row["input"] == "Ada Lovelace lived in London"
    assert not any(name.startswith("said") for name in row["stats"])


def test_intervals_are_over_sentences(pieces) -> None:
    asking = objective(pieces)
    documents = [asking.encode(document(*SENTENCES[at % 2], at)) for at in range(20)]
    found = evaluate(model_for(asking, pieces), asking, documents, split="dev", metrics=["tag_accuracy", "entity_f1"])
    for row in found.rows:
        assert row["n"] == 20 and row["low"] <= row["value"] <= row["high"]


def test_perfect_entities_of_few_sentences_are_not_certain() -> None:
    """Nine sentences of which three have all the entities say as much as three do."""
    entities = np.array([1.0, 1.0, 1.0, 0, 0, 0, 0, 0, 0])
    stream = StreamingMetrics(build_metrics(["entity_precision", "entity_recall", "entity_f1"]))
    stream.add({"gold_entities": entities, "predicted_entities": entities, "hit_entities": entities})
    for row in stream.rows("dev"):
        assert (row["value"], row["low"], row["high"], row["n"]) == (1.0, pytest.approx(3 / (3 + 1.959964**2)), 1.0, 9)


def test_words_that_are_cut_off_count_as_wrong(pieces) -> None:
    words, tags = SENTENCES[0]
    whole = objective(pieces).encode(document(words, tags))
    room = int(whole.fields["_starts"][1])  # of the two words of a name the first is read
    asking = objective(pieces, max_tokens=room + 2)
    encoded = asking.encode(document(words, tags))
    sample = asking.prepare(encoded, chance.generator(0))
    assert sample.label == (5.0, 2.0, 1.0) and len(sample.tokens) == room + 2
    found = evaluate(Answers(["B-PER"]), asking, [encoded], split="dev")
    values = {row["metric"]: row["value"] for row in found.rows}
    assert values["tag_accuracy"] == pytest.approx(1 / 5)
    assert values["entity_precision"] == 0 and values["entity_recall"] == 0  # half a name is not the name
    assert found.predictions[0]["prediction"] == "B-PER O O O O"
    assert asking.planned_tokens({"tokens": np.array([3, 900])}).tolist() == [min(3, room) + 2, room + 2]


# ----------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("words", "tags", "message"),
    [
        (["a", "b"], ["O"], "f.jsonl:7: 2 tokens and 1 tags; one tag for each is expected"),
        (["a", "b"], ["O", "B-PLACE"], r"f.jsonl:7: the tag 'B-PLACE' is none of those in training"),
        (["a", " "], ["O", "O"], "f.jsonl:7: word 2 of 2 is ' '; a list of words is expected in `tokens`"),
        (["a", None], ["O", "O"], "f.jsonl:7: word 2 of 2 is None"),
        ([], [], "f.jsonl:7: no word is given"),
        (["a"], [3], r"f.jsonl:7: 3 is no name of a tag; name them with `objective.tag_names`"),
        (["a"], None, "f.jsonl:7: no field 'tags'; training and scoring need one, `isoform predict` does not"),
    ],
)
def test_a_sentence_that_does_not_fit_is_named(words, tags, message: str, pieces) -> None:
    asking = objective(pieces)
    with pytest.raises(DataError, match=message):
        asking.prepare(asking.encode(document(words, tags)), chance.generator(0))


def test_tags_that_are_numbers_have_names(pieces) -> None:
    asking = objective(pieces, tag_names=["O", "B-PER", "I-PER", "B-LOC"])
    encoded = asking.encode(document(["Ada", "Lovelace"], [1, 2]))
    assert [TAGS[tag] for tag in encoded.fields["_tags"]] == ["B-PER", "I-PER"]
    with pytest.raises(DataError, match=r"the tag 4 is no number from 0 to 3 \(objective.tag_names\)"):
        asking.encode(document(["a"], [4]))
    with pytest.raises(DataError, match="the tag -1 is no number from 0 to 3"):
        asking.encode(document(["a"], [-1]))


def test_a_text_is_divided_at_its_spaces(pieces) -> None:
    asking = objective(pieces)
    plain, listed = (asking.encode(document(words)) for words in ("Ada lived  there", ["Ada", "lived", "there"]))
    assert plain.fields["tokens"].tolist() == listed.fields["tokens"].tolist()
    view = asking.view(plain)
    assert (view.targets != IGNORE).sum() == 3


def test_a_word_of_which_nothing_is_left_keeps_its_tag(pieces) -> None:
    encoded = objective(pieces).encode(document(["Ada", "\u0301", "lived"], ["B-PER", "O", "O"]))
    assert len(encoded.fields["_starts"]) == 3
    assert encoded.fields["tokens"][encoded.fields["_starts"][1]] == pieces.special_ids["unk"]


def test_tags_come_from_training_or_from_the_model() -> None:
    train = [document(*pair) for pair in SENTENCES]
    config = Tag.Config()
    assert Tag.settled(config, train, None).labels == TAGS
    known = Classifier(labels=("I-PER", "B-PER", "B-LOC", "O"), pooling="none")
    assert Tag.settled(config, train, known).labels == list(known.labels)
    assert Tag.settled(config, None, known).labels == list(known.labels)
    assert objective(None, labels=["ADJ", "NOUN"]).metrics == ("tag_accuracy", "loss")
    with pytest.raises(ConfigError, match="the model has no classifier of words"):
        Tag.settled(config, None, None)
    with pytest.raises(ConfigError, match="classifier decides on whole texts, tag on words"):
        Tag.settled(config, train, Classifier(labels=("a", "b")))
    with pytest.raises(
        ConfigError, match=r"has no tag 'B-LOC', 'B-PER', 'I-PER'; it has O, X; set `objective.new_head"
    ):
        Tag.settled(config, train, Classifier(labels=("O", "X"), pooling="none"))
    with pytest.raises(DataError, match="one tag only, 'O'"):
        Tag.settled(config, [document(["a"], ["O"])], None)
