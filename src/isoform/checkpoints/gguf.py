"""GGUF files: weights, config, tokenizer and chat template of llama.cpp in one file, read as a Hugging Face folder is.

    metadata `llama.*`        -> config.json       tensors `blk.0.attn_q.weight` ... -> their Hugging Face names
    metadata `tokenizer.*`    -> tokenizer

Queries and keys stand there with the two halves of each head interleaved, since ggml turns neighbouring channels; here
they are put back. Weights become float32. The `gguf` package reads the container.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isoform.checkpoints import ggml
from isoform.errors import CheckpointError, DataError
from isoform.layers.position import inverse_frequencies
from isoform.layers.rope_scaling import Llama3
from isoform.text.bytelevel import byte_level
from isoform.text.tokenizers import TextTokenizer

# Their names behind `blk.N.` -> Hugging Face's behind `model.layers.N.`.
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
# The angles of LLaMA 3.1 and later, which the metadata does not mention: theta / theta' of each pair of channels.
ROPE_FACTORS = "rope_freqs.weight"
LLAMA3_FACTORS = (8.0, 16.0, 32.0)
# Kinds of a token.
CONTROL, USER_DEFINED = 3, 4
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator", "mask": "mask"}
# A line is shown where reading takes longer, and again as often.
PATIENCE_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class GGUF:
    """A file as a Hugging Face folder would hold it.

    no_tokenizer: why there is none. kinds: how many tensors are packed in which way. name: what the model calls itself.
    """

    hf_config: dict[str, Any]
    tensors: dict[str, Tensor]
    tokenizer: TextTokenizer | None
    no_tokenizer: str | None
    kinds: dict[str, int]
    name: str | None


def read_gguf(path: Path) -> GGUF:
    """A whole file. Raises: CheckpointError that names what is damaged, unknown or not read, and what to do."""
    progress = Progress(path)
    reader = _open(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise CheckpointError(
            f"{path}: the architecture {architecture!r} is not read from GGUF, llama is; take the model's Hugging Face "
            "folder"
        )
    stored = {tensor.name: tensor for tensor in reader.tensors}
    factors = stored.pop(ROPE_FACTORS, None)
    hf_config = _config(path, fields, stored, None if factors is None else torch.from_numpy(_numbers(factors)))
    tensors: dict[str, Tensor] = {}
    kinds: dict[str, int] = {}
    for number, (name, tensor) in enumerate(stored.items()):
        progress.at(number, len(stored))
        numbers = torch.from_numpy(_numbers(tensor))
        kinds[tensor.tensor_type.name] = kinds.get(tensor.tensor_type.name, 0) + 1
        heads = {"attn_q": hf_config["num_attention_heads"], "attn_k": hf_config["num_key_value_heads"]}
        part = name.split(".")[-2] if "." in name else name
        tensors[_theirs(path, name)] = halves(numbers, heads[part]) if part in heads else numbers
    progress.done()
    tokenizer, reason = _tokenizer(path, fields)
    return GGUF(hf_config, tensors, tokenizer, reason, kinds, fields.get("general.name"))


def halves(rows: Tensor, num_heads: int) -> Tensor:
    """Rows (h, k/2, 2), neighbours turned together, -> rows (h, 2, k/2), halves turned together."""
    return rows.reshape(num_heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape).contiguous()


def _open(path: Path) -> Any:
    try:
        import gguf
    except ImportError:
        raise CheckpointError(f"{path}: reading GGUF needs the package gguf; pip install 'isoform[export]'") from None
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        raise CheckpointError(f"{path}: not a whole GGUF file ({error}); fetch it again") from None


def _numbers(tensor: Any) -> Any:
    shape = tuple(reversed(tensor.shape.tolist()))
    # A copy: torch writes into what it is given, the file is mapped for reading.
    return ggml.unpack(tensor.data, tensor.tensor_type.name, shape, tensor.name).copy()


def _theirs(path: Path, name: str) -> str:
    """The Hugging Face name of a tensor. Raises: CheckpointError."""
    stem, _, kind = name.rpartition(".")
    if stem.startswith("blk."):
        _, layer, part = stem.split(".", 2)
        if part in BLOCK_NAMES:
            return f"model.layers.{layer}.{BLOCK_NAMES[part]}.{kind}"
    elif stem in NAMES:
        return f"{NAMES[stem]}.{kind}"
    raise CheckpointError(f"{path}: the tensor {name} is not known for llama; take the model's Hugging Face folder")


# ------------------------------------------------------------------------------------------------------------ config


def _config(path: Path, fields: Mapping[str, Any], stored: Mapping[str, Any], factors: Tensor | None) -> dict[str, Any]:
    """config.json as transformers would have it. Raises: CheckpointError naming the metadata that is missing."""

    def need(name: str) -> Any:
        if f"llama.{name}" not in fields:
            raise CheckpointError(f"{path}: the metadata llama.{name} is missing; fetch the file again")
        return fields[f"llama.{name}"]

    if fields.get("llama.expert_count"):
        raise CheckpointError(f"{path}: a mixture of experts is not read from GGUF; take its Hugging Face folder")
    if "token_embd.weight" not in stored:
        raise CheckpointError(f"{path}: the tensor token_embd.weight is missing; fetch the file again")
    width, heads = need("embedding_length"), need("attention.head_count")
    head_width = fields.get("llama.attention.key_length", width // heads)
    rotated = fields.get("llama.rope.dimension_count", head_width)
    if rotated != head_width:
        raise CheckpointError(f"{path}: {rotated} of {head_width} channels of a head are turned, all are expected")
    base = _decimal(fields.get("llama.rope.freq_base", 10_000.0))
    longest = need("context_length")
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": int(stored["token_embd.weight"].shape[1]),
        "hidden_size": width,
        "intermediate_size": need("feed_forward_length"),
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", heads),
        "head_dim": head_width,
        "hidden_act": "silu",
        "max_position_embeddings": longest,
        "rms_norm_eps": _decimal(need("attention.layer_norm_rms_epsilon")),
        "rope_parameters": {"rope_theta": base, **_scaling(path, fields, factors, base, head_width, longest)},
        "tie_word_embeddings": "output.weight" not in stored,
        "attention_bias": "blk.0.attn_q.bias" in stored,
        "mlp_bias": "blk.0.ffn_up.bias" in stored,
        **{f"{role}_token_id": fields.get(f"tokenizer.ggml.{ROLES[role]}_token_id") for role in ("bos", "eos", "pad")},
    }


def _decimal(value: float) -> float:
    """What was written before it became a float32: 1e-06, not 9.99999997e-07."""
    return float(str(np.float32(value)))


def _scaling(
    path: Path, fields: Mapping[str, Any], factors: Tensor | None, base: float, head_width: int, longest: int
) -> dict[str, Any]:
    """The rest of `rope_parameters`."""
    if factors is not None:
        theta = inverse_frequencies(head_width, base, factors.device)
        for factor in LLAMA3_FACTORS:
            if torch.allclose(theta / Llama3(factor=factor).angles(theta, base), factors, rtol=1e-4):
                turns = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
                return {"rope_type": "llama3", "factor": factor, **turns}
        raise CheckpointError(f"{path}: {ROPE_FACTORS} is none of LLaMA 3's; take the model's Hugging Face folder")
    kind = fields.get("llama.rope.scaling.type", "none")
    factor = float(fields.get("llama.rope.scaling.factor", fields.get("llama.rope.scale_linear", 1.0)))
    if kind == "none" or factor == 1:
        return {"rope_type": "default"}
    if kind == "yarn":
        trained = fields.get("llama.rope.scaling.original_context_length", longest)
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": trained}
    if kind != "linear":
        raise CheckpointError(f"{path}: llama.rope.scaling.type {kind!r} is not read; linear or yarn is expected")
    return {"rope_type": "linear", "factor": factor}


# --------------------------------------------------------------------------------------------------------- tokenizer


def _tokenizer(path: Path, fields: Mapping[str, Any]) -> tuple[TextTokenizer | None, str | None]:
    """The tokenizer with its chat template, or why it is not read."""

    def get(name: str, default: Any = None) -> Any:
        return fields.get(f"tokenizer.ggml.{name}", default)

    tokens = get("tokens", [])
    if get("model") != "gpt2" or not tokens:
        return None, f"{path}: the tokenizer {get('model')!r} is not read, byte-level BPE (gpt2) is"
    kinds = get("token_type", [1] * len(tokens))
    try:
        tokenizer = byte_level(
            tokens,
            get("merges", []),
            split=get("pre", "default"),
            special=[token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL],
            whole=[token for token, kind in zip(tokens, kinds, strict=True) if kind == USER_DEFINED],
            roles={
                role: tokens[get(f"{theirs}_token_id")]
                for role, theirs in ROLES.items()
                if get(f"{theirs}_token_id") is not None
            },
            begins=bool(get("add_bos_token", False)),
        )
    except (DataError, ValueError, IndexError) as error:
        raise CheckpointError(f"{path}: the tokenizer cannot be read: {error}") from None
    tokenizer.chat_template = fields.get("tokenizer.chat_template")
    return tokenizer, None


class Progress:
    """Lines on standard error while a file is read, once it takes longer than a few seconds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.began = self.shown = time.monotonic()

    def at(self, number: int, of: int) -> None:
        """So many tensors of all are read."""
        now = time.monotonic()
        if now - self.shown > PATIENCE_SECONDS:
            self.shown = now
            print(f"reading {self.path.name}: {number} of {of} tensors, {now - self.began:.0f} s", file=sys.stderr)

    def done(self) -> None:
        """Everything is read."""
        if self.shown > self.began:
            seconds = time.monotonic() - self.began
            print(f"reading {self.path.name}: done in {seconds:.0f} s", file=sys.stderr)
