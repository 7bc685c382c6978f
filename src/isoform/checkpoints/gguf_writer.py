"""GGUF files, out: LLaMA and GPT-2 with byte-level BPE, as llama.cpp's own converter writes them.

    magic, version, counts; metadata (name, kind, value) ...; tensors (name, shape, kind, offset) ...; the numbers

What GGUF has no form for is refused with the reason: `why_not` for models, `tokenizer_fields` for tokenizers.
Source: the GGUF specification of ggml; llama.cpp's convert_hf_to_gguf.py for names and the order of rows.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isoform import storage
from isoform.checkpoints import gguf as reading
from isoform.checkpoints.folders import LoadedModel
from isoform.errors import CheckpointError
from isoform.layers.position import inverse_frequencies
from isoform.layers.rope_scaling import Llama3, Yarn
from isoform.text.bytelevel import SPLITS
from isoform.text.tokenizers import TextTokenizer

ALIGNMENT_BYTES = 32
# Number of a kind of numbers, and of `general.file_type` where all matrices are of it.
KINDS = {torch.float32: (0, 0), torch.float16: (1, 1), torch.bfloat16: (30, 32)}
# Kinds of a token beside those of `reading`.
NORMAL, UNUSED = 1, 5


def write_model(path: Path, loaded: LoadedModel) -> dict[str, Any]:
    """Writes the file; returns the fields of config.json that transformers' loader must be told.

    It does not read these from the file, in which they stand. Raises: CheckpointError with the reason where GGUF has no
    form.
    """
    reason = why_not(loaded)
    if reason is not None:
        raise CheckpointError(f"{loaded.info['path']}: no GGUF form: {reason}; --to hf or --to onnx may have one")
    form, _ = loaded.model.hf_form(loaded.config)
    assert loaded.tokenizer is not None, "why_not has looked"
    rows = int(form["vocab_size"])
    weights = dict(loaded.model.state_to_hf())
    metadata, tensors = _llama(form, weights) if form["model_type"] == "llama" else _gpt2(form, weights)
    scaling, angles = _scaling(loaded.config.position, metadata)
    file_type = KINDS[next(iter(weights.values())).dtype][1]
    general = {
        "general.architecture": form["model_type"],
        "general.name": Path(str(loaded.info["path"])).stem,
        "general.file_type": file_type,
    }
    named = {f"{form['model_type']}.{name}": value for name, value in {**metadata, **scaling}.items()}
    fields = {**general, **named, **tokenizer_fields(loaded.tokenizer, rows), **_generation(loaded)}
    write_file(path, fields, {**angles, **tensors})
    return _unread(form)


def why_not(loaded: LoadedModel) -> str | None:
    """What the model has that GGUF or its readers have not, or None."""
    if loaded.family not in ("gpt2", "llama"):
        return f"it is written for gpt2 and llama, this is a {loaded.family}"
    if loaded.config.classifier is not None:
        return "its readers have no classifier"
    form, reason = loaded.model.hf_form(loaded.config)
    if form is None:
        return str(reason)
    others = {
        "gpt_neox": "its gpt2 has no rotary positions; a llama has",
        "mistral": "its llama has no window",
        "mixtral": "transformers' loader does not read a mixture of experts",
    }
    if form["model_type"] in others:
        return others[form["model_type"]]
    kind, only = loaded.config.feedforward["kind"], "swiglu" if form["model_type"] == "llama" else "gelu-tanh"
    if kind != only:
        return f"its {form['model_type']} has {only} as its feed-forward layer, this has {kind}"
    scaling = loaded.config.position.get("scaling")
    if scaling is not None and scaling["kind"] == "yarn":
        plain = Yarn(factor=scaling["factor"], original_positions=scaling["original_positions"]).model_dump()
        changed = [name for name, value in plain.items() if scaling[name] != value]
        if changed:
            return f"its yarn has no model.position.scaling.{changed[0]}"
    if scaling is not None and scaling["kind"] == "llama3":
        plain = Llama3(factor=scaling["factor"]).model_dump()
        changed = [name for name, value in plain.items() if scaling[name] != value]
        if changed or scaling["factor"] not in reading.LLAMA3_FACTORS:
            known = ", ".join(f"{factor:g}" for factor in reading.LLAMA3_FACTORS)
            return f"its readers know LLaMA 3's own scalings alone, by the factors {known}"
    if loaded.tokenizer is None:
        return f"the file needs a tokenizer: {loaded.info['tokenizer']}"
    return None


def _unread(form: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of config.json that stand in the file and are not read from there by transformers."""
    if form["model_type"] == "gpt2":
        plain: dict[str, Any] = {"n_positions": 1024, "n_inner": None}
        inner = form["n_inner"] if form["n_inner"] != 4 * form["n_embd"] else None
        given = {"n_positions": form["n_positions"], "n_inner": inner}
    else:
        plain = {"attention_bias": False, "mlp_bias": False, "rope_parameters": "default"}
        scaled = form["rope_parameters"]["rope_type"] != "default"
        rope = form["rope_parameters"] if scaled else "default"
        given = {"attention_bias": form["attention_bias"], "mlp_bias": form["mlp_bias"], "rope_parameters": rope}
    return {name: value for name, value in given.items() if value != plain[name]}


# ------------------------------------------------------------------------------------------------ config and tensors


def _llama(form: Mapping[str, Any], weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata, and tensors under GGUF's names with the halves of each head of queries and keys interleaved."""
    heads = {"attn_q": form["num_attention_heads"], "attn_k": form["num_key_value_heads"]}
    outer = {theirs: ours for ours, theirs in reading.NAMES.items()}
    inner = {theirs: ours for ours, theirs in reading.BLOCK_NAMES.items()}
    tensors = {}
    for name, tensor in weights.items():
        stem, _, kind = name.rpartition(".")
        if stem in outer:
            tensors[f"{outer[stem]}.{kind}"] = tensor
            continue
        _, _, layer, part = stem.split(".", 3)
        short = inner[part]
        tensors[f"blk.{layer}.{short}.{kind}"] = neighbours(tensor, heads[short]) if short in heads else tensor
    metadata = {
        "vocab_size": form["vocab_size"],
        "context_length": form["max_position_embeddings"],
        "embedding_length": form["hidden_size"],
        "block_count": form["num_hidden_layers"],
        "feed_forward_length": form["intermediate_size"],
        "attention.head_count": form["num_attention_heads"],
        "attention.head_count_kv": form["num_key_value_heads"],
        "attention.key_length": form["head_dim"],
        "attention.value_length": form["head_dim"],
        "attention.layer_norm_rms_epsilon": float(form["rms_norm_eps"]),
        "rope.dimension_count": form["head_dim"],
        "rope.freq_base": float(form["rope_parameters"]["rope_theta"]),
    }
    return metadata, tensors


def neighbours(rows: Tensor, num_heads: int) -> Tensor:
    """Rows (h, 2, k/2), halves turned together, -> rows (h, k/2, 2), neighbours turned together."""
    return rows.reshape(num_heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _gpt2(form: Mapping[str, Any], weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata, and tensors under GGUF's names; Conv1D's `(inputs, outputs)` turned round."""
    outer = {theirs: ours for ours, theirs in reading.GPT2_NAMES.items()}
    inner = {theirs: ours for ours, theirs in reading.GPT2_BLOCK_NAMES.items()}
    tensors = {}
    for name, tensor in weights.items():
        stem, _, kind = name.rpartition(".")
        if stem in outer:
            tensors[f"{outer[stem]}.{kind}"] = tensor
            continue
        _, _, layer, part = stem.split(".", 3)
        tensors[f"blk.{layer}.{inner[part]}.{kind}"] = tensor.t() if tensor.ndim == 2 else tensor
    metadata = {
        "context_length": form["n_positions"],
        "embedding_length": form["n_embd"],
        "block_count": form["n_layer"],
        "feed_forward_length": form["n_inner"] or 4 * form["n_embd"],
        "attention.head_count": form["n_head"],
        "attention.layer_norm_epsilon": float(form["layer_norm_epsilon"]),
    }
    return metadata, tensors


def _scaling(position: Mapping[str, Any], metadata: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensor of a stretched RoPE; LLaMA 3's is a divisor for each pair of channels."""
    scaling = position.get("scaling")
    if position.get("scale", 1) != 1:
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(position["scale"])}, {}
    if scaling is None:
        return {}, {}
    if scaling["kind"] == "yarn":
        trained = {"rope.scaling.original_context_length": scaling["original_positions"]}
        return {"rope.scaling.type": "yarn", "rope.scaling.factor": float(scaling["factor"]), **trained}, {}
    theta = inverse_frequencies(metadata["rope.dimension_count"], position["base"], torch.device("cpu"))
    return {}, {reading.ROPE_FACTORS: theta / Llama3(**scaling).angles(theta, position["base"])}


# --------------------------------------------------------------------------------------------------------- tokenizer


def tokenizer_fields(tokenizer: TextTokenizer, rows: int) -> dict[str, Any]:
    """Metadata of a byte-level BPE, with a token for every row of the embedding.

    Raises: CheckpointError with the reason where it is of another kind or does what the metadata cannot say.
    """
    described = json.loads(tokenizer.backend.to_str())
    split = _split(tokenizer, described)
    vocab = {index: token for token, index in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
    added = {entry["id"]: entry for entry in described["added_tokens"]}
    kinds = [NORMAL if index in vocab else UNUSED for index in range(rows)]
    for index, entry in added.items():
        kinds[index] = reading.CONTROL if entry["special"] else reading.USER_DEFINED
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in described["model"]["merges"]]
    ids = {
        f"{theirs}_token_id": tokenizer.special_ids[role]
        for role, theirs in reading.ROLES.items()
        if role in tokenizer.special_ids
    }
    fields: dict[str, Any] = {
        "model": "gpt2",
        "pre": split,
        "tokens": [vocab.get(index, f"[PAD{index}]") for index in range(rows)],
        "token_type": kinds,
        "merges": merges,
        **ids,
        "add_bos_token": bool(tokenizer.first_ids),
    }
    template = {} if tokenizer.chat_template is None else {"tokenizer.chat_template": tokenizer.chat_template}
    return {**{f"tokenizer.ggml.{name}": value for name, value in fields.items()}, **template}


def _split(tokenizer: TextTokenizer, described: Mapping[str, Any]) -> str:
    """llama.cpp's name for the rule that parts words. Raises: CheckpointError."""

    def refused(what: str) -> CheckpointError:
        return CheckpointError(f"no GGUF form: {what}; --to hf and --to onnx carry every tokenizer")

    if tokenizer.kind != "bpe" or (described["decoder"] or {}).get("type") != "ByteLevel":
        raise refused(f"a tokenizer of kind {tokenizer.kind}, byte-level BPE is expected")
    if described["normalizer"] is not None:
        raise refused(f"the tokenizer changes texts first ({described['normalizer']['type']})")
    model = described["model"]
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(option):
            raise refused(f"the tokenizer's {option} is {model[option]!r}")
    parts = described["pre_tokenizer"] or {}
    steps = parts.get("pretokenizers", [parts])
    pattern = steps[0]["pattern"].get("Regex") if steps[0].get("type") == "Split" else None
    whole = steps[-1].get("type") == "ByteLevel" and not steps[-1].get("add_prefix_space")
    if whole and len(steps) == 1 and steps[0].get("use_regex"):
        return "gpt-2"
    if whole and len(steps) == 2 and pattern is not None and not steps[1].get("use_regex"):
        found = next((name for name, known in SPLITS.items() if known == pattern), None)
        if found is not None:
            return found
    raise refused("the tokenizer parts words in a way that has no name in llama.cpp")


def _generation(loaded: LoadedModel) -> dict[str, Any]:
    """What the metadata can say of generation_config.json: sampling, and a second id that ends a text."""
    given = loaded.info.get("generation") or {}
    fields: dict[str, Any] = {
        f"general.sampling.{theirs}": given[ours] if ours == "top_k" else float(given[ours])
        for ours, theirs in reading.SAMPLING.items()
        if given.get(ours) is not None
    }
    assert loaded.tokenizer is not None, "why_not has looked"
    ends = given.get("eos_token_id")
    others = [index for index in ends if index != loaded.tokenizer.special_ids.get("eos")] if type(ends) is list else []
    return {**fields, **({"tokenizer.ggml.eot_token_id": others[0]} if others else {})}


# --------------------------------------------------------------------------------------------------------- container


def write_file(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes a container of version 3; vectors as float32, as every reader expects them."""
    numbers = {
        name: (tensor if tensor.ndim > 1 else tensor.float()).detach().cpu().contiguous()
        for name, tensor in tensors.items()
    }
    storage.write_blocks(path, _blocks(metadata, numbers))


def _blocks(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    head = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    head += [_string(name) + _value(value) for name, value in metadata.items()]
    offset = 0
    for name, tensor in tensors.items():
        shape = struct.pack(f"<I{tensor.ndim}Q", tensor.ndim, *reversed(tensor.shape))
        head.append(_string(name) + shape + struct.pack("<IQ", KINDS[tensor.dtype][0], offset))
        offset += _aligned(tensor.numel() * tensor.element_size())
    start = b"".join(head)
    yield start.ljust(_aligned(len(start)), b"\0")
    for tensor in tensors.values():
        data = tensor.reshape(-1).view(torch.uint8).numpy().data
        yield data
        yield b"\0" * (_aligned(len(data)) - len(data))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    """Kind and bytes: numbers from 0 on are uint32 and in lists int32, as llama.cpp's converter has them."""
    if isinstance(value, list):
        strings = all(isinstance(item, str) for item in value)
        items = b"".join(map(_string, value)) if strings else struct.pack(f"<{len(value)}i", *value)
        return struct.pack("<IIQ", 9, 8 if strings else 5, len(value)) + items
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    return struct.pack("<II", 4, value)
