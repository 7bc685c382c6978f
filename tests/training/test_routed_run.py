"""A mixture of experts in a whole run: what is logged, drawn and counted."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from isoform.models.accounting import accounts
from isoform.storage import read_json, read_jsonl
from isoform.studies.curves import stage_curves
from isoform.studies.listings import print_plan
from isoform.studies.records import Records
from isoform.training.prepare import prepare
from isoform.training.run import train

MOE = {"kind": "moe", "experts": 4, "active": 2}


@pytest.fixture
def routed(make):
    model = {"family": "llama", "num_layers": 2, "num_heads": 2, "width": 16, "feedforward_width": 24}
    return make({"model": {**model, "feedforward": MOE}})


def test_loads_and_entropy_reach_the_log_and_the_report(routed, tmp_path):
    folder = train(routed, tmp_path / "run", quiet=True).folder
    rows = read_jsonl(folder / "metrics.jsonl")
    for row in rows:
        assert 0 < row["router_entropy"] <= math.log(4) + 1e-6
        for layer in (0, 1):
            loads = [row[f"expert_load.{layer}.{expert}"] for expert in range(4)]
            assert sum(loads) == pytest.approx(4)
            assert min(loads) > 0, "no expert is dead"
        assert 0.99 < row["loss_balance"] < 4
        assert row["loss_router_z"] > 0
    assert rows[0]["tokens"] < 8 * 32, "routers' parts are no targets"
    charts = {chart.title: chart for stage in stage_curves(Records(folder)) for chart in stage.charts}
    assert {"Router entropy", "Use of experts"} <= charts.keys()
    assert "most used" in charts["Use of experts"].note


def test_a_run_without_experts_draws_neither(make, tmp_path):
    folder = train(make(), tmp_path / "run", quiet=True).folder
    titles = {chart.title for stage in stage_curves(Records(folder)) for chart in stage.charts}
    assert not titles & {"Router entropy", "Use of experts"}


def test_micro_batches_do_not_change_a_routed_run(routed, make, tmp_path):
    model = routed.model
    first = train(make({"model": model, "train": {"micro_batch_tokens": 64}}), tmp_path / "small", quiet=True).folder
    second = train(routed, tmp_path / "large", quiet=True).folder
    for small, large in zip(*(read_jsonl(run / "metrics.jsonl") for run in (first, second)), strict=True):
        assert small["loss"] == pytest.approx(large["loss"], rel=1e-3)
        assert small["loss_balance"] == pytest.approx(large["loss_balance"], rel=1e-3)


def test_active_and_total_parameters_are_told_apart(routed, tmp_path):
    found = accounts(prepare(routed).model, 32)
    assert found["total"] - found["active"] == 2 * (4 - 2) * 3 * 16 * 24
    stage = {"name": "training", "runs": 1, "model": found, "steps": 1, "tokens": 1, "learning_rates": [[0, 1.0]]}
    stage |= {"seconds_training": 1, "seconds_evaluating": 1, "seconds_total": 1, "peak_memory_bytes": 1}
    stage |= {"precision": "fp32", "device": "cpu", "warnings": []}
    plan = {"name": "x", "jobs": 1, "stages": [stage], "tuning_trials": {}, "audit": [], "seconds_total": 1}
    plan |= {"disk_bytes": 1, "free_disk_bytes": 1, "memory_bytes": 1}
    console = Console(file=io.StringIO(), width=200)
    print_plan(plan, console)
    assert f"({found['active']:,} active)" in console.file.getvalue()


def test_the_manifest_has_both(routed, tmp_path):
    folder = train(routed, tmp_path / "run", quiet=True).folder
    model = read_json(folder / "manifest.json")["model"]
    assert model["active"] < model["total"]
