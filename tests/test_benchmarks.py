"""The benchmarks' own arithmetic, the plain GPT against transformers, and the command from end to end."""

from __future__ import annotations

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


def test_the_plain_gpt_is_a_gpt_2(tmp_path):
    from benchmarks.plain_gpt import PlainGPT
    from transformers import GPT2LMHeadModel

    from isoform.checkpoints.folders import save_model
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
    from benchmarks.works import WORKS

    for name, each in WORKS.items():
        assert page.read_text().count(f"| {name} |") == len(each.sides) - 1
