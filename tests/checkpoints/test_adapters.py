"""Adapter folders, in and out, and merged. Oracle: peft on tiny random models of transformers."""

from __future__ import annotations

import json

import pytest
import torch
from peft import AutoPeftModelForTokenClassification, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

import isoform
from isoform.checkpoints.adapters import load_adapter, merge
from isoform.checkpoints.doctor import examine
from isoform.checkpoints.folders import load_model
from isoform.checkpoints.forms import save_base, save_model
from isoform.checkpoints.parity import probe_batch
from isoform.errors import CheckpointError, ConfigError
from isoform.models import heads
from isoform.models.bert import Bert
from isoform.models.gpt2 import GPT2
from isoform.models.llama import Llama
from isoform.models.lora import Lora, activate, adapter_state, low_rank
from isoform.registry import lookup
from isoform.text.kinds import Char
from isoform.text.tokenizers import train_tokenizer

# What peft itself warns of.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
CAUSAL, MASKED = AutoModelForCausalLM, AutoModelForMaskedLM
WRITTEN = {
    "gpt2 whole": (GPT2.tiny, CAUSAL, {"targets": ["c_attn", "c_fc"], "rank_stabilized": True}),
    "gpt2 parts of one matrix": (GPT2.tiny, CAUSAL, {"targets": ["query", "value", "feedforward.up"]}),
    "gpt-neox": (
        lambda: GPT2.tiny(position={"kind": "rope"}, tied=False),
        CAUSAL,
        {"targets": ["key", "feedforward.down"], "rank_stabilized": True},
    ),
    "llama": (Llama.tiny, CAUSAL, {"targets": ["q_proj", "gate_proj"], "rank": 3}),
    "llama one for three": (Llama.tiny, CAUSAL, {"targets": ["attention.qkv"]}),
    "bert with its head": (lambda: Bert.tiny(tied=False), MASKED, {"targets": ["query"], "train": ["head"]}),
}
READ = {
    "gpt2": (GPT2, CAUSAL, {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "llama": (
        Llama,
        CAUSAL,
        {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 5}},
    ),
    "bert": (Bert, MASKED, {"target_modules": ["query", "key"], "use_rslora": True, "bias": "lora_only"}),
}


def shaken(model, seed=0):
    draw = torch.Generator().manual_seed(seed)
    for tensor in adapter_state(model).values():
        tensor.copy_(tensor + 0.2 * torch.randn(tensor.shape, generator=draw))
    return model


def saved(folder, model, **options):
    Lora(Lora.Config(**options)).attach(model, seed=0)
    shaken(model)
    save_base(folder / "base", model, None)
    save_model(folder / "final", model, None)
    return model.eval()


@pytest.mark.parametrize("kind", WRITTEN)
@torch.no_grad()
def test_peft_reads_what_is_written_here(tmp_path, kind):
    build, auto, options = WRITTEN[kind]
    model = saved(tmp_path, build(), **options)
    expected = model.dense(IDS)
    theirs = PeftModel.from_pretrained(auto.from_pretrained(tmp_path / "base"), tmp_path / "final").eval()
    torch.testing.assert_close(theirs(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    back = load_model(tmp_path / "final").model
    torch.testing.assert_close(back.dense(IDS), expected, rtol=1e-5, atol=1e-6)
    merged = merge(model)
    assert merged.max_difference < 1e-4
    torch.testing.assert_close(merged.model.dense(IDS), expected, rtol=1e-4, atol=1e-5)
    assert not any("adapters" in name for name in merged.model.state_dict())


@pytest.mark.parametrize("kind", READ)
@torch.no_grad()
def test_what_peft_writes_is_read_here_and_written_back(tmp_path, kind):
    family, auto, options = READ[kind]
    save_model(tmp_path / "base", family.tiny(), None)
    torch.manual_seed(0)
    base = auto.from_pretrained(tmp_path / "base")
    theirs = get_peft_model(base, LoraConfig(r=4, lora_alpha=12, init_lora_weights=False, **options)).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    ours = isoform.load(tmp_path / "adapter").model
    expected = theirs(IDS).logits
    torch.testing.assert_close(ours.dense(IDS), expected, rtol=1e-4, atol=1e-5)
    save_model(tmp_path / "again", ours, None)
    again = PeftModel.from_pretrained(auto.from_pretrained(tmp_path / "base"), tmp_path / "again").eval()
    torch.testing.assert_close(again(IDS).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "gpt2"])
@torch.no_grad()
def test_a_new_head_and_its_labels_go_along(tmp_path, family):
    classifier = heads.Classifier(labels=("bad", "good", "none"), pooling="last" if family == "gpt2" else "cls")
    options = {"pooler": "plain"} if family == "bert" else {}
    model = saved(tmp_path, heads.attach(lookup("model", family).tiny(**options), classifier, 0), targets=["key"])
    batch = probe_batch(model, 1)  # the padding of RoBERTa shifts positions in transformers
    expected = model.classifier(model(batch).hidden, batch)
    back = load_model(tmp_path / "final")
    assert back.config.classifier.labels == ("bad", "good", "none")
    torch.testing.assert_close(back.model.classifier(back.model(batch).hidden, batch), expected)
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    theirs = PeftModel.from_pretrained(base, tmp_path / "final").eval()
    first = batch.tokens[: batch.sequences.lengths[0]][None]
    torch.testing.assert_close(theirs(first).logits[0], expected[0], rtol=1e-4, atol=1e-5)
    merged = merge(model).model
    torch.testing.assert_close(merged.classifier(merged(batch).hidden, batch), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_peft_knows_a_tagger_for_what_it_is(tmp_path):
    classifier = heads.Classifier(labels=("O", "B-PER", "I-PER"), pooling="none")
    model = saved(tmp_path, heads.attach(Bert.tiny(), classifier, 0), targets=["query"])
    batch = probe_batch(model, 1)
    length = batch.sequences.lengths[0]
    expected = model.classifier(model(batch).hidden, batch)[:length]
    config = json.loads((tmp_path / "final/adapter_config.json").read_text())
    # A run's base has no settled place; whoever moves the two says where it stands.
    config["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "final/adapter_config.json").write_text(json.dumps(config))
    theirs = AutoPeftModelForTokenClassification.from_pretrained(tmp_path / "final").eval()
    torch.testing.assert_close(theirs(batch.tokens[None, :length]).logits[0], expected, rtol=1e-4, atol=1e-5)


def test_the_doctor_compares_with_peft_and_tells_what_was_trained(tmp_path):
    saved(tmp_path, Bert.tiny(), rank=3)
    said = {finding.what: finding.level for finding in examine(tmp_path / "final")}
    assert not {"error", "warning"} & {level for what, level in said.items() if "tokenizer" not in what}
    assert any("adapter of rank 3" in what and f"{2 * 2 * 3 * 64} trained" in what for what in said)
    assert any("of PeftModel in transformers: relative error" in what for what in said)


@torch.no_grad()
def test_several_folders_on_one_base(tmp_path):
    outputs = []
    for seed in (1, 2):
        model = GPT2.tiny().eval()
        Lora(Lora.Config()).attach(model, seed=seed)
        outputs.append(shaken(model, seed).dense(IDS))
        save_model(tmp_path / str(seed), model, None)
    base = GPT2.tiny().eval()
    plain = base.dense(IDS)
    for seed in (1, 2):
        load_adapter(base, tmp_path / str(seed), name=f"task-{seed}")
    for name, expected in (("task-1", outputs[0]), ("task-2", outputs[1]), (None, plain)):
        activate(base, name)
        assert torch.equal(base.dense(IDS), expected)
    with pytest.raises(ConfigError, match="no active adapter"):
        merge(base)


def test_a_second_adapter_of_another_base_is_refused(tmp_path):
    for seed in (0, 1):
        model = GPT2.tiny()
        with torch.no_grad():
            model.embedding.weight += seed
        Lora(Lora.Config()).attach(model, seed=seed)
        save_model(tmp_path / str(seed), model, None)
    base = GPT2.tiny()
    load_adapter(base, tmp_path / "0", name="first")
    load_adapter(base, tmp_path / "0", name="again")
    with pytest.raises(CheckpointError, match="the adapter was trained on another base: hash"):
        load_adapter(base, tmp_path / "1", name="second")


def test_an_adapter_that_changed_its_base_is_refused(tmp_path):
    saved(tmp_path, GPT2.tiny())
    path = tmp_path / "final" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": "pissa"}))
    with pytest.raises(CheckpointError, match="init_lora_weights is 'pissa'"):
        load_adapter(GPT2.tiny(), tmp_path / "final")


def test_a_model_without_a_form_in_transformers_keeps_its_adapter(tmp_path):
    model = saved(tmp_path, GPT2.tiny(position={"kind": "alibi"}), targets=["query", "feedforward.up"])
    assert torch.equal(load_model(tmp_path / "final").model.dense(IDS), model.dense(IDS))
    assert "alibi" in json.loads((tmp_path / "final" / "isoform.json").read_text())["native_because"]


def test_a_merge_that_changes_the_outputs_is_refused(tmp_path, monkeypatch):
    model = saved(tmp_path, GPT2.tiny())
    monkeypatch.setattr("isoform.layers.lora.LowRank.product", lambda self: 0 * (self.up @ self.down))
    with pytest.raises(CheckpointError, match="outputs differ by up to"):
        merge(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' given, LORA is expected"),
        ({"use_dora": True}, "use_dora is True"),
        (
            {"base_model_name_or_path": "someone/model"},
            r"hf:someone/model: not in the local cache.*name the base: `--base FOLDER`",
        ),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, changes, message):
    model = GPT2.tiny()
    Lora(Lora.Config()).attach(model, seed=0)
    save_model(tmp_path / "adapter", model, None)
    (tmp_path / "adapter" / "manifest.json").unlink()
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    save_model(tmp_path / "whole", GPT2.tiny(), None)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "adapter", base=None if "base_model_name_or_path" in changes else tmp_path / "whole")


@torch.no_grad()
def test_a_base_of_the_hub_is_fetched_by_its_name(tmp_path, monkeypatch):
    asked = []

    def fetched(repository, revision=None, **_):
        asked.append((repository, revision))
        return str(tmp_path / "base")

    model = saved(tmp_path, GPT2.tiny())
    adapter = (tmp_path / "final").rename(tmp_path / "elsewhere")
    (adapter / "manifest.json").unlink()
    (adapter / "isoform.json").unlink(missing_ok=True)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    for changes in ({}, {"revision": "v2"}, {"base_model_name_or_path": "google-bert/bert-base-uncased@main"}):
        path.write_text(json.dumps({**config, "base_model_name_or_path": "google-bert/bert-base-uncased", **changes}))
        found = load_model(adapter)
        assert torch.equal(found.model.dense(IDS), model.dense(IDS))
    name = "google-bert/bert-base-uncased"
    assert asked == [(name, None), (name, "v2"), (name, "main")]


def test_every_verb_takes_the_base_that_an_adapter_does_not_name(tmp_path):
    lines = [f"{word} and {other}" for word in ("sun", "moon", "tree") for other in ("bird", "stone", "cloud")]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    words = train_tokenizer("char", Char.Config(), lines)
    model = GPT2.tiny(vocab_size=words.vocab_size)
    save_model(tmp_path / "apart" / "whole", model, words)
    Lora(Lora.Config()).attach(model, seed=0)
    save_model(tmp_path / "final", shaken(model), words)
    config = json.loads((tmp_path / "final" / "adapter_config.json").read_text())
    (tmp_path / "final" / "manifest.json").unlink()
    (tmp_path / "final" / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "/gone/base"})
    )
    adapter, base = tmp_path / "final", tmp_path / "apart" / "whole"
    verbs = {
        "evaluate": lambda **base: isoform.evaluate(adapter, data=str(tmp_path / "lines.txt"), **base),
        "generate": lambda **base: "".join(isoform.generate(adapter, "sun", max_new_tokens=4, temperature=0, **base)),
        "predict": lambda **base: isoform.predict(adapter, ["sun"], **base),
        "export": lambda **base: isoform.export(adapter, "hf", out=tmp_path / "out", **base),
    }
    for verb, carry_out in verbs.items():
        with pytest.raises(CheckpointError, match="name the base: `--base FOLDER`"):
            carry_out()
        assert carry_out(base=base) is not None, verb
    with pytest.raises(CheckpointError, match="a whole model and no adapter"):
        isoform.load(base, base=base)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (lambda: GPT2.tiny(width=64), "do not fit a matrix"),
        (lambda: GPT2.tiny(num_layers=1), "is no matrix of this base"),
        (lambda: Bert.tiny(), "is no matrix of this base"),
        (lambda: GPT2(GPT2.tiny().config, seed=5), "trained on another base"),
    ],
)
def test_an_adapter_of_another_base_is_refused(tmp_path, base, message):
    saved(tmp_path, GPT2.tiny())
    save_model(tmp_path / "other", base(), None)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "final", base=tmp_path / "other")


def test_the_first_low_rank_layer_is_where_its_name_says():
    model = GPT2.tiny()
    adapter = Lora(Lora.Config(targets=["query"])).attach(model, seed=0)
    assert [low_rank(model, "default", place).rows for place in adapter.places] == [(0, 32), (0, 32)]
