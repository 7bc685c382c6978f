"""Answers to files of any length: in order, a chunk at a time, written whole or not at all; mistakes have a place."""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from rich.console import Console

import isoform
from isoform import cli
from isoform.config import RunConfig, run_config
from isoform.data.batches import collate
from isoform.errors import DataError
from isoform.layers.init import Linear
from isoform.layers.quantized import Int8Linear
from isoform.reading import merge
from isoform.serving.predict import CHUNK, CPU_BATCH_TOKENS, predict, read_inputs, with_rate, write_answers
from isoform.serving.use import given_document, open_model
from isoform.storage import read_json, read_jsonl
from isoform.training.prepare import prepare
from isoform.training.run import train
from isoform.training.scoring import score_all

WORDS = {"good": ["fine", "lovely", "great"], "bad": ["dull", "awful", "poor"]}
FILLER = "the film its story an actor this scene with and of a long short ending music".split()  # noqa: SIM905


def texts(number: int, seed: int = 0) -> list[tuple[str, str]]:
    draw = random.Random(seed)
    made = []
    for _ in range(number):
        label = draw.choice(sorted(WORDS))
        made.append((" ".join([*draw.choices(FILLER, k=draw.randint(1, 12)), draw.choice(WORDS[label])]), label))
    return made


def write_csv(path: Path, header: list[str], rows: list) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def tiny(root: Path, **changes) -> RunConfig:
    """A BERT of one layer on train.csv and dev.csv."""
    values = {
        "name": "tiny",
        "data": {"root": str(root), "train": "train.csv", "dev": "dev.csv", "overlap": "keep"},
        "text": {"tokenizer": {"kind": "wordpiece", "vocab_size": 300}, "max_tokens": 24},
        "model": {"family": "bert", "num_layers": 1, "num_heads": 2, "width": 16},
        "objective": {"kind": "classify"},
        "train": {"max_steps": 4, "batch_sequences": 16, "learning_rate": 0.01, "precision": "fp32"},
    }
    return run_config(merge(values, changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("used")
    write_csv(root / "train.csv", ["text", "label"], texts(120))
    write_csv(root / "dev.csv", ["text", "label"], texts(40, seed=1))
    return train(tiny(root), root / "run", quiet=True).folder


def test_a_chunk_is_read_before_the_first_answer_and_no_more(folder: Path) -> None:
    read = []

    def endless() -> Iterator[str]:
        while True:
            read.append(1)
            yield "a fine film"

    answers = predict(open_model(folder), endless())
    for _ in range(CHUNK):
        next(answers)
    assert len(read) == CHUNK
    next(answers)
    assert len(read) == 2 * CHUNK


def test_order_is_kept_and_a_text_column_is_enough(folder: Path, tmp_path: Path) -> None:
    rows = [[text] for text, _ in texts(CHUNK + 90, seed=2)]
    opened = open_model(folder)
    path = write_csv(tmp_path / "new.csv", ["text"], rows)
    found = list(predict(opened, read_inputs(opened, path)))
    assert [answer.input for answer in found] == [text for (text,) in rows]
    for at in (0, 7, CHUNK - 1, CHUNK, CHUNK + 89):
        (alone,) = predict(opened, [rows[at][0]])
        assert found[at].probabilities == pytest.approx(dict(alone.probabilities), rel=1e-5)
    (tmp_path / "new.txt").write_text("\n\n".join(text for (text,) in rows) + "\n")
    assert [answer.label for answer in predict(opened, read_inputs(opened, tmp_path / "new.txt"))] == [
        answer.label for answer in found
    ]


def test_the_file_is_written_whole_or_not_at_all(folder: Path, tmp_path: Path) -> None:
    opened = open_model(folder)
    rows = [[text] for text, _ in texts(CHUNK + 9, seed=2)]
    rows[CHUNK + 3] = ["  "]
    path = write_csv(tmp_path / "new.csv", ["text"], rows)
    out = tmp_path / "out.csv"
    out.write_text("what was there before")
    with pytest.raises(DataError, match=rf"new.csv:{CHUNK + 5}: the field 'text' is empty"):
        write_answers(predict(opened, read_inputs(opened, path)), out)
    assert out.read_text() == "what was there before" and {*tmp_path.iterdir()} == {out, path}


def test_the_command_tells_how_many_and_how_fast(folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    path = write_csv(tmp_path / "new.csv", ["text"], [[text] for text, _ in texts(30)])
    argv = ["isoform", "predict", str(folder), "--in", str(path), "--out", str(tmp_path / "out.jsonl")]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code and "30 answers written to" in (said := capsys.readouterr().out) and "a second" in said
    assert [row["input"] for row in read_jsonl(tmp_path / "out.jsonl")] == [text for text, _ in texts(30)]
    argv[3:5] = ["--in", str(write_csv(tmp_path / "other.csv", ["review", "when"], [["a film", "now"]]))]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 3 and "no column 'text'; the columns are 'review', 'when'" in line


def test_a_terminal_shows_the_rate(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isoform.serving.predict.LOOK_SECONDS", 0.0)
    screen = Console(force_terminal=True, color_system=None, file=(file := io.StringIO()), width=80)
    assert len(list(with_rate(predict(open_model(folder), ["a film"] * 3), screen))) == 3
    assert "3 answers" in file.getvalue() and "a second" in file.getvalue()


# --------------------------------------------------------------------------------------------------- what can be wrong


@pytest.mark.parametrize(
    ("file", "header", "rows", "message"),
    [
        (
            "train.csv",
            ["review", "label"],
            [["a film", "good"]],
            r"no column 'text'; the columns are 'review', 'label'",
        ),
        ("dev.csv", ["text", "labels"], [["a film", "good"]], r"no column 'label' .did you mean 'labels'"),
        ("train.csv", ["text", "label"], [["a film", "good"], ["a scene", "good"]], r"has one label only, 'good'"),
        ("dev.csv", ["text", "label"], [["a", "good"], ["b", "ugly"]], r"dev.csv:3: the label 'ugly' is none of those"),
        ("dev.csv", ["text", "label"], [["a", "0"]], r"dev.csv:2: the label '0' is none.*a number.*they are names"),
        ("dev.csv", ["text", "label"], [["a", "good"], ["", "bad"]], r"dev.csv:3: the field 'text' is empty"),
        ("train.csv", ["text", "label"], [["a", "good"], ["b", ""]], r"train.csv:3: the field 'label' is empty"),
    ],
)
def test_bad_rows_are_one_line_with_their_place(file, header, rows, message: str, tmp_path: Path) -> None:
    for name in ("train.csv", "dev.csv"):
        write_csv(tmp_path / name, ["text", "label"], texts(20))
    write_csv(tmp_path / file, header, rows)
    with pytest.raises(DataError, match=message) as caught:
        prepare(tiny(tmp_path))
    assert "\n" not in str(caught.value)


def test_names_where_training_has_numbers(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", ["text", "label"], [["a", "0"], ["b", "1"], ["c", "1"]])
    write_csv(tmp_path / "dev.csv", ["text", "label"], [["a", "good"]])
    with pytest.raises(DataError, match=r"the label 'good' is none.*: 0, 1; here it is a name, in training.*numbers"):
        prepare(tiny(tmp_path))


@pytest.mark.parametrize("value", [None, float("nan")])
def test_nothing_in_a_parquet_file_has_its_row(value, folder: Path, tmp_path: Path) -> None:
    column = pyarrow.array([1.5, value]) if value is not None else pyarrow.array(["a film", None])
    parquet.write_table(pyarrow.table({"text": column, "label": ["good", "bad"]}), tmp_path / "new.parquet")
    with pytest.raises(DataError, match=r"new.parquet:2: (nothing|NaN) in the column 'text', a text is expected"):
        isoform.evaluate(folder, data=str(tmp_path / "new.parquet"))


def test_a_text_of_a_million_characters_is_cut_off_and_counted(folder: Path, tmp_path: Path) -> None:
    long = ("film of a story " * 62_500)[:1_000_000]
    (found,) = isoform.predict(folder, [long])
    (short,) = isoform.predict(folder, [long[:400]])
    assert found["probabilities"] == pytest.approx(short["probabilities"])
    write_csv(tmp_path / "train.csv", ["text", "label"], [*texts(20), (long, "good")])
    write_csv(tmp_path / "dev.csv", ["text", "label"], texts(5, seed=3))
    run = prepare(tiny(tmp_path))
    report = run.datasets["train"].report
    assert report["documents_truncated"] == 1 and report["tokens_dropped"] > 100_000
    assert max(run.batch_plan.lengths) <= 24
    with pytest.raises(DataError, match=r"train.csv:22: the document has \d+ tokens, at most 24 fit"):
        prepare(tiny(tmp_path, data={"long_documents": "refuse"}))


# -------------------------------------------------------------------------------------------------- what a run leaves


def test_the_temperature_is_fitted_on_the_selection_split_and_judged_on_the_other(tmp_path: Path) -> None:
    for name, seed in (("train.csv", 0), ("dev.csv", 1), ("test.csv", 2)):
        write_csv(tmp_path / name, ["text", "label"], texts(60, seed))
    config = tiny(
        tmp_path,
        data={"test": "test.csv"},
        train={"max_steps": 8, "evaluate_every_steps": 4, "select": {"metric": "accuracy", "split": "dev"}},
        evaluate={"train_examples": 30, "max_predictions": 5},
    )
    run = train(config, tmp_path / "run", quiet=True).folder
    about = read_json(run / "breakdown.json")
    assert about["fitted_on"] == "dev" and about["temperature"] > 0
    assert about["splits"]["dev"]["scaled"] is None and about["splits"]["test"]["scaled"]["error"] is not None
    scored = {(row["metric"], row["split"]): row["value"] for row in read_json(run / "eval.json")}
    for split in ("dev", "test"):
        part = about["splits"][split]
        assert part["n"] == 60 == sum(map(sum, part["confusion"]))
        right = sum(row[at] for at, row in enumerate(part["confusion"]))
        assert right / 60 == pytest.approx(scored["accuracy", split])
        assert part["reliability"]["error"] == pytest.approx(scored["calibration_error", split])
    # Another test split cannot move it.
    write_csv(tmp_path / "test.csv", ["text", "label"], texts(60, seed=9))
    moved = read_json(train(config, tmp_path / "again", quiet=True).folder / "breakdown.json")
    assert moved["temperature"] == about["temperature"] and moved["splits"]["test"] != about["splits"]["test"]
    # The training texts are scored beside, by the same name of a metric.
    looks = [event for event in read_jsonl(run / "events.jsonl") if event["event"] == "evaluation"]
    assert len(looks) == 2
    for look in looks:
        counts = {row["split"]: row["n"] for row in look["rows"] if row["metric"] == "accuracy"}
        assert counts == {"dev": 60, "train": 30}
    page = isoform.report(run).read_text()
    assert "Accuracy on train" in page and "Loss on dev" in page


def test_without_a_selection_split_there_is_no_temperature(folder: Path, tmp_path: Path) -> None:
    config = tiny(folder.parent, train={"select": {"split": "test"}}, data={"test": "dev.csv"})
    run = prepare(config)
    score_all(run, run.model, ["dev"], tmp_path / "made", {})
    about = read_json(tmp_path / "made" / "breakdown.json")
    assert about["temperature"] is None and about["fitted_on"] is None and about["splits"]["dev"]["scaled"] is None


def test_bf16_says_what_fp32_says_within_its_rounding(folder: Path) -> None:
    """Batches of several sizes, weights converted once; then the model is trained further as if nothing had been."""
    inputs = [text for text, _ in texts(200, seed=3)]
    wide, narrow = open_model(folder, precision="fp32"), open_model(folder, precision="bf16")
    exact, rounded = ([answer.probabilities for answer in predict(opened, inputs)] for opened in (wide, narrow))
    for one, other in zip(exact, rounded, strict=True):
        assert other == pytest.approx(dict(one), abs=0.02)
    again = [answer.probabilities for answer in predict(narrow, inputs)]
    assert again == rounded
    batch = collate([narrow.objective.view(narrow.objective.encode(given_document(narrow, inputs[0], "input", 1)))])
    with narrow.autocast():
        narrow.model(batch).hidden.float().sum().backward()
    assert any(parameter.grad is not None for parameter in narrow.model.parameters())


def test_a_batch_holds_as_much_as_the_caches_of_a_processor(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, sizes = open_model(folder), []
    forward = opened.model.forward
    monkeypatch.setattr(opened.model, "forward", lambda batch: sizes.append(len(batch.tokens)) or forward(batch))
    assert len(list(predict(opened, [text for text, _ in texts(CHUNK)]))) == CHUNK
    assert len(sizes) < 4 and max(sizes) <= CPU_BATCH_TOKENS
    monkeypatch.setattr("isoform.serving.predict.CPU_BATCH_TOKENS", 100)
    sizes.clear()
    list(predict(opened, [text for text, _ in texts(CHUNK)]))
    assert len(sizes) > 10 and max(sizes) <= 100


def test_weights_of_eight_bits_say_nearly_the_same_and_hold_for_scores_too(folder: Path) -> None:
    inputs = [text for text, _ in texts(40, seed=5)]
    plain, narrow = isoform.predict(folder, inputs), isoform.predict(folder, inputs, int8=True)
    gaps = [
        abs(one["probabilities"][label] - other["probabilities"][label])
        for one, other in zip(plain, narrow, strict=True)
        for label in one["probabilities"]
    ]
    assert 0 < max(gaps) < 0.05
    opened = open_model(folder, int8=True)
    assert any(isinstance(layer, Int8Linear) for layer in opened.scoring.modules())
    assert not any(isinstance(layer, Int8Linear) for layer in opened.model.modules())


def test_weights_are_converted_once_for_all_predictions(folder: Path) -> None:
    opened = open_model(folder, precision="bf16")

    def kept() -> list[int]:
        list(predict(opened, ["a fine film", "its dull story"]))
        layers = [layer for layer in opened.scoring.modules() if isinstance(layer, Linear)]
        return [weight.data_ptr() for layer in layers for weight in (layer.converted or {}).values()]

    first = kept()
    assert first and kept() == first
    assert all(layer.converted is None for layer in opened.model.modules() if isinstance(layer, Linear))
