"""What every causal decoder does with its parts: the pass through them, the cache, the padded call, folders.

A family's file says which parts there are, and its `forms` how Hugging Face writes them down.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from isoform.contracts import Batch, Output, Sequences
from isoform.errors import ConfigError
from isoform.layers import fused
from isoform.layers.block import Stream
from isoform.layers.cache import KVCache
from isoform.layers.dropout import Dropout, token_keys
from isoform.layers.position import Position
from isoform.models import heads, names
from isoform.models.border import dense_logits
from isoform.models.hf_fields import own_options
from isoform.registry import build_options


class Forms(Protocol):
    """A module that knows a family's forms in Hugging Face."""

    def choose(self, config: Any) -> tuple[str | None, str | None]:
        """(model_type, None) where there is a form for the model, else (None, the reason)."""
        ...

    def write_config(self, config: Any, model_type: str) -> dict[str, Any]:
        """config.json of a form that `choose` chose."""
        ...

    def read_config(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Our options from their config.json. Raises: ConfigError naming the field that our model cannot follow."""
        ...

    def table(self, config: Any, model_type: str) -> names.Table:
        """Their names -> our places."""
        ...

    def with_prefix(self, tensors: Mapping[str, Tensor], model_type: str) -> dict[str, Tensor]:
        """The names that the tables know, for checkpoints of the bare model."""
        ...


class Decoder(nn.Module):
    """A causal language model; the family's `__init__` builds the parts named below.

    x = embedding[token] + position;  x = block(x) for each block;  hidden = norm(x);  logits = head hidden

    Shapes: tokens `(n,)`, hidden `(n, d)`, logits `(m, v)` at the m places that ask.
    """

    capabilities: ClassVar[frozenset[str]] = frozenset({"causal", "cache", "classify"})
    hf_model_types: ClassVar[tuple[str, ...]]
    forms: ClassVar[Forms]
    classifier_shape: ClassVar[heads.Shape] = heads.DECODER

    config: Any
    max_positions: int | None
    embedding: nn.Embedding
    position: Position
    embedding_dropout: Dropout
    blocks: nn.ModuleList
    final_norm: nn.Module
    head: nn.Linear | None
    # None: the head is the embedding
    classifier: heads.ClassificationHead | None

    def forward(self, batch: Batch, *, cache: KVCache | None = None, all_layers: bool = False) -> Output:
        self.check_length(batch.sequences, cache)
        keys = token_keys(batch)
        stream = Stream(batch.positions, batch.sequences, self.position, keys, cache)
        hidden = self.embedding_dropout(self.position.embed(self.embedding(batch.tokens), batch.positions), keys)
        layers = [hidden]
        for block in self.blocks:
            hidden = block(hidden, stream)
            layers.append(hidden)
        if cache is not None:
            cache.advance(batch.sequences)
        return Output(
            hidden=self.final_norm(hidden),
            layers=tuple(layers) if all_layers else None,
            router_logits=tuple(stream.router_logits) or None,
        )

    def check_length(self, sequences: Sequences, cache: KVCache | None) -> None:
        """Raises: ConfigError where old and new tokens together are more than there are positions."""
        limit = self.position.limit
        before = [0] * len(sequences) if cache is None else cache.lengths
        longest = max((old + new for old, new in zip(before, sequences.lengths, strict=True)), default=0)
        if limit is not None and longest > limit:
            raise ConfigError(
                f"model.max_positions: {limit} learned positions, a sequence of {longest} tokens given; "
                "shorten it (text.max_tokens)"
            )

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary: `(m, d)` -> `(m, v)`."""
        return fused.linear(hidden, self.embedding.weight if self.head is None else self.head.weight, None)

    def new_cache(self, num_sequences: int) -> KVCache:
        """An empty cache for so many sequences."""
        return KVCache(num_sequences, len(self.blocks))

    def dense(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The call that people know: padded ids and mask `(b, t)` -> logits `(b, t, v)`, zero at padding."""
        return dense_logits(self, input_ids, attention_mask)

    # ------------------------------------------------------------------------------------------------- Hugging Face

    @classmethod
    def hf_form(cls, config: Any) -> tuple[dict[str, Any] | None, str | None]:
        """(config.json of transformers, None), or (None, the reason why it has no form for such a model)."""
        model_type, reason = cls.forms.choose(config)
        if model_type is None:
            return None, reason
        broken = heads.why_not(cls.classifier_shape, config)
        if broken:
            return None, f"{model_type} in transformers has no {', no '.join(broken)}"
        form = heads.written(cls.classifier_shape, config, cls.forms.write_config(config, model_type))
        if cls.from_hf(form).resolved() != config.resolved():
            # What the form cannot say (a fixed position table, left-out biases) is read again from here.
            form["isoform"] = config.model_dump(mode="json")
        return form, None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Any:
        """Our config from a config.json of `hf_model_types`. Raises: ConfigError."""
        options = own_options(config)
        if options is None:
            options = cls.forms.read_config(config)
            options |= heads.read(cls.classifier_shape, cls, config, config.get(names.TENSOR_NAMES))
        return build_options(cls, options, "config.json")

    @classmethod
    def to_hf(cls, config: Any) -> dict[str, Any]:
        """config.json of transformers. Raises: ConfigError with the reason where there is none."""
        form, reason = cls.hf_form(config)
        if form is None:
            raise ConfigError(f"model: no Hugging Face form: {reason}")
        return form

    @classmethod
    def state_from_hf(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Their tensors under our names. Raises: CheckpointError naming what is unknown, missing or not ours."""
        ours = cls.from_hf({**config, names.TENSOR_NAMES: list(tensors)})
        model_type = str(config["model_type"])
        expected = cls.undrawn(ours).state_dict()
        theirs = cls.forms.with_prefix(tensors, model_type)
        return names.to_ours(theirs, cls._table(ours, model_type), ours.num_layers, expected)

    @classmethod
    def _table(cls, config: Any, model_type: str) -> names.Table:
        return {**cls.forms.table(config, model_type), **heads.table(cls.classifier_shape, config)}

    @classmethod
    def undrawn(cls, config: Any) -> Self:
        """A model of names and shapes without values."""
        build: Any = cls
        with torch.device("meta"):
            model: Self = build(config, seed=None)
        return model

    def state_to_hf(self) -> dict[str, Tensor]:
        """Our tensors under their names. Raises: ConfigError where there is no form."""
        model_type = str(self.to_hf(self.config)["model_type"])
        return names.to_theirs(self.state_dict(), self._table(self.config, model_type), self.config.num_layers)


def check_shape(config: Any, head_width: int | None = None) -> int:
    """The vocabulary's size, where widths and heads fit together.

    head_width: where it does not follow from the two. Raises: ConfigError.
    """
    if config.vocab_size is None:
        raise ConfigError("model.vocab_size: missing; give it, or a tokenizer that knows it")
    if head_width is None and config.width % config.num_heads:
        raise ConfigError(
            f"model.num_heads: {config.num_heads} given, a divisor of model.width {config.width} is expected"
        )
    if config.num_heads % (config.num_kv_heads or config.num_heads):
        raise ConfigError(
            f"model.num_kv_heads: {config.num_kv_heads} given, "
            f"a divisor of model.num_heads {config.num_heads} is expected"
        )
    size: int = config.vocab_size
    return size
