"""What the encoder families share: the head that guesses masked tokens, and the way to Hugging Face."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isoform.contracts import Sequences
from isoform.errors import ConfigError
from isoform.layers import fused
from isoform.layers.init import linear
from isoform.models import heads, names
from isoform.models.hf_fields import own_options
from isoform.models.names import TENSOR_NAMES

# What to change where experts are asked for: here no field takes the biases of feed-forward layers away.
NO_EXPERTS = (
    "this family's feed-forward layers always have them; choose a kind such as gelu, or a family with experts: llama, "
    "or gpt2 with bias: false"
)


class MaskedHead(nn.Module):
    """Scores over the vocabulary at chosen places.

    logits = table norm(act(dense hidden)) + bias

    Shapes: hidden `(m, d)`, dense `(d, d)`, table `(v, d)`, bias `(v,)` -> `(m, v)`; the table is the embedding unless
    the head has its own. Source: HF `BertLMPredictionHead`. Differs: nothing.
    """

    def __init__(
        self,
        width: int,
        vocab_size: int,
        norm: nn.Module,
        activation: Callable[[Tensor], Tensor],
        *,
        tied: bool,
        dense_bias: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.dense = linear(width, width, bias=dense_bias)
        self.activation, self.norm = activation, norm
        self.table = None if tied else linear(width, vocab_size, bias=False)
        self.bias = nn.Parameter(torch.empty(vocab_size)) if bias else None

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        table = embedding if self.table is None else self.table.weight
        return fused.linear(self.norm(self.activation(self.dense(hidden))), table, self.bias)


def vocabulary(config: Any) -> int:
    """The vocabulary's size, where widths and heads fit together. Raises: ConfigError."""
    if config.vocab_size is None:
        raise ConfigError("model.vocab_size: missing; give it, or a tokenizer that knows it")
    if config.width % config.num_heads:
        raise ConfigError(
            f"model.num_heads: {config.num_heads} given, a divisor of model.width {config.width} is expected"
        )
    size: int = config.vocab_size
    return size


def check_length(sequences: Sequences, limit: int | None) -> None:
    """Raises: ConfigError where a sequence is longer than the table of positions."""
    if limit is not None and sequences.max_length > limit:
        raise ConfigError(
            f"model.max_positions: {limit} learned positions, a sequence of {sequences.max_length} tokens given; "
            "shorten it (text.max_tokens)"
        )


def no_head() -> ConfigError:
    """What to say where logits are asked of an encoder alone."""
    return ConfigError(
        "model.head: none: these weights are an encoder without a head that guesses tokens; start from a folder of "
        "...ForMaskedLM, or from scratch"
    )


def no_cache(family: str) -> ConfigError:
    """What to say where an encoder is asked to write a text."""
    return ConfigError(f"model.family: {family} reads a text from both sides and cannot continue one; gpt2 can")


# ----------------------------------------------------------------------------------------------------- Hugging Face


@dataclass(frozen=True, slots=True)
class HuggingFace:
    """A family's form in transformers, both ways.

    why_not: reasons why it has no form for a config. write, read: config.json and our options. table: see `names`.
    renamed: their tensors under the names of the table, for old or headless checkpoints.
    stored: the names of the table as that config's folder has them (a headless model has no prefix).
    """

    why_not: Callable[[Any], list[str]]
    write: Callable[[Any], dict[str, Any]]
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    table: Callable[[Any], names.Table]
    renamed: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    stored: Callable[[Any, dict[str, Tensor]], dict[str, Tensor]]

    def form(self, cls: Any, config: Any) -> tuple[dict[str, Any] | None, str | None]:
        """(config.json, None), or (None, the reason why there is none)."""
        broken = [*self.why_not(config), *heads.why_not(cls.classifier_shape, config)]
        if broken:
            return None, f"{' and '.join(cls.hf_model_types)} in transformers has no {', no '.join(broken)}"
        form = heads.written(cls.classifier_shape, config, self.write(config))
        if cls.from_hf(form).resolved != config.resolved:
            # What the form cannot say (a fixed position table) is read again from here.
            form["isoform"] = config.model_dump(mode="json")
        return form, None

    def options(self, cls: Any, config: Mapping[str, Any]) -> dict[str, Any]:
        """Our options from config.json. Raises: ConfigError naming the field that our model cannot follow."""
        options = own_options(config)
        if options is not None:
            return options
        return {**self.read(config), **heads.read(cls.classifier_shape, cls, config, stored_names(config))}

    def state_in(self, cls: Any, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Their tensors under our names. Raises: CheckpointError naming what is unknown, missing or not ours."""
        ours = cls.from_hf({**config, TENSOR_NAMES: list(tensors)})
        with torch.device("meta"):
            expected = cls(ours, seed=None).state_dict()
        return names.to_ours(self.renamed(tensors), self._whole(cls, ours), ours.num_layers, expected)

    def state_out(self, model: Any) -> dict[str, Tensor]:
        """Our tensors under their names. Raises: ConfigError where there is no form."""
        form, reason = self.form(type(model), model.config)
        if form is None:
            raise ConfigError(f"model: no Hugging Face form: {reason}")
        config = model.config
        tensors = names.to_theirs(model.state_dict(), self._whole(type(model), config), config.num_layers)
        return tensors if config.classifier is not None else self.stored(config, tensors)

    def _whole(self, cls: Any, config: Any) -> names.Table:
        return {**self.table(config), **heads.table(cls.classifier_shape, config)}


def stored_names(config: Mapping[str, Any]) -> list[str] | None:
    """Names of the tensors beside a config.json, where they are known."""
    found: Iterable[str] | None = config.get(TENSOR_NAMES)
    return None if found is None else list(found)


def headless(tensors: Mapping[str, Tensor], stem: str) -> dict[str, Tensor]:
    """The names of a folder that has the encoder alone: without `stem`."""
    return {name.removeprefix(stem): tensor for name, tensor in tensors.items()}


def prefixed(tensors: Mapping[str, Tensor], stem: str, roots: tuple[str, ...]) -> dict[str, Tensor]:
    """The encoder's tensors, whose names begin with one of `roots`, behind `stem` where they are not yet."""
    return {stem + name if name.startswith(roots) else name: tensor for name, tensor in tensors.items()}
