"""XLNet: an encoder that guesses tokens in a random order, with a second stream that knows a place but not its token.

Positions are relative and fixed: the model sees distances alone, texts may be of any length.
Source: Yang et al. 2019; HF `XLNetLMHeadModel`, with which logits and gradients agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from isoform.config import Component, Positive
from isoform.contracts import Batch, Output
from isoform.errors import ConfigError
from isoform.layers.attention import Padded
from isoform.layers.cache import KVCache
from isoform.layers.dropout import Dropout, name_sites, token_keys
from isoform.layers.init import embedding, initialize, linear
from isoform.layers.norm import LayerNorm
from isoform.layers.two_stream import TwoStreamAttention, TwoStreamBlock, View
from isoform.models import encoder, heads, xlnet_forms
from isoform.models.border import dense_logits
from isoform.models.fixed import check_experts, refuse_swaps
from isoform.registry import Options, build_options, component, register


@register("model", "xlnet")
class XLNet(nn.Module):
    """An encoder of two streams.

    h = embedding[token], g = mask vector;  (h, g) = block(h, g) for each block;  logits = head of g where a token is
    guessed, of h where a text is read whole

    Shapes: tokens `(n,)`, hidden and second `(n, d)`, logits `(m, v)` at the m places that ask.
    Source: see the head of this file. Differs: no memory of an earlier text, dropout as in `layers.two_stream`.
    """

    capabilities: ClassVar[frozenset[str]] = frozenset({"bidirectional", "two-stream", "classify"})
    hf_model_types: ClassVar[tuple[str, ...]] = ("xlnet",)
    hugging_face: ClassVar[encoder.HuggingFace] = xlnet_forms.XLNET
    classifier_shape: ClassVar[heads.Shape] = xlnet_forms.CLASSIFIER
    max_positions: ClassVar[int | None] = None

    class Config(Options):
        num_layers: Positive = 12
        num_heads: Positive = 12
        width: Positive = 768
        feedforward_width: Positive | None = None
        # null: 4 width
        vocab_size: Positive | None = None
        # null: the tokenizer's
        feedforward: Component = Field({"kind": "gelu"})
        # gelu | gelu-tanh | relu | relu-squared
        max_distance: Positive | None = None
        # tokens; farther ones count as so far away; null: no limit
        norm_eps: float = Field(1e-12, gt=0)
        dropout: float = Field(0.1, ge=0, lt=1)
        head: Literal["tokens", "none"] = "tokens"
        # whether it guesses tokens, or is an encoder alone
        tied: bool = True
        # whether the matrix of the head is the embedding
        classifier: heads.Classifier | None = None
        # of whole texts; the objective `classify` brings it

        @model_validator(mode="before")
        @classmethod
        def _fixed(cls, values: dict[str, Any]) -> dict[str, Any]:
            """Raises: ConfigError naming a part that is XLNet's own, and why."""
            refuse_swaps(
                values,
                ("position", "norm", "window"),
                "XLNet's two streams are bound to relative positions, LayerNorm after each arm "
                "and no window; family bert swaps them",
            )
            return values

        @model_validator(mode="after")
        def _together(self) -> Self:
            check_experts(self.feedforward, biases=True, otherwise=encoder.NO_EXPERTS)
            return self

        @property
        def resolved(self) -> dict[str, Any]:
            """The options with what None stands for, so that equal models are equal."""
            return {**self.model_dump(), "feedforward_width": self.feedforward_width or 4 * self.width}

    def __init__(self, config: Config, seed: int | None = 0) -> None:
        """Draws the parameters from `seed`; None leaves them undrawn, for weights that are loaded at once."""
        super().__init__()
        vocab_size, width = encoder.vocabulary(config), config.width
        feedforward_class, feedforward = component("feedforward", config.feedforward, "model.feedforward")
        norm = LayerNorm.Config(eps=config.norm_eps)
        self.config = config
        self.embedding = embedding(vocab_size, width)
        self.mask_vector = nn.Parameter(torch.empty(1, width))
        self.input_dropout, self.final_dropout = Dropout(config.dropout), Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            TwoStreamBlock(
                TwoStreamAttention(width, config.num_heads, dropout=config.dropout),
                feedforward_class(feedforward, width, config.resolved["feedforward_width"], bias=True),
                LayerNorm(norm, width),
                LayerNorm(norm, width),
                dropout=config.dropout,
            )
            for _ in range(config.num_layers)
        )
        self.head = Head(width, vocab_size, tied=config.tied) if config.head == "tokens" else None
        self.classifier = heads.build(self.classifier_shape, config)
        name_sites(self)
        if seed is not None:
            initialize(self, seed, num_layers=None)

    def forward(self, batch: Batch, *, cache: None = None, all_layers: bool = False) -> Output:
        if isinstance(batch.sequences, Padded):
            raise ConfigError("model.family: xlnet has no dense form for a graph; --to hf writes it")
        view = View.of(batch, self.config.max_distance, token_keys(batch))
        content = self.input_dropout(self.embedding(batch.tokens), view.keys)
        query = None
        if view.asked is not None:
            query = self.input_dropout(self.mask_vector.expand(len(view.asked), -1), view.asked_keys)
        layers = [content]
        for block in self.blocks:
            content, query = block(content, query, view)
            layers.append(content)
        hidden, second = self.final_dropout(content, view.keys), None
        if query is not None and view.asked is not None:
            query = self.final_dropout(query, view.asked_keys)
            second = query.new_zeros(hidden.shape).index_copy(0, view.asked, query)
        return Output(hidden, layers=tuple(layers) if all_layers else None, second=second)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary: `(m, d)` -> `(m, v)`. Raises: ConfigError where there is no head."""
        if self.head is None:
            raise encoder.no_head()
        scores: Tensor = self.head(hidden, self.embedding.weight)
        return scores

    def new_cache(self, num_sequences: int) -> KVCache:
        """Raises: ConfigError: it has no cache."""
        raise encoder.no_cache("xlnet")

    def dense(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """The call that people know: padded `(b, t)` -> logits `(b, t, v)` of texts read whole, zero at padding."""
        return dense_logits(self, input_ids, attention_mask, token_type_ids)

    @classmethod
    def hf_form(cls, config: Any) -> tuple[dict[str, Any] | None, str | None]:
        """(config.json of transformers, None), or (None, the reason why it has no form for such a model)."""
        return cls.hugging_face.form(cls, config)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Any:
        """Our config from a config.json of `hf_model_types`. Raises: ConfigError."""
        return build_options(cls, cls.hugging_face.options(cls, config), "config.json")

    @classmethod
    def state_from_hf(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Their tensors under our names. Raises: CheckpointError naming what is unknown, missing or not ours."""
        return cls.hugging_face.state_in(cls, config, tensors)

    def state_to_hf(self) -> dict[str, Tensor]:
        """Our tensors under their names. Raises: ConfigError where there is no form."""
        return self.hugging_face.state_out(self)

    @classmethod
    def tiny(cls, **changes: object) -> Self:
        """A small random model for tests; `changes` go into its config."""
        sizes = {"num_layers": 2, "num_heads": 4, "width": 32, "vocab_size": 61, "dropout": 0.0}
        return cls(cls.Config(**{**sizes, **changes}))


class Head(nn.Module):
    """Scores over the vocabulary: table hidden + bias, the table being the embedding unless it has its own.

    Shapes: hidden `(m, d)`, table `(v, d)`, bias `(v,)` -> `(m, v)`.
    """

    def __init__(self, width: int, vocab_size: int, *, tied: bool) -> None:
        super().__init__()
        self.table = None if tied else linear(width, vocab_size, bias=False)
        self.bias = nn.Parameter(torch.empty(vocab_size))

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        return nn.functional.linear(hidden, embedding if self.table is None else self.table.weight, self.bias)
