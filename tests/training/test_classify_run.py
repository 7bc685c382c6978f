"""From a csv of texts and labels to a tuned model, its predictions, and a study that compares two."""

from __future__ import annotations

import csv
import random
import shutil
from pathlib import Path

import pytest
import torch
from sklearn.metrics import confusion_matrix, f1_score
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    pipeline,
)

import isoform
from isoform.config import RunConfig, run_config
from isoform.errors import ConfigError, DataError
from isoform.reading import apply_settings, merge, read_config
from isoform.registry import build_options, lookup
from isoform.serving.predict import predict, read_inputs, write_answers
from isoform.serving.use import open_model
from isoform.storage import read_json, read_jsonl
from isoform.text.tokenizers import train_tokenizer
from isoform.training.prepare import prepare
from isoform.training.run import train

WORDS = {"good": ["fine", "lovely", "great"], "bad": ["dull", "awful", "poor"], "mixed": ["fair", "uneven", "plain"]}
FILLER = "the film its story an actor this scene with and of a long short ending music".split()  # noqa: SIM905


def rows(number: int, seed: int = 0) -> list[tuple[str, str]]:
    draw = random.Random(seed)
    made = []
    for _ in range(number):
        label = draw.choice(sorted(WORDS))
        words = [draw.choice(FILLER) for _ in range(7)]
        words.insert(draw.randrange(7), draw.choice(WORDS[label]))
        made.append((" ".join(words), label))
    return made


def write_csv(path: Path, header: list[str], table: list) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *table])
    return path


def tiny(path: Path, **changes) -> RunConfig:
    values = {
        "name": "tiny",
        "data": {"path": str(path), "splits": {"train": 0.8, "dev": 0.2}, "overlap": "keep"},
        "text": {"tokenizer": {"kind": "wordpiece", "vocab_size": 300}, "max_tokens": 24},
        "model": {"family": "modernbert", "num_layers": 1, "num_heads": 2, "width": 32, "local_window": 8},
        "objective": {"kind": "classify", "pooling": "mean"},
        "train": {"max_steps": 60, "batch_sequences": 16, "learning_rate": 0.01, "precision": "fp32"},
    }
    return run_config(merge(values, changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("classified")
    path = write_csv(place / "my.csv", ["text", "label"], rows(240))
    return train(tiny(path), place / "run", quiet=True).folder


def test_a_csv_is_learnt_and_its_labels_are_names(folder: Path) -> None:
    scored = {row["metric"]: row["value"] for row in read_json(folder / "eval.json")}
    assert scored["accuracy"] > 0.8
    predictions = read_jsonl(folder / "predictions.jsonl")
    gold, said = [row["gold"] for row in predictions], [row["prediction"] for row in predictions]
    assert set(gold) == set(WORDS)
    assert scored["macro_f1"] == pytest.approx(f1_score(gold, said, average="macro"))
    table = confusion_matrix(gold, said, labels=sorted(WORDS))
    assert table.trace() == sum(row["stats"]["correct"] for row in predictions)
    for row in predictions:
        assert max(row["probabilities"], key=row["probabilities"].get) == row["prediction"]
        assert sum(row["probabilities"].values()) == pytest.approx(1)
    config = read_json(folder / "final" / "config.json")
    assert config["id2label"] == {"0": "bad", "1": "good", "2": "mixed"}


def test_the_folder_is_one_of_transformers(folder: Path) -> None:
    theirs = AutoModelForSequenceClassification.from_pretrained(folder / "final").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "final")
    texts = [text for text, _ in rows(5, seed=9)]
    found = isoform.predict(folder, texts)
    for text, row in zip(texts, found, strict=True):
        ids = tokenizer(text)["input_ids"]
        assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
        with torch.no_grad():
            shares = theirs(torch.tensor([ids])).logits.softmax(-1)[0].tolist()
        expected = {theirs.config.id2label[at]: share for at, share in enumerate(shares)}
        assert row["input"] == text and row["probabilities"] == pytest.approx(expected, rel=1e-4)
        assert row["label"] == max(expected, key=expected.get)


FAMILIES = {
    "gpt2": {"family": "gpt2", "num_layers": 1, "num_heads": 2, "width": 16},
    "llama": {"family": "llama", "num_layers": 1, "num_heads": 2, "width": 16},
    "bert": {"family": "bert", "num_layers": 1, "num_heads": 2, "width": 16},
    "roberta": {"family": "roberta", "num_layers": 1, "num_heads": 2, "width": 16},
    "xlnet": {"family": "xlnet", "num_layers": 1, "num_heads": 2, "width": 16},
}


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pipeline_of_transformers_says_the_same_of_a_text(family: str, pair: bool, tmp_path: Path) -> None:
    table = [(text, text.split()[0], label) for text, label in rows(60)]
    path = write_csv(tmp_path / "my.csv", ["text", "other", "label"], table)
    decoder = family in ("gpt2", "llama", "xlnet")
    config = tiny(
        path,
        model=FAMILIES[family],
        text={"tokenizer": {"kind": "bpe" if decoder else "wordpiece"}},
        objective={"pooling": "last" if decoder else "cls", **({"second": "other"} if pair else {})},
        train={"max_steps": 2},
    )
    folder = train(config, tmp_path / "run", quiet=True).folder
    theirs = pipeline("text-classification", model=str(folder / "final"), top_k=None)
    given = [{"text": text, "other": other} if pair else text for text, other, _ in table[:4]]
    for row, (text, other, _) in zip(isoform.predict(folder, given), table[:4], strict=True):
        said = theirs([{"text": text, "text_pair": other}] if pair else [text])[0]
        assert {each["label"]: each["score"] for each in said} == pytest.approx(row["probabilities"], rel=1e-4)


def test_a_classifier_from_elsewhere_reads_what_it_was_tuned_on(tmp_path: Path) -> None:
    options = build_options(lookup("tokenizer", "bpe"), {"special": ["pad", "bos", "eos"], "vocab_size": 300}, "text")
    tokenizer = train_tokenizer("bpe", options, [text for text, _ in rows(40)])
    sizes = {"vocab_size": tokenizer.vocab_size, "n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 64}
    theirs = GPT2ForSequenceClassification(GPT2Config(**sizes, num_labels=2, pad_token_id=0)).eval()
    theirs.config.id2label = {0: "no", 1: "yes"}
    theirs.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    said = pipeline("text-classification", model=str(tmp_path), top_k=None)
    for text, _ in rows(3):
        (row,) = predict(open_model(tmp_path, precision="fp32"), [text])
        expected = {each["label"]: each["score"] for each in said([text])[0]}
        assert row.as_dict()["probabilities"] == pytest.approx(expected, rel=1e-4)


def test_predictions_of_a_file_stream_to_a_file(folder: Path, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "new.csv", ["text", "when"], [(text, "now") for text, _ in rows(600, seed=4)])
    opened = open_model(folder)
    count, _ = write_answers(predict(opened, read_inputs(opened, path)), tmp_path / "out.csv")
    with (tmp_path / "out.csv").open() as file:
        table = list(csv.DictReader(file))
    assert count == len(table) == 600
    assert list(table[0]) == ["input", "label", "probability bad", "probability good", "probability mixed"]
    assert [row["input"] for row in table] == [text for text, _ in rows(600, seed=4)]


def test_evaluation_refuses_labels_that_were_not_trained(folder: Path, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "more.csv", ["text", "label"], rows(40, seed=5))
    scored = {row["metric"]: row for row in isoform.evaluate(folder, data=str(path))}
    assert scored["accuracy"]["value"] > 0.8 and scored["accuracy"]["n"] == 40
    bare = {row["metric"]: row["value"] for row in isoform.evaluate(folder / "final", data=str(path))}
    assert bare["accuracy"] == scored["accuracy"]["value"]
    path = write_csv(tmp_path / "numbers.csv", ["text", "label"], [("a fine film", "good"), ("a dull film", "0")])
    with pytest.raises(DataError, match=r"numbers.csv:3: the label '0' is none of those in training: bad, good, mixed"):
        isoform.evaluate(folder, data=str(path))


def test_a_classifier_is_tuned_further_in_its_own_order_of_labels(folder: Path, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "two.csv", ["text", "label"], [row for row in rows(90, seed=6) if row[1] != "bad"])
    origin = {"model": {"from": str(folder)}}
    prepared = prepare(tiny(path, **origin))
    assert prepared.objective.labels == ("bad", "good", "mixed")
    with torch.no_grad():
        assert torch.equal(prepared.model.classifier.scores.weight, isoform.load(folder).model.classifier.scores.weight)
    others = [(text, "early" if text < "m" else "late") for text, _ in rows(90, seed=6)]
    renamed = write_csv(tmp_path / "other.csv", ["text", "label"], others)
    with pytest.raises(ConfigError, match=r"the model's classifier has no label '.*new_head"):
        prepare(tiny(renamed, **origin))
    fresh = prepare(tiny(renamed, **origin, objective={"kind": "classify", "new_head": True}))
    assert fresh.model.config.classifier.labels == ("early", "late")


@pytest.mark.parametrize(
    ("table", "changes", "error", "message"),
    [
        ([("a film", "good")] * 3, {}, DataError, "one label only, 'good'"),
        ([("a film", "good"), ("", "bad")], {}, DataError, "my.csv:3: the field 'text' is empty"),
        ([("a film", "good"), ("no film", " ")], {}, DataError, "my.csv:3: the field 'label' is empty"),
        ([("a film", "1.5"), ("b", "x")], {"objective": {"task": "regression"}}, DataError, "'x' is no number"),
        ([("a", "x"), ("b", "y")], {"objective": {"labels": ["x"]}}, ConfigError, "names no label 'y'"),
        ([("a", "x"), ("b", "y")], {"objective": {"second": "other"}}, DataError, "no column 'other'"),
        ([("a", "x"), ("b", "y")], {"model": {"family": "t5"}}, ConfigError, "needs a model that is classify"),
        ([("a", "x"), ("b", "y")], {"text": {"max_tokens": 2}}, ConfigError, "leaves no room for a text"),
    ],
)
def test_data_that_cannot_be_learnt_is_one_clear_line(table, changes, error, message: str, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "my.csv", ["text", "label"], table)
    data = {"train": str(path), "path": None}
    with pytest.raises(error, match=message) as caught:
        prepare(tiny(path, data=data, **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("task", "made"),
    [("multi-label", lambda text, label: f"{label};film" if "film" in text else label), ("regression", None)],
)
def test_several_labels_and_numbers(task: str, made, tmp_path: Path) -> None:
    marks = {"bad": "-1", "mixed": "0", "good": "1"}
    made = made or (lambda text, label: marks[label])
    path = write_csv(tmp_path / "my.csv", ["text", "label"], [(text, made(text, label)) for text, label in rows(160)])
    config = tiny(path, objective={"kind": "classify", "task": task})
    run = train(config, tmp_path / "run", quiet=True).folder
    losses = [row["loss"] for row in read_jsonl(run / "metrics.jsonl")]
    assert sum(losses[-5:]) / 5 < losses[0] / 2
    scored = {row["metric"]: row["value"] for row in read_json(run / "eval.json")}
    row = isoform.predict(run, ["the film of a great story"])[0]
    if task == "regression":
        assert scored["pearson"] > 0.5 and isinstance(row["label"], float)
    else:
        assert scored["macro_f1"] > 0.4 and set(row["label"]) <= {*WORDS, "film"}
        assert list(row["probabilities"]) == sorted({*WORDS, "film"})


def test_pairs_are_read_as_two_segments(tmp_path: Path) -> None:
    table = [(text, other, str(text == other)) for text, _ in rows(40) for other in (text, "another film")]
    path = write_csv(tmp_path / "my.csv", ["text", "second", "label"], table)
    config = tiny(path, objective={"kind": "classify", "second": "second"}, train={"max_steps": 2})
    run = train(config, tmp_path / "run", quiet=True).folder
    opened = open_model(run)
    answers = list(predict(opened, read_inputs(opened, path)))
    assert answers[0].as_dict()["input"] == {"text": table[0][0], "second": table[0][1]}
    view = opened.objective.view(opened.objective.encode(_document(table[0])))
    assert view.segments is not None and sorted(set(view.segments.tolist())) == [0, 1]


def _document(row):
    from isoform.contracts import Document

    return Document("0", {"text": row[0], "second": row[1]}, {})


def test_the_recipe_takes_a_csv_or_a_pretrained_model() -> None:
    values = apply_settings(read_config("classify"), ["data.path=my.csv", "model.from=somewhere"])
    assert run_config(values).model == {"from": "somewhere"}


def test_two_arms_on_the_film_snippets_are_audited_and_compared(tmp_path: Path) -> None:
    sizes = {"num_layers": 1, "num_heads": 2, "width": 16, "dropout": 0.0}
    study = {
        "name": "snippets",
        "question": "Does pooling matter?",
        "base": {
            "data": {"path": "builtin:movie-snippets", "splits": {"train": 0.8, "dev": 0.2}, "overlap": "keep"},
            "text": {"tokenizer": {"kind": "char"}, "max_tokens": 32},
            "model": {"family": "bert", **sizes},
            "objective": {"kind": "classify"},
        },
        "stages": {"tune": {"data": {"max_documents": 120}, "train": {"max_steps": 4, "batch_sequences": 8}}},
        "arms": {
            "first": {"stages": ["tune"]},
            "mean": {"stages": ["tune"], "objective": {"pooling": "mean"}},
        },
        "seeds": 2,
        "compare": {"metric": "accuracy", "split": "dev"},
        "questions": [{"pair": ["first", "mean"]}, {"pair": ["first", "mean"], "metric": "macro_f1"}],
    }
    results = isoform.study(study, out=tmp_path / "study")
    asked = [(question["metric"], question["num_seeds"]) for question in results["questions"]]
    assert asked == [("accuracy", 2), ("macro_f1", 2)]
    assert not [row for row in results["audit"] if row["level"] == "refuse"]
    assert "accuracy" in (tmp_path / "study" / "report.html").read_text()


def test_only_the_parameters_that_are_named_are_trained(tmp_path):
    path = write_csv(tmp_path / "my.csv", ["text", "label"], rows(60))
    before = prepare(tiny(path))
    config = tiny(path, train={"parameters": ["classifier*", "blocks.0.feedforward_norm.*"], "max_steps": 3})
    result = train(config, tmp_path / "head-alone", quiet=True)
    after = open_model(result.folder).model
    moved = {
        name
        for (name, ours), theirs in zip(after.named_parameters(), before.model.parameters(), strict=True)
        if not torch.equal(ours, theirs)
    }
    assert moved and all(name.startswith(("classifier.", "blocks.0.feedforward_norm.")) for name in moved)
    manifest = read_json(result.folder / "manifest.json")
    assert manifest["model"]["trainable"] == sum(
        parameter.numel() for name, parameter in before.model.named_parameters() if name in moved
    )
    with pytest.raises(ConfigError, match=r"train.parameters: no parameter is called 'clasifier\*'"):
        prepare(tiny(path, train={"parameters": ["clasifier*"]}))


def test_recomputed_blocks_end_with_the_same_bits(tmp_path):
    path = write_csv(tmp_path / "my.csv", ["text", "label"], rows(60))
    weights = []
    for recompute in (False, True):
        config = tiny(path, train={"max_steps": 3, "recompute": recompute})
        folder = train(config, tmp_path / str(recompute), quiet=True).folder
        weights.append(open_model(folder).model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    shared = {"family": "bert", "num_layers": 1, "num_heads": 2, "width": 32, "position": {"kind": "t5"}}
    with pytest.raises(ConfigError, match=r"train.recompute: the blocks of this bert share learned scores"):
        prepare(tiny(path, model=shared, train={"recompute": True}))


def test_a_folder_knows_its_second_column_and_its_length(tmp_path: Path) -> None:
    """The column has a name that no file could have."""
    pairs = [(text, "yes" if label == "good" else "no", label) for text, label in rows(120) if label != "mixed"]
    path = write_csv(tmp_path / "pairs.csv", ["text", "is it [en]/?", "label"], pairs)
    config = tiny(path, objective={"second": "is it [en]/?"}, train={"max_steps": 3})
    run = train(config, tmp_path / "run", quiet=True)
    in_run, alone = open_model(run.folder), open_model(run.folder / "final")
    asked = write_csv(tmp_path / "asked.csv", ["text", "is it [en]/?"], [pair[:2] for pair in pairs[:9]])
    first, second = ([row.probabilities for row in predict(each, read_inputs(each, asked))] for each in (in_run, alone))
    assert first == second
    shutil.copytree(run.folder / "final", tmp_path / "elsewhere")
    moved = open_model(tmp_path / "elsewhere", precision="fp32")
    assert [row.probabilities for row in predict(moved, read_inputs(moved, asked))] == first
    assert moved.config.text.max_tokens == 24


def test_a_folder_knows_which_part_of_a_long_text_was_read(tmp_path: Path) -> None:
    """What says the label stands at the end, behind more than is read."""
    ends = {"good": "well", "bad": "badly"}
    labels = random.Random(0).sample(["good", "bad"] * 80, 160)
    texts = [(f"{i} {'and so it went on ' * 9}{ends[label]} done", label) for i, label in enumerate(labels)]
    path = write_csv(tmp_path / "long.csv", ["text", "label"], texts)
    learnt = {}
    for keep in ("start", "end", "ends"):
        run = train(tiny(path, objective={"keep": keep}), tmp_path / keep, quiet=True)
        learnt[keep] = next(row["value"] for row in run.rows if row["metric"] == "accuracy")
        opened = open_model(run.folder / "final", precision="fp32")
        assert opened.objective.config.keep == keep
        asked = read_inputs(opened, write_csv(tmp_path / "asked.csv", ["text"], [(text,) for text, _ in texts[:20]]))
        right = [row.answer == label for row, (_, label) in zip(predict(opened, asked), texts, strict=False)]
        assert all(right) is (keep != "start")
    more = {"model": {"from": str(tmp_path / "ends" / "final")}, "train": {"max_steps": 1}}
    again = prepare(tiny(path, **more))
    assert again.objective.config.keep == "ends", "what is tuned further is read as it was"
    assert learnt["start"] < 0.8 and learnt["end"] == learnt["ends"] == 1.0


def test_all_of_a_file_is_answered_however_little_was_trained_on(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "my.csv", ["text", "label"], rows(60))
    run = train(tiny(path, data={"max_documents": 40}, train={"max_steps": 2}), tmp_path / "run", quiet=True)
    opened = open_model(run.folder)
    assert sum(1 for _ in predict(opened, read_inputs(opened, path))) == 60


def test_a_metric_of_one_label_is_refused_where_there_are_several(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "my.csv", ["text", "label"], rows(60))
    with pytest.raises(ConfigError, match=r"mcc is of single-label classifiers; objective.task is multi-label"):
        prepare(tiny(path, objective={"task": "multi-label"}, evaluate={"metrics": ["mcc"]}))
    prepare(tiny(path, evaluate={"metrics": ["mcc"]}))
