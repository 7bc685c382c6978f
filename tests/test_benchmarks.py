"""The benchmarks' own arithmetic, the plain GPT against transformers, and the command from end to end."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def work(sides):
    from benchmarks.pairs import Work, near

    return Work("gpt-baby", "a", "tried", "tokens", lambda folder, setting: None, sides, near("loss", 0.05))


def test_sides_take_turns_and_the_ratio_is_the_median_over_rounds(monkeypatch):
    from benchmarks import pairs

    order: list[str] = []
    rates = {"ours": iter([30.0, 10.0, 40.0]), "a": iter([10.0, 10.0, 10.0]), "b": iter([5.0, 20.0, 10.0])}
    losses = {"ours": 2.0, "a": 2.05, "b": 3.0}

    def child(work, side, folder, setting):
        order.append(side)
        if side == "prepare":
            return {}
        return {"count": next(rates[side]), "seconds": 1.0, "checks": {"loss": losses[side]}, "peak_bytes": 1}

    monkeypatch.setattr(pairs, "run_child", child)
    first, second = pairs.measure(
        work(dict.fromkeys(rates, lambda folder, setting: None)), pairs.Setting(), 3, lambda line: None
    )
    assert order == ["prepare", "ours", "a", "b", "a", "b", "ours", "b", "ours", "a"]
    assert first.ratios == [3.0, 1.0, 4.0] and first.ratio == 3.0 and first.agrees
    assert second.ratios == [6.0, 0.5, 4.0] and second.ratio == 4.0 and not second.agrees
    assert second.told == "loss 2.0000 and 3.0000"


def test_lists_may_differ_in_some_places():
    from benchmarks.pairs import equal_share

    check = equal_share("labels", 0.75)
    assert check({"labels": [1, 2, 3, 4]}, {"labels": [1, 2, 3, 0]}) == (True, "75.00 % of 4 labels equal")
    assert not check({"labels": [1, 2, 3, 4]}, {"labels": [1, 2, 0, 0]})[0]


def test_the_page_keeps_the_rows_of_other_works(tmp_path):
    from benchmarks.__main__ import line, write
    from benchmarks.pairs import Measured

    page = tmp_path / "RESULTS.md"
    row = Measured(work({}), "theirs", [30.0, 50.0], [10.0, 10.0], 10**9, 2 * 10**9, True, "loss equal")
    write(page, "decode-1", ["| decode-1 | theirs | **9.00** |"])
    write(page, "gpt-baby", [line(row)])
    write(page, "gpt-baby", [line(row)])
    text = page.read_text()
    assert text.count("| decode-1 |") == 1 and text.count("| gpt-baby |") == 1
    assert "**4.00** | 3.00 to 5.00 (2) | 40.0 tokens/s | 10.0 tokens/s | 1.00 / 2.00 GB | yes: loss equal" in text
    assert "- **decode-1** (c)" in text and "load" in text


def test_facts_stand_in_a_table_of_their_own_and_keep_theirs(tmp_path):
    from benchmarks.__main__ import write

    page = tmp_path / "RESULTS.md"
    write(page, "cost-layers", ["| cost-layers | 0.1 s a layer | today |"])
    write(page, "decode-1", ["| decode-1 | theirs | **9.00** |"])
    write(page, "cost-layers", ["| cost-layers | 0.2 s a layer | tomorrow |"])
    text = page.read_text()
    assert "0.1 s" not in text and text.index("| decode-1 |") < text.index("| cost-layers | 0.2 s a layer |")
    assert text.count("|---|---|---|\n| cost-layers") == 1 and "- **cost-layers** (h)" in text


def test_one_process_may_tell_of_several_comparisons(monkeypatch):
    from benchmarks import pairs
    from benchmarks.__main__ import line

    rows = [{"theirs": name, "our_rates": [4.0, 6.0], "their_rates": [2.0, 2.0], "told": "equal"} for name in "ab"]
    report = {"count": 1, "seconds": 1.0, "checks": {"rows": rows}, "peak_bytes": 3 * 10**9}
    monkeypatch.setattr(pairs, "run_child", lambda work, side, folder, setting: report)
    both = dataclasses.replace(work({}), together=True)
    first, second = pairs.measure_together(both, pairs.Setting(), lambda line: None)
    assert (first.theirs, second.theirs, first.ratio) == ("a", "b", 2.5)
    assert "| 5.0 tokens/s | 2.0 tokens/s | 3.00 GB of both | yes: equal |" in line(first)


def test_of_what_is_done_once_the_time_is_told():
    from benchmarks.pairs import WHOLE, speed

    assert speed(dataclasses.replace(work({}), unit=WHOLE), 1 / 12.5) == "12.5 s"
    assert speed(work({}), 1250.0) == "1,250.0 tokens/s"


def test_the_fit_of_a_line():
    from benchmarks.costs import fit

    start, slope, explained, deviation = fit([[1, 3.0], [2, 5.0], [4, 9.0]])
    assert (start, slope) == pytest.approx((1.0, 2.0)) and explained == pytest.approx(1) and deviation < 1e-12
    _, _, explained, deviation = fit([[1, 3.0], [2, 6.0], [4, 9.0]])
    assert explained == pytest.approx(27 / 28) and deviation == pytest.approx(1 / 8)


def test_the_plain_loop_is_judged_on_every_character_but_the_first(monkeypatch):
    from benchmarks.plain_gpt import PlainGPT, mean_loss

    torch.manual_seed(0)
    plain = PlainGPT(11, 8, 1, 2, 8, bias=True, dropout=0.3, tied=False)
    data = torch.randint(0, 11, (30,))
    total = 0.0
    plain.eval()
    for start in range(0, 29, 8):
        row = data[start : start + 9]
        total += float(plain(row[None, :-1], row[None, 1:]).detach()) * (len(row) - 1)
    plain.train()
    assert mean_loss(plain, data, 8, batch=2) == pytest.approx(total / 29) and plain.training


def test_a_loss_that_was_not_reached_is_told():
    from benchmarks.reaching import reached

    low, high = {"loss": 1.87, "steps": 110, "target": 1.88}, {"loss": 1.9, "steps": 2000, "target": 1.88}
    assert reached(low, high) == (True, "1.8700 after 110 steps and 1.9000 after 2,000 steps")
    assert not reached(high, low)[0]


def test_the_families_are_those_that_are_compared():
    from benchmarks import families, family_works

    assert set(family_works.NAMES) == set(families.FAMILIES)


def test_the_plain_gpt_is_a_gpt_2(tmp_path):
    from benchmarks.plain_gpt import PlainGPT
    from transformers import GPT2LMHeadModel

    from isoform.checkpoints.forms import save_model
    from isoform.registry import build_options, lookup

    family = lookup("model", "gpt2")
    sizes = {"num_layers": 2, "num_heads": 2, "width": 16, "vocab_size": 19, "max_positions": 12, "dropout": 0.0}
    model = family(build_options(family, {**sizes, "feedforward": {"kind": "gelu"}}, "model"), seed=0)
    save_model(tmp_path, model, None)
    plain = PlainGPT(19, 12, 2, 2, 16, bias=True, dropout=0.0)
    plain.load(tmp_path)
    tokens = torch.randint(0, 19, (3, 13), generator=torch.Generator().manual_seed(0))
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    loss = theirs(input_ids=tokens[:, :12]).logits.log_softmax(-1).gather(2, tokens[:, 1:, None]).mean().neg()
    assert torch.allclose(plain(tokens[:, :12], tokens[:, 1:]), loss, atol=1e-5)


def test_unknown_names_and_missing_data_are_told(tmp_path):
    from benchmarks.pairs import Setting

    with pytest.raises(SystemExit, match=r"--root FOLDER names the folder that holds imdb/train\.parquet"):
        Setting(root=str(tmp_path)).data("imdb", "train.parquet")


@pytest.mark.slow
def test_every_work_goes_through_with_tiny_sizes(tmp_path):
    page = tmp_path / "quick.md"
    words = [sys.executable, "-m", "benchmarks", "--quick", "--out", str(page)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    from benchmarks.works import FACTS, WORKS

    for name, each in WORKS.items():
        assert page.read_text().count(f"| {name} |") == (2 if each.together else len(each.sides) - 1)
    for name in FACTS:
        assert page.read_text().count(f"| {name} |") == 1
