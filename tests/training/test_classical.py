"""Naive Bayes and logistic regression on terms: scikit-learn's numbers, in a run folder like any other."""

from __future__ import annotations

import csv
import math
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import make_pipeline

import isoform
from isoform.config import RunConfig, run_config
from isoform.errors import CheckpointError, ConfigError, DataError
from isoform.reading import apply_settings, merge, read_config
from isoform.serving.predict import predict
from isoform.serving.use import open_model
from isoform.storage import read_json, read_jsonl, write_text
from isoform.studies.curves import stage_curves
from isoform.studies.records import Records
from isoform.text.ngrams import NGrams, load_ngrams, terms_of
from isoform.training import classical
from isoform.training.plan import plan_config
from isoform.training.prepare import prepare
from isoform.training.run import score_as_is, train

SIGNS = {"good": ["fine", "lovely", "great"], "bad": ["dull", "awful", "poor"], "mixed": ["fair", "uneven", "plain"]}
FILLER = "the film its story an actor this scene with and of a long short ending music".split()  # noqa: SIM905
ESTIMATORS = {
    "naive-bayes": lambda strength: MultinomialNB(alpha=strength),
    "logistic-regression": lambda strength: LogisticRegression(C=strength, max_iter=2000),
}
STRENGTH = {"naive-bayes": "alpha", "logistic-regression": "inverse_penalty"}


def rows(number: int, seed: int = 0, labels: tuple[str, ...] = ("bad", "good", "mixed")) -> list[tuple[str, str]]:
    draw = random.Random(seed)
    made = []
    for _ in range(number):
        label = draw.choice(labels)
        words = [draw.choice(FILLER) for _ in range(7)]
        words.insert(draw.randrange(7), draw.choice(SIGNS[draw.choice([label, label, *labels])]))
        made.append((" ".join(words), label))
    return made


def write_csv(path: Path, table: list, header: tuple[str, ...] = ("text", "label")) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *table])
    return path


def bag(root: Path, **changes: Any) -> RunConfig:
    """A run on train.csv and dev.csv."""
    values = {
        "name": "bag",
        "data": {"root": str(root), "train": "train.csv", "dev": "dev.csv", "overlap": "keep"},
        "text": {"max_tokens": 4},
        "model": {"family": "naive-bayes"},
        "objective": {"kind": "classify"},
        "train": {"select": {"metric": "accuracy", "split": "dev"}},
    }
    return run_config(merge(values, changes))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_csv(tmp_path / "train.csv", rows(120))
    write_csv(tmp_path / "dev.csv", rows(60, seed=1))
    return tmp_path


@pytest.mark.parametrize("family", ESTIMATORS)
@pytest.mark.parametrize("labels", [("bad", "good"), ("bad", "good", "mixed")])
@pytest.mark.parametrize(("ngrams", "idf"), [("1", True), ("1-2", False), ("2", True)])
def test_probabilities_are_those_of_scikit_learn(family, labels, ngrams, idf, tmp_path: Path) -> None:
    table = rows(90, labels=labels)
    write_csv(tmp_path / "train.csv", table)
    write_csv(tmp_path / "dev.csv", rows(9, seed=1, labels=labels))
    model = {"family": family, "ngrams": ngrams, "idf": idf, STRENGTH[family]: 0.5}
    run = train(bag(tmp_path, model=model), tmp_path / "run", quiet=True).folder
    span = tuple(int(words) for words in (ngrams[0], ngrams[-1]))
    theirs = make_pipeline(TfidfVectorizer(ngram_range=span, use_idf=idf), ESTIMATORS[family](0.5))
    theirs.fit([text for text, _ in table], [label for _, label in table])
    asked = [*(text for text, _ in rows(9, seed=2, labels=labels)), "Great, GREAT film!", "nothing of it known", "?"]
    found = isoform.predict(run, asked)
    for ours, expected in zip(found, theirs.predict_proba(asked), strict=True):
        assert list(ours["probabilities"].values()) == pytest.approx(expected.tolist(), abs=2e-5)
        assert list(ours["probabilities"]) == list(theirs.classes_)


@pytest.mark.parametrize("text", ["A fine, fine film: it's OK", "x", "", "naïve Γεια 12 3"])
def test_terms_are_those_of_scikit_learn(text: str, tmp_path: Path) -> None:
    for span in ((1, 1), (1, 2), (2, 3)):
        analyse = CountVectorizer(ngram_range=span).build_analyzer()
        assert sorted(terms_of(text, *span)) == sorted(analyse(text))
    known = NGrams(["fine", "film", "fine film"], 1, 2)
    assert known.encode("a fine film").tolist() == [1, 2, 3] and known.encode("nothing").tolist() == [0]
    assert known.decode(known.encode("the fine film")) == "fine film fine film"
    known.save(tmp_path)
    again = load_ngrams(tmp_path)
    assert again.fingerprint() == known.fingerprint() and again.vocab_size == 4
    write_text(tmp_path / "vocabulary.json", "{}")
    with pytest.raises(DataError, match=r"vocabulary.json: not a vocabulary of terms"):
        load_ngrams(tmp_path)


def test_the_best_of_a_grid_is_kept_and_all_trials_are_told(root: Path) -> None:
    grid = {"features": [5, 30], "ngrams": [1, "1-2"], "idf": [True, False], "alpha": [0.1, 1.0]}
    result = train(bag(root, model={"family": "naive-bayes", **grid}), root / "run", quiet=True)
    trials = read_json(root / "run" / "manifest.json")["trials"]
    assert len(trials) == 16
    (chosen,) = [trial for trial in trials if trial["chosen"]]
    assert chosen["value"] == max(trial["value"] for trial in trials)
    # What was chosen by is what the folder then scores.
    accuracy = next(row for row in result.rows if row["metric"] == "accuracy")
    assert accuracy["value"] == pytest.approx(chosen["value"])
    kept = isoform.load(root / "run").config
    assert kept.features == chosen["setting"]["model.features"] and kept.ngrams == chosen["setting"]["model.ngrams"]
    isoform.report(root / "run")
    assert "16 trials on the selection split" in (root / "run" / "report.html").read_text()


def test_a_run_of_it_is_a_run_like_any_other(root: Path) -> None:
    folder = train(bag(root), root / "run", quiet=True).folder
    manifest = read_json(folder / "manifest.json")
    assert (manifest["steps"], manifest["tokens"], manifest["complete"]) == (0, 120, True)
    again = train(bag(root), root / "run", quiet=True)
    assert again.manifest["finished"] == manifest["finished"]
    predictions = read_jsonl(folder / "predictions.jsonl")
    assert [row["input"] for row in predictions] == [text for text, _ in rows(60, seed=1)]
    accuracy = accuracy_score([row["gold"] for row in predictions], [row["prediction"] for row in predictions])
    scored = {row["metric"]: row for row in isoform.evaluate(folder, split="dev")}
    assert scored["accuracy"]["value"] == pytest.approx(accuracy)
    outside = {row["metric"]: row for row in isoform.evaluate(folder / "final", data=str(root / "dev.csv"))}
    assert outside["loss"]["value"] == pytest.approx(scored["loss"]["value"])
    with pytest.raises(ConfigError, match=r"model.alpha: 0.1 -> 1.0"):
        train(bag(root, model={"family": "naive-bayes", "alpha": 1.0}), root / "run", quiet=True)
    assert not list(folder.rglob("*.pkl"))


def test_texts_are_read_whole_however_short_the_context_is(root: Path) -> None:
    """`text.max_tokens` is 4: only a text that is read to its end ends with the sign."""
    folder = train(bag(root), root / "run", quiet=True).folder
    text = "film " * 200_000 + "lovely " * 100_000
    (found,) = predict(open_model(folder), [text])
    assert found.label == "good"
    again = score_as_is(run_config({**bag(root).model_dump(), "model": {"from": str(folder)}}), root / "as-is")
    first = {row["metric"]: row["value"] for row in read_json(folder / "eval.json")}
    assert {row["metric"]: row["value"] for row in again.rows} == first
    plan = plan_config(bag(root))
    assert plan["steps"] == 0 and plan["seconds_total"] > 0 and plan["model"]["total"] > 0
    assert isoform.plan(bag(root).model_dump())["stages"][0]["model"] == plan["model"]


def test_what_other_verbs_make_of_it(root: Path) -> None:
    folder = train(bag(root), root / "run", quiet=True).folder
    assert not [row for row in isoform.doctor(folder) if row["level"] == "error"]
    for to in ("hf", "onnx", "gguf"):
        with pytest.raises(CheckpointError, match=r"naive-bayes, a bag of words, has no form in another program"):
            isoform.export(folder, to)
    with pytest.raises(ConfigError, match=r"a bag of words, which cannot continue a text"):
        list(isoform.generate(folder, "a film"))


def test_pairs_are_one_bag(tmp_path: Path) -> None:
    table = [(text, "lovely" if label == "good" else "dull", label) for text, label in rows(60, labels=("bad", "good"))]
    for name in ("train.csv", "dev.csv"):
        write_csv(tmp_path / name, table, ("text", "verdict", "label"))
    run = train(bag(tmp_path, objective={"second": "verdict"}), tmp_path / "run", quiet=True)
    assert next(row["value"] for row in run.rows if row["metric"] == "accuracy") > 0.9


def test_the_recipe_has_the_grid_of_72_settings(root: Path) -> None:
    config = run_config(apply_settings(read_config("naive-bayes"), [f"data.path={root / 'train.csv'}"]))
    assert math.prod(map(len, classical.grid(prepare(config)).values())) == 72


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"model": {"alpha": [1.0, 2.0]}, "train": {"select": {"metric": "last"}}},
            ConfigError,
            r"nothing to choose by",
        ),
        (
            {"model": {"alpha": [1.0, 2.0]}, "train": {"select": {"split": "holdout"}}},
            ConfigError,
            "no split 'holdout'",
        ),
        ({"model": {"ngrams": "2-1"}}, ConfigError, r"model: ngrams '2-1': a number of words, or from-to"),
        ({"model": {"features": 0}}, ConfigError, r"features 0: at least one"),
        ({"model": {"ngrams": "40"}}, DataError, r"model.ngrams: no training text has a term of 40 words"),
        ({"model": {"penalty": 1.0}}, ConfigError, r"model.penalty: unknown key"),
        ({"adapter": {"kind": "lora"}}, ConfigError, r"adapter: naive-bayes has no layers"),
        ({"objective": {"task": "multi-label"}}, ConfigError, r"naive-bayes tells one label of several"),
        ({"objective": {"kind": "causal"}}, ConfigError, r"needs a model that is causal; naive-bayes is classify"),
    ],
)
def test_what_it_cannot_do_is_one_line(changes, error, message: str, root: Path) -> None:
    with pytest.raises(error, match=message) as caught:
        train(bag(root, **changes), root / "run", quiet=True)
    assert "\n" not in str(caught.value)
    assert not (root / "run").exists()


def test_it_is_not_tuned_further_nor_read_when_damaged(root: Path) -> None:
    folder = train(bag(root), root / "run", quiet=True).folder
    with pytest.raises(ConfigError, match=r"holds naive-bayes, which is fitted once"):
        prepare(run_config({**bag(root).model_dump(), "model": {"from": str(folder)}}))
    path = folder / "final" / "vocabulary.json"
    path.write_text(path.read_text().replace("film", "flim"))
    with pytest.raises(CheckpointError, match=r"vocabulary.json"):
        isoform.load(folder)


def test_without_scikit_learn_the_message_says_what_to_install(root: Path, monkeypatch) -> None:
    folder = train(bag(root), root / "run", quiet=True).folder
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ConfigError, match=r"pip install 'isoform\[classical\]'"):
        train(bag(root), root / "other", quiet=True)
    assert isoform.predict(folder, ["a lovely film"])[0]["label"] == "good"


def test_equal_seeds_and_unequal_ones_give_the_same_weights(root: Path) -> None:
    first = train(bag(root, model={"family": "logistic-regression"}), root / "one", quiet=True)
    second = train(bag(root, model={"family": "logistic-regression"}, seed=1), root / "two", quiet=True)
    assert first.manifest["final_sha256"] == second.manifest["final_sha256"]


def test_an_arm_of_a_study_is_audited_compared_and_told(root: Path) -> None:
    tiny = {"family": "bert", "num_layers": 1, "num_heads": 2, "width": 16, "dropout": 0.0}
    study = {
        "name": "classical",
        "base": {
            "data": {"root": str(root), "train": "train.csv", "dev": "dev.csv", "holdout": 0.2, "overlap": "keep"},
            "text": {"tokenizer": {"kind": "word"}, "max_tokens": 16},
            "model": tiny,
            "objective": {"kind": "classify"},
            "train": {"max_steps": 8, "batch_sequences": 16, "learning_rate": 0.01, "precision": "fp32"},
            "evaluate": {"splits": ["dev"]},
        },
        "stages": {"tune": {"train": {"select": {"metric": "accuracy", "split": "holdout"}}}},
        "arms": {
            "bert": {"stages": ["tune"]},
            "bayes": {
                "stages": ["tune"],
                "model": {"family": "naive-bayes", "alpha": [0.1, 1.0], "ngrams": ["1", "1-2"]},
            },
            "logistic": {"stages": ["tune"], "model": {"family": "logistic-regression"}},
        },
        "seeds": 2,
        "compare": {"metric": "accuracy", "split": "dev"},
        "questions": [{"pair": ["bayes", "bert"]}, {"pair": ["bayes", "logistic"], "metric": "macro_f1"}],
    }
    results = isoform.study(study, out=root / "study")
    assert not [row for row in results["audit"] if row["level"] == "refuse"]
    told = [row["message"] for row in results["audit"]]
    assert any("arms bayes, logistic: fitted in one go" in message for message in told)
    assert any("tuning trials 4 in bayes and 1 in bert" in message for message in told)
    assert any(message.startswith("arm bayes: the best model.alpha is") for message in told)
    ids = [
        [row["id"] for row in read_jsonl(root / "study" / arm["runs"][0]["final"] / "predictions.jsonl")]
        for arm in results["arms"]
    ]
    assert ids[0] == ids[1] == ids[2]
    (curves,) = stage_curves(Records(root / "study"))
    assert [name for _, name in curves.legend] == ["bert"]
    assert (root / "study" / "report.html").read_text().count("examples of <bdi>dev</bdi>") == 3
    bayes = results["arms"][1]
    assert len(bayes["tuning"]) == 4 and np.isfinite(results["questions"][0]["difference"])
    same = {**study, "arms": {"one": study["arms"]["logistic"], "two": study["arms"]["logistic"]}, "questions": []}
    with pytest.raises(isoform.errors.AuditError, match=r"arms one and two do not differ in any option"):
        isoform.study(same, out=root / "same")
    asked = {**study, "questions": [{"pair": ["bayes", "bert"], "equal": {"flops": 0.1}}]}
    with pytest.raises(isoform.errors.AuditError, match=r"training FLOPs mean nothing for arm bayes.*equal.flops"):
        isoform.study(asked, out=root / "asked")
