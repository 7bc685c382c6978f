"""Every row of the audit's table: a case that trips it, and one that does not."""

from __future__ import annotations

import copy
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import model_validator

from isoform.config import study_config
from isoform.contracts import IGNORE
from isoform.errors import ConfigError
from isoform.layers.position import Position
from isoform.models.gpt2 import GPT2
from isoform.objectives.causal import Causal
from isoform.reading import apply_settings, merge
from isoform.registry import Options, Reads, build_options, recording, register
from isoform.storage import json_line, write_json, write_text
from isoform.studies import audit, audit_curves, audit_data, audit_rows, audit_terms
from isoform.studies.audit_options import dead_options
from isoform.studies.audit_probe import Probes
from isoform.studies.layout import Layout
from isoform.training.prepare import prepare
from isoform.training.run import train

Rows = list[dict[str, Any]]

NAMES = [f"{first} {last}" for first in ("Ada", "Ben", "Cleo", "Dov", "Eve") for last in ("Stone", "Field", "Marsh")]
TOWNS = ("Paris", "Oslo", "New York")


@register("position", "inert")
class Inert(Position):
    """Positions with an option that nothing uses."""

    class Config(Options):
        base: float = 1.0


@register("model", "clairvoyant")
class Clairvoyant(GPT2):
    """A model whose every state holds a little of the whole batch."""

    def forward(self, batch: Any, **options: Any) -> Any:
        output = super().forward(batch, **options)
        output.hidden = output.hidden + 1e-3 * output.hidden.mean(dim=0)
        return output


RARE = "Cleo Field"


@register("objective", "forgetful")
class Forgetful(Causal):
    """Causal, but for one document that may be asked for nothing."""

    class Config(Causal.Config):
        forget: bool = False

    def prepare(self, encoded: Any, rng: Any) -> Any:
        sample = super().prepare(encoded, rng)
        forgotten = self.config.forget and RARE in self.tokenizer.decode(encoded.fields["text"])
        return replace(sample, targets=np.full_like(sample.targets, IGNORE)) if forgotten else sample


def town(index: int) -> str:
    return TOWNS[index % len(TOWNS)]


def question(index: int) -> str:
    return f"Where was {NAMES[index]} born?\t{town(index)}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ISOFORM_CACHE", str(tmp_path / "cache"))
    texts = {
        "wiki.txt": [f"{name} was born in {town(i)} and liked it." for i, name in enumerate(NAMES)],
        "other.txt": [f"{name} went to the sea on day {i} of May." for i, name in enumerate(NAMES)],
        "third.txt": [f"{name} met {NAMES[-i]} again in June." for i, name in enumerate(NAMES)],
        "train.tsv": [question(i) for i in range(9)],
        "dev.tsv": [question(i) for i in range(9, 12)],
        "holdout.tsv": [question(i) for i in range(12, 15)],
        "leaky.tsv": [question(i) for i in range(10)],
    }
    for name, lines in texts.items():
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    return tmp_path


BASE = {
    "data": {"columns": ["question", "answer"]},
    "model": {"family": "gpt2", "num_layers": 2, "num_heads": 2, "width": 32, "dropout": 0.0},
    "text": {"tokenizer": {"kind": "char"}, "max_tokens": 64},
    "train": {
        "max_steps": 6,
        "batch_sequences": 4,
        "learning_rate": 1e-3,
        "schedule": {"kind": "linear", "warmup_steps": 2},
        "precision": "fp32",
    },
}
PRETRAIN = {"data": {"train": "wiki.txt", "dev": "other.txt"}, "objective": {"kind": "causal"}}
FINETUNE = {"data": {"train": "train.tsv", "dev": "dev.tsv", "test": "holdout.tsv"}, "objective": {"kind": "answers"}}


def layout(folder: Path, second: dict[str, Any], first: dict[str, Any] | None = None, **changes: Any) -> Layout:
    """Two arms, `first` and `second`, that are the stage `only` (pretraining text) with these changes."""
    values: dict[str, Any] = {
        "base": merge(BASE, {"data": {"root": str(folder)}}),
        "stages": {"only": PRETRAIN, "finetune": FINETUNE},
        "arms": {"first": {"stages": ["only"], **(first or {})}, "second": {"stages": ["only"], **second}},
        "seeds": 2,
        "compare": {"metric": "loss", "split": "dev"},
        "questions": [{"pair": ["first", "second"]}],
    }
    config = study_config({**values, **changes})
    return Layout(config, list(range(config.seeds)), "fp32", "sources")


def plain(settings: str) -> dict[str, Any]:
    return apply_settings({}, settings.split("; ")) if settings else {}


def findings(rows: Rows, check: str) -> Rows:
    """What a check found; it must have spoken."""
    mine = [row for row in rows if row["check"] == check]
    assert mine, f"{check} said nothing"
    return [row for row in mine if row["level"] != "pass"]


def one(rows: Rows, level: str) -> str:
    assert [row["level"] for row in rows] == [level], rows
    return str(rows[0]["message"])


# ------------------------------------------------------------------------------------------------------- dead options


def dead(study: Layout) -> Rows:
    with Probes(study) as probes:
        return dead_options(study, probes)


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ("model.position={kind: inert, base: 2.0}", "model.position.base"),
        ("model.window=1000", "model.window"),
        ("train.precision=auto", "train.precision"),
        ("train.patience=3", "train.patience"),
        ("train.optimizer={kind: adamw, decay_embeddings: true}", "train.optimizer.decay_embeddings"),
        ("objective={kind: span-corruption, view: whole, max_prefix_tokens: 7}", "objective.max_prefix_tokens"),
        ("data.overlap=keep", "data.overlap"),
        ("finetune.model.position.kind=rope", "finetune.model.position"),
    ],
)
def test_an_option_that_does_nothing_is_refused_by_its_name(folder: Path, changes: str, option: str) -> None:
    """Each arm also differs in the learning rate, which does something and must not be named."""
    second = merge(plain(changes), {"train": {"learning_rate": 2e-3}})
    same = {
        "model.position.base": "model.position={kind: inert}",
        "objective.max_prefix_tokens": "objective={kind: span-corruption, view: whole}",
    }
    stages = {"stages": ["only", "finetune"]} if "finetune" in changes else {}
    study = layout(folder, {**second, **stages}, {**plain(same.get(option, "")), **stages})
    message = one(dead(study), "refuse")
    assert message.startswith(f"{option} does nothing")
    assert "first" in message and "second" in message


@pytest.mark.parametrize(
    "changes",
    [
        "train.learning_rate=2e-3",
        "train.max_steps=7",
        "train.batch_sequences=5",
        "train.schedule={kind: cosine, warmup_steps: 2}",
        "train.schedule.warmup_steps=3",
        "train.clip_norm=2.0",
        "train.optimizer={kind: adamw, weight_decay: 0.01}",
        "train.optimizer={kind: adamw, epsilon: 1e-7}",
        "train.optimizer={kind: muon}",
        "data.train=other.txt; data.dev=wiki.txt",
        "data.max_documents=14",
        "data.dev=third.txt",
        "objective={kind: span-corruption}",
        "model.dropout=0.1",
        "model.attention_dropout=0.1",
        "model.position={kind: rope, base: 500}",
        "model.window=20",
        "model.norm={kind: layernorm, epsilon: 1e-6}",
        "model.num_layers=1",
        "text.max_tokens=32",
        "text.tokenizer={kind: word}",
        "train.select={metric: loss, split: dev}",
        "evaluate.max_new_tokens=5",
        "evaluate.max_examples=3",
        "evaluate.max_tokens={dev: 32}",
        "stages=[only, finetune]",
    ],
)
def test_an_option_that_does_something_is_not_refused(folder: Path, changes: str) -> None:
    assert dead(layout(folder, plain(changes))) == []


def test_an_option_inside_a_section_that_only_one_arm_has_is_tried_by_itself(folder: Path) -> None:
    message = one(dead(layout(folder, plain("model.position={kind: inert, base: 2.0}"))), "refuse")
    assert message.startswith("model.position.base does nothing: its default in arm first and 2.0 in arm second")


def test_an_option_that_acts_on_a_single_document_is_found(folder: Path) -> None:
    study = layout(folder, plain("objective={kind: forgetful, forget: true}"), plain("objective.kind=forgetful"))
    with Probes(study) as probes:
        probe = probes.chain("second")["only"]
        assert RARE not in probe.run.tokenizer.decode(probe.batch.tokens.tolist()), "else the updates would show it"
        assert dead_options(study, probes) == []


def test_clipping_that_acts_on_rare_gradients_only_is_found(folder: Path) -> None:
    assert dead(layout(folder, plain("train.clip_norm=100.0"), plain("train.clip_norm=50.0"))) == []


def test_looking_more_often_is_something_where_a_metric_selects(folder: Path) -> None:
    select = {"train": {"select": {"metric": "loss", "split": "dev"}}}
    for option in ("evaluate_every_steps", "patience"):
        assert dead(layout(folder, merge(select, {"train": {option: 2}}), select)) == []


@pytest.mark.parametrize(
    "changes",
    [
        "",
        "track=[tensorboard]",
        "train.log_every_steps=2",
        "train.checkpoint_every_steps=2; train.keep_checkpoints=3",
        "train.evaluate_every_steps=2",
        "train.micro_batch_tokens=512",
        "model.position={kind: learned}",
    ],
)
def test_the_same_thing_twice_is_refused(folder: Path, changes: str) -> None:
    message = one(dead(layout(folder, plain(changes))), "refuse")
    assert "arms first and second" in message and "compared twice" in message


def test_a_default_spelled_out_beside_a_real_difference_is_no_dead_option(folder: Path) -> None:
    assert dead(layout(folder, plain("model.position={kind: rope, base: 10000}"), plain("model.position.kind=rope")))
    assert dead(layout(folder, plain("model.position={kind: rope, base: 10000}; train.learning_rate=1e-4"))) == []


def test_so_many_updates_and_so_many_epochs_are_one_thing(folder: Path) -> None:
    """At another batch they differ, though in one of the two arms they may be the same; at the same batch, nowhere."""
    epoch = plain("train.max_steps=null; train.max_epochs=3; train.batch_sequences=8")
    run = prepare(layout(folder, epoch, epoch).chain("first", 0)[0].config)
    for steps in (run.num_steps, run.num_steps + 1):
        assert dead(layout(folder, plain(f"train.max_steps={steps}"), epoch)) == []
        assert dead(layout(folder, epoch, plain(f"train.max_steps={steps}"))) == []
    same = plain(f"train.max_steps={run.num_steps}; train.batch_sequences=8")
    assert one(dead(layout(folder, epoch, same)), "refuse").startswith("train.max_epochs, train.max_steps does nothing")


def test_arms_that_differ_in_what_they_tune_are_not_the_same(folder: Path) -> None:
    tune = {"tune": {"train.learning_rate": [1e-4, 1e-3]}}
    assert dead(layout(folder, tune)) == []
    assert one(dead(layout(folder, tune, tune)), "refuse")


def test_arms_that_no_question_names_are_not_dead_either(folder: Path) -> None:
    """b is a again, d is c again, w is a with an option that does nothing; e does something."""
    only = {"stages": ["only"]}
    arms = {
        "a": only,
        "b": only,
        "c": {**only, "model": {"dropout": 0.2}},
        "d": {**only, "model": {"dropout": 0.2}, "train": {"log_every_steps": 7}},
        "e": {**only, "model": {"num_layers": 3}},
        "w": {**only, "model": {"window": 1000, "num_heads": 4}},
    }
    for questions in ([], [{"pair": ["a", "c"]}]):
        rows = dead(layout(folder, {}, arms=arms, questions=questions))
        assert [(row["level"], row["pair"]) for row in rows] == [
            ("refuse", ["a", "b"]),
            ("refuse", ["a", "w"]),
            ("refuse", ["c", "d"]),
        ]
        assert "model.window does nothing" in rows[1]["message"]


def test_an_option_that_is_dead_beside_the_first_arm_alone_is_a_warning_where_others_are_asked(folder: Path) -> None:
    """Both b and c have the window, so that their question is sound."""
    window = {"stages": ["only"], "model": {"window": 1000}}
    arms = {"a": {"stages": ["only"]}, "b": merge(window, {"model": {"num_layers": 3}})}
    arms["c"] = merge(window, {"model": {"num_heads": 4}})
    asked = [{"pair": ["a", "c"]}, {"pair": ["b", "c"]}]
    rows = dead(layout(folder, {}, arms=arms, questions=asked))
    assert [(row["level"], row["pair"]) for row in rows] == [("warn", ["a", "b"]), ("refuse", ["a", "c"])]


# ------------------------------------------------------------------------------------------ the rest of the plan's rows


def before(study: Layout) -> Rows:
    return audit.before(study)


def test_a_plan_in_order_passes_every_check_once(folder: Path) -> None:
    rows = before(layout(folder, plain("train.learning_rate=2e-3")))
    checks = [
        audit_rows.DEAD,
        audit_rows.FUTURE,
        audit_rows.OVERLAP,
        audit_rows.ANSWERS,
        audit_rows.SELECTION,
        audit_rows.TERMS,
        audit_rows.SCHEDULE,
    ]
    assert [(row["check"], row["level"]) for row in rows] == [(check, "pass") for check in checks]


def test_a_model_that_reads_the_future_is_refused(folder: Path) -> None:
    study = layout(folder, plain("model.family=clairvoyant"))
    assert "arm second" in one(findings(before(study), audit_rows.FUTURE), "refuse")


def overlap(study: Layout) -> Rows:
    with Probes(study) as probes:
        return audit_data.overlaps(study, probes)


def test_overlap_within_a_stage_goes_as_the_policy_says(folder: Path) -> None:
    def study(policy: str) -> Layout:
        stages = {"only": merge(FINETUNE, {"data": {"train": "leaky.tsv", "overlap": policy}})}
        return layout(folder, plain("train.learning_rate=2e-3"), stages=stages)

    with_refusal = layout(folder, {}, stages={"only": FINETUNE})
    assert overlap(with_refusal) == []
    kept = one(overlap(study("keep")), "warn")
    assert "1 documents of dev stand exactly and 0 nearly in train" in kept
    assert "1 training documents" in one(overlap(study("drop_from_train")), "inform")
    message = one(before(study("refuse")), "refuse")
    assert "data.overlap" in message and "dev.tsv" in message


def test_overlap_between_an_earlier_stage_and_the_compared_split(folder: Path) -> None:
    def study(train: str, policy: str) -> Layout:
        earlier = merge(FINETUNE, {"data": {"train": train, "overlap": policy}})
        del earlier["data"]["dev"], earlier["data"]["test"]
        stages = {"only": earlier, "finetune": FINETUNE}
        both = {"stages": ["only", "finetune"]}
        return layout(folder, {**both, **plain("train.learning_rate=2e-3")}, both, stages=stages)

    assert overlap(study("train.tsv", "refuse")) == []
    message = one(overlap(study("leaky.tsv", "refuse")), "refuse")
    assert "arms first, second" in message and "1 documents of dev stand exactly" in message and "stage only" in message
    assert one(overlap(study("leaky.tsv", "keep")), "warn")


def test_answers_in_the_pretraining_text_are_counted(folder: Path) -> None:
    def answers(text: str) -> Rows:
        both = {"stages": ["only", "finetune"]}
        stages = {"only": merge(PRETRAIN, {"data": {"train": text, "dev": None}}), "finetune": FINETUNE}
        study = layout(folder, {**both, **plain("train.learning_rate=2e-3")}, both, stages=stages)
        with Probes(study) as probes:
            return audit_data.answers_seen(study, probes)

    assert answers("other.txt") == []
    half = "Oslo and New York.\nEve Field went to Paris.\nDov Stone lives in New York, Dov Field in Oslo\n"
    (folder / "half.txt").write_text(half * 4)
    message = one(answers("half.txt"), "inform")
    assert "contains the answer to 3 of 3 questions of dev, to 1 of them in one line" in message


def selection(study: Layout) -> Rows:
    with Probes(study) as probes:
        return audit_data.selected_on_compared(study, probes)


def test_selection_on_the_compared_split_is_refused(folder: Path) -> None:
    chosen = plain("train.select={metric: loss, split: dev}")
    last = plain("train.select={metric: last, split: dev}")
    test = plain("train.select={metric: loss, split: test}")
    stages = {"only": FINETUNE}
    assert selection(layout(folder, test, last, stages=stages)) == []
    message = one(selection(layout(folder, chosen, last, stages=stages)), "refuse")
    assert "arm second" in message and "only.train.select.split" in message
    question = [{"pair": ["first", "second"], "split": "test"}]
    assert one(selection(layout(folder, test, last, stages=stages, questions=question)), "refuse")
    assert selection(layout(folder, chosen, last, stages=stages, questions=question)) == []


def test_the_compared_documents_under_another_name_are_refused_too(folder: Path) -> None:
    stages = {"only": merge(FINETUNE, {"data": {"test": "dev.tsv", "overlap": "keep"}})}
    assert one(selection(layout(folder, plain("train.select={metric: loss, split: test}"), stages=stages)), "refuse")


def terms(study: Layout) -> Rows:
    with Probes(study) as probes:
        return audit_terms.planned_terms(study, probes)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ("train.max_steps=12", "updates"),
        ("train.max_steps=12", "data_tokens"),
        ("train.max_steps=12", "flops"),
        ("model.num_layers=3", "parameters"),
        ("tune={train.learning_rate: [1e-4, 1e-3]}", "tuning_trials"),
    ],
)
def test_unequal_terms_are_refused_where_named_and_told_elsewhere(folder: Path, changes: str, name: str) -> None:
    def rows(equal: dict[str, float]) -> Rows:
        return terms(layout(folder, plain(changes), questions=[{"pair": ["first", "second"], "equal": equal}]))

    refused = [row for row in rows({name: 0.1}) if row["level"] == "refuse"]
    assert f"equal.{name}" in one(refused, "refuse")
    assert refused[0]["pair"] == ["first", "second"]
    assert audit_terms.WORDS[name] in one(rows({}), "inform")
    assert not any(row["level"] == "refuse" for row in rows({name: 0.6}))


def test_equal_terms_are_told_as_asked_and_unknown_ones_are_errors(folder: Path) -> None:
    rates = plain("train.learning_rate=2e-3")
    assert terms(layout(folder, rates)) == []
    equal = {"parameters": 0.1, "updates": 0.0, "data_tokens": 0.0}
    told = terms(layout(folder, rates, questions=[{"pair": ["first", "second"], "equal": equal}]))
    message = one(told, "pass").replace("\N{NO-BREAK SPACE}", " ")
    assert message == "equal as asked: tokens read, updates, parameters (within 10 %)"
    assert told[0]["pair"] == ["first", "second"]
    with pytest.raises(ConfigError, match="did you mean 'updates'"):
        terms(layout(folder, rates, questions=[{"pair": ["first", "second"], "equal": {"update": 0}}]))


def test_terms_of_an_arm_from_elsewhere_cannot_be_promised(folder: Path) -> None:
    arms = {"first": {"stages": ["only"]}, "second": {"results": "theirs"}}
    assert terms(layout(folder, {}, arms=arms)) == []
    asked = [{"pair": ["first", "second"], "equal": {"updates": 0}}]
    assert "arm second was not trained here" in one(terms(layout(folder, {}, arms=arms, questions=asked)), "refuse")


@pytest.mark.parametrize(
    ("rates", "complaint"),
    [
        ([0.5, 1.0, 0.5], None),
        ([1.0, 1.0, 0.5, 0.5], None),
        ([1.0], None),
        ([0.25, 0.5, 0.75, 1.0], "warm-up has not ended"),
        ([0.5, 1.0, 0.2, 0.6], "rises again after its peak, at step 4"),
        ([0.5, 1.0, 1.0], "never falls"),
    ],
)
def test_what_is_odd_about_a_planned_rate(rates: list[float], complaint: str | None) -> None:
    found = audit_curves.rate_complaint(rates)
    assert found is None if complaint is None else complaint in str(found)


def test_a_rate_that_never_falls_is_told_with_its_arms(folder: Path) -> None:
    study = layout(folder, plain("train.schedule.kind=constant"))
    with Probes(study) as probes:
        assert "stage only of arm second: the learning rate never falls" in one(
            audit_curves.schedules(study, probes), "warn"
        )


# ------------------------------------------------------------------------------------------------------- finished runs


class Finished:
    """A study's folder as if it had been carried out; a test changes what it needs."""

    def __init__(self, folder: Path, study: Layout) -> None:
        self.study, self.folder = study, folder / "study"
        for run in study.all():
            losses = [3.0 - 0.02 * step + 0.01 * (step % 3) for step in range(100)]
            self.manifest(run.arm, run.seed, final_sha256=run.key)
            self.losses(run.arm, run.seed, losses)
            self.events(run.arm, run.seed, [{"event": "evaluation", "step": step} for step in (50, 100)])
            self.selections(run.arm, run.seed, {"best-metric": 50, "last": 100})
        self.results: dict[str, Any] = {
            "arms": [
                {
                    "name": name,
                    "tuning": [],
                    "runs": [{"selections": {"last": 0.4, "best-metric": 0.5}} for _ in study.seeds],
                }
                for name, _ in study.arms()
            ]
        }

    def path(self, arm: str, seed: int) -> Path:
        return self.folder / self.study.chain(arm, seed)[-1].folder

    def manifest(self, arm: str, seed: int, **values: Any) -> None:
        path = self.path(arm, seed) / "manifest.json"
        normal = {"seconds": {"total": 10.0}, "steps": 100, "num_steps": 100, "tokens": 5000, "unused_parameters": []}
        old = json.loads(path.read_text()) if path.exists() else normal
        write_json(path, {**old, **values})

    def losses(self, arm: str, seed: int, losses: list[float]) -> None:
        rows = [json_line({"step": step, "loss": loss}) for step, loss in enumerate(losses, 1)]
        write_text(self.path(arm, seed) / "metrics.jsonl", "".join(rows))

    def events(self, arm: str, seed: int, events: list[dict[str, Any]]) -> None:
        write_text(self.path(arm, seed) / "events.jsonl", "".join(map(json_line, events)))

    def selections(self, arm: str, seed: int, steps: dict[str, int], final: str = "best-metric") -> None:
        found = {name: {"step": step, "rows": []} for name, step in steps.items()}
        write_json(self.path(arm, seed) / "selections.json", {"final": final, "selections": found})

    def rows(self, verdicts: dict[str, str] | None = None) -> Rows:
        def compare(pair: Any, asked: Any, selection: str) -> Any:
            assert pair == asked.pair
            return SimpleNamespace(verdict=(verdicts or {}).get(selection, "better"))

        return audit.after(self.study, self.folder, self.results, compare)


@pytest.fixture
def finished(folder: Path) -> Finished:
    return Finished(folder, layout(folder, plain("train.learning_rate=2e-3")))


def test_a_study_in_order_passes_every_check_once(finished: Finished) -> None:
    rows = finished.rows()
    checks = [
        audit_rows.UNUSED,
        audit_rows.TEST,
        audit_rows.EDGE,
        audit_rows.ARTEFACT,
        audit_rows.DIVERGED,
        audit_rows.DAMAGED,
        audit_rows.WINDOWS,
        audit_rows.ONE_SEED,
    ]
    assert [(row["check"], row["level"]) for row in rows] == [(check, "pass") for check in checks]


def test_a_parameter_without_a_gradient_is_told(finished: Finished) -> None:
    finished.manifest("second", 0, unused_parameters=["blocks.0.gate"])
    assert findings(finished.rows(), audit_rows.UNUSED) == []
    finished.manifest("second", 1, unused_parameters=["blocks.0.gate"])
    message = one(findings(finished.rows(), audit_rows.UNUSED), "warn")
    assert "stage only of arm second" in message and "blocks.0.gate" in message


def test_a_field_that_nobody_read_is_told(finished: Finished) -> None:
    for seed in (0, 1):
        finished.manifest("second", seed, config_unread=["train.learning_rate", "train.precision"])
    message = one(findings(finished.rows(), audit_rows.UNUSED), "warn")
    assert "arm second: train.learning_rate was set and never read" in message


@pytest.mark.parametrize(("where", "told"), [("train", False), ("finetune.train", True)])
def test_a_field_that_another_stage_of_the_arm_read_is_not_told(folder: Path, where: str, told: bool) -> None:
    """Set in both stages, the first one reads it; set in the last alone, nobody does."""
    study = layout(folder, {"stages": ["only", "finetune"], **plain(f"{where}.clip_norm=0.5")})
    finished = Finished(folder, study)
    for seed in (0, 1):
        finished.manifest("second", seed, config_unread=["train.clip_norm"])
        first = finished.folder / study.chain("second", seed)[0].folder
        write_json(first / "manifest.json", json.loads((finished.path("first", seed) / "manifest.json").read_text()))
        write_json(first / "selections.json", {"final": "last", "selections": {}})
    rows = findings(finished.rows(), audit_rows.UNUSED)
    assert "train.clip_norm" in one(rows, "warn") if told else rows == []


def test_equal_final_weights_are_refused(finished: Finished) -> None:
    for seed in (0, 1):
        finished.manifest("first", seed, final_sha256="same")
        finished.manifest("second", seed, final_sha256="same")
    rows = [row for row in finished.rows() if row["check"] == audit_rows.DEAD]
    assert "train.learning_rate made no difference" in one(rows, "refuse")
    assert rows[0]["pair"] == ["first", "second"]


def test_equal_final_weights_of_arms_that_no_question_names(folder: Path) -> None:
    arms = {
        name: {"stages": ["only"], "train": {"learning_rate": rate}}
        for name, rate in zip("abc", (1e-3, 2e-3, 3e-3), strict=True)
    }
    finished = Finished(folder, layout(folder, {}, arms=arms, questions=[{"pair": ["b", "a"]}]))
    for arm in ("b", "c"):
        finished.manifest(arm, 1, final_sha256="same")
    rows = [row for row in finished.rows() if row["check"] == audit_rows.DEAD]
    assert "at 1 of 2 seeds" in one(rows, "refuse") and rows[0]["pair"] == ["b", "c"]


@pytest.mark.parametrize(
    "changes", ["evaluate.max_new_tokens=5", "train.select={metric: loss, split: dev}", "data.dev=third.txt"]
)
def test_arms_that_only_answer_or_select_otherwise_may_have_equal_weights(folder: Path, changes: str) -> None:
    finished = Finished(folder, layout(folder, plain(changes)))
    for arm in ("first", "second"):
        finished.manifest(arm, 0, final_sha256="same")
    assert not any(row["check"] == audit_rows.DEAD for row in finished.rows())


def test_looks_at_the_test_split_are_counted_over_the_folder(finished: Finished) -> None:
    for arm in ("first", "second"):
        for seed in (0, 1):
            finished.manifest(arm, seed, test_scored=1)
    assert findings(finished.rows(), audit_rows.TEST) == []
    write_json(finished.folder / "stages" / "a-trial" / "manifest.json", {"test_scored": 1})
    finished.manifest("first", 0, test_scored=3)
    message = one(findings(finished.rows(), audit_rows.TEST), "warn")
    assert "3 times more than once a run (1 of them by trials" in message


def test_unequal_time_is_told_and_refused_where_named(folder: Path, finished: Finished) -> None:
    finished.manifest("second", 0, seconds={"total": 10.5})
    assert not any(row["check"] == audit_rows.TERMS for row in finished.rows())
    finished.manifest("second", 0, seconds={"total": 30.0})
    assert "seconds of training 10 in first and 20 in second" in one(
        findings(finished.rows(), audit_rows.TERMS), "inform"
    )
    asked = [{"pair": ["first", "second"], "equal": {"seconds": 0.2}}]
    finished.study = layout(folder, plain("train.learning_rate=2e-3"), questions=asked)
    assert "equal.seconds" in one(findings(finished.rows(), audit_rows.TERMS), "refuse")


def test_a_run_that_stopped_early_breaks_equal_updates(folder: Path) -> None:
    asked = [{"pair": ["first", "second"], "equal": {"updates": 0}}]
    finished = Finished(folder, layout(folder, plain("train.learning_rate=2e-3"), questions=asked))
    finished.manifest("second", 0, steps=60)
    refused = [row for row in findings(finished.rows(), audit_rows.TERMS) if row["level"] == "refuse"]
    assert "equal.updates" in one(refused, "refuse")


def test_tokens_read_are_the_same_unit_before_and_after(folder: Path) -> None:
    """What was made of a plan is counted as the plan was, whatever the loss was taken on."""
    asked = [{"pair": ["first", "second"], "equal": {"data_tokens": 0.01}}]
    study = layout(folder, plain("train.max_steps=12"), questions=asked)
    planned = one([row for row in terms(study) if row["level"] == "refuse"], "refuse")
    finished = Finished(folder, study)
    for seed in (0, 1):
        finished.manifest("first", seed, steps=6, num_steps=6, tokens=10)
        finished.manifest("second", seed, steps=11, num_steps=12, tokens=10)
    made = one([row for row in findings(finished.rows(), audit_rows.TERMS) if row["level"] == "refuse"], "refuse")
    first, second = (
        re.search(r"tokens read ([\d,]+) in first and ([\d,]+) in second", text) for text in (planned, made)
    )
    assert first is not None and second is not None and first[1] == second[1]
    numbers = [float(found[2].replace(",", "")) for found in (first, second)]
    assert numbers[1] == pytest.approx(numbers[0] * 11 / 12, rel=0.01)
    for seed in (0, 1):
        finished.manifest("second", seed, steps=6)
    rows = [row for row in finished.rows() if row["check"] == audit_rows.TERMS and row["level"] != "inform"]
    assert "equal as asked, as trained: tokens read" in one(rows, "pass").replace("\N{NO-BREAK SPACE}", " ")


def test_target_tokens_are_told_apart_from_tokens_read(finished: Finished) -> None:
    finished.manifest("second", 0, tokens=7000)
    assert "made: target tokens 5,000 in first and 6,000 in second" in one(
        findings(finished.rows(), audit_rows.TERMS), "inform"
    )


@pytest.mark.parametrize(("chosen", "edge"), [(1e-4, "lowest"), (3e-4, None), (1e-3, "highest")])
def test_a_best_setting_at_the_end_of_its_grid(folder: Path, chosen: float, edge: str | None) -> None:
    tune = {"tune": {"train.learning_rate": [1e-4, 3e-4, 1e-3], "model.dropout": [0.0, 0.1, 0.2]}}
    finished = Finished(folder, layout(folder, tune))
    trial = {"setting": {"train.learning_rate": chosen, "model.dropout": 0.0}, "chosen": True, "value": 1.0}
    finished.results["arms"][1]["tuning"] = [trial]
    rows = findings(finished.rows(), audit_rows.EDGE)
    assert rows == [] if edge is None else f"train.learning_rate is {chosen}, the {edge}" in one(rows, "warn")


def test_a_best_checkpoint_at_the_last_step(finished: Finished) -> None:
    for seed in (0, 1):
        finished.selections("second", seed, {"best-metric": 100, "last": 100})
    message = one(findings(finished.rows(), audit_rows.EDGE), "warn")
    assert "stage only of arm second" in message and "2 of 2 seeds" in message


def test_a_verdict_that_hangs_on_the_checkpoint(finished: Finished) -> None:
    rows = findings(finished.rows({"last": "cannot-tell"}), audit_rows.ARTEFACT)
    assert "last: cannot-tell, best-metric: better" in one(rows, "warn")
    assert rows[0]["pair"] == ["first", "second"]


NOISE = [0.05 * math.sin(7.0 * step) for step in range(100)]
FALLING = [4.0 * math.exp(-step / 20) + 1 + noise for step, noise in enumerate(NOISE)]


@pytest.mark.parametrize(
    ("losses", "bad"),
    [
        (FALLING, False),
        ([2.0 + noise for noise in NOISE], False),
        ([2.0, 1.0], False),
        ([2.0 + 0.1 * step for step in range(100)], True),
        ([*FALLING[:50], *(9.0 + noise for noise in NOISE[50:])], True),
        ([*FALLING[:50], math.nan, *FALLING[51:]], True),
        ([1.0, 2.0], True),
    ],
)
def test_a_loss_that_ends_above_its_start(finished: Finished, losses: list[float], bad: bool) -> None:
    finished.losses("second", 1, losses)
    assert audit.diverged(finished.path("second", 1)) is bad
    rows = findings(finished.rows(), audit_rows.DIVERGED)
    if bad:
        assert "stage only of arm second: seed 1 ended above" in one(rows, "warn")
    else:
        assert rows == []


def test_a_stop_for_a_non_finite_loss_is_a_divergence(finished: Finished) -> None:
    finished.events("first", 0, [{"event": "non-finite", "step": 3}])
    assert audit.diverged(finished.path("first", 0))
    assert "stage only of arm first: seed 0" in one(findings(finished.rows(), audit_rows.DIVERGED), "warn")


def test_a_jump_of_the_loss_is_told(finished: Finished) -> None:
    losses = copy.copy(FALLING)
    losses[60] = 4.5
    assert audit_curves.spikes(losses) == [60]
    assert audit_curves.spikes(FALLING) == []
    # A classifier's first steps, a few reviews each: odd batches, no jump.
    odd = [0.69, 0.69, 0.69, 0.69, 0.69, 0.69, 0.68, 0.68, 0.69, 0.71, 0.68, 0.71, 0.67, 0.68, 0.69, 0.67, 0.73, 0.68]
    assert audit_curves.spikes([*odd, 0.67, 0.69, 0.65, 0.61, 0.68, 0.68, 0.62, 0.67, 0.64, 0.82, 0.61]) == []
    assert audit_curves.spikes([*odd, 0.67, 0.69, 0.65, 0.61, 0.68, 0.68, 0.62, 0.67, 0.64, 1.40, 0.61]) == [27]
    assert audit_curves.spikes([2.0 + 10 * noise for noise in NOISE]) == []
    finished.losses("second", 0, losses)
    assert "jumps up, first at logged step 61" in one(findings(finished.rows(), audit_rows.DIVERGED), "warn")


def test_a_damaged_checkpoint_is_told(finished: Finished) -> None:
    finished.events("second", 0, [{"event": "checkpoint-damaged", "checkpoint": "step-000010", "problem": "hash"}])
    assert "stage only of arm second: seed 0" in one(findings(finished.rows(), audit_rows.DAMAGED), "warn")


def test_windows_of_few_documents_are_told_with_their_question(finished: Finished) -> None:
    note = "the examples are windows of only 1 document"
    finished.results["questions"] = [{"pair": ["first", "second"], "notes": [note]}, {"pair": ["second", "first"]}]
    rows = findings(finished.rows(), audit_rows.WINDOWS)
    assert one(rows, "warn") == note and rows[0]["pair"] == ["first", "second"]


def test_one_seed_is_told(folder: Path) -> None:
    finished = Finished(folder, layout(folder, plain("train.learning_rate=2e-3"), seeds=1))
    assert "not of the methods" in one(findings(finished.rows(), audit_rows.ONE_SEED), "inform")


# --------------------------------------------------------------------------------------------------- fields never read


class Careless:
    """A component that checks both of its options and uses one."""

    class Config(Options):
        used: int = 0
        unused: int = 0

        @model_validator(mode="after")
        def _checked(self) -> Careless.Config:
            assert self.used >= 0 and self.unused >= 0
            return self


def test_a_field_that_is_set_and_never_read_is_listed() -> None:
    study = study_config(
        {
            "stages": {"only": {}},
            "arms": {"a": {"stages": ["only"], "train": {"max_steps": 3}}},
            "compare": {"metric": "loss"},
        }
    )
    config = Layout(study, [0], "fp32", "x").config("a", "only", 0, {})
    reads = Reads()
    with recording(reads):
        options = build_options(Careless, {"used": 1, "unused": 2}, "objective")
        assert options.used + config.seed == 1
        build_options(Careless, {"unused": 2}, "elsewhere")
    assert config.train.max_steps == 3, "looking after recording is not noted"
    assert reads.unread(config) == ["name", "objective.unused", "train.max_steps"]
    with recording(reads):
        assert config.train.max_steps == 3
    assert reads.unread(config) == ["name", "objective.unused"]


def test_a_run_lists_what_it_did_not_read(folder: Path) -> None:
    study = layout(folder, plain("objective={kind: span-corruption, view: whole, max_prefix_tokens: 7}"))
    config = study.chain("second", 0)[-1].config
    manifest = train(config, folder / "run", quiet=True).manifest
    assert manifest["config_unread"] == ["objective.max_prefix_tokens"]
    assert manifest["unused_parameters"] == []


def test_probes_leave_the_models_as_they_were(folder: Path) -> None:
    study = layout(folder, plain("model.window=1000"))
    with Probes(study) as probes:
        probe = probes.chain("second")["only"]
        before = {name: tensor.clone() for name, tensor in probe.run.model.state_dict().items()}
        assert dead_options(study, probes), "the option is dead, so that both models were trained"
        assert all(torch.equal(tensor, before[name]) for name, tensor in probe.run.model.state_dict().items())
        assert len(list(Path(probes._folder.name).iterdir())) == 0
