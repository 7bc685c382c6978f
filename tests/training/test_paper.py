"""Plans by arithmetic: every published size, without its text and without a byte of its weights."""

from __future__ import annotations

import re

import pytest
from rich.console import Console

import isoform
from isoform import machine
from isoform.config import run_config
from isoform.errors import ConfigError, DataError
from isoform.reading import apply_settings, read_config, recipe_names
from isoform.studies.listings import print_plan
from isoform.training.paper import plan_on_paper, why_on_paper

SIZE = re.compile(r"published size \(([\d.,]+) M parameters")
PUBLISHED = {name: found[1] for name in recipe_names() if (found := SIZE.search(read_config(name).get("about", "")))}
# Parameters as the published models in transformers have them.
EXACT = {
    "llama-7b": 6_738_415_616,
    "llama-2-7b": 6_738_415_616,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "mixtral-8x7b": 46_702_792_704,
    "t5-11b": 11_307_321_344,
    "bert-base": 109_514_298,
}


@pytest.fixture
def paper(tmp_path, monkeypatch):
    """A folder without texts."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def changed(name, *settings):
    return run_config(apply_settings(read_config(name), list(settings)))


def test_every_published_size_is_found():
    assert len(PUBLISHED) > 25
    assert PUBLISHED.keys() >= EXACT.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_size_is_planned_without_text_or_weights(name, paper):
    config = changed(name)
    assert why_on_paper(config)
    plan = plan_on_paper(config, "no text")
    total = plan["model"]["total"]
    assert f"{total / 1e6:,.1f}".replace(",", "") == PUBLISHED[name].replace(",", "")
    assert total == EXACT.get(name, total)
    # Kaplan's 6 N, N the parameters that a token passes through, half of them in an encoder-decoder; attention over
    # 131,072 tokens is most of what the longest takes.
    flops = plan["model"]["flops_forward_per_token"] + plan["model"]["flops_backward_per_token"]
    passed = plan["model"]["active"] / (2 if config.model["family"] == "t5" else 1)
    assert 0.7 < flops / (6 * passed) < 5
    assert plan["peak_memory_bytes"] == 16 * total
    assert plan["tokens"] == plan["mean_batch_tokens"] * config.train.max_steps
    assert max(rate for _, rate in plan["learning_rates"]) == pytest.approx(config.train.learning_rate, rel=0.05)


def test_the_face_plans_a_model_that_does_not_fit(paper, capsys):
    plan = isoform.plan("llama-2-7b")
    assert plan["seconds_total"] is None
    print_plan(plan, Console(width=200))
    said = capsys.readouterr().out
    assert "6,738,415,616" in said
    assert "planned on paper, no time is measured: training takes 107.8 GB without activations" in said
    assert "about" not in said


def test_a_model_that_fits_is_planned_on_paper_only_without_its_text(paper, monkeypatch):
    monkeypatch.setattr(machine, "memory_bytes", lambda: 10**12)
    config = changed("bert-base")
    assert why_on_paper(config) == "texts: no such file or folder"
    (paper / "texts").mkdir()
    assert why_on_paper(config) is None
    monkeypatch.setattr(machine, "memory_bytes", lambda: 10**9)
    assert "training takes 1.8 GB" in str(why_on_paper(config))


def test_what_only_the_text_tells_is_not_made_up(paper):
    without_steps = changed("bert-base", "train.max_steps=null", "train.max_epochs=1")
    assert why_on_paper(without_steps) is None or machine.memory_bytes() < 2e9
    with pytest.raises(ConfigError, match=r"train.max_epochs: .*only `train.max_steps` says how long"):
        plan_on_paper(without_steps, "no text")
    # The vocabulary of characters is that of the text.
    with pytest.raises(DataError, match=r"input.txt: no such file"):
        isoform.plan("shakespeare-char-small")
