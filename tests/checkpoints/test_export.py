"""Exports: each format once with the fresh process, the rest with its reader in this one."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import isoform
from isoform import storage
from isoform.checkpoints import adapters, export, gguf_writer, onnx, reload
from isoform.checkpoints.folders import load_model
from isoform.checkpoints.forms import save_base, save_model
from isoform.cli import main
from isoform.errors import CheckpointError, ConfigError
from isoform.layers.rope_scaling import Llama3
from isoform.models import heads
from isoform.models.bert import Bert
from isoform.models.distilbert import DistilBert
from isoform.models.gpt2 import GPT2
from isoform.models.llama import Llama
from isoform.models.lora import Lora, adapter_state
from isoform.models.modernbert import ModernBert
from isoform.models.roberta import Roberta
from isoform.models.t5 import T5
from isoform.models.xlnet import XLNet
from isoform.serving.use import open_model
from isoform.text.bytelevel import SPLITS, byte_level
from isoform.text.kinds import Bpe, Char

TEMPLATE = "{% for m in messages %}<bos>{{ m['role'] }}: {{ m['content'] }}<eos>{% endfor %}"
# More rows than tokens, as padded vocabularies have.
ROWS = 330


@pytest.fixture(scope="module")
def bpe() -> Any:
    tokenizer = Bpe.train(Bpe.Config(vocab_size=320, special=("pad", "bos", "eos")), list(export.TEXTS) * 3)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def shaken(model: Any) -> Any:
    """Norms and biases away from their first values, so that a mixed-up tensor is seen."""
    draw = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    return model


Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path, bpe: Any) -> Save:
    """A model folder with what shall travel with it."""

    def make(model: Any, tokenizer: Any = bpe, name: str = "model", **config: Any) -> Path:
        folder = tmp_path / name
        save_model(folder, shaken(model), tokenizer)
        if config:
            storage.write_json(folder / "config.json", {**storage.read_json(folder / "config.json"), **config})
            (folder / "manifest.json").unlink()
        return folder

    return make


def answered_here(request: dict[str, Any], to: str) -> tuple[list[Tensor], dict[str, Any]]:
    """`export._ask` without a process of its own."""
    read = reload._onnx if to == "onnx" else reload._transformers
    arrays, reply = read(Path(request["place"]), json.loads(json.dumps(request)))
    return [torch.from_numpy(array.copy()) for array in arrays], json.loads(json.dumps(reply))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "_ask", answered_here)


# ------------------------------------------------------------------------------------------- whole, a fresh process


def test_a_hugging_face_folder_takes_labels_and_generation_along(save: Save, tmp_path: Path) -> None:
    folder = save(GPT2.tiny(num_layers=1, vocab_size=ROWS), id2label={"0": "cold", "1": "warm"})
    (folder / "LICENSE").write_text("free")
    (folder / "notes.bin").write_bytes(b"a pickle?")
    found = isoform.export(folder, "hf", out=tmp_path / "out")
    assert found["reader"] == "GPT2LMHeadModel"
    assert found["error"] < 1e-5
    assert found["largest_difference"] < 1e-3
    assert set(found["compared"]) == {
        "ids of texts",
        "special ids",
        "chat template",
        "label names",
        "generation config",
    }
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "LICENSE", "export.json", "manifest.json"} <= names
    assert "notes.bin" not in names
    again = isoform.load(tmp_path / "out")
    assert all(torch.equal(t, load_model(folder).model.state_dict()[n]) for n, t in again.model.state_dict().items())


@pytest.mark.parametrize(
    "model",
    [
        T5.tiny(num_layers=1),
        Bert.tiny(num_layers=1, head="none"),
        Roberta.tiny(num_layers=1),
        XLNet.tiny(num_layers=1),
        heads.attach(XLNet.tiny(), heads.Classifier(labels=("cold", "warm"), pooling="last"), seed=0),
        heads.attach(GPT2.tiny(), heads.Classifier(labels=("cold", "warm"), pooling="last"), seed=0),
    ],
    ids=["t5", "bert", "roberta", "xlnet", "xlnet classifier", "classifier"],
)
def test_folders_of_other_families(model: Any, save: Save, tmp_path: Path, here: None) -> None:
    tokenizer = Char.train(Char.Config(), ["some characters"])
    found = isoform.export(save(model, tokenizer), "hf", out=tmp_path / "out")
    assert found["error"] < 1e-5
    assert found["output"] == onnx.output_of(model)


def test_a_gguf_file_of_gpt2(save: Save, tmp_path: Path) -> None:
    folder = save(GPT2.tiny(num_layers=1, vocab_size=ROWS, feedforward_width=96, tied=False))
    found = isoform.export(folder, "gguf", out=tmp_path / "out")
    assert found["error"] < 1e-5
    assert found["compared"] == ("ids of texts", "special ids", "chat template")
    assert found["notes"][0].endswith("tell it: n_positions=48, n_inner=96")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.gguf", "export.json", "manifest.json"}


def test_an_onnx_graph_of_a_mixture(save: Save, tmp_path: Path) -> None:
    options = {"kind": "moe", "experts": 3, "active": 2}
    folder = save(Llama.tiny(num_layers=1, vocab_size=ROWS, feedforward=options))
    found = isoform.export(folder, "onnx", out=tmp_path / "out")
    assert found["reader"] == "onnxruntime"
    assert found["error"] < 1e-5
    assert found["notes"] == ("inputs input_ids, attention_mask; weights are float32; no cache",)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.onnx", "config.json", "tokenizer.json", "chat_template.jinja"} <= names
    assert "model.safetensors" not in names


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        T5.tiny(num_layers=1),
        Bert.tiny(num_layers=1, head="none"),
        ModernBert.tiny(num_layers=2),
        GPT2.tiny(num_layers=1, position={"kind": "t5"}, window=5),
    ],
    ids=["t5", "bert", "modernbert", "gpt2"],
)
def test_onnx_graphs_of_other_families(model: Any, save: Save, tmp_path: Path, here: None) -> None:
    tokenizer = Char.train(Char.Config(), ["some characters"])
    assert isoform.export(save(model, tokenizer), "onnx", out=tmp_path / "out")["error"] < 1e-5


# ----------------------------------------------------------------------------------------------------------- adapters


@pytest.fixture
def save_adapter(tmp_path: Path, bpe: Any) -> Save:
    """A run's folder with an adapter in it, its base beside it."""

    def make(model: Any, **options: Any) -> Path:
        shaken(model)
        Lora(Lora.Config(**options)).attach(model, seed=0)
        for tensor in adapter_state(model).values():
            tensor.copy_(tensor + 0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(2)))
        save_base(tmp_path / "run" / "base", model, bpe)
        save_model(tmp_path / "run" / "final", model, bpe)
        return tmp_path / "run"

    return make


@pytest.mark.slow
def test_an_adapter_is_read_by_peft_in_a_fresh_process(save_adapter: Save, tmp_path: Path) -> None:
    run = save_adapter(GPT2.tiny(num_layers=1, vocab_size=ROWS), rank=2)
    found = isoform.export(run, "peft")
    assert found["path"] == str(run / "export" / "peft")
    assert found["reader"] == "PeftModelForCausalLM"
    assert found["error"] < 1e-5
    assert set(found["compared"]) == {"ids of texts", "special ids", "chat template"}
    assert str(run / "base") in found["notes"][0]
    names = {path.name for path in Path(found["path"]).iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert "model.safetensors" not in names
    again = load_model(Path(found["path"]))
    assert again.info["base"] == str(run / "base")


@pytest.mark.parametrize("to", ["hf", "gguf", "onnx"])
def test_an_adapter_is_merged_for_programs_that_read_whole_models(
    to: Any, save_adapter: Save, tmp_path: Path, here: None
) -> None:
    run = save_adapter(Llama.tiny(num_layers=1, vocab_size=ROWS), rank=2)
    found = isoform.export(run, to, out=tmp_path / "out")
    assert found["error"] < 1e-4
    assert any("merged with its base" in note for note in found["notes"])
    assert "chat template" in found["compared"] or to == "onnx"
    if to != "onnx":
        again = load_model(tmp_path / "out" / ("model.gguf" if to == "gguf" else ""))
        ids = torch.tensor([[3, 1, 4, 1, 5]])
        torch.testing.assert_close(again.model.dense(ids), load_model(run).model.dense(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's own
@pytest.mark.parametrize("to", ["peft", "hf"])
def test_a_classifier_that_was_trained_by_an_adapter_keeps_its_labels(
    to: Any, save_adapter: Save, tmp_path: Path, here: None
) -> None:
    wanted = heads.Classifier(labels=("cold", "warm"), pooling="last", max_tokens=8, keep="end")
    run = save_adapter(heads.attach(GPT2.tiny(vocab_size=ROWS), wanted, seed=0), rank=2)
    found = isoform.export(run, to, out=tmp_path / "out")
    assert found["error"] < 1e-4
    assert found["output"] == "class scores"
    assert "label names" in found["compared"]
    assert "texts longer than 8 tokens were read as their end: cut them so yourself" in found["notes"]


def test_adapters_and_bases_that_peft_cannot_read_are_refused(save: Save, save_adapter: Save, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no adapter, but a whole model; --to hf writes that"):
        isoform.export(save(GPT2.tiny(vocab_size=ROWS)), "peft", out=tmp_path / "out")
    run = save_adapter(GPT2.tiny(vocab_size=ROWS, position={"kind": "alibi"}))
    with pytest.raises(CheckpointError, match=r"no PEFT form: its base has none in transformers: .* position alibi"):
        isoform.export(run, "peft", out=tmp_path / "out")


def test_an_adapter_that_was_left_out_is_seen(
    save_adapter: Save, tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = save_adapter(GPT2.tiny(num_layers=1, vocab_size=ROWS), rank=2)

    def unadapted(model: Any) -> Any:
        return adapters.Merged(load_model(run / "base").model, 0.0, 0.0)

    monkeypatch.setattr(adapters, "merge", unadapted)
    with pytest.raises(CheckpointError, match="not exported: logits of GPT2LMHeadModel differ by up to"):
        isoform.export(run, "hf", out=tmp_path / "out")


# --------------------------------------------------------------------------------------------------------------- ONNX


MIXTURE = {"kind": "moe", "experts": 3, "active": 2}


@pytest.mark.parametrize(
    "model",
    [
        GPT2.tiny(),
        GPT2.tiny(position={"kind": "alibi"}, num_kv_heads=2, window=4),
        GPT2.tiny(position={"kind": "t5", "max_distance": 20}),
        GPT2.tiny(position={"kind": "sinusoidal"}),
        Llama.tiny(feedforward=MIXTURE),
        Bert.tiny(),
        Bert.tiny(position={"kind": "alibi"}, window=4),
        Roberta.tiny(),
        DistilBert.tiny(),
        ModernBert.tiny(),
    ],
    ids=lambda model: type(model).__name__,
)
def test_the_dense_graph_is_the_ragged_model(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = shaken(model).eval()
    ids = torch.randint(0, 61, (3, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    mask[1, :3] = 0  # padding on the left
    segments = {"token_type_ids": (ids % 2)} if "token_type_ids" in onnx.input_names(model) else {}
    with torch.no_grad():
        expected = model.dense(ids, mask, **segments)
        monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
        torch.testing.assert_close(onnx.Dense(model)(ids, mask, **segments), expected, rtol=1e-4, atol=1e-5)


def test_the_dense_graph_of_two_streams() -> None:
    model = shaken(T5.tiny()).eval()
    source, target = torch.randint(0, 61, (2, 9)), torch.randint(0, 61, (2, 6))
    source_mask, target_mask = torch.ones_like(source), torch.ones_like(target)
    source_mask[0, 4:] = 0
    target_mask[1, 2:] = 0
    with torch.no_grad():
        found = onnx.Dense(model)(source, source_mask, target, target_mask)
        expected = model.dense(source, target, source_mask, target_mask)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("cls", "pooling"), [(GPT2, "last"), (Bert, "cls"), (ModernBert, "mean")])
def test_the_dense_graph_of_a_classifier(cls: Any, pooling: str) -> None:
    model = shaken(heads.attach(cls.tiny(), heads.Classifier(labels=("cold", "warm"), pooling=pooling), seed=0)).eval()
    ids = torch.randint(0, 61, (3, 9))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    mask[1, :3] = 0
    segments = {"token_type_ids": torch.zeros_like(ids)} if cls is Bert else {}
    with torch.no_grad():
        found = onnx.Dense(model)(ids, mask, **segments)
        expected = [
            export._ours(model, [row[real.bool()].tolist()], "class scores")[0]
            for row, real in zip(ids, mask, strict=True)
        ]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_an_encoder_without_a_head_gives_hidden_states() -> None:
    model = Bert.tiny(head="none", num_segments=0)
    assert onnx.output_of(model) == "hidden states"
    assert onnx.input_names(model) == ["input_ids", "attention_mask"]
    assert onnx.Dense(model)(*torch.ones(2, 1, 4, dtype=torch.int64)).shape == (1, 4, 32)
    assert onnx.output_of(GPT2.tiny()) == "logits"
    assert onnx.input_names(T5.tiny())[2:] == ["decoder_input_ids", "decoder_attention_mask"]


# --------------------------------------------------------------------------------------------------------------- GGUF


def rope(**options: Any) -> dict[str, Any]:
    return {"position": {"kind": "rope", **options}}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"tied": True, **rope(base=5e4)}, ()),
        ({"attention_bias": True, "feedforward_bias": True}, ("attention_bias=True", "mlp_bias=True")),
        ({"head_width": 16, **rope(scale=2.0)}, ("'rope_type': 'linear'",)),
        (rope(scaling={"kind": "yarn", "factor": 4.0, "original_positions": 16}), ("'rope_type': 'yarn'",)),
        (rope(scaling=Llama3(factor=8).model_dump()), ("'rope_type': 'llama3'",)),
    ],
    ids=["tied", "biases", "linear", "yarn", "llama3"],
)
def test_llamas_in_gguf_are_read_here_and_there(
    options: dict[str, Any], told: tuple[str, ...], save: Save, tmp_path: Path, here: None, bpe: Any
) -> None:
    folder = save(Llama.tiny(**{"vocab_size": ROWS, "num_layers": 1, **options}))
    found = isoform.export(folder, "gguf", out=tmp_path / "out")
    assert found["error"] < 1e-5
    assert all(part in " ".join(found["notes"]) for part in told)
    assert bool(found["notes"]) == bool(told)
    ours, again = load_model(folder), load_model(tmp_path / "out" / "model.gguf")
    assert again.config.resolved() == ours.config.resolved()
    for name, tensor in ours.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name
    assert again.tokenizer is not None
    assert again.tokenizer.special == bpe.special
    assert again.tokenizer.chat_template == TEMPLATE


@pytest.mark.parametrize("options", [{}, {"tied": False, "feedforward_width": 96}], ids=["tied", "own head"])
def test_a_gpt2_in_gguf_is_read_here_as_it_was(
    options: dict[str, Any], save: Save, tmp_path: Path, here: None, bpe: Any
) -> None:
    folder = save(GPT2.tiny(**{"vocab_size": ROWS, "num_layers": 2, **options}))
    isoform.export(folder, "gguf", out=tmp_path / "out")
    ours, again = load_model(folder), load_model(tmp_path / "out" / "model.gguf")
    rates = dict.fromkeys(("dropout", "embedding_dropout", "residual_dropout", "attention_dropout"))
    assert {**again.config.resolved(), **rates} == {**ours.config.resolved(), **rates}
    assert again.model.state_dict().keys() == ours.model.state_dict().keys()
    for name, tensor in ours.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name
    assert again.tokenizer is not None
    assert again.tokenizer.special == bpe.special
    assert again.tokenizer.encode(export.TEXTS[1]).tolist() == bpe.encode(export.TEXTS[1]).tolist()


def test_half_precision_and_other_words_stay_in_gguf(save: Save, tmp_path: Path, here: None, bpe: Any) -> None:
    vocab = bpe.backend.get_vocab(with_added_tokens=True)
    merges = [" ".join(pair) for pair in json.loads(bpe.backend.to_str())["model"]["merges"]]
    tokens, special = sorted(vocab, key=vocab.__getitem__), list(bpe.special.values())
    roles = {"bos": "<bos>", "eos": "<eos>"}
    tokenizer = byte_level(tokens, merges, split="llama-bpe", special=special, whole=[], roles=roles, begins=True)
    model = Llama.tiny(num_layers=1, vocab_size=320, num_kv_heads=1).to(torch.bfloat16)
    folder = save(model, tokenizer)
    storage.write_json(folder / "generation_config.json", {"eos_token_id": [2, 5], "temperature": 0.7, "top_k": 40})
    (folder / "manifest.json").unlink()
    assert isoform.export(folder, "gguf", out=tmp_path / "out")["error"] < 1e-4
    again = load_model(tmp_path / "out" / "model.gguf")
    assert again.info["packed"] == {"BF16": 9, "F32": 3}
    assert again.tokenizer is not None
    assert again.tokenizer.first_ids == [again.tokenizer.special_ids["bos"]]
    import gguf

    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    assert SPLITS[fields["tokenizer.ggml.pre"].contents()] == SPLITS["llama-bpe"]
    assert fields["tokenizer.ggml.eot_token_id"].contents() == 5
    assert fields["general.sampling.temp"].contents() == pytest.approx(0.7)
    assert fields["general.sampling.top_k"].contents() == 40
    ids = {"bos_token_id": again.tokenizer.special_ids["bos"], "eos_token_id": [2, 5]}
    assert again.info["generation"] == {**ids, "do_sample": True, "temperature": 0.7, "top_k": 40}
    assert set(open_model(tmp_path / "out" / "model.gguf").stop) == {2, 5}


def test_waves_are_written_as_a_table(save: Save, tmp_path: Path, here: None) -> None:
    folder = save(GPT2.tiny(num_layers=1, vocab_size=ROWS, position={"kind": "sinusoidal"}, bias=False))
    assert isoform.export(folder, "gguf", out=tmp_path / "out")["error"] < 1e-5


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: GPT2.tiny(position={"kind": "rope"}), "its gpt2 has no rotary positions"),
        (lambda: GPT2.tiny(position={"kind": "alibi"}), "has position alibi"),
        (lambda: GPT2.tiny(feedforward={"kind": "relu"}), "its gpt2 has gelu-tanh as its feed-forward layer"),
        (lambda: Llama.tiny(feedforward={"kind": "geglu"}), "its llama has swiglu as its feed-forward layer"),
        (lambda: Llama.tiny(window=8), "its llama has no window"),
        (lambda: Llama.tiny(feedforward=MIXTURE), "does not read a mixture of experts"),
        (lambda: Llama.tiny(position={"kind": "learned"}), "llama in transformers has not: position learned"),
        (lambda: Llama.tiny(**rope(scaling={"kind": "yarn", "fast_turns": 8.0})), "its yarn has no .*fast_turns"),
        (
            lambda: Llama.tiny(**rope(scaling={"kind": "llama3", "factor": 4.0})),
            "its readers know LLaMA 3's own scalings alone, by the factors 8, 16, 32",
        ),
        (lambda: Bert.tiny(), "it is written for gpt2 and llama, this is a bert"),
        (lambda: T5.tiny(), "it is written for gpt2 and llama, this is a t5"),
        (lambda: Llama.tiny(), "a tokenizer of kind char, byte-level BPE is expected"),
    ],
)
def test_what_gguf_has_no_form_for_is_refused(
    model: Callable[[], Any], reason: str, save: Save, tmp_path: Path
) -> None:
    folder = save(model(), Char.train(Char.Config(), ["some characters"]))
    with pytest.raises(CheckpointError, match=f"no GGUF form: .*{reason}"):
        isoform.export(folder, "gguf", out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_tokenizers_that_the_metadata_cannot_describe_are_refused(bpe: Any) -> None:
    lower = Bpe.train(Bpe.Config(vocab_size=300, lowercase=True, special=("eos",)), list(export.TEXTS))
    with pytest.raises(CheckpointError, match="the tokenizer changes texts first"):
        gguf_writer.tokenizer_fields(lower, 300)
    from tokenizers import Tokenizer, pre_tokenizers

    from isoform.text.tokenizers import TextTokenizer

    other = Tokenizer.from_str(bpe.backend.to_str())
    other.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(False)])
    with pytest.raises(CheckpointError, match=r"parts words in a way that has no name in llama\.cpp"):
        gguf_writer.tokenizer_fields(TextTokenizer(other, bpe.special), 320)
    assert gguf_writer.tokenizer_fields(bpe, ROWS)["tokenizer.ggml.token_type"][-1] == gguf_writer.UNUSED


# ----------------------------------------------------------------------------------------------------------- refusals


def test_a_difference_is_refused_and_nothing_stays(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(Llama.tiny(num_layers=1, vocab_size=ROWS))

    def swapped(rows: Tensor, num_heads: int) -> Tensor:
        return rows

    monkeypatch.setattr(export, "_ask", answered_here)
    monkeypatch.setattr(gguf_writer, "neighbours", swapped)
    with pytest.raises(CheckpointError, match=r"not exported: logits of LlamaForCausalLM differ by up to \d.*e"):
        isoform.export(folder, "gguf", out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_other_ids_or_labels_are_refused_by_name(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(GPT2.tiny(num_layers=1, vocab_size=ROWS))
    told: dict[str, Any] = {}

    def tampered(request: dict[str, Any], to: str) -> tuple[list[Tensor], dict[str, Any]]:
        if not told:
            told["answer"] = answered_here(request, to)
        arrays, reply = told["answer"]
        return arrays, {**reply, **told["changed"]}

    monkeypatch.setattr(export, "_ask", tampered)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"ids": [[1], [2], [3]]}, "the ids of texts of GPT2LMHeadModel are not ours"),
        ({"special": {"bos": 1, "eos": 0, "pad": 0}}, "the special ids of"),
        ({"chat_template": None}, "the chat template of"),
        ({"generation": {"max_length": 20}}, "the generation config of"),
    ]
    monkeypatch.setitem(told, "answer", answered_here(_request(folder), "hf"))
    for changed, message in changes:
        told["changed"] = changed
        with pytest.raises(CheckpointError, match=message):
            isoform.export(folder, "hf", out=tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


def _request(folder: Path) -> dict[str, Any]:
    """What `export` asks of a folder of Hugging Face."""
    loaded = load_model(folder)
    rows = export._rows(loaded)
    calls = [export._call(loaded, part) for part in (rows, rows[:1])]
    texts = list(export.TEXTS)
    return {"format": "hf", "place": str(folder), "settings": {}, "calls": calls, "output": "logits", "texts": texts}


def test_a_reader_that_fails_is_quoted(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(GPT2.tiny(num_layers=1, vocab_size=ROWS))

    def fails(command: list[str], **options: Any) -> Any:
        return subprocess.CompletedProcess(command, 1, "", "Traceback\nValueError: a strange config\n")

    monkeypatch.setattr(subprocess, "run", fails)
    with pytest.raises(CheckpointError, match="what was written is not read again: ValueError: a strange config"):
        isoform.export(folder, "hf", out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_without_a_form_in_transformers_is_refused(save: Save, tmp_path: Path) -> None:
    folder = save(GPT2.tiny(vocab_size=ROWS, position={"kind": "alibi"}))
    with pytest.raises(CheckpointError, match=r"no Hugging Face form: neither gpt2 nor gpt_neox .* position alibi"):
        isoform.export(folder, "hf", out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_is_not_installed_is_named(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"onnxruntime not installed; pip install 'isoform\[export\]'"):
        isoform.export(tmp_path, "onnx", out=tmp_path / "out")


def test_a_model_without_a_dense_form_has_no_graph(save: Save, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no ONNX form: xlnet has no dense form; --to hf has one"):
        isoform.export(save(XLNet.tiny(vocab_size=ROWS)), "onnx", out=tmp_path / "out")


def test_a_folder_of_something_else_is_not_replaced(save: Save, tmp_path: Path, here: None) -> None:
    folder = save(GPT2.tiny(num_layers=1, vocab_size=ROWS))
    with pytest.raises(ConfigError, match="--to: 'tflite' given, hf, peft, onnx, gguf is expected"):
        isoform.export(folder, "tflite")  # type: ignore[arg-type]
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="is there and is no earlier export"):
        isoform.export(folder, "hf", out=tmp_path / "out")
    (tmp_path / "out" / export.RECORD).write_text("{}")
    isoform.export(folder, "hf", out=tmp_path / "out")
    assert storage.read_json(tmp_path / "out" / export.RECORD)["format"] == "hf"


def test_the_command_says_what_was_compared(
    save: Save, tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*words: str) -> int:
        monkeypatch.setattr("sys.argv", ["isoform", "export", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0)

    out = str(tmp_path / "out")
    folder = str(save(GPT2.tiny(num_layers=1, vocab_size=ROWS)))
    assert command(folder, "--to", "hf", "--out", out) == 0
    said = capsys.readouterr().out
    assert "read again by GPT2LMHeadModel in a fresh process: logits of 177 tokens, relative error" in said
    assert "equal ids of texts, special ids, chat template, generation config" in said
    assert said.splitlines()[-1] == out
    assert command(folder, "--to", "hf", "--out", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["format"] == "hf"
    assert command(folder, "--to", "hf", "--out", folder) == 2
    assert (
        command(str(save(Bert.tiny(vocab_size=ROWS), name="bert")), "--to", "gguf", "--out", str(tmp_path / "other"))
        == 4
    )
    assert "no GGUF form: it is written for gpt2 and llama, this is a bert" in capsys.readouterr().err


def test_a_run_keeps_its_exports(save: Save, tmp_path: Path) -> None:
    save(GPT2.tiny(num_layers=1, vocab_size=ROWS), name="run/final")
    assert export._target(tmp_path / "run", "onnx") == tmp_path / "run" / "export" / "onnx"
    save(GPT2.tiny(num_layers=1, vocab_size=ROWS), name="plain")
    assert export._target(tmp_path / "plain", "onnx") == Path("export/plain-onnx")
