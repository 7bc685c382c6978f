"""Fields of a config.json of transformers: what every family may hold, and how RoPE is written down."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from isoform.errors import ConfigError
from isoform.models.hf_fields import check_types
from isoform.registry import nearest

# Fields that say where a model came from, how it is called or how it generates, and nothing about its numbers.
_INDIFFERENT = """
_attn_implementation_autoset _model_name_or_path _name_or_path architectures bad_words_ids begin_suppress_tokens
bos_token_id chunk_size_feed_forward decoder_start_token_id diversity_penalty do_sample dtype early_stopping
eos_token_id finetuning_task forced_bos_token_id forced_eos_token_id id2label initializer_range is_encoder_decoder
is_llama_config isoform label2id length_penalty max_length max_window_layers min_length model_type name_or_path
no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states
output_router_logits output_scores pad_token_id prefix pretraining_tp problem_type repetition_penalty return_dict
return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature tensor_names tf_legacy_loss
tokenizer_class top_k top_p torch_dtype transformers.js_config transformers_version typical_p unsloth_fixed
unsloth_version use_bfloat16 use_cache
"""
INDIFFERENT = frozenset(_INDIFFERENT.split())


def check_fields(given: Mapping[str, Any], known: Iterable[str], required: Iterable[str] = ()) -> None:
    """Raises: ConfigError naming a field that is of another type than it must be, or that is switched on and that the
    family does not know.

    A field that is null, false, 0 or empty is off. required: fields that may not be null in this family.
    """
    known = frozenset(known)
    check_types(given, known, required)
    for field, value in given.items():
        if value and field not in known and field not in INDIFFERENT:
            raise ConfigError(
                f"config.json: {field} is {value!r:.60} and is not known for {given['model_type']}"
                f"{nearest(field, known)}; if it changes nothing that the model computes, remove it from a copy"
            )


def expect(given: Mapping[str, Any], field: str, *expected: Any) -> None:
    """Raises: ConfigError where a field is there and has none of the values expected."""
    if field in given and given[field] not in expected:
        raise ConfigError(
            f"config.json: {field} is {given[field]!r:.60}, {expected[0]!r} is expected: "
            "this model has no such form here"
        )


def rope_position(given: Mapping[str, Any], *, base: float, fraction: float, max_positions: int) -> dict[str, Any]:
    """Our options of `rope` from a config.json in any of its generations; base, fraction: where it says nothing.

    Raises: ConfigError naming a kind of scaling that cannot be followed, or a field that is given twice.
    """
    rope = _rope_fields(given, base)
    kind = rope.pop("rope_type")
    options: dict[str, Any] = {
        "kind": "rope",
        "base": rope.pop("rope_theta"),
        "fraction": rope.pop("partial_rotary_factor", given.get("partial_rotary_factor", fraction)),
    }
    trained = {"original_positions": rope.pop("original_max_position_embeddings", max_positions)}
    if kind == "linear":
        options["scale"] = _taken(rope, "factor")
    elif kind == "llama3":
        named = {"low_turns": _taken(rope, "low_freq_factor"), "high_turns": _taken(rope, "high_freq_factor")}
        options["scaling"] = {"kind": kind, "factor": _taken(rope, "factor"), **named, **trained}
    elif kind == "yarn":
        factor = _taken(rope, "factor") or max_positions / trained["original_positions"]
        options["scaling"] = {"kind": kind, "factor": factor, **trained, **_yarn(rope, factor)}
    elif kind == "dynamic":
        raise ConfigError(
            "config.json: rope_type 'dynamic' turns by the length of the longest text of a batch, so that a text alone "
            "and in company would differ; use yarn or llama3, or texts within max_position_embeddings and 'default'"
        )
    elif kind != "default":
        raise ConfigError(f"config.json: rope_type {kind!r} given; default, linear, llama3 or yarn is expected")
    left = sorted(name for name, value in rope.items() if value is not None and kind != "default")
    if left:
        raise ConfigError(f"config.json: rope_parameters.{left[0]} is not known for rope_type {kind!r}")
    return options


def _rope_fields(given: Mapping[str, Any], base: float) -> dict[str, Any]:
    """What `rope_scaling` (older) or `rope_parameters` says, with the kind under `rope_type` and the base in it."""
    theta = given.get("rope_theta", given.get("rotary_emb_base", base))
    said = []
    for field in ("rope_scaling", "rope_parameters"):
        part = {name: value for name, value in (given.get(field) or {}).items() if value is not None}
        if part:
            older = part.pop("type", "default")
            said.append({"rope_type": older, "rope_theta": theta, **part})
    said = said or [{"rope_type": "default", "rope_theta": theta}]
    # transformers follows the older field alone, and the newer is what it writes
    first, last = said[0], said[-1]
    for name in sorted({*first, *last}):
        if first.get(name) != last.get(name):
            raise ConfigError(
                f"config.json: {name} is {first.get(name)!r:.60} by rope_scaling and {last.get(name)!r:.60} by "
                "rope_parameters; remove the wrong one of the two fields from a copy"
            )
    return first


def _taken(rope: dict[str, Any], field: str) -> Any:
    if field not in rope:
        raise ConfigError(f"config.json: rope_parameters.{field} is missing")
    return rope.pop(field)


def _yarn(rope: dict[str, Any], factor: float) -> dict[str, Any]:
    amplitude, above, below = (rope.pop(name, None) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    if amplitude is None and above and below and factor > 1:
        amplitude = (0.1 * above * math.log(factor) + 1) / (0.1 * below * math.log(factor) + 1)
    return {
        "fast_turns": rope.pop("beta_fast", None) or 32.0,
        "slow_turns": rope.pop("beta_slow", None) or 1.0,
        "rounded": rope.pop("truncate", True),
        "attention_factor": amplitude,
    }


def rope_parameters(position: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters` of config.json from our options of `rope`, without the rotated fraction."""
    base, scaling = position["base"], position.get("scaling")
    if scaling is None:
        linear = {"rope_type": "linear", "factor": position["scale"]}
        return {**({"rope_type": "default"} if position["scale"] == 1 else linear), "rope_theta": base}
    shared = {
        "rope_type": scaling["kind"],
        "rope_theta": base,
        "factor": scaling["factor"],
        "original_max_position_embeddings": scaling["original_positions"],
    }
    if scaling["kind"] == "llama3":
        return {**shared, "low_freq_factor": scaling["low_turns"], "high_freq_factor": scaling["high_turns"]}
    return {
        **shared,
        "beta_fast": scaling["fast_turns"],
        "beta_slow": scaling["slow_turns"],
        **({} if scaling["rounded"] else {"truncate": False}),
        **({} if scaling["attention_factor"] is None else {"attention_factor": scaling["attention_factor"]}),
    }
