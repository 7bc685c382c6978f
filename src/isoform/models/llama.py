"""LLaMA: a causal decoder with rotary positions, RMSNorm before each arm, grouped heads and a gated feed-forward layer.

What research swaps is an object passed in: position, norm, feed-forward layer (a mixture of experts among them),
window. With a window it is Mistral, with experts Mixtral.
Source: Touvron et al. 2023, Jiang et al. 2023 and 2024; HF `LlamaForCausalLM`, `MistralForCausalLM` and
`MixtralForCausalLM`, with which logits and gradients agree.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator
from torch import nn

from isoform.config import Component, Positive
from isoform.layers.block import Block, SelfAttention
from isoform.layers.dropout import Dropout, name_sites
from isoform.layers.init import embedding, initialize, linear
from isoform.models import llama_forms
from isoform.models.decoder import Decoder, Forms, check_shape
from isoform.models.fixed import check_experts
from isoform.models.heads import Classifier, build
from isoform.registry import Options, component, lookup, register

# A gated layer of 2/3 the width has the parameters of a plain one; rounded up, so that matrices are friendly.
WIDTH_MULTIPLE = 64


@register("model", "llama")
class Llama(Decoder):
    """The decoder of LLaMA, see `Decoder` for the pass through it.

    Source: see the head of this file. Differs: nothing; first values of the ends of residual arms are as GPT-2's.
    """

    hf_model_types: ClassVar[tuple[str, ...]] = ("llama", "mistral", "mixtral")
    forms: ClassVar[Forms] = llama_forms

    class Config(Options):
        num_layers: Positive = 12
        num_heads: Positive = 12
        num_kv_heads: Positive | None = None
        # heads of keys and values, a divisor of num_heads; null: num_heads
        width: Positive = 768
        head_width: Positive | None = None
        # null: width / num_heads
        feedforward_width: Positive | None = None
        # of each expert, where there are experts; null: 4 width, or 8/3 width where gated, up to a multiple of 64
        vocab_size: Positive | None = None
        # null: the tokenizer's
        max_positions: Positive | None = None
        # tokens; null: text.max_tokens
        position: Component = Field({"kind": "rope"})
        # none | learned | sinusoidal | rope | alibi | t5
        norm: Component = Field({"kind": "rmsnorm"})
        # layernorm | rmsnorm
        feedforward: Component = Field({"kind": "swiglu"})
        # swiglu | geglu | gelu | gelu-tanh | relu | relu-squared | moe
        window: Positive | None = None
        # tokens that each token sees, itself among them; null: all before it
        dropout: float = Field(0.0, ge=0, lt=1)
        # rate after the embedding and after each arm
        attention_dropout: float = Field(0.0, ge=0, lt=1)
        # rate on attention weights
        tied: bool = False
        # whether the head is the embedding
        attention_bias: bool = False
        feedforward_bias: bool = False
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
            check_experts(
                self.feedforward, biases=self.feedforward_bias, otherwise="set model.feedforward_bias to false"
            )
            return self

        def resolved(self) -> dict[str, Any]:
            """The config with what None stands for, so that equal models are equal."""
            kind = str(self.feedforward.get("expert", self.feedforward["kind"]))
            inner = 4 * self.width
            if lookup("feedforward", kind).gated:
                inner = -(-(2 * inner) // (3 * WIDTH_MULTIPLE)) * WIDTH_MULTIPLE
            return {
                **self.model_dump(),
                "num_kv_heads": self.num_kv_heads or self.num_heads,
                "head_width": self.head_width or self.width // self.num_heads,
                "feedforward_width": self.feedforward_width or inner,
            }

    def __init__(self, config: Config, seed: int | None = 0) -> None:
        """Draws the parameters from `seed`; None leaves them undrawn, for weights that are loaded at once."""
        super().__init__()
        vocab_size, width, heads = check_shape(config, config.head_width), config.width, config.num_heads
        whole = config.resolved()
        self.config = config
        self.max_positions = config.max_positions
        norm_class, norm = component("norm", config.norm, "model.norm")
        feedforward_class, feedforward = component("feedforward", config.feedforward, "model.feedforward")
        position_class, position = component("position", config.position, "model.position")
        self.embedding = embedding(vocab_size, width)
        self.position = position_class(
            position, width=width, num_heads=heads, head_width=whole["head_width"], max_positions=config.max_positions
        )
        self.embedding_dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(
                SelfAttention(
                    width,
                    heads,
                    whole["num_kv_heads"],
                    layer=layer,
                    causal=True,
                    window=config.window,
                    bias=config.attention_bias,
                    dropout=config.attention_dropout,
                    head_width=whole["head_width"],
                ),
                feedforward_class(feedforward, width, whole["feedforward_width"], bias=config.feedforward_bias),
                norm_class(norm, width),
                norm_class(norm, width),
                norm_first=True,
                dropout=config.dropout,
            )
            for layer in range(config.num_layers)
        )
        self.final_norm = norm_class(norm, width)
        self.classifier = build(self.classifier_shape, config)
        self.head = None if config.tied or self.classifier else linear(width, vocab_size, bias=False)
        name_sites(self)
        if seed is not None:
            initialize(self, seed, num_layers=config.num_layers)

    @classmethod
    def tiny(cls, **changes: object) -> Llama:
        """A small random model for tests; `changes` go into its config."""
        sizes = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "width": 32, "feedforward_width": 48}
        shape = {"vocab_size": 61, "max_positions": 48}
        return cls(cls.Config(**{**sizes, **shape, **changes}))
