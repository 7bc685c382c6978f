"""From a file of tagged sentences to a tuned tagger, its scores, predictions and files; and to a smaller one."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForTokenClassification

import isoform
from isoform.config import RunConfig, run_config
from isoform.contracts import Document
from isoform.errors import ConfigError, DataError
from isoform.reading import merge
from isoform.serving.predict import predict, read_inputs, write_answers
from isoform.serving.use import open_model
from isoform.storage import read_json, read_jsonl
from isoform.training.prepare import prepare
from isoform.training.run import train

NAMES = {"PER": ["ada", "grace hopper", "alan turing"], "LOC": ["london", "new york", "paris"]}
FRAMES = [
    "PER FILL lived in LOC",
    "in LOC FILL there was PER",
    "PER FILL met PER",
    "nobody FILL saw LOC",
    "it FILL rains",
]
FILL = ["then", "often", "once", "never", "today"]


def sentences(number: int, seed: int = 0) -> list[tuple[list[str], list[str]]]:
    draw = random.Random(seed)
    made = []
    for _ in range(number):
        words, tags = [], []
        for word in draw.choice(FRAMES).split():
            entity = (
                draw.choice(NAMES[word]).split() if word in NAMES else [draw.choice(FILL) if word == "FILL" else word]
            )
            words += entity
            tags += [f"{'I' if at else 'B'}-{word}" for at in range(len(entity))] if word in NAMES else ["O"]
        made.append((words, tags))
    return made


def write(path: Path, made, **names) -> Path:
    keys = {"tokens": "tokens", "tags": "tags", **names}
    path.write_text("".join(json.dumps({keys["tokens"]: w, keys["tags"]: t}) + "\n" for w, t in made))
    return path


def tiny(path: Path, **changes) -> RunConfig:
    values = {
        "name": "tiny",
        "data": {"path": str(path), "splits": {"train": 0.8, "dev": 0.2}, "overlap": "keep"},
        "text": {"tokenizer": {"kind": "wordpiece", "vocab_size": 120}, "max_tokens": 24},
        "model": {"family": "modernbert", "num_layers": 2, "num_heads": 2, "width": 32, "local_window": 8},
        "objective": {"kind": "tag"},
        "train": {"max_steps": 60, "batch_sequences": 16, "learning_rate": 0.01, "precision": "fp32"},
    }
    return run_config(merge(values, changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tagged")
    return train(tiny(write(place / "my.jsonl", sentences(160))), place / "run", quiet=True).folder


def test_a_file_of_sentences_is_learnt(folder: Path) -> None:
    scored = {row["metric"]: row for row in read_json(folder / "eval.json")}
    assert list(scored) == ["entity_f1", "entity_precision", "entity_recall", "tag_accuracy", "loss"]
    assert scored["entity_f1"]["value"] > 0.9 and scored["tag_accuracy"]["value"] > 0.9
    assert scored["entity_f1"]["low"] <= scored["entity_f1"]["value"] <= scored["entity_f1"]["high"]
    rows = read_jsonl(folder / "predictions.jsonl")
    right = sum(a == b for row in rows for a, b in zip(row["gold"].split(), row["prediction"].split(), strict=True))
    assert scored["tag_accuracy"]["value"] == pytest.approx(right / sum(len(row["gold"].split()) for row in rows))
    config = read_json(folder / "final" / "config.json")
    assert config["architectures"] == ["ModernBertForTokenClassification"]
    assert config["id2label"] == {"0": "O", "1": "B-LOC", "2": "B-PER", "3": "I-LOC", "4": "I-PER"}


def test_words_come_back_with_their_tags(folder: Path) -> None:
    found = isoform.predict(folder, ["grace hopper lived in new york", "it rains"])
    assert found[0]["tokens"] == ["grace", "hopper", "lived", "in", "new", "york"]
    assert found[0]["tags"] == ["B-PER", "I-PER", "O", "O", "B-LOC", "I-LOC"]
    assert found[1] == {"tokens": ["it", "rains"], "tags": ["O", "O"]}
    theirs = AutoModelForTokenClassification.from_pretrained(folder / "final").eval()
    opened = open_model(folder)
    view = opened.objective.view(opened.objective.encode(Document("d", {"tokens": "grace hopper lived"}, {})))
    with torch.no_grad():
        logits = theirs(input_ids=torch.from_numpy(view.tokens).long()[None]).logits[0]
    said = [theirs.config.id2label[int(at)] for at in logits[torch.from_numpy(view.targets >= 0)].argmax(-1)]
    assert said == ["B-PER", "I-PER", "O"]


def test_files_go_in_and_out(folder: Path, tmp_path: Path) -> None:
    made = sentences(20, seed=5)
    conll = "".join("".join(f"{w}\t_\t{t}\n" for w, t in zip(*pair, strict=True)) + "\n" for pair in made)
    (tmp_path / "new.conll").write_text("-DOCSTART- -X- O\n\n# sent_id = 1\n" + conll)
    opened = open_model(folder)
    for name in ("out.conll", "out.jsonl", "out.csv", "out.txt"):
        answers = predict(opened, read_inputs(opened, tmp_path / "new.conll"))
        assert write_answers(answers, tmp_path / name)[0] == 20
    rows = read_jsonl(tmp_path / "out.jsonl")
    assert [row["tokens"] for row in rows] == [words for words, _ in made]
    lines = (tmp_path / "out.conll").read_text().split("\n\n")[:-1]
    assert [[line.split("\t")[1] for line in part.split("\n")] for part in lines] == [row["tags"] for row in rows]
    assert (tmp_path / "out.csv").read_text().splitlines()[0] == "tokens,tags"
    assert (tmp_path / "out.txt").read_text().split("\n")[0].split()[
        0
    ] == f"{rows[0]['tokens'][0]}/{rows[0]['tags'][0]}"
    scored = {row["metric"]: row["value"] for row in isoform.evaluate(folder, data=str(tmp_path / "new.conll"))}
    assert scored["entity_f1"] > 0.9
    bare = {row["metric"]: row["value"] for row in isoform.evaluate(folder / "final", data=str(tmp_path / "new.conll"))}
    assert bare["entity_f1"] == scored["entity_f1"]


def test_a_tagger_is_tuned_further_and_taught(folder: Path, tmp_path: Path) -> None:
    """In its own order of tags; and its first layer alone, by what the whole says of each word."""
    path = write(tmp_path / "more.jsonl", sentences(60, seed=3))
    again = prepare(tiny(path, model={"from": str(folder)}))
    whole = open_model(shutil.copytree(folder / "final", tmp_path / "elsewhere"))
    assert whole.config.text.max_tokens == 24, "a folder alone knows how long its sentences were"
    theirs = isoform.load(folder).model.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in again.model.state_dict().items())
    objective = {"kind": "distill", "teacher": str(folder), "of": {"kind": "tag"}, "hidden": {}, "store": True}
    config = tiny(path, model={"from": str(folder), "layers": [0]}, objective=objective, train={"max_steps": 5})
    run = train(config, tmp_path / "taught", quiet=True)
    assert {row["metric"]: row["value"] for row in run.rows}["tag_accuracy"] > 0.5
    assert isoform.predict(run.folder, "ada met ada")[0]["tokens"] == ["ada", "met", "ada"]
    texts = tiny(path, model={"from": str(folder)}, objective={"kind": "classify"}, data={"text": "words"})
    write(path, [("a b", "x"), ("b c", "y")] * 20, tokens="words", tags="label")
    with pytest.raises(ConfigError, match="classifier decides on words, classify on whole texts"):
        prepare(texts)


def test_columns_and_numbers_may_be_called_otherwise(tmp_path: Path) -> None:
    names = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    made = [(words, [names.index(tag) for tag in tags]) for words, tags in sentences(40)]
    path = write(tmp_path / "my.jsonl", made, tokens="words", tags="ner_tags")
    data = {"tokens": "words", "tags": "ner_tags"}
    run = prepare(tiny(path, data=data, objective={"tag_names": names}))
    assert run.objective.labels == ("O", "B-LOC", "B-PER", "I-LOC", "I-PER")
    with pytest.raises(DataError, match=r"my.jsonl:1: \d is no name of a tag; name them with `objective.tag_names`"):
        prepare(tiny(path, data=data))


@pytest.mark.parametrize(
    ("text", "changes", "error", "message"),
    [
        ("a\tO\nb\tB-X\n\nc\n", {}, DataError, "my.conll: no column 'tags'; the columns are 'tokens'"),
        ("a\tO\nb\n", {}, DataError, "my.conll:2: 1 columns given, 2 in the line before"),
        ("a\tO\n\nb\tO\n", {}, DataError, "one tag only, 'O'"),
        ("a\tO\nb\tX\n", {"model": {"family": "gpt2", "local_window": None}}, ConfigError, "bidirectional"),
    ],
)
def test_data_that_cannot_be_learnt_is_one_clear_line(text, changes, error, message: str, tmp_path: Path) -> None:
    path = tmp_path / "my.conll"
    path.write_text(text)
    changes = {"data": {"train": str(path), "path": None}, **changes}
    with pytest.raises(error, match=message) as caught:
        prepare(tiny(path, **changes))
    assert "\n" not in str(caught.value)


def test_a_tag_that_training_has_not_is_named(tmp_path: Path) -> None:
    train_file = write(tmp_path / "train.jsonl", sentences(20))
    dev_file = write(tmp_path / "dev.jsonl", [(["ada"], ["B-PERS"])])
    config = tiny(train_file, data={"path": None, "train": str(train_file), "dev": str(dev_file)})
    with pytest.raises(DataError, match=r"dev.jsonl:1: the tag 'B-PERS' is none of those in training \(did you mean"):
        prepare(config)


def test_a_text_file_may_be_conll(tmp_path: Path) -> None:
    path = tmp_path / "eng.txt"
    path.write_text("EU NNP B-NP B-ORG\nrejects VBZ B-VP O\n\nParis NNP B-NP B-LOC\n")
    run = prepare(tiny(path, data={"train": str(path), "path": None, "unit": "conll"}, train={"batch_sequences": 2}))
    assert run.objective.labels == ("O", "B-LOC", "B-ORG") and len(run.datasets["train"]) == 2
