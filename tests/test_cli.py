"""The command line as a person meets it: one line and the right exit code for each mistake; JSON for each verb."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import isoform
from isoform import chance
from isoform.checkpoints.forms import save_model
from isoform.cli import main
from isoform.errors import IsoformWarning
from isoform.layers import choice
from isoform.models.gpt2 import GPT2
from isoform.storage import locked

CONFIG = """
name: tiny
data: {{path: lines.txt, splits: {{train: 0.8, dev: 0.2}}, overlap: keep}}
text: {{tokenizer: char, max_tokens: 32}}
model: {{family: gpt2, num_layers: 1, num_heads: 2, width: 16, dropout: 0.0}}
objective: causal
train: {{max_steps: 6, batch_sequences: 8, precision: fp32, {train}}}
"""
PAIRS = """
name: pairs
data: {train: pairs.tsv, columns: [question, answer], holdout: 10, overlap: keep}
text: {tokenizer: char, max_tokens: 48}
model: {family: gpt2, num_layers: 1, num_heads: 2, width: 16, dropout: 0.0}
objective: answers
train: {max_steps: 4, batch_sequences: 8, precision: fp32}
evaluate: {max_new_tokens: 5}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("ISOFORM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    words = ["sun", "moon", "river", "stone", "bird", "cloud", "tree", "field", "wind", "night"]
    lines = [" ".join(words[(i * k) % 10] for k in range(1, 3 + i % 9)) + "." for i in range(60)]
    Path("lines.txt").write_text("\n".join(dict.fromkeys(lines)) + "\n")
    Path("pairs.tsv").write_text("".join(f"What is {words[i % 10]} {i}?\t{words[(i * 3) % 10]}\n" for i in range(40)))
    Path("tiny.yaml").write_text(CONFIG.format(train="learning_rate: 1e-3"))
    Path("pairs.yaml").write_text(PAIRS)
    return tmp_path


def run(monkeypatch, capsys, *words: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of the command."""
    monkeypatch.setattr(sys, "argv", ["isoform", *words])
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refused(monkeypatch, capsys, *words: str) -> tuple[int, str]:
    code, _, errors = run(monkeypatch, capsys, *words)
    said = [line for line in errors.splitlines() if line.startswith("isoform: ")]
    assert len(said) == 1, errors
    assert "Traceback" not in errors
    return code, said[0]


def change(path: str, old: str, new: str) -> None:
    text = Path(path).read_text()
    assert old in text
    Path(path).write_text(text.replace(old, new))


def test_unknown_key(monkeypatch, capsys):
    change("tiny.yaml", "learning_rate", "learning_rat")
    code, line = refused(monkeypatch, capsys, "train", "tiny.yaml")
    assert code == 2 and "train.learning_rat: unknown key (did you mean 'learning_rate'?)" in line
    assert not Path("runs").exists()


def test_unknown_key_of_a_component(monkeypatch, capsys):
    change("tiny.yaml", "width: 16", "widht: 16")
    code, line = refused(monkeypatch, capsys, "train", "tiny.yaml")
    assert code == 2 and "model.widht: unknown key (did you mean 'width'?)" in line


def test_unknown_kind_and_family(monkeypatch, capsys):
    for old, new, hint in (("objective: causal", "objective: casual", "causal"), ("gpt2", "gtp2", "gpt2")):
        Path("wrong.yaml").write_text(Path("tiny.yaml").read_text().replace(old, new))
        code, line = refused(monkeypatch, capsys, "train", "wrong.yaml")
        assert code == 2 and f"did you mean '{hint}'?" in line


def test_wrong_type(monkeypatch, capsys):
    code, line = refused(monkeypatch, capsys, "train", "tiny.yaml", "--set", "train.max_steps=many")
    assert code == 2 and "train.max_steps: given 'many'" in line


def test_missing_file(monkeypatch, capsys):
    code, line = refused(monkeypatch, capsys, "train", "tiny.yaml", "--set", "data.path=nothing.txt")
    assert code == 3 and "nothing.txt" in line


def test_empty_file(monkeypatch, capsys):
    Path("lines.txt").write_text("")
    code, line = refused(monkeypatch, capsys, "train", "tiny.yaml")
    assert code == 3 and "lines.txt" in line


def test_a_line_without_a_tab(monkeypatch, capsys):
    Path("pairs.tsv").write_text("What is a?\tx\nWhat is b?\n")
    code, line = refused(monkeypatch, capsys, "train", "pairs.yaml")
    assert code == 3 and "pairs.tsv:2" in line


def test_bytes_that_are_not_utf8(monkeypatch, capsys):
    Path("lines.txt").write_bytes(b"a good line\nsome \xff bytes\n" * 10)
    code, line = refused(monkeypatch, capsys, "train", "tiny.yaml")
    assert code == 3 and "lines.txt:2:6" in line


def test_an_empty_answer(monkeypatch, capsys):
    lines = Path("pairs.tsv").read_text().splitlines()
    Path("pairs.tsv").write_text("\n".join([lines[0], "What is nothing?\t", *lines[2:]]) + "\n")
    code, line = refused(monkeypatch, capsys, "train", "pairs.yaml")
    assert code == 3 and "pairs.tsv:2" in line


def test_a_document_longer_than_the_context_is_refused_where_that_was_asked(monkeypatch, capsys):
    change("tiny.yaml", "max_tokens: 32", "max_tokens: 8")
    code, line = refused(monkeypatch, capsys, "train", "tiny.yaml", "--set", "data.long_documents=refuse")
    assert code == 3 and "text.max_tokens" in line


def test_a_corpus_smaller_than_one_batch(monkeypatch, capsys):
    code, line = refused(monkeypatch, capsys, "train", "tiny.yaml", "--set", "train.batch_sequences=500")
    assert code == 3 and "fewer than one batch" in line


def test_a_folder_in_use(monkeypatch, capsys):
    with locked(Path("runs/tiny")):
        code, line = refused(monkeypatch, capsys, "train", "tiny.yaml")
    assert code == 5 and "is working in this folder" in line


def test_one_long_text_is_split_by_the_recipe_that_is_made_for_it(folder):
    draw = chance.generator(0, "speeches")
    lines = ["".join("abcdefgh \n"[i] for i in draw.integers(10, size=60)) for _ in range(9000)]
    (folder / "input.txt").write_text("\n".join(lines))
    changes = ["data.path=input.txt", "train.max_steps=2", "train.precision=fp32", "evaluate.max_examples=4"]
    changes += ["train.select.max_examples=4", "train.schedule.warmup_steps=1"]
    rows = isoform.train("shakespeare-char-small", set=changes, out=folder / "run")
    assert {row["split"] for row in rows} == {"dev"} and all(row["n"] == 4 for row in rows)


def test_a_folder_that_cannot_be_made(monkeypatch, capsys):
    code, line = refused(monkeypatch, capsys, "train", "tiny.yaml", "--out", "lines.txt")
    assert code == 6 and "lines.txt" in line


def test_a_refused_run_leaves_nothing(monkeypatch, capsys):
    refused(monkeypatch, capsys, "train", "tiny.yaml", "--set", "train.batch_sequences=500", "--out", "runs/none")
    assert not Path("runs/none").exists()


@pytest.mark.parametrize("option", ["model.position.knd=rope", "train.schedule.warmup_step=3"])
def test_a_component_without_a_kind(monkeypatch, capsys, option):
    code, line = refused(monkeypatch, capsys, "train", "tiny.yaml", "--set", option)
    key = option.split("=")[0].rpartition(".")[2]
    assert code == 2 and f"`kind` is missing beside {key!r}" in line
    assert ("did you mean `kind` by 'knd'?" in line) == (key == "knd")


def test_a_mistake_of_a_whole_section_is_said_without_the_section(monkeypatch, capsys):
    code, line = refused(monkeypatch, capsys, "study", "quickstart", "--set", "questions=[{pair: [scratch, nope]}]")
    assert code == 2 and line.startswith("isoform: questions.0.pair: 'nope' is not an arm")


def test_changed_data_is_shown(monkeypatch, capsys):
    assert run(monkeypatch, capsys, "train", "tiny.yaml")[0] == 0
    with Path("lines.txt").open("a") as file:
        file.write("one line more.\n")
    code, line = refused(monkeypatch, capsys, "train", "tiny.yaml")
    assert code == 3 and "the data has changed since this run began: splits." in line and " -> " in line


def test_the_precision_of_a_run_is_chosen_once(monkeypatch, capsys, folder):
    change("tiny.yaml", "precision: fp32", "precision: auto")
    monkeypatch.setattr(choice, "fast_bf16", lambda shape: True)
    assert run(monkeypatch, capsys, "train", "tiny.yaml", "--set", "train.max_steps=2", "--out", "run")[0] == 0
    manifest = json.loads((folder / "run" / "manifest.json").read_text())
    assert manifest["precision"] == "bf16"
    (folder / "run" / "manifest.json").write_text(json.dumps({**manifest, "complete": False}))
    monkeypatch.setattr(choice, "fast_bf16", lambda shape: False)
    words = ("train", "tiny.yaml", "--set", "train.max_steps=2", "--out", "run", "--resume")
    assert run(monkeypatch, capsys, *words)[0] == 0
    again = json.loads((folder / "run" / "manifest.json").read_text())
    assert (again["precision"], again["started"]) == ("bf16", manifest["started"])


def test_inputs_of_every_form_and_characters_that_nobody_knows(monkeypatch, capsys, folder):
    assert run(monkeypatch, capsys, "train", "pairs.yaml")[0] == 0
    asked = ["What is sun 0?", "What is Ä 1?"]
    (folder / "in.txt").write_text("\n".join(asked))
    (folder / "in.csv").write_text("\n".join(asked))
    (folder / "in.jsonl").write_text("".join(json.dumps({"question": text}) + "\n" for text in asked))
    for name in ("in.txt", "in.csv", "in.jsonl"):
        code, told, errors = run(monkeypatch, capsys, "predict", "runs/pairs", "--in", name, "--json")
        assert code == 0 and [row["input"] for row in json.loads(told)] == asked
        assert "1 input tokens were unknown" in errors
    with pytest.warns(IsoformWarning, match="1 input tokens were unknown"):
        assert len(isoform.predict("runs/pairs", asked[1])) == 1
    with pytest.warns(IsoformWarning, match="1 input tokens were unknown"):
        list(isoform.generate("runs/pairs", "Ä", max_new_tokens=1))
    code, line = refused(monkeypatch, capsys, "predict", "runs/pairs", "sun", "--out", "answers.xlsx")
    assert code == 2 and ".csv, .jsonl, .txt or .conll" in line and not Path("answers.xlsx").exists()


def test_no_such_run(monkeypatch, capsys):
    code, line = refused(monkeypatch, capsys, "predict", "runs/none", "hello")
    assert code == 4 and "runs/none" in line


def test_ctrl_c_saves_and_exits_130():
    code = (
        "import signal, threading\n"
        "from isoform.training.loop import Loop\n"
        "update = Loop._update\n"
        "def interrupted(self, step):\n"
        "    if step.step == 2: signal.raise_signal(signal.SIGINT)\n"
        "    return update(self, step)\n"
        "Loop._update = interrupted\n"
        "import sys\nsys.argv = ['isoform', 'train', 'tiny.yaml']\n"
        "from isoform.cli import main\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    assert "stopped at step 3 of 6, saved" in done.stderr
    again = subprocess.run(
        [sys.executable, "-m", "isoform.cli", "train", "tiny.yaml", "--resume"], capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr


def test_a_prompt_is_shown_only_once_there_is_something_to_follow_it(monkeypatch, capsys):
    Path("damaged").mkdir()
    Path("damaged/config.json").write_text("{")
    code, out, errors = run(monkeypatch, capsys, "generate", "damaged", "--prompt", "hi")
    assert (code, out) == (4, "") and errors.startswith("isoform: ")
    assert run(monkeypatch, capsys, "train", "tiny.yaml", "--out", "run")[0] == 0
    code, out, _ = run(monkeypatch, capsys, "generate", "run", "--prompt", "sun ", "--max-new-tokens", "3")
    assert code == 0 and out.startswith("sun ") and len(out) > len("sun \n")


def test_train_predict_eval_generate_report_and_doctor_speak_json(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "train", "pairs.yaml", "--out", "run", "--json")
    rows = json.loads(out)
    assert code == 0 and {row["metric"] for row in rows} >= {"exact_match", "loss"}
    assert rows[0].keys() >= {"metric", "split", "value", "n", "low", "high"}
    assert Path("run/report.html").is_file()

    inputs = ["What is sun 0?", "What is \N{SNOWMAN}?"]
    code, out, errors = run(monkeypatch, capsys, "predict", "run", *inputs, "--json")
    answers = json.loads(out)
    assert code == 0 and [row["input"] for row in answers] == inputs and answers[0].keys() == {"input", "answer"}
    assert answers == isoform.predict("run", inputs)

    code, out, errors = run(monkeypatch, capsys, "predict", "run", *inputs)
    assert code == 0 and "1 input tokens were unknown" in errors

    Path("inputs.tsv").write_text("".join(f"What is sun {i}?\n" for i in range(7)))
    code, out, _ = run(monkeypatch, capsys, "predict", "run", "--in", "inputs.tsv", "--out", "answers.csv")
    assert code == 0 and "7 answers written" in out
    assert len(Path("answers.csv").read_text().splitlines()) == 8

    code, out, _ = run(monkeypatch, capsys, "eval", "run", "--data", "pairs.tsv", "--json")
    assert code == 0 and json.loads(out)[0]["n"] == 40

    code, out, _ = run(monkeypatch, capsys, "eval", "run", "--data", "pairs.tsv", "--int8", "--json")
    for row in json.loads(out):
        assert row["change"] == row["value_int8"] - row["value"]
    code, out, _ = run(monkeypatch, capsys, "eval", "run", "--data", "pairs.tsv", "--int8")
    assert code == 0 and "in int8" in out and "change" in out

    asked = ["--prompt", "What is", "--max-new-tokens", "5", "--json"]
    for more in ([], ["--int8"]):
        code, out, _ = run(monkeypatch, capsys, "generate", "run", *asked, *more)
        assert code == 0 and json.loads(out).keys() == {"prompt", "text"}

    code, out, _ = run(monkeypatch, capsys, "report", "run", "--to", "md", "--json")
    assert code == 0 and Path(json.loads(out)["path"]).read_text().startswith("#")

    for words in (["doctor"], ["doctor", "run"], ["recipes"], ["data", "lines.txt"]):
        code, out, errors = run(monkeypatch, capsys, *words, "--json")
        assert json.loads(out), (words, errors)

    # A run beside itself is the same thing twice, which the audit refuses; the numbers are there all the same.
    code, out, _ = run(monkeypatch, capsys, "compare", "run", "run", "--json")
    assert code == 10 and json.loads(out)["questions"][0]["difference"] == 0


def test_every_verb_that_opens_a_model_hands_its_base_on(monkeypatch, capsys):
    save_model(Path("whole"), GPT2.tiny(), None)
    for words in (
        ["eval", "whole"],
        ["predict", "whole", "sun"],
        ["generate", "whole"],
        ["export", "whole", "--to=hf"],
    ):
        code, line = refused(monkeypatch, capsys, *words, "--base", "elsewhere")
        assert code == 4 and "whole: a whole model and no adapter, which has no base elsewhere" in line, words


def test_plan_says_what_it_takes_and_keeps_nothing(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "plan", "tiny.yaml", "--try", "--json")
    plan = json.loads(out)
    assert code == 0 and plan["stages"][0]["steps"] == 6 and plan["seconds_total"] > 0 and plan["attempt"]["rows"]
    assert not Path("runs").exists()


def test_a_study_for_train_and_a_run_for_study_are_told(monkeypatch, capsys):
    assert "use `isoform study`" in refused(monkeypatch, capsys, "train", "quickstart")[1]
    assert "use `isoform train`" in refused(monkeypatch, capsys, "study", "tiny.yaml")[1]


def test_plain_screens_go_through(monkeypatch, capsys):
    for words in (["recipes"], ["doctor"], ["plan", "tiny.yaml"], ["data", "lines.txt"], ["--version"]):
        code, out, errors = run(monkeypatch, capsys, *words)
        assert code == 0 and out.strip(), (words, errors)


def test_bench_prints_ceilings_and_shares_and_writes_nothing(monkeypatch, capsys, folder):
    code, out, _ = run(monkeypatch, capsys, "bench", "tiny.yaml", "--seconds", "0", "--json")
    values = json.loads(out)
    assert code == 0 and sum(values["shares"].values()) == pytest.approx(1)
    assert not (folder / "runs").exists()
    monkeypatch.setattr(isoform, "bench", lambda *given, **options: values)
    code, out, _ = run(monkeypatch, capsys, "bench")
    assert code == 0
    for words in ("matrix products, fp32", "GFLOP/s", "where a step's time goes", "kernels:", "optimiser"):
        assert words in out, words
