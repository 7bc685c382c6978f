"""Which type each field of a config.json of transformers has, whatever the family that reads it.

A file may have been written by hand or by another program: what is computed with is checked before.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from isoform.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Kind:
    """expected: in words; holds: whether a value is of this kind; null: whether it may be left open."""

    expected: str
    holds: Callable[[Any], bool]
    null: bool = False


def _whole(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _named_labels(value: Any) -> bool:
    return isinstance(value, dict) and all(str(place).isdecimal() for place in value)


def _words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


def _table(value: Any) -> bool:
    return isinstance(value, dict)


_SIZE = "a whole number above 0"
_KINDS = {
    Kind(_SIZE, _whole): """
        vocab_size hidden_size n_embd d_model dim intermediate_size d_inner hidden_dim d_ff num_hidden_layers n_layer
        n_layers num_layers num_attention_heads n_head n_heads num_heads max_position_embeddings n_positions d_kv
        num_local_experts num_experts_per_tok relative_attention_num_buckets relative_attention_max_distance
        local_attention global_attn_every_n_layers
        """,
    Kind(_SIZE, _whole, null=True): """
        n_inner n_ctx n_token d_head head_dim embedding_size num_key_value_heads num_decoder_layers sliding_window
        """,
    Kind("a whole number of at least 0", lambda value: _whole(value, 0)): "type_vocab_size",
    Kind("a whole number of at least 0", lambda value: _whole(value, 0), null=True): "pad_token_id",
    Kind("a whole number", lambda value: _whole(value, -(1 << 62)), null=True): "clamp_len",
    Kind("a number", _number): """
        layer_norm_eps layer_norm_epsilon rms_norm_eps norm_eps hidden_dropout_prob attention_probs_dropout_prob
        hidden_dropout attention_dropout embd_pdrop resid_pdrop attn_pdrop dropout dropout_rate embedding_dropout
        mlp_dropout seq_classif_dropout summary_last_dropout router_aux_loss_coef
        """,
    Kind("a number", _number, null=True): """
        classifier_dropout rope_theta rotary_pct rotary_emb_base partial_rotary_factor global_rope_theta
        local_rope_theta
        """,
    Kind("true or false", lambda value: value in (True, False), null=True): """
        tie_word_embeddings scale_decoder_outputs attention_bias mlp_bias
        """,
    Kind("a list of names", _words, null=True): "architectures layer_types",
    Kind('a table such as {"0": "no", "1": "yes"}', _named_labels, null=True): "id2label",
    Kind('a table such as {"rope_type": "default"}', _table, null=True): "rope_scaling rope_parameters",
}
_ROPE_KINDS = {
    Kind("a name", lambda value: isinstance(value, str), null=True): "rope_type type",
    Kind(_SIZE, _whole, null=True): "original_max_position_embeddings",
    Kind("a number", _number, null=True): """
        rope_theta partial_rotary_factor factor low_freq_factor high_freq_factor beta_fast beta_slow mscale
        mscale_all_dim attention_factor
        """,
    # one for each kind of layer
    Kind('a table such as {"rope_type": "default"}', _table, null=True): "full_attention sliding_attention",
}


def _by_name(kinds: Mapping[Kind, str]) -> dict[str, Kind]:
    return {name: kind for kind, names in kinds.items() for name in names.split()}


FIELDS, ROPE_FIELDS = _by_name(_KINDS), _by_name(_ROPE_KINDS)
# What is read for every family.
SHARED = frozenset({"architectures", "id2label"})


def check_types(given: Mapping[str, Any], read: Iterable[str], required: Iterable[str] = ()) -> None:
    """Raises: ConfigError naming the first of the fields that are `read` which is of another type than it must be.

    required: those that may not be null here, though other families leave them open.
    """
    required = frozenset(required)
    for field in sorted(given.keys() & (SHARED | required | frozenset(read))):
        _check(FIELDS, field, field, given[field], required=field in required)
        if field in ("rope_scaling", "rope_parameters"):
            _check_rope(field, given[field] or {})


def own_options(given: Mapping[str, Any]) -> dict[str, Any] | None:
    """Our own options, where a config.json that we wrote says them. Raises: ConfigError where they are no table."""
    kept = given.get("isoform")
    if kept and not isinstance(kept, dict):
        raise ConfigError(f"config.json: isoform is {_json(kept):.60}, a table of our own options is expected")
    return kept or None


def _check_rope(place: str, rope: Mapping[str, Any]) -> None:
    for field, value in rope.items():
        _check(ROPE_FIELDS, f"{place}.{field}", field, value)
        if isinstance(value, dict) and field in ROPE_FIELDS:
            _check_rope(f"{place}.{field}", value)


def _check(kinds: Mapping[str, Kind], place: str, field: str, value: Any, *, required: bool = False) -> None:
    kind = kinds.get(field)
    if kind is None:
        return
    null = kind.null and not required
    if not kind.holds(value) and not (null and value is None):
        expected = kind.expected + (", or null," if null else "")
        raise ConfigError(f"config.json: {place} is {_json(value):.60}, {expected} is expected")


def _json(value: Any) -> str:
    """A value as it stands in the file."""
    return json.dumps(value, ensure_ascii=False, default=repr)
