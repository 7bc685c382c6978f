"""BERT: a bidirectional encoder with a norm after each arm and a head that guesses masked tokens.

What research swaps is an object passed in: position, norm, feed-forward layer, window.
Source: Devlin et al. 2019; HF `BertForMaskedLM`, with which logits and gradients agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, NonNegativeInt, ValidationInfo, field_validator, model_validator
from torch import Tensor, nn

from isoform.config import Component, Positive
from isoform.contracts import Batch, Output, Sequences
from isoform.layers import ragged
from isoform.layers.block import Block, SelfAttention, Stream
from isoform.layers.cache import KVCache
from isoform.layers.dropout import Dropout, name_sites, token_keys
from isoform.layers.init import embedding, initialize, linear
from isoform.models import bert_forms, encoder, heads
from isoform.models.border import dense_logits
from isoform.models.fixed import check_experts
from isoform.registry import Options, build_options, component, lookup, register


@register("model", "bert")
class Bert(nn.Module):
    """An encoder that reads a text from both sides.

    x = dropout(norm(embedding[token] + segment[which] + position));  hidden = x after each block, norms last;
    logits = head hidden;  pooled = tanh(pooler hidden[first token])

    Shapes: tokens and segments `(n,)`, hidden `(n, d)`, logits `(m, v)` at the m places that ask, pooled `(b, d)`.
    Source: see the head of this file. Differs: nothing; first values of all matrices are N(0, 0.02^2).
    """

    capabilities: ClassVar[frozenset[str]] = frozenset({"bidirectional", "classify"})
    hf_model_types: ClassVar[tuple[str, ...]] = ("bert",)
    hugging_face: ClassVar[encoder.HuggingFace] = bert_forms.BERT
    classifier_shape: ClassVar[heads.Shape] = heads.BERT
    # The head's own activation; None: that of the feed-forward layers.
    head_activation: ClassVar[str | None] = None

    class Config(Options):
        num_layers: Positive = 12
        num_heads: Positive = 12
        width: Positive = 768
        feedforward_width: Positive | None = None
        # null: 4 width
        vocab_size: Positive | None = None
        # null: the tokenizer's
        max_positions: Positive | None = None
        # tokens; null: text.max_tokens
        num_segments: NonNegativeInt = 2
        # kinds of segment that a token may belong to (HF: token types); 0: no such table
        position: Component = Field({"kind": "learned"})
        # none | learned | sinusoidal | rope | alibi | t5
        norm: Component = Field({"kind": "layernorm", "eps": 1e-12})
        # layernorm | rmsnorm
        feedforward: Component = Field({"kind": "gelu"})
        # gelu | gelu-tanh | relu | relu-squared | geglu | swiglu
        window: Positive | None = None
        # each token sees window // 2 tokens to each side; null: all
        dropout: float = Field(0.1, ge=0, lt=1)
        attention_dropout: float | None = Field(None, ge=0, lt=1)
        # of attention weights; null: dropout
        head: Literal["masked", "none"] = "masked"
        # whether it guesses tokens, or is an encoder alone
        tied: bool = True
        # whether the last matrix of the head is the embedding
        pooler: Literal["none", "plain", "next-sentence"] = "none"
        # of the first token, for a whole text; next-sentence: with BERT's own classifier on it
        classifier: heads.Classifier | None = None
        # of whole texts; the objective `classify` brings it

        @field_validator("position", "norm", "feedforward")
        @classmethod
        def _spelt_out(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
            """The component's options with every default in them. Raises: ConfigError."""
            _, options = component(str(info.field_name), value, f"model.{info.field_name}")
            return {"kind": value["kind"], **options.model_dump(mode="json")}

        @model_validator(mode="after")
        def _together(self) -> Self:
            check_experts(self.feedforward, biases=True, otherwise=encoder.NO_EXPERTS)
            return self

        @property
        def position_offset(self) -> int:
            """Rows of the table of positions before that of the first token."""
            return 0

        @property
        def resolved(self) -> dict[str, Any]:
            """The options with what None stands for, so that equal models are equal."""
            inner, rate = self.feedforward_width or 4 * self.width, self.attention_dropout
            widths = {"feedforward_width": inner, "attention_dropout": self.dropout if rate is None else rate}
            return {**self.model_dump(), **widths}

    def __init__(self, config: Any, seed: int | None = 0) -> None:
        """Draws the parameters from `seed`; None leaves them undrawn, for weights that are loaded at once."""
        super().__init__()
        vocab_size, width, num_heads = encoder.vocabulary(config), config.width, config.num_heads
        self.config = config
        self.max_positions: int | None = config.max_positions
        norm_class, norm = component("norm", config.norm, "model.norm")
        feedforward_class, feedforward = component("feedforward", config.feedforward, "model.feedforward")
        position_class, position = component("position", config.position, "model.position")
        rows = None if config.max_positions is None else config.max_positions + config.position_offset
        self.embedding = embedding(vocab_size, width)
        self.segment_embedding = embedding(config.num_segments, width) if config.num_segments else None
        self.position = position_class(
            position, width=width, num_heads=num_heads, head_width=width // num_heads, max_positions=rows
        )
        self.input_norm = norm_class(norm, width)
        self.input_dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(
                SelfAttention(
                    width,
                    num_heads,
                    num_heads,
                    layer=layer,
                    causal=False,
                    window=config.window,
                    bias=True,
                    dropout=config.resolved["attention_dropout"],
                ),
                feedforward_class(feedforward, width, config.feedforward_width or 4 * width, bias=True),
                norm_class(norm, width),
                norm_class(norm, width),
                norm_first=False,
                dropout=config.dropout,
            )
            for layer in range(config.num_layers)
        )
        activation = lookup("feedforward", self.head_activation or config.feedforward["kind"]).activation
        self.head = (
            encoder.MaskedHead(width, vocab_size, norm_class(norm, width), activation, tied=config.tied)
            if config.head == "masked"
            else None
        )
        self.pooler = None if config.pooler == "none" else linear(width, width, bias=True)
        self.next_sentence = linear(width, 2, bias=True) if config.pooler == "next-sentence" else None
        self.classifier = heads.build(self.classifier_shape, config)
        name_sites(self)
        if seed is not None:
            initialize(self, seed, num_layers=None)

    def forward(self, batch: Batch, *, cache: None = None, all_layers: bool = False) -> Output:
        if self.position.limit is not None:
            encoder.check_length(batch.sequences, self.max_positions)
        keys = token_keys(batch)
        stream = Stream(batch.positions, batch.sequences, self.position, keys)
        embedded = self.embedding(batch.tokens)
        if self.segment_embedding is not None:
            table = self.segment_embedding
            alone = batch.segments is None or table.num_embeddings == 1
            embedded = embedded + (table.weight[0] if alone else table(batch.segments))
        embedded = self.position.embed(embedded, batch.positions + self.config.position_offset)
        hidden = self.input_dropout(self.input_norm(embedded), keys)
        layers = [hidden]
        for block in self.blocks:
            hidden = block(hidden, stream)
            layers.append(hidden)
        return Output(hidden=hidden, layers=tuple(layers) if all_layers else None)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary: `(m, d)` -> `(m, v)`. Raises: ConfigError where there is no head."""
        if self.head is None:
            raise encoder.no_head()
        scores: Tensor = self.head(hidden, self.embedding.weight)
        return scores

    def pooled(self, hidden: Tensor, sequences: Sequences) -> Tensor:
        """A vector for each sequence, from its first token: `(n, d)` -> `(b, d)`."""
        assert self.pooler is not None, "a model with a pooler is asked"
        first = torch.tensor(ragged.starts(sequences), device=hidden.device)
        return torch.tanh(self.pooler(hidden[first]))

    def new_cache(self, num_sequences: int) -> KVCache:
        """Raises: ConfigError: an encoder has no cache."""
        raise encoder.no_cache(self.hf_model_types[0])

    def dense(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """The call that people know: padded `(b, t)` -> logits `(b, t, v)`, zero at padding."""
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
    def tiny(cls, **changes: object) -> Bert:
        """A small random model for tests; `changes` go into its config."""
        sizes = {"num_layers": 2, "num_heads": 4, "width": 32, "vocab_size": 61, "max_positions": 48, "dropout": 0.0}
        return cls(cls.Config(**{**sizes, **changes}))
