"""Conversations: which tokens are asked, that nobody sees a neighbour, and what is lost where one is too long.

Oracles: the assistant masks of transformers; each conversation alone for the batch of all.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from isoform.config import DataConfig
from isoform.contracts import IGNORE, Document, Sample
from isoform.data.batches import collate
from isoform.data.corpus import build_dataset
from isoform.data.sources import open_source
from isoform.errors import ConfigError, DataError
from isoform.models.llama import Llama
from isoform.objectives.chat import Chat
from isoform.text.chat import TEMPLATE, chat_tokens, conversation
from isoform.text.kinds import Bpe
from isoform.text.tokenizers import TextTokenizer, load_tokenizer

MARKED = """{{ bos_token }}{% for m in messages %}
{%- if m.role == 'assistant' %}[A]{{ '\n' }}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}
{%- else %}[U] {{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}[A]{{ '\n' }}{% endif %}"""
text = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=14).filter(str.strip)


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    words = ["system user assistant What is a river? You are kind. Hello there and so on"] * 3
    return Bpe.train(Bpe.Config(vocab_size=330, special=("pad", "bos", "eos")), words)


def build(tokenizer: TextTokenizer, max_tokens: int = 256, template: str | None = TEMPLATE) -> Chat:
    own = TextTokenizer(tokenizer.backend, tokenizer.special)
    return Chat(Chat.Config(template=template), own, max_tokens)


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[at % 2], "content": content} for at, content in enumerate(contents)]


def document(messages: list[dict[str, str]] | str, number: int = 1) -> Document:
    return Document(f"d{number}", {"messages": json.dumps(messages)}, {"source": "chat.jsonl", "row": number})


def sample(objective: Chat, messages: list[dict[str, str]], number: int = 1) -> Sample:
    return objective.prepare(objective.encode(document(messages, number)), np.random.default_rng(0))


@given(contents=st.lists(text, min_size=1, max_size=3), questions=st.lists(text, min_size=3, max_size=3))
@settings(max_examples=40, deadline=None)
def test_answers_and_their_closing_token_alone_are_asked(tokenizer, contents, questions) -> None:
    objective = build(tokenizer)
    messages = turns(*(part for pair in zip(questions, contents, strict=False) for part in pair))
    made = sample(objective, messages)
    assert made.targets is not None
    eos = tokenizer.special_ids["eos"]
    runs: list[list[int]] = []
    for place, target in enumerate(made.targets.tolist()):
        if target == IGNORE:
            continue
        if place == 0 or made.targets[place - 1] == IGNORE:
            runs.append([])
        runs[-1].append(target)
    assert [run[-1] for run in runs] == [eos] * len(contents)
    assert [tokenizer.decode(run) for run in runs] == contents
    whole = conversation(objective.tokenizer, messages).ids.tolist()  # type: ignore[arg-type]
    assert made.tokens.tolist() == whole[:-1]
    assert all(target in (IGNORE, after) for target, after in zip(made.targets.tolist(), whole[1:], strict=True))


def test_labels_are_those_of_transformers(tokenizer, tmp_path: Path) -> None:
    objective = build(tokenizer, template=MARKED)
    objective.tokenizer.save(tmp_path)  # type: ignore[attr-defined]
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for messages in (turns("hi", "Hello"), turns("What?", "A river.", "Grüße, 你好", "You are kind")):
        given_ = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        written = conversation(objective.tokenizer, messages)  # type: ignore[arg-type]
        assert written.ids.tolist() == given_["input_ids"]
        asked = [1 if any(a <= at < b for a, b in written.answers.values()) else 0 for at in range(len(written.ids))]
        assert asked == given_["assistant_masks"]


def test_what_is_learnt_follows_the_tokens_of_a_prompt(tokenizer) -> None:
    objective = build(tokenizer)
    encoded = objective.encode(document(turns("hi", "Hello", "What?", "\n\nA river")))
    prompt = objective.prompt(encoded)
    assert (prompt.gold, prompt.text) == ("\n\nA river", "user: hi\nassistant: Hello\nuser: What?")
    made = objective.prepare(encoded, np.random.default_rng(0))
    assert made.targets is not None
    assert made.tokens[: len(prompt.tokens)].tolist() == prompt.tokens.tolist()
    answer = made.targets[len(prompt.tokens) - 1 :]
    assert tokenizer.decode(answer) == prompt.gold and answer[-1] in prompt.stop
    asked = objective.prompt(objective.encode(Document("x", {"messages": "hi"}, {})))
    assert asked.gold is None
    assert asked.tokens.tolist() == chat_tokens(objective.tokenizer, turns("hi")).tolist()  # type: ignore[arg-type]


@given(lengths=st.lists(st.integers(1, 9), min_size=2, max_size=6), filler=st.sampled_from([None, 16]))
@settings(max_examples=12, deadline=None)
def test_no_conversation_of_a_batch_sees_another(tokenizer, lengths, filler) -> None:
    objective = build(tokenizer)
    model = Llama.tiny(vocab_size=tokenizer.vocab_size).double()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).double()
    samples = [
        sample(objective, turns("so " * length, "kind " * (10 - length), "x", "on"), number)
        for number, length in enumerate(lengths)
    ]

    def loss(some: list[Sample]) -> tuple[torch.Tensor, float]:
        batch = collate(some, filler_to=filler)
        return objective.loss(model, batch, model(batch))["loss"].total, objective.counts(batch)["loss"]

    together, count = loss(samples)
    alone = [loss([one]) for one in samples]
    torch.testing.assert_close(together, torch.stack([total for total, _ in alone]).sum(), rtol=1e-10, atol=1e-10)
    assert count == sum(part for _, part in alone)


def test_ours_is_the_template_of_who_has_none(tokenizer, tmp_path: Path) -> None:
    objective = build(tokenizer, template=None)
    objective.tokenizer.save(tmp_path)  # type: ignore[attr-defined]
    assert load_tokenizer(tmp_path).chat_template == TEMPLATE
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "system", "content": "Be kind"}, *turns("hi", "Hello", "What?")]
    ours = chat_tokens(load_tokenizer(tmp_path), messages)
    assert theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == ours.tolist()
    assert tokenizer.decode(ours, skip_special=False).startswith("<bos>system\nBe kind<eos>\n<bos>user\nhi<eos>\n")
    own = TextTokenizer(tokenizer.backend, tokenizer.special, "{{ messages[0].content }}{{ eos_token }}")
    assert Chat(Chat.Config(), own, 9).tokenizer.chat_template.startswith("{{ messages")  # type: ignore[attr-defined]
    bare = TextTokenizer(tokenizer.backend, {"pad": "<pad>"})
    with pytest.raises(ConfigError, match=r"objective.template: .* add `eos` to text.tokenizer.special"):
        Chat(Chat.Config(), bare, 9)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
            "{% if not add_generation_prompt %}{{ messages | length }}{% endif %}",
            None,
        ),
        ("{{ messages | length }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}", "otherwise once"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "ends an answer with no special token"),
        ("{{ raise_exception('no systems here') }}", "no systems here"),
        ("{% for m in %}", "does not take these messages"),
    ],
)
def test_a_template_that_cannot_be_learnt_from_is_refused(tokenizer, template: str, message: str | None) -> None:
    objective = build(tokenizer, template=template)
    if message is None:
        assert objective.encode(document(turns("a", "b", "c", "d")))
        return
    with pytest.raises(DataError, match=rf"^chat\.jsonl:7: .*{message}") as caught:
        objective.encode(document(turns("a", "b", "c", "d"), 7))
    assert "\n" not in str(caught.value)


def test_what_is_cut_off_is_counted_and_nothing_is_learnt_from_nothing(tokenizer, tmp_path: Path) -> None:
    rows = [
        {"messages": turns("hi", "Hello")},
        {"messages": turns("hi", "Hello", "What is a river?", "kind " * 20)},
        {"messages": turns("so on " * 30, "Hello")},
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    objective = build(tokenizer, 40)
    sizes = [objective.encode(document(row["messages"])) for row in rows]
    source = open_source(str(path), DataConfig(), objective.alternatives)
    dataset = build_dataset(source, objective.tokenizer, objective, DataConfig(), 40, tmp_path / "cache")  # type: ignore[arg-type]
    report = dataset.report
    asked, kept = zip(*map(objective.asked, sizes), strict=True)
    assert 0 < kept[1] < asked[1] and kept[2] == 0
    assert report["targets"] == sum(asked) and report["targets_lost"] == sum(asked) - sum(kept)
    assert (report["documents"], report["documents_truncated"], report["documents_unasked"]) == (3, 1, 1)
    samples = [objective.prepare(one, np.random.default_rng(0)) for one in dataset]
    assert [int((one.targets != IGNORE).sum()) for one in samples] == list(kept[:2])
    assert objective.planned_tokens(dataset.field_lengths).tolist() == [len(one.tokens) for one in samples]
    path.write_text(json.dumps(rows[0]) + "\n" + json.dumps({"messages": turns("hi")}) + "\n")
    source = open_source(str(path), DataConfig(), objective.alternatives)
    with pytest.raises(DataError, match=r"chat\.jsonl:2: a conversation without an answer"):
        build_dataset(source, objective.tokenizer, objective, DataConfig(), 40, tmp_path / "cache")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fields", [{"instruction": "hi", "input": "", "output": ""}, {"question": "hi", "answer": " "}]
)
def test_an_empty_answer_names_its_row(tokenizer, fields: dict[str, str]) -> None:
    with pytest.raises(DataError, match=r"chat\.jsonl:3: message 2 \(assistant\) is an empty answer"):
        build(tokenizer).encode(Document("d", fields, {"source": "chat.jsonl", "row": 3}))
