"""Answers to messages: by the model's template, until one of its own stop tokens, streamed like any continuation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import isoform
from isoform import cli
from isoform.checkpoints.forms import save_model
from isoform.contracts import Prompt
from isoform.errors import DataError
from isoform.evaluation.generate import generate
from isoform.models.llama import Llama
from isoform.serving.predict import predict
from isoform.serving.use import _continued, continue_text, open_model
from isoform.storage import read_json, write_json
from isoform.text.chat import chat_tokens
from isoform.text.kinds import Bpe

TEMPLATE = (
    "{% for m in messages %}<bos>{{ m.role }} {{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant {% endif %}"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny chat model whose every parameter matters."""
    tokenizer = Bpe.train(Bpe.Config(vocab_size=300), ["user assistant hello there " * 4])
    tokenizer.chat_template = TEMPLATE
    model = Llama.tiny(vocab_size=tokenizer.vocab_size)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    save_model(tmp_path / "model", model, tokenizer)
    return tmp_path / "model"


def answer(folder: Path, **options: Any) -> str:
    return "".join(isoform.generate(folder, "hello", chat=True, max_new_tokens=12, **options))


def test_an_answer_continues_the_rendered_conversation(folder: Path) -> None:
    opened = open_model(folder)
    tokens = chat_tokens(opened.tokenizer, [{"role": "user", "content": "hello"}])
    prompt = Prompt("prompt", tokens, opened.stop, 12, "hello")
    expected = generate(opened.model, [prompt], autocast=opened.autocast)[0]
    assert answer(folder) == opened.tokenizer.decode(expected.tokens)
    assert answer(folder) == answer(folder, temperature=0.0) != answer(folder, temperature=2.0)
    assert answer(folder) != "".join(isoform.generate(folder, "hello", temperature=0.0, max_new_tokens=12))


def test_every_stop_token_of_the_model_s_files_ends_an_answer(folder: Path) -> None:
    opened = open_model(folder)
    assert opened.stop == (opened.tokenizer.special_ids["eos"],)
    first = next(iter(generate_ids(folder)))
    settings = read_json(folder / "generation_config.json")
    (folder / "manifest.json").unlink()
    write_json(folder / "generation_config.json", {**settings, "eos_token_id": [2, first]})
    assert set(open_model(folder).stop) == {2, first}
    assert answer(folder) == ""


def test_the_token_that_closes_an_answer_ends_one_whatever_the_tokenizer_s_end_is(folder: Path) -> None:
    opened = open_model(folder)
    other = opened.tokenizer.special["pad"]
    opened.tokenizer.chat_template = TEMPLATE.replace("<eos>", other)
    prompt = _continued(opened, "hello", chat=True, max_new_tokens=3)
    assert set(prompt.stop) == {opened.tokenizer.special_ids["eos"], opened.tokenizer.special_ids["pad"]}
    assert _continued(opened, "hello", chat=False, max_new_tokens=3).stop == opened.stop
    save_model(folder.parent / "other", opened.model, opened.tokenizer)
    saved = read_json(folder.parent / "other" / "generation_config.json")
    ids = opened.tokenizer.special_ids
    assert saved["eos_token_id"] == [ids["eos"], ids["pad"]]
    assert open_model(folder.parent / "other").stop == tuple(sorted(saved["eos_token_id"]))


def generate_ids(folder: Path) -> tuple[int, ...]:
    opened = open_model(folder)
    tokens = chat_tokens(opened.tokenizer, [{"role": "user", "content": "hello"}])
    return generate(opened.model, [Prompt("prompt", tokens, opened.stop, 3, "hello")])[0].tokens


def test_a_model_without_a_template_says_so(folder: Path) -> None:
    opened = open_model(folder)
    opened.tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        continue_text(opened, "hello", chat=True)


def test_a_foreign_model_reads_its_begin_token_first(folder: Path) -> None:
    from tokenizers import processors

    opened = open_model(folder)
    assert opened.tokenizer.first_ids == []
    begin = opened.tokenizer.special["bos"]
    opened.tokenizer.backend.post_processor = processors.TemplateProcessing(
        single=[begin, "$A"], special_tokens=[(begin, opened.tokenizer.special_ids["bos"])]
    )
    del opened.tokenizer.__dict__["first_ids"]
    assert opened.tokenizer.first_ids == [opened.tokenizer.special_ids["bos"]]
    assert opened.tokenizer.special_ids["bos"] not in opened.tokenizer.encode("hello").tolist()


def test_the_command_prints_the_answer_alone(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    words = ["isoform", "generate", str(folder), "--chat", "--prompt", "hello", "--max-new-tokens", "12"]
    for extra in ([], ["--json"]):
        monkeypatch.setattr("sys.argv", [*words, *extra])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code in (0, None)
        out = capsys.readouterr().out
        assert (json.loads(out)["text"] if extra else out.removesuffix("\n")) == answer(folder)


@pytest.mark.parametrize("int8", [False, True])
def test_predictions_read_one_model_made_once(folder: Path, monkeypatch: pytest.MonkeyPatch, int8: bool) -> None:
    opened, models = open_model(folder, int8=int8), []
    short = opened.config.evaluate.model_copy(update={"max_new_tokens": 4})
    opened.config = opened.config.model_copy(update={"evaluate": short})
    inputs = ["hello", "there", "hello there", "user", "assistant"]
    expected = [answer.answer for answer in predict(opened, inputs)]

    def seen(model: Any, *given: Any, **options: Any) -> Any:
        models.append(model)
        return generate(model, *given, **options)

    monkeypatch.setattr("isoform.serving.predict.generate", seen)
    monkeypatch.setattr("isoform.serving.predict.CHUNK", 2)
    assert [answer.answer for answer in predict(opened, inputs)] == expected
    assert len(models) == 3 and all(model is opened.reading(int8=int8) for model in models)
