"""GGUF files: weights, config, tokenizer and chat template of llama.cpp in one file, read as a Hugging Face folder is.

    metadata `llama.*`, `gpt2.*`    -> config.json    tensors `blk.0.attn_q.weight` ... -> their Hugging Face names
    metadata `tokenizer.*`          -> tokenizer

A LLaMA's queries and keys stand there with the two halves of each head interleaved, since ggml turns neighbouring
channels, and a GPT-2's matrices with their outputs first; here they are put back. Weights become float32. The `gguf`
package reads the container.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isoform.checkpoints import ggml
from isoform.checkpoints.tensors import Progress
from isoform.errors import CheckpointError, DataError
from isoform.layers.position import inverse_frequencies
from isoform.layers.rope_scaling import Llama3
from isoform.text.bytelevel import byte_level
from isoform.text.tokenizers import TextTokenizer

# Their names behind `blk.N.` -> Hugging Face's behind `model.layers.N.`, of a GPT-2 behind `transformer.h.N.`.
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
GPT2_BLOCK_NAMES = {
    "attn_norm": "ln_1",
    "ffn_norm": "ln_2",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
GPT2_NAMES = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
# The angles of LLaMA 3.1 and later, which the metadata does not mention: theta / theta' of each pair of channels.
ROPE_FACTORS = "rope_freqs.weight"
LLAMA3_FACTORS = (8.0, 16.0, 32.0)
# Kinds of a token.
CONTROL, USER_DEFINED = 3, 4
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator", "mask": "mask"}
# generation_config.json -> what llama.cpp takes from `general.sampling` where its caller says nothing.
SAMPLING = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}
# Other tokens that end a text.
ENDS = ("eot", "eom")
# What of an architecture's metadata is read, or says what the tensors say too.
READ = frozenset(
    """
    context_length embedding_length block_count feed_forward_length vocab_size expert_count expert_used_count
    attention.head_count attention.head_count_kv attention.key_length attention.value_length
    attention.layer_norm_epsilon attention.layer_norm_rms_epsilon rope.dimension_count rope.freq_base rope.scale_linear
    rope.scaling.type rope.scaling.factor rope.scaling.original_context_length rope.scaling.finetuned
    """.split()  # noqa: SIM905
)
# What changes nothing at this value, though it is switched on.
NEUTRAL = {"rope.scaling.attn_factor": 1.0, "attention.causal": True}


@dataclass(frozen=True, slots=True)
class GGUF:
    """A file as a Hugging Face folder would hold it.

    no_tokenizer: why there is none. kinds: how many tensors are packed in which way. name: what the model calls itself.
    generation: generation_config.json, where the file says more than the tokenizer.
    """

    hf_config: dict[str, Any]
    tensors: dict[str, Tensor]
    tokenizer: TextTokenizer | None
    no_tokenizer: str | None
    kinds: dict[str, int]
    name: str | None
    generation: dict[str, Any]


def read_gguf(path: Path) -> GGUF:
    """A whole file. Raises: CheckpointError that names what is damaged, unknown or not read, and what to do."""
    progress = Progress(f"reading {path.name}", "tensors")
    reader = _open(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    architecture = fields.get("general.architecture")
    if architecture not in ("gpt2", "llama"):
        raise CheckpointError(
            f"{path}: the architecture {architecture!r} is not read from GGUF, gpt2 and llama are; take the model's "
            "Hugging Face folder"
        )
    _refuse_unread(path, fields, architecture)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    hf_config, theirs = _gpt2(path, fields, stored) if architecture == "gpt2" else _llama(path, fields, stored)
    tensors: dict[str, Tensor] = {}
    kinds: dict[str, int] = {}
    for number, (name, tensor) in enumerate(stored.items()):
        progress.at(number, len(stored))
        numbers = torch.from_numpy(_numbers(tensor))
        kinds[tensor.tensor_type.name] = kinds.get(tensor.tensor_type.name, 0) + 1
        place, value = theirs(name, numbers)
        tensors[place] = value
    progress.done()
    tokenizer, reason = _tokenizer(path, fields)
    generation = _generation(fields, hf_config)
    return GGUF(hf_config, tensors, tokenizer, reason, kinds, fields.get("general.name"), generation)


def _refuse_unread(path: Path, fields: Mapping[str, Any], architecture: str) -> None:
    """Raises: CheckpointError for what is switched on and would change what the model computes."""
    for name, value in fields.items():
        kind, _, rest = name.partition(".")
        neutral = (NEUTRAL[rest],) if rest in NEUTRAL else (0, False, "", None)
        if kind == architecture and rest not in READ and value not in neutral:
            raise CheckpointError(
                f"{path}: the metadata {name} ({value!r}) is not read; take the model's Hugging Face folder"
            )


def _generation(fields: Mapping[str, Any], hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json, where there is sampling or more than one token that ends a text."""
    sampling = {
        ours: value if ours == "top_k" else _decimal(value)
        for ours, theirs in SAMPLING.items()
        if (value := fields.get(f"general.sampling.{theirs}")) is not None
    }
    named = [hf_config["eos_token_id"], *(fields.get(f"tokenizer.ggml.{end}_token_id") for end in ENDS)]
    ends = list(dict.fromkeys(index for index in named if index is not None))
    if not sampling and len(ends) < 2:
        return {}
    ids = {name: hf_config[name] for name in ("bos_token_id", "pad_token_id") if hf_config[name] is not None}
    return {**ids, "eos_token_id": ends, **({"do_sample": True, **sampling} if sampling else {})}


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


# ------------------------------------------------------------------------------------------------------------ config

# The name of a tensor in Hugging Face and its values there.
Theirs = Callable[[str, Tensor], tuple[str, Tensor]]


def _need(path: Path, fields: Mapping[str, Any], name: str) -> Any:
    if name not in fields:
        raise CheckpointError(f"{path}: the metadata {name} is missing; fetch the file again")
    return fields[name]


def _hf_name(path: Path, name: str, outer: Mapping[str, str], stem: str, inner: Mapping[str, str]) -> str:
    """The Hugging Face name of a tensor. Raises: CheckpointError."""
    given, _, kind = name.rpartition(".")
    if given.startswith("blk."):
        _, layer, part = given.split(".", 2)
        if part in inner:
            return f"{stem}.{layer}.{inner[part]}.{kind}"
    elif given in outer:
        return f"{outer[given]}.{kind}"
    raise CheckpointError(f"{path}: the tensor {name} is not known; take the model's Hugging Face folder")


def _shared(path: Path, fields: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of every config.json: the vocabulary, whether the head is a matrix of its own, ids of special tokens."""
    if "token_embd.weight" not in stored:
        raise CheckpointError(f"{path}: the tensor token_embd.weight is missing; fetch the file again")
    return {
        "vocab_size": int(stored["token_embd.weight"].shape[1]),
        "tie_word_embeddings": "output.weight" not in stored,
        **{f"{role}_token_id": fields.get(f"tokenizer.ggml.{ROLES[role]}_token_id") for role in ("bos", "eos", "pad")},
    }


def _gpt2(path: Path, fields: Mapping[str, Any], stored: Mapping[str, Any]) -> tuple[dict[str, Any], Theirs]:
    """config.json as transformers would have it, and how tensors are carried there. Raises: CheckpointError."""
    hf_config = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        **_shared(path, fields, stored),
        "n_positions": _need(path, fields, "gpt2.context_length"),
        "n_embd": _need(path, fields, "gpt2.embedding_length"),
        "n_layer": _need(path, fields, "gpt2.block_count"),
        "n_head": _need(path, fields, "gpt2.attention.head_count"),
        "n_inner": _need(path, fields, "gpt2.feed_forward_length"),
        "layer_norm_epsilon": _decimal(_need(path, fields, "gpt2.attention.layer_norm_epsilon")),
        "activation_function": "gelu_new",
    }

    def theirs(name: str, numbers: Tensor) -> tuple[str, Tensor]:
        # Conv1D keeps (inputs, outputs).
        turned = numbers.t().contiguous() if name.startswith("blk.") and numbers.ndim == 2 else numbers
        return _hf_name(path, name, GPT2_NAMES, "transformer.h", GPT2_BLOCK_NAMES), turned

    return hf_config, theirs


def _llama(path: Path, fields: Mapping[str, Any], stored: dict[str, Any]) -> tuple[dict[str, Any], Theirs]:
    """config.json as transformers would have it, and how tensors are carried there. Raises: CheckpointError."""
    if fields.get("llama.expert_count"):
        raise CheckpointError(f"{path}: a mixture of experts is not read from GGUF; take its Hugging Face folder")
    shared = _shared(path, fields, stored)
    packed = stored.pop(ROPE_FACTORS, None)
    factors = None if packed is None else torch.from_numpy(_numbers(packed))
    width, heads = (_need(path, fields, f"llama.{name}") for name in ("embedding_length", "attention.head_count"))
    head_width = fields.get("llama.attention.key_length", width // heads)
    rotated = fields.get("llama.rope.dimension_count", head_width)
    if rotated != head_width:
        raise CheckpointError(f"{path}: {rotated} of {head_width} channels of a head are turned, all are expected")
    base = _decimal(fields.get("llama.rope.freq_base", 10_000.0))
    longest = _need(path, fields, "llama.context_length")
    hf_config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        **shared,
        "hidden_size": width,
        "intermediate_size": _need(path, fields, "llama.feed_forward_length"),
        "num_hidden_layers": _need(path, fields, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", heads),
        "head_dim": head_width,
        "hidden_act": "silu",
        "max_position_embeddings": longest,
        "rms_norm_eps": _decimal(_need(path, fields, "llama.attention.layer_norm_rms_epsilon")),
        "rope_parameters": {"rope_theta": base, **_scaling(path, fields, factors, base, head_width, longest)},
        "attention_bias": "blk.0.attn_q.bias" in stored,
        "mlp_bias": "blk.0.ffn_up.bias" in stored,
    }
    turned = {"attn_q": heads, "attn_k": hf_config["num_key_value_heads"]}

    def theirs(name: str, numbers: Tensor) -> tuple[str, Tensor]:
        place = _hf_name(path, name, NAMES, "model.layers", BLOCK_NAMES)
        part = name.split(".")[-2]
        return place, halves(numbers, turned[part]) if part in turned else numbers

    return hf_config, theirs


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
