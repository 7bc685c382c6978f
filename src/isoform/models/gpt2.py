"""GPT-2: a causal decoder with learned positions, LayerNorm before each arm, and a GELU feed-forward layer.

What research swaps is an object passed in: position, norm, feed-forward layer, window, grouped heads.
Source: Radford et al. 2019; HF `GPT2LMHeadModel`, with which logits and gradients agree.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator
from torch import nn

from isoform.config import Component, Positive
from isoform.layers.block import Block, SelfAttention
from isoform.layers.dropout import Dropout, name_sites
from isoform.layers.init import embedding, initialize, linear
from isoform.models import gpt2_forms
from isoform.models.decoder import Decoder, Forms, check_shape
from isoform.models.fixed import check_experts
from isoform.models.heads import Classifier, build
from isoform.registry import Options, component, register

Rate = Field(None, ge=0, lt=1)


@register("model", "gpt2")
class GPT2(Decoder):
    """The decoder of GPT-2, see `Decoder` for the pass through it.

    Source: see the head of this file. Differs: the head may be untied, biases may be left out.
    """

    hf_model_types: ClassVar[tuple[str, ...]] = ("gpt2", "gpt_neox")
    forms: ClassVar[Forms] = gpt2_forms

    class Config(Options):
        num_layers: Positive = 12
        num_heads: Positive = 12
        num_kv_heads: Positive | None = None
        # heads of keys and values, a divisor of num_heads; null: num_heads
        width: Positive = 768
        feedforward_width: Positive | None = None
        # null: 4 width
        vocab_size: Positive | None = None
        # null: the tokenizer's
        max_positions: Positive | None = None
        # tokens; null: text.max_tokens
        position: Component = Field({"kind": "learned"})
        # none | learned | sinusoidal | rope | alibi | t5
        norm: Component = Field({"kind": "layernorm"})
        # layernorm | rmsnorm
        feedforward: Component = Field({"kind": "gelu-tanh"})
        # gelu | gelu-tanh | relu | relu-squared | geglu | swiglu | moe (without biases)
        window: Positive | None = None
        # tokens that each token sees, itself among them; null: all before it
        norm_first: bool = True
        # norms before each arm and at the end; false: after each sum
        dropout: float = Field(0.1, ge=0, lt=1)
        # rate of all three kinds:
        embedding_dropout: float | None = Rate
        residual_dropout: float | None = Rate
        attention_dropout: float | None = Rate
        # null: dropout
        tied: bool = True
        # whether the head is the embedding
        bias: bool = True
        # of the linear layers in blocks
        classifier: Classifier | None = None
        # of whole texts; the objective `classify` brings it

        @field_validator("position", "norm", "feedforward")
        @classmethod
        def _spelt_out(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
            """The component's options with every default in them. Raises: ConfigError."""
            _, options = component(str(info.field_name), value, f"model.{info.field_name}")
            return {"kind": value["kind"], **options.model_dump(mode="json")}

        @model_validator(mode="after")
        def _together(self) -> Self:
            check_experts(self.feedforward, biases=self.bias, otherwise="set model.bias to false")
            return self

        @property
        def rates(self) -> dict[str, float]:
            """Dropout rates: embedding, residual, attention."""
            given = {
                "embedding": self.embedding_dropout,
                "residual": self.residual_dropout,
                "attention": self.attention_dropout,
            }
            return {site: self.dropout if rate is None else rate for site, rate in given.items()}

        def resolved(self) -> dict[str, Any]:
            """The config with what None stands for, so that equal models are equal."""
            shape = {
                "num_kv_heads": self.num_kv_heads or self.num_heads,
                "feedforward_width": self.feedforward_width or 4 * self.width,
                "dropout": None,
                **{f"{site}_dropout": rate for site, rate in self.rates.items()},
            }
            return {**self.model_dump(), **shape}

    def __init__(self, config: Config, seed: int | None = 0) -> None:
        """Draws the parameters from `seed`; None leaves them undrawn, for weights that are loaded at once."""
        super().__init__()
        vocab_size, width, heads = check_shape(config), config.width, config.num_heads
        groups = config.num_kv_heads or heads
        self.config = config
        self.max_positions = config.max_positions
        norm_class, norm = component("norm", config.norm, "model.norm")
        feedforward_class, feedforward = component("feedforward", config.feedforward, "model.feedforward")
        position_class, position = component("position", config.position, "model.position")
        self.embedding = embedding(vocab_size, width)
        self.position = position_class(
            position, width=width, num_heads=heads, head_width=width // heads, max_positions=config.max_positions
        )
        self.embedding_dropout = Dropout(config.rates["embedding"])
        self.blocks = nn.ModuleList(
            Block(
                SelfAttention(
                    width,
                    heads,
                    groups,
                    layer=layer,
                    causal=True,
                    window=config.window,
                    bias=config.bias,
                    dropout=config.rates["attention"],
                ),
                feedforward_class(feedforward, width, config.feedforward_width or 4 * width, bias=config.bias),
                norm_class(norm, width),
                norm_class(norm, width),
                norm_first=config.norm_first,
                dropout=config.rates["residual"],
            )
            for layer in range(config.num_layers)
        )
        self.final_norm = norm_class(norm, width) if config.norm_first else nn.Identity()
        self.classifier = build(self.classifier_shape, config)
        self.head = None if config.tied or self.classifier else linear(width, vocab_size, bias=False)
        name_sites(self)
        if seed is not None:
            initialize(self, seed, num_layers=config.num_layers)

    @classmethod
    def tiny(cls, **changes: object) -> GPT2:
        """A small random model for tests; `changes` go into its config."""
        sizes = {"num_layers": 2, "num_heads": 4, "width": 32, "vocab_size": 61, "max_positions": 48, "dropout": 0.0}
        return cls(cls.Config(**{**sizes, **changes}))
