"""A student of a few of its teacher's layers: trained, stopped, resumed, scored, opened; and as an arm of a study."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import isoform
from isoform.checkpoints.tensors import read_tensors
from isoform.config import RunConfig, run_config
from isoform.errors import CheckpointError, ConfigError, DataError, Stopped
from isoform.objectives.teachers import Teacher
from isoform.reading import merge
from isoform.storage import read_json, read_jsonl
from isoform.training.loop import Loop
from isoform.training.prepare import prepare
from isoform.training.run import train

GOOD, BAD = ["fine", "lovely", "great"], ["dull", "awful", "poor"]
SCENES = ["the film", "its story", "an actor", "this scene", "the music"]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("reviews")
    rows = [
        (f"{scene} {word} {at}", label)
        for at in range(4)
        for scene in SCENES
        for words, label in ((GOOD, "pos"), (BAD, "neg"))
        for word in words
    ]
    (place / "my.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    return place


def tiny(table: Path, **changes) -> RunConfig:
    values = {
        "name": "tiny",
        "data": {"root": str(table), "path": "my.csv", "splits": {"train": 0.8, "dev": 0.2}, "overlap": "keep"},
        "text": {"tokenizer": {"kind": "word"}, "max_tokens": 16},
        "model": {"family": "modernbert", "num_layers": 4, "num_heads": 2, "width": 16, "embedding_dropout": 0.1},
        "objective": {"kind": "classify", "pooling": "mean"},
        "train": {"max_steps": 12, "batch_sequences": 16, "learning_rate": 0.01, "precision": "fp32"},
    }
    return run_config(merge(values, changes))


@pytest.fixture(scope="module")
def teacher(table: Path) -> Path:
    return train(tiny(table, train={"max_steps": 40}), table / "teacher", quiet=True).folder


def distilled(**options) -> dict[str, object]:
    return {"kind": "distill", "teacher": "teacher", "of": {"kind": "classify", "pooling": "mean"}, **options}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return read_tensors(folder / "final" / "model.safetensors")


def stop_after(monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    original = Loop._update

    def update(self, step):
        if step.step + 1 == stop:
            raise Stopped("stopped", 130)
        return original(self, step)

    monkeypatch.setattr(Loop, "_update", update)


def test_a_student_learns_and_is_a_model_like_any_other(table: Path, teacher: Path, tmp_path: Path) -> None:
    config = tiny(
        table,
        model={"from": "teacher", "layers": [0, 3]},
        objective=distilled(hidden={"layers": {2: 4}}, store=True),
    )
    run = train(config, tmp_path / "student", quiet=True).folder
    kept = yaml.safe_load((run / "config.yaml").read_text())
    assert kept["objective"]["of"]["labels"] == ["neg", "pos"] and kept["model"]["layers"] == [0, 3]
    assert {"data", "tokenizer", "teacher"} <= read_json(run / "manifest.json")["fingerprints"].keys()
    rows = read_jsonl(run / "metrics.jsonl")
    assert {"loss", "loss_teacher", "loss_hidden"} <= rows[0].keys()
    scored = {row["metric"]: row["value"] for row in read_json(run / "eval.json")}
    assert scored["accuracy"] > 0.9
    loaded = isoform.load(run)
    assert loaded.config.num_layers == 2 and loaded.config.classifier.labels == ("neg", "pos")
    shutil.move(table / "teacher", table / "away")
    try:  # what was learnt is used without the teacher
        assert isoform.predict(run, "the film lovely 1")[0]["label"] == "pos"
        assert {row["metric"]: row["value"] for row in isoform.evaluate(run, split="dev")}["accuracy"] > 0.9
    finally:
        shutil.move(table / "away", table / "teacher")


def test_a_student_of_all_layers_is_its_teacher(table: Path, teacher: Path) -> None:
    run = prepare(tiny(table, model={"from": "teacher", "layers": [0, 1, 2, 3]}, objective=distilled()))
    theirs = isoform.load(teacher).model.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in run.model.state_dict().items())


def test_stopped_and_resumed_ends_bit_equal_with_its_maps(
    table: Path, teacher: Path, tmp_path: Path, monkeypatch
) -> None:
    """A student of another width, whose states are mapped to the teacher's; the maps are kept and left behind."""
    config = tiny(
        table,
        text={"tokenizer": {"path": "teacher/final"}},
        model={"width": 8, "num_layers": 2},
        objective=distilled(hidden={"weight": 2.0}),
        train={"checkpoint_every_steps": 1},
    )
    whole = train(config, tmp_path / "whole", quiet=True).folder
    states = sorted((whole / "checkpoints").iterdir())
    maps = [read_tensors(state / "state" / "companion.safetensors") for state in states]
    assert {name: tuple(tensor.shape) for name, tensor in maps[0].items()} == {
        f"{pair}.{kind}": shape for pair in range(3) for kind, shape in (("weight", (16, 8)), ("bias", (16,)))
    }
    assert not torch.equal(maps[0]["0.weight"], maps[1]["0.weight"])
    assert not any("companion" in name or "objective" in name for name in weights(whole))
    assert isoform.load(whole).config.width == 8
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(Stopped):
            train(config, tmp_path / "parts", quiet=True)
    shutil.copytree(table / "teacher", tmp_path / "moved")
    moved = tiny(
        table, **{**config.model_dump(), "objective": {**config.objective, "teacher": str(tmp_path / "moved")}}
    )
    parts = train(moved, tmp_path / "parts", resume=True, quiet=True).folder
    assert all(torch.equal(tensor, weights(parts)[name]) for name, tensor in weights(whole).items())
    losses = [[row["loss_hidden"] for row in read_jsonl(run / "metrics.jsonl")] for run in (whole, parts)]
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]
    rows = read_jsonl(whole / "metrics.jsonl")
    assert rows[-1]["loss_teacher"] < rows[0]["loss_teacher"]


def test_another_teacher_is_no_resume(table: Path, teacher: Path, tmp_path: Path, monkeypatch) -> None:
    config = tiny(
        table, model={"from": "teacher", "layers": [0]}, objective=distilled(), train={"checkpoint_every_steps": 1}
    )
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Stopped):
            train(config, tmp_path / "run", quiet=True)
    other = train(tiny(table, seed=1), tmp_path / "other", quiet=True).folder
    values = merge(config.model_dump(), {"objective": {"teacher": str(other)}})
    with pytest.raises(DataError, match="the teacher has changed since this run began: fingerprint"):
        train(run_config(values), tmp_path / "run", resume=True, quiet=True)


def test_a_language_model_is_distilled_from_kept_lessons_as_from_its_teacher(make, tmp_path: Path, monkeypatch) -> None:
    teacher = train(make({"model": {"num_layers": 3}}), tmp_path / "teacher", quiet=True).folder
    changes = {
        "model": {"from": str(teacher), "layers": [0, 2]},
        "objective": {"kind": "distill", "teacher": str(teacher), "of": {"kind": "causal"}, "hidden": {}},
    }
    plain = train(make(changes), tmp_path / "plain", quiet=True)
    asked: list[int] = []
    ask = Teacher.ask
    monkeypatch.setattr(Teacher, "ask", lambda self, batch: asked.append(1) or ask(self, batch))
    kept = train(make(merge(changes, {"objective": {"store": True}})), tmp_path / "kept", quiet=True)
    assert len(asked) == 1
    seed = train(make(merge(changes, {"objective": {"store": True}, "seed": 1})), tmp_path / "seed", quiet=True)
    assert len(asked) == 1 and seed.rows
    ours, theirs = weights(plain.folder), weights(kept.folder)
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"model": {"from": "teacher", "layers": [0, 9]}},
            ConfigError,
            r"model.layers: \[0, 9\] given; .* from 0 to 3",
        ),
        ({"model": {"from": "teacher", "width": 3}}, ConfigError, r"model.width: given beside `from: teacher`"),
        ({"model": {"layers": [0]}}, ConfigError, r"model.layers: unknown key"),
        ({"objective": distilled(teacher="nowhere")}, CheckpointError, "nowhere: no such folder"),
        ({"objective": distilled()}, ConfigError, "has another vocabulary"),
        ({"objective": {"kind": "distill", "teacher": "t"}}, ConfigError, r"objective.of: field required"),
    ],
)
def test_what_cannot_be_distilled_is_one_line(table, teacher, changes, error, message: str) -> None:
    others = {"text": {"tokenizer": {"kind": "char"}}}
    with pytest.raises(error, match=message) as caught:
        prepare(tiny(table, **(others if "model" not in changes else {}), **changes))
    assert "\n" not in str(caught.value)


def study_of(table: Path) -> dict[str, object]:
    base = tiny(table, train={"max_steps": 6}).model_dump(mode="json", exclude={"name", "seed"})
    student = {"stages": ["tune"], "model": {"from": "arm:large", "layers": [0, 1]}}
    return {
        "name": "small",
        "base": base,
        "stages": {"tune": {}},
        "arms": {
            "large": {"stages": ["tune"]},
            "alone": student,
            "taught": {
                **student,
                "objective": distilled(teacher="arm:large", temperature=3.0, of={"kind": "classify"}, store=True),
            },
        },
        "seeds": 2,
        "compare": {"metric": "accuracy", "split": "dev"},
        "questions": [{"pair": ["alone", "taught"]}],
    }


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_arm_may_learn_from_an_arm_above_it(jobs: int, table: Path, tmp_path: Path) -> None:
    values = {**study_of(table), "jobs": jobs}
    results = isoform.study(values, out=tmp_path / "study")
    assert not [row for row in results["audit"] if row["level"] == "refuse"]
    runs = {run.name: run for run in (tmp_path / "study" / "stages").iterdir()}
    assert len(runs) == 6  # the teacher is trained once a seed
    for run in runs.values():
        config = yaml.safe_load((run / "config.yaml").read_text())
        if config["objective"]["kind"] != "distill":
            continue
        theirs = Path(config["objective"]["teacher"]).parent
        assert theirs.name in runs and f"seed{config['seed']}-" in theirs.name
        assert read_json(theirs / "manifest.json")["seed"] == config["seed"]
    again = isoform.study(values, out=tmp_path / "study")
    assert again["questions"] == results["questions"]


def test_arms_that_cannot_teach_are_told(table: Path, tmp_path: Path) -> None:
    values = study_of(table)
    values["arms"] = dict(reversed(values["arms"].items()))
    with pytest.raises(ConfigError, match=r"arms.taught: arm:large is no arm above it; above it: no arm"):
        isoform.study(values, out=tmp_path / "a")
    values = study_of(table)
    values["arms"]["taught"]["objective"]["teacher"] = "arm:larg"
    with pytest.raises(ConfigError, match=r"arm:larg is no arm above it \(did you mean 'large'\?\)"):
        isoform.study(values, out=tmp_path / "b")


def test_the_plan_of_a_study_with_teachers(table: Path) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    plan = isoform.plan(study_of(table))
    assert [stage["runs"] for stage in plan["stages"]] == [2, 2, 2]
