"""A whole study on tiny models: what is shared, what is done once, what a stop leaves, and what is compared."""

from __future__ import annotations

import copy
import csv
import shutil

import pytest

from isoform.config import study_config
from isoform.errors import AuditError, ConfigError, Stopped
from isoform.reading import read_config
from isoform.storage import read_json, read_jsonl, write_json
from isoform.studies import workers
from isoform.studies.audit_rows import (
    DEAD,
    DIVERGED,
    LEFT_OUT,
    ONE_SEED,
    OTHER_DATA,
    SELECTION,
    TERMS,
    TEST,
    UNKNOWN,
)
from isoform.studies.forecast import forecast
from isoform.studies.layout import some_arms
from isoform.studies.outside import compare_results
from isoform.studies.study import study
from isoform.training.run import train


def test_a_study_ends_with_verdicts_an_audit_and_a_report(values, tmp_path):
    results = study(values, tmp_path / "out", command="isoform study tiny", quiet=True)
    assert [question["pair"] for question in results["questions"]] == [
        ["scratch", "pretrained"],
        ["pretrained", "faster"],
    ]
    for question in results["questions"]:
        assert question["verdict"] in {"better", "worse", "cannot-tell"}
        assert question["low"] <= question["difference"] <= question["high"]
        assert question["p_adjusted"] >= question["p"]
        assert question["num_seeds"] == 2 and question["num_examples"] == 20
    rows = {row["name"]: row for row in results["arms"]}
    stages = ["pretrain", "finetune"]
    assert rows["faster"]["differences"] == {"stages": stages, "finetune.train.learning_rate": 0.03}
    assert (
        rows["pretrained"]["runs"][0]["stages"][0]["shared"] and not rows["scratch"]["runs"][0]["stages"][0]["shared"]
    )
    mean = sum(r["value"] for run in rows["scratch"]["runs"] for r in run["metrics"] if r["metric"] == "loss") / 2
    assert next(s["mean"] for s in rows["scratch"]["summary"] if s["metric"] == "loss") == pytest.approx(mean)
    assert {row["level"] for row in results["audit"]} <= {"pass", "inform", "warn"}
    assert "isoform study tiny" in (tmp_path / "out" / "report.html").read_text()
    # 2 seeds x (1 shared pretraining + 3 fine-tunings)
    assert len(list((tmp_path / "out" / "stages").iterdir())) == 8


def test_what_is_done_is_not_done_again_and_a_stopped_study_goes_on(values, tmp_path, monkeypatch):
    calls: list[str] = []

    def counted(config, folder, **options):
        calls.append(config.name)
        if len(calls) == stop_at:
            raise Stopped("stopped", 130)
        return train(config, folder, **options)

    monkeypatch.setattr(workers, "train", counted)
    stop_at = 5
    with pytest.raises(Stopped):
        study(values, tmp_path / "out", quiet=True)
    stop_at = 0
    first = study(values, tmp_path / "out", quiet=True)
    assert len(calls) == 9, "eight runs, one of them begun twice"
    again = study(values, tmp_path / "out", quiet=True)
    assert len(calls) == 9
    assert again["questions"] == first["questions"]
    more = copy.deepcopy(values)
    more["seeds"] = 3
    study(more, tmp_path / "out", quiet=True)
    assert len(calls) == 13, "a further seed adds its own four runs alone"


def test_some_arms_now_and_the_others_later(values, tmp_path, monkeypatch):
    calls: list[str] = []

    def counted(config, folder, **options):
        calls.append(config.name)
        return train(config, folder, **options)

    monkeypatch.setattr(workers, "train", counted)
    values["published"] = [{"arm": name, "metric": "loss", "value": 1.0} for name in values["arms"]]
    some = study(values, tmp_path / "out", arms=["faster", "pretrained"], quiet=True)
    assert [arm["name"] for arm in some["arms"]] == ["pretrained", "faster"], "in the order of the study"
    assert [question["pair"] for question in some["questions"]] == [["pretrained", "faster"]]
    assert [row["arm"] for row in some["published"]] == ["pretrained", "faster"]
    asked, left = some["questions"][0], [row["message"] for row in some["audit"] if row["check"] == LEFT_OUT]
    assert asked["p_adjusted"] == min(1.0, 2 * asked["p"]), "the question that is left to be asked counts already"
    assert left == [
        "1 of the study's 3 arms are left out by --arms: scratch; 1 of its 2 questions are answered, p-values are "
        "adjusted over all"
    ]
    assert len(calls) == 6
    record = read_json(tmp_path / "out" / "manifest.json")
    said: list[str] = []
    whole = study(values, tmp_path / "out", quiet=True, say=said.append)
    assert len(calls) == 8, "what the two had made is kept"
    assert not any(row["check"] == LEFT_OUT for row in whole["audit"])
    assert len(whole["questions"]) == 2 and not any("another study" in line for line in said)
    kept = read_json(tmp_path / "out" / "manifest.json")
    assert {name: kept[name] for name in ("started", "kernels")} == {
        name: record[name] for name in ("started", "kernels")
    }
    with pytest.raises(ConfigError, match=r"--arms: 'fastest' is no arm of the study \(did you mean 'faster'\?\)"):
        study(values, tmp_path / "out", arms=["fastest"], quiet=True)


def test_an_arm_brings_the_arms_that_it_asks_for():
    whole = study_config(read_config("distill"))
    some = some_arms(whole, ["three-taught"])
    assert list(some.arms) == ["teacher", "three-taught"]
    assert [question.pair for question in some.questions] == [("teacher", "three-taught")]
    with pytest.raises(ConfigError, match="--arms: no arm is named; the study has teacher, "):
        some_arms(whole, [])


def test_seeds_differ_and_are_shared_by_arms(values, tmp_path):
    results = study(values, tmp_path / "out", quiet=True)
    scores = {
        (arm["name"], run["seed"]): next(r["value"] for r in run["metrics"] if r["metric"] == "loss")
        for arm in results["arms"]
        for run in arm["runs"]
    }
    assert len(set(scores.values())) == 6
    assert {seed for _, seed in scores} == {0, 1}


def test_an_empty_list_of_stages_scores_the_model_as_it_is(values, tmp_path):
    pretrain = {**values["base"], **values["stages"]["pretrain"]}
    pretrain["data"] = {**values["base"]["data"], "train": "lines.txt"}
    from isoform.config import run_config

    train(run_config(pretrain), tmp_path / "model", quiet=True)
    values["arms"] = {
        "untuned": {"stages": [], "model": {"from": str(tmp_path / "model" / "final")}},
        "tuned": {"stages": ["finetune"], "model": {"from": str(tmp_path / "model" / "final")}},
    }
    values["questions"] = [{"pair": ["untuned", "tuned"]}]
    results = study(values, tmp_path / "out", quiet=True)
    assert results["arms"][0]["runs"][0]["stages"][0]["steps"] == 0
    assert results["questions"][0]["second"] < results["questions"][0]["first"], (
        "tuning lowers the loss on its own task"
    )


def test_tune_gives_each_setting_one_trial_and_keeps_the_best_on_the_selection_split(values, tmp_path):
    values["arms"] = {
        "fixed": {"stages": ["finetune"]},
        "tuned": {"stages": ["finetune"], "tune": {"train.learning_rate": [1e-6, 0.02]}},
    }
    values["questions"] = [{"pair": ["fixed", "tuned"]}]
    results = study(values, tmp_path / "out", quiet=True)
    trials = results["arms"][1]["tuning"]
    assert [trial["chosen"] for trial in trials] == [False, True]
    assert trials[1]["value"] < trials[0]["value"]
    assert results["arms"][1]["differences"]["train.learning_rate"] == 0.02


def test_trials_are_as_short_as_the_study_says_and_the_plan_counts_them(values, tmp_path):
    """Also where an arm starts from what a tuned arm has made, whose setting has to be known first."""
    values["arms"] = {
        "tuned": {"stages": ["finetune"], "tune": {"train.learning_rate": [1e-6, 0.02]}},
        "onwards": {
            "stages": ["finetune"],
            "model": {"from": "arm:tuned"},
            "tune": {"train.learning_rate": [0.01, 0.005]},
        },
    }
    values["questions"], values["trials"] = [], {"train.max_steps": 3}
    planned = {stage["name"]: stage["runs"] for stage in forecast(values)["stages"]}
    assert planned["tuned: finetune, trial"] == planned["tuned: finetune"] == 2
    results = study(values, tmp_path / "out", quiet=True)
    assert [trial["chosen"] for trial in results["arms"][0]["tuning"]] == [False, True]
    steps = [read_json(path)["steps"] for path in (tmp_path / "out").glob("stages/*/manifest.json")]
    assert sorted(steps) == [3] * 4 + [6] * 4
    first, second = ([tmp_path / "out" / run["final"] for run in arm["runs"]] for arm in results["arms"])
    for made, began in zip(first, second, strict=True):
        assert str(made / "final") in (began / "config.yaml").read_text(), "of the setting that was chosen"


def test_trials_do_not_look_at_the_test_split(values, tmp_path):
    finetune = values["stages"]["finetune"]
    finetune["data"]["test"] = finetune["data"].pop("dev")
    finetune["evaluate"]["splits"] = ["test"]
    values["compare"]["split"] = "test"
    values["arms"] = {"tuned": {"stages": ["finetune"], "tune": {"train.learning_rate": [0.01, 0.02]}}}
    values["questions"], values["seeds"] = [], 1
    results = study(values, tmp_path / "out", quiet=True)
    assert [row["check"] for row in results["audit"] if row["level"] == "warn" and "test" in row["check"]] == []
    manifests = [read_json(path) for path in (tmp_path / "out").glob("stages/*/manifest.json")]
    assert sorted(manifest["test_scored"] for manifest in manifests) == [0, 0, 1]
    assert len(list((tmp_path / "out").glob("stages/*/predictions.jsonl"))) == 1, "a trial is judged on the way alone"


def test_a_stage_that_no_trial_changes_is_carried_out_once(values, tmp_path):
    tune = {"finetune.train.learning_rate": [0.01, 0.02]}
    values["arms"] = {"tuned": {"stages": ["pretrain", "finetune"], "tune": tune}}
    values["questions"], values["seeds"], values["trials"] = [], 1, {"finetune.train.max_steps": 3}
    planned = {stage["name"]: stage["runs"] for stage in forecast(values)["stages"]}
    assert sum(runs for name, runs in planned.items() if "pretrain" in name) == 1
    study(values, tmp_path / "out", quiet=True)
    folders = [path.name for path in (tmp_path / "out" / "stages").iterdir()]
    assert sorted(name.split("-")[0] for name in folders) == ["finetune"] * 3 + ["pretrain"]


def test_results_of_another_tool_are_an_arm(values, tmp_path):
    values["compare"] = {"metric": "exact_match", "split": "dev"}
    first = study(
        {**values, "arms": {"scratch": values["arms"]["scratch"]}, "questions": []}, tmp_path / "first", quiet=True
    )
    rows = read_jsonl(tmp_path / "first" / first["arms"][0]["runs"][0]["final"] / "predictions.jsonl")
    with (tmp_path / "predictions.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "gold", "prediction"])
        table.writerows([row["id"], row["gold"], row["gold"]] for row in rows)
    values["arms"] = {"scratch": values["arms"]["scratch"], "perfect": {"results": "predictions.csv"}}
    values["questions"] = [{"pair": ["scratch", "perfect"]}]
    results = study(values, tmp_path / "out", quiet=True)
    assert results["questions"][0]["second"] == 1.0


def test_a_diverged_seed_is_left_out_only_by_the_rule_stated_before(values, tmp_path, monkeypatch):
    from isoform.studies import audit

    real = audit.diverged
    monkeypatch.setattr(audit, "diverged", lambda folder: "finetune-seed1" in str(folder) or real(folder))
    assert study(values, tmp_path / "kept", quiet=True)["questions"][0]["num_seeds"] == 2
    values["compare"]["exclude_diverged"] = True
    assert study(values, tmp_path / "excluded", quiet=True)["questions"][0]["num_seeds"] == 1


def test_a_study_that_the_audit_refuses_trains_nothing(values, tmp_path):
    values["compare"]["split"] = "holdout"
    with pytest.raises(AuditError) as refusal:
        study(values, tmp_path / "out", quiet=True)
    assert refusal.value.exit_code == 10
    assert not (tmp_path / "out" / "stages").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "exact_macth", "split": "holdout"}, "did you mean 'exact_match'"),
        ({"metric": "perplexity", "split": "holdout"}, "perplexity is not measured"),
        ({"metric": "loss", "split": "holdut"}, "no split 'holdut'"),
    ],
)
def test_what_would_fail_after_training_fails_before(values, tmp_path, change, message):
    values["stages"]["finetune"]["train"]["select"] = change
    with pytest.raises((ConfigError, AuditError), match=message):
        study(values, tmp_path / "out", quiet=True)
    assert not (tmp_path / "out" / "stages").exists()


def test_compare_reads_finished_runs(values, tmp_path):
    results = study(values, tmp_path / "out", quiet=True)
    folders = [tmp_path / "out" / arm["runs"][0]["final"] for arm in results["arms"][:2]]
    found = compare_results(folders, metric="loss")
    losses = [next(r["value"] for r in read_json(folder / "eval.json") if r["metric"] == "loss") for folder in folders]
    assert found["questions"][0]["difference"] == pytest.approx(losses[1] - losses[0])
    assert found["questions"][0]["speaks_of"] == "models"
    assert {row["check"]: row["level"] for row in found["audit"]} == {
        DEAD: "pass",
        TERMS: "inform",
        SELECTION: "pass",
        OTHER_DATA: "pass",
        TEST: "pass",
        DIVERGED: "pass",
        ONE_SEED: "inform",
    }
    told = next(row["message"] for row in found["audit"] if row["check"] == TERMS)
    assert told.startswith("made: updates 6 in ") and "target tokens" in told
    # The second run began from a pretraining, which is its cost too.
    assert [stage["name"] for stage in found["arms"][1]["runs"][0]["stages"]] == ["pretrain", "finetune"]
    assert all(arm["parameters"]["total"] for arm in found["arms"])


def test_compare_audits_runs_that_no_study_planned(values, tmp_path):
    results = study({**values, "seeds": 1}, tmp_path / "out", quiet=True)
    one = tmp_path / "out" / results["arms"][0]["runs"][0]["final"]
    two, bare = tmp_path / "two", tmp_path / "bare"
    shutil.copytree(one, two)
    shutil.copytree(one, bare)
    (bare / "manifest.json").unlink()

    def rows(*paths):
        return {row["check"]: row for row in compare_results(list(paths), metric="loss", split="dev")["audit"]}

    found = rows(one, two)
    assert (found[DEAD]["level"], found[DEAD]["pair"]) == ("refuse", [one.name, "two"])
    assert "the same training twice" in found[DEAD]["message"]

    manifest = read_json(two / "manifest.json")
    manifest["data"]["splits"]["fingerprints"]["dev"] = "other"
    write_json(two / "manifest.json", {**manifest, "final_sha256": "other", "test_scored": 2, "steps": 9})
    config = (two / "config.yaml").read_text()
    (two / "config.yaml").write_text(config.replace("split: holdout", "split: dev"))
    found = rows(one, two)
    assert found[DEAD]["level"] == "pass"
    assert (
        found[SELECTION]["level"] == "refuse"
        and "two: its checkpoint was selected on dev" in found[SELECTION]["message"]
    )
    assert found[OTHER_DATA]["level"] == found[TEST]["level"] == "warn"
    assert "other in two" in found[OTHER_DATA]["message"]
    assert "updates 6 in" in found[TERMS]["message"]

    found = rows(one, bare)
    assert "bare: no manifest.json" in found[UNKNOWN]["message"] and DEAD not in found
