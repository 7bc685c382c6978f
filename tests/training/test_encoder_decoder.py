"""Whole runs of an encoder-decoder: span corruption, then questions and answers, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sacrebleu.metrics import BLEU, CHRF
from transformers import AutoTokenizer, T5ForConditionalGeneration

import isoform.config
import isoform.reading
from isoform.errors import ConfigError
from isoform.evaluation.generate import generate
from isoform.storage import read_json, read_jsonl
from isoform.studies.audit_probe import Probe, sees_future
from isoform.training.feed import Feed
from isoform.training.prepare import prepare
from isoform.training.run import train
from isoform.training.step import LossModule, accumulate

T5 = {
    "data": {"holdout": None},
    "text": {"tokenizer": {"kind": "char", "sentinels": 20}, "max_tokens": 32},
    "model": {"family": "t5", "num_layers": 2, "num_heads": 2, "width": 16, "dropout": 0.1},
}
PAIRS = {
    "data": {"path": "pairs.tsv", "columns": ["question", "answer"]},
    "objective": {"kind": "text-to-text"},
    "train": {"select": {"metric": "exact_match", "split": "dev"}, "learning_rate": 0.01},
    "evaluate": {"max_new_tokens": 8},
}


@pytest.fixture
def make_t5(make):
    def build(*changes):
        base = make().model_dump(mode="json", exclude_defaults=True)
        base["model"] = {}
        for change in (T5, *changes):
            base = isoform.reading.merge(base, change)
        return isoform.config.run_config(base)

    return build


def test_span_corruption_then_questions(make_t5, tmp_path) -> None:
    spans = train(make_t5({"objective": {"kind": "t5-spans"}}), tmp_path / "spans", quiet=True)
    assert {row["metric"] for row in spans.rows} == {"loss", "perplexity", "token_accuracy"}
    steps = read_jsonl(spans.folder / "metrics.jsonl")
    assert steps[-1]["loss"] < steps[0]["loss"]
    answers = train(make_t5(PAIRS), tmp_path / "answers", start=spans.folder / "final", quiet=True)
    assert {row["metric"] for row in answers.rows} >= {"exact_match", "loss"}
    predictions = read_jsonl(answers.folder / "predictions.jsonl")
    assert all(row["gold"] and row["prediction"] is not None for row in predictions)
    said = isoform.predict(answers.folder, [row["input"] for row in predictions])
    assert [row["answer"] for row in said] == [row["prediction"] for row in predictions]
    manifest = read_json(answers.folder / "manifest.json")
    assert manifest["unused_parameters"] == []
    assert manifest["model"]["flops_forward_per_token"] > 0


def test_transformers_generates_what_we_generate_from_the_final_folder(make_t5, tmp_path) -> None:
    run = train(make_t5(PAIRS, {"train": {"max_steps": 30}}), tmp_path / "run", quiet=True)
    theirs = T5ForConditionalGeneration.from_pretrained(run.folder / "final").eval()
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "final")
    ours = isoform.load(run.folder)
    prepared = prepare(make_t5(PAIRS))
    for encoded in list(prepared.datasets["dev"])[:3]:
        prompt = prepared.objective.prompt(encoded)
        assert prompt is not None and prompt.source is not None
        ids = torch.from_numpy(prompt.source).long()[None]
        with torch.no_grad():
            said = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, num_beams=3)
        found = generate(ours.model, [prompt], beams=isoform.config.Beams(num_beams=3), max_new_tokens=8)[0]
        assert tokenizer.decode(said[0], skip_special_tokens=True) == ours.tokenizer.decode(found.tokens)


def test_beams_answer_in_an_evaluation(make_t5, tmp_path) -> None:
    run = train(make_t5(PAIRS, {"evaluate": {"beams": 3}, "train": {"max_steps": 4}}), tmp_path / "run", quiet=True)
    ours, prepared = isoform.load(run.folder), prepare(make_t5(PAIRS))
    prompts = [prepared.objective.prompt(encoded) for encoded in prepared.datasets["dev"]]
    found = generate(ours.model, prompts, beams=isoform.config.Beams(num_beams=3), max_new_tokens=8)
    texts = [ours.tokenizer.decode(generation.tokens) for generation in found]
    assert [row["prediction"] for row in read_jsonl(run.folder / "predictions.jsonl")] == texts


def test_a_folder_that_no_run_trained_answers_from_text_to_text(make_t5, tmp_path) -> None:
    run = train(make_t5(PAIRS, {"train": {"max_steps": 2}}), tmp_path / "run", quiet=True)
    shutil.copytree(run.folder / "final", tmp_path / "model")
    question = "What is sun 0?"
    answer = isoform.predict(run.folder, [question])[0]["answer"]
    pieces = isoform.generate(tmp_path / "model", question, temperature=0, max_new_tokens=8)
    assert "".join(pieces) == answer
    assert list(isoform.generate(tmp_path / "model", question, beams=3, max_new_tokens=8))
    with pytest.raises(ConfigError, match="an encoder needs something to read"):
        list(isoform.generate(tmp_path / "model", ""))


def test_chrf_and_bleu_are_measured_and_kept_for_each_example(make_t5, tmp_path) -> None:
    changes = {
        "evaluate": {"metrics": ["chrf", "bleu", "loss"]},
        "train": {"max_steps": 2, "select": {"metric": "loss"}},
    }
    run = train(make_t5(PAIRS, changes), tmp_path / "run", quiet=True)
    values = {row["metric"]: row["value"] for row in run.rows}
    predictions = read_jsonl(run.folder / "predictions.jsonl")
    said, gold = [row["prediction"] for row in predictions], [row["gold"] for row in predictions]
    assert values["chrf"] == pytest.approx(CHRF().corpus_score(said, [gold]).score)
    assert values["bleu"] == pytest.approx(BLEU().corpus_score(said, [gold]).score)


def test_the_recipe_translates(tmp_path) -> None:
    people, things = (
        ("A man", "A girl", "Two dogs", "An old woman"),
        ("a ball", "a red kite", "the river", "three birds"),
    )
    deeds = {"train": ("sees", "holds", "draws", "follows"), "validation": ("paints",), "test": ("watches",)}
    for split, verbs in deeds.items():
        said = [f"{who} {verb} {what} by the sea." for who in people for verb in verbs for what in things]
        pairs = {"source": said, "target": [text.upper() for text in said]}
        pq.write_table(pa.table(pairs), tmp_path / f"multi30k_en_de_{split}.parquet")
    small = ["model.num_layers=1", "model.width=32", "model.head_width=8", "model.feedforward_width=32"]
    short = ["train.max_epochs=2", "train.batch_tokens=1024", "trials.train.max_epochs=1", "evaluate.max_new_tokens=4"]
    settings = [f"data.root={tmp_path}", "text.tokenizer.vocab_size=320", "train.precision=fp32", *small, *short]
    results = isoform.study("translate", set=settings, seeds=1, jobs=1, out=tmp_path / "study")
    for arm in results["arms"]:
        assert {row["metric"] for row in arm["runs"][0]["metrics"]} == {"chrf", "bleu", "loss"}
        assert [trial["value"] for trial in arm["tuning"]], "a rate of its own"
    assert results["questions"][0]["verdict"] in ("cannot-tell", "better", "worse")


def test_a_resume_ends_bit_equal(make_t5, tmp_path, monkeypatch) -> None:
    from isoform.training.loop import Loop

    whole = train(make_t5(PAIRS), tmp_path / "whole", quiet=True)
    save = Loop._save

    def stop(self) -> None:
        save(self)
        if self.state.step == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(Loop, "_save", stop)
    with pytest.raises(KeyboardInterrupt):
        train(make_t5(PAIRS), tmp_path / "stopped", quiet=True)
    monkeypatch.setattr(Loop, "_save", save)
    resumed = train(make_t5(PAIRS), tmp_path / "stopped", resume=True, quiet=True)
    first, second = isoform.load(whole.folder / "last").model, isoform.load(resumed.folder / "last").model
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("objective", ["text-to-text", "t5-spans"])
@pytest.mark.parametrize(("micro_batch_tokens", "world"), [(40, 1), (90, 2), (100_000, 3)])
def test_micro_batches_and_ranks_do_not_change_the_gradient(make_t5, objective, micro_batch_tokens, world) -> None:
    run = prepare(make_t5(PAIRS if objective == "text-to-text" else {}, {"objective": {"kind": objective}}))
    model = run.model.double()

    def gradient(tokens: int, world: int) -> dict[str, torch.Tensor]:
        total: dict[str, torch.Tensor] = {}
        arguments = (run.datasets["train"], run.objective, run.batch_plan)
        shares = [
            Feed(*arguments, seed=0, micro_batch_tokens=tokens, rank=rank, world=world).at(1) for rank in range(world)
        ]
        counts = {"loss": sum(share.counts["loss"] for share in shares)}
        for share in shares:
            rank_model = copy.deepcopy(model)
            module = LossModule(rank_model, run.objective)
            accumulate(module, share.batches, counts, precision="fp32", device=torch.device("cpu"))
            for name, parameter in rank_model.named_parameters():
                total[name] = total.get(name, torch.zeros(())) + parameter.grad
        return total

    whole, parts = gradient(100_000, 1), gradient(micro_batch_tokens, world)
    for name, expected in whole.items():
        torch.testing.assert_close(parts[name], expected, rtol=1e-9, atol=1e-12)


def test_both_streams_count_in_the_micro_batch(make_t5) -> None:
    run = prepare(make_t5(PAIRS))
    feed = Feed(run.datasets["train"], run.objective, run.batch_plan, seed=0, micro_batch_tokens=60)
    step = feed.at(0)
    assert len(step.batches) > 1
    for batch in step.batches:
        assert batch.source is not None
        assert len(batch.sequences) == len(batch.source.sequences)
        assert batch.num_filler == batch.source.num_filler
    real = sum(sum(b.sequences.lengths[: len(b.sample_ids)]) for b in step.batches)
    sources = sum(sum(b.source.sequences.lengths[: len(b.sample_ids)]) for b in step.batches)
    assert step.num_tokens == real + sources
    planned = run.batch_plan.lengths[run.batch_plan.samples(0)[1]].sum()
    assert step.num_tokens == planned


def test_the_audit_sees_a_decoder_that_sees_the_future(make_t5) -> None:
    run = prepare(make_t5(PAIRS))
    assert not sees_future(Probe(run))
    for block in run.model.decoder.blocks:
        block.attention.causal = False
    assert sees_future(Probe(run))


def test_a_prefix_is_no_leak(make) -> None:
    run = prepare(make({"objective": {"kind": "prefix"}}))
    assert not sees_future(Probe(run))
    batch = Probe(run).batch
    assert any(batch.sequences.prefixes)
    plain = dataclasses.replace(batch, sequences=type(batch.sequences)(batch.sequences.lengths))
    assert not torch.equal(run.model(batch).hidden, run.model(plain).hidden)


def test_a_prefix_model_trains_and_learns(make, tmp_path) -> None:
    run = train(make({"objective": {"kind": "prefix"}, "train": {"max_steps": 30}}), tmp_path / "run", quiet=True)
    losses = [row["loss"] for row in read_jsonl(run.folder / "metrics.jsonl")]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("family", "objective", "message"),
    [
        (
            "gpt2",
            "text-to-text",
            r"text-to-text needs a model that is encoder-decoder; gpt2 is .*families that can: t5",
        ),
        ("gpt2", "t5-spans", r"t5-spans needs a model that is encoder-decoder"),
        ("t5", "causal", r"causal needs a model that is causal; t5 is .*families that can: .*gpt2"),
        ("t5", "prefix", r"prefix needs a model that is causal"),
        ("t5", "answers", r"answers needs a model that is causal"),
    ],
)
def test_an_objective_that_the_family_cannot_do_is_refused_before_any_data(make, family, objective, message) -> None:
    changes = {"data": {"root": "/nowhere"}, "objective": {"kind": objective}}
    config = make(changes).model_copy(update={"model": {"family": family}})
    with pytest.raises(ConfigError, match=message):
        prepare(config)


def test_too_few_sentinels_are_refused(make_t5) -> None:
    config = make_t5({"objective": {"kind": "t5-spans"}, "text": {"tokenizer": {"sentinels": 1}}})
    with pytest.raises(ConfigError, match=r"text.tokenizer.sentinels: the tokenizer has 1 tokens"):
        prepare(config)
