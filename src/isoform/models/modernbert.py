"""ModernBERT: an encoder with a norm before each arm, rotary positions, local and global attention by turns, and GeGLU.

Source: Warner et al. 2024; HF `ModernBertForMaskedLM`, with which logits and gradients agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from isoform.config import Positive
from isoform.contracts import Batch, Output
from isoform.errors import ConfigError
from isoform.layers.block import SelfAttention, Stream
from isoform.layers.cache import KVCache
from isoform.layers.dropout import Dropout, name_sites, token_keys
from isoform.layers.feedforward import Geglu
from isoform.layers.init import embedding, initialize, linear
from isoform.layers.norm import LayerNorm
from isoform.layers.position import Rope
from isoform.layers.recompute import Recomputable
from isoform.models import encoder, heads, modernbert_forms
from isoform.models.border import dense_logits
from isoform.models.fixed import refuse_swaps
from isoform.registry import Options, build_options, register

Rate = Field(0.0, ge=0, lt=1)


class GatedInner(nn.Module):
    """down(dropout(gelu(a) * b)) with a, b the halves of inner x.

    Shapes: x `(n, d)`, inner `(2 f, d)`, down `(d, f)`. Source: Shazeer 2020, HF `ModernBertMLP`. Differs: nothing.
    """

    def __init__(self, width: int, inner_width: int, dropout: float) -> None:
        super().__init__()
        self.inner = linear(width, 2 * inner_width, bias=False)
        self.down = linear(inner_width, width, bias=False)
        self.dropout = Dropout(dropout)

    def forward(self, hidden: Tensor, dropout_keys: Tensor | None) -> Tensor:
        gate, up = self.inner(hidden).chunk(2, dim=-1)  # (n, 2 f) -> 2 x (n, f)
        output: Tensor = self.down(self.dropout(Geglu.gated_by(gate, up), dropout_keys))
        return output


class Layer(Recomputable):
    """x + dropout(attention(norm(x))), then x + feedforward(norm(x)); the first layer's first norm is left out."""

    def __init__(self, config: ModernBert.Config, layer: int) -> None:
        super().__init__()
        self.is_global = layer % config.global_every == 0
        self.attention_norm = norm(config) if layer else nn.Identity()
        self.attention = SelfAttention(
            config.width,
            config.num_heads,
            config.num_heads,
            layer=layer,
            causal=False,
            window=None if self.is_global else config.local_window,
            bias=False,
            dropout=config.attention_dropout,
        )
        self.attention_dropout = Dropout(config.attention_dropout)
        self.feedforward_norm = norm(config)
        self.feedforward = GatedInner(config.width, config.inner_width, config.feedforward_dropout)

    def forward(self, hidden: Tensor, stream: Stream) -> Tensor:
        keys = stream.dropout_keys
        hidden = hidden + self.attention_dropout(self.attention(self.attention_norm(hidden), stream), keys)
        output: Tensor = hidden + self.feedforward(self.feedforward_norm(hidden), keys)
        return output


@register("model", "modernbert")
class ModernBert(nn.Module):
    """An encoder that reads a text from both sides, most of its layers only near by.

    x = dropout(norm(embedding[token]));  x = layer(x) for each layer;  hidden = norm(x);  logits = head hidden

    Every `global_every`-th layer, the first among them, sees the whole text and turns queries and keys with
    `global_base`; the others see `local_window // 2` tokens to each side and turn with `local_base`.

    Shapes: tokens `(n,)`, hidden `(n, d)`, logits `(m, v)` at the m places that ask.
    Source: see the head of this file. Differs: first values are not cut off at two standard deviations.
    """

    capabilities: ClassVar[frozenset[str]] = frozenset({"bidirectional", "classify"})
    hf_model_types: ClassVar[tuple[str, ...]] = ("modernbert",)
    hugging_face: ClassVar[encoder.HuggingFace] = modernbert_forms.MODERNBERT
    classifier_shape: ClassVar[heads.Shape] = heads.MODERNBERT

    class Config(Options):
        num_layers: Positive = 22
        num_heads: Positive = 12
        width: Positive = 768
        feedforward_width: Positive | None = None
        # of each half of the gated layer; null: 3/2 width
        vocab_size: Positive | None = None
        # null: the tokenizer's
        max_positions: Positive | None = None
        # tokens; null: text.max_tokens
        global_every: Positive = 3
        # every such layer, from the first, sees the whole text
        local_window: Positive = 128
        # tokens; the other layers see half of them to each side
        global_base: float = Field(160_000.0, gt=1)
        local_base: float = Field(10_000.0, gt=1)
        # of RoPE in the two kinds of layer
        norm_eps: float = Field(1e-5, gt=0)
        embedding_dropout: float = Rate
        attention_dropout: float = Rate
        feedforward_dropout: float = Rate
        head: Literal["masked", "none"] = "masked"
        # whether it guesses tokens, or is an encoder alone
        tied: bool = True
        # whether the last matrix of the head is the embedding
        classifier: heads.Classifier | None = None
        # of whole texts; the objective `classify` brings it

        @model_validator(mode="before")
        @classmethod
        def _fixed(cls, values: Any) -> Any:
            """Raises: ConfigError naming a part that other families swap and this one does not, and why."""
            refuse_swaps(
                values,
                ("position", "norm", "feedforward", "window"),
                "ModernBERT is the choice of its parts: RoPE with two bases, LayerNorm without "
                "bias, GeGLU, local and global attention by turns; families gpt2, llama and bert swap them",
            )
            return values

        @property
        def inner_width(self) -> int:
            """f: `feedforward_width`, or 3/2 of the width."""
            return self.feedforward_width or 3 * self.width // 2

        @property
        def resolved(self) -> dict[str, Any]:
            """The options with what None stands for, so that equal models are equal."""
            return {**self.model_dump(), "feedforward_width": self.inner_width}

        def keeping(self, layers: Sequence[int]) -> dict[str, int]:
            """What changes where these layers alone are kept, see `depth`. Raises: ConfigError."""
            kinds = [layer % self.global_every == 0 for layer in layers]
            every = next((at for at in range(1, len(layers)) if kinds[at]), self.global_every)
            if layers[0] != 0 or kinds != [at % every == 0 for at in range(len(layers))]:
                raise ConfigError(
                    f"model.layers: {list(layers)} given; ModernBERT begins with layer 0, which has no norm, and its "
                    f"layers see the whole text at equal distances (here every {self.global_every}th does): keep 0, "
                    "and as many local layers after each global one"
                )
            return {"num_layers": len(layers), "global_every": every}

    def __init__(self, config: Config, seed: int | None = 0) -> None:
        """Draws the parameters from `seed`; None leaves them undrawn, for weights that are loaded at once."""
        super().__init__()
        vocab_size, width = encoder.vocabulary(config), config.width
        self.config = config
        self.max_positions = config.max_positions
        self.embedding = embedding(vocab_size, width)
        self.input_norm = norm(config)
        self.input_dropout = Dropout(config.embedding_dropout)
        self.global_position, self.local_position = (
            Rope(
                Rope.Config(base=base),
                width=width,
                num_heads=config.num_heads,
                head_width=width // config.num_heads,
                max_positions=config.max_positions,
            )
            for base in (config.global_base, config.local_base)
        )
        self.blocks = nn.ModuleList(Layer(config, layer) for layer in range(config.num_layers))
        self.final_norm = norm(config)
        self.head = (
            encoder.MaskedHead(width, vocab_size, norm(config), F.gelu, tied=config.tied, dense_bias=False)
            if config.head == "masked"
            else None
        )
        self.classifier = heads.build(self.classifier_shape, config)
        name_sites(self)
        if seed is not None:
            initialize(self, seed, num_layers=config.num_layers)

    def forward(self, batch: Batch, *, cache: None = None, all_layers: bool = False) -> Output:
        keys = token_keys(batch)
        whole = Stream(batch.positions, batch.sequences, self.global_position, keys)
        near = replace(whole, position=self.local_position)
        hidden = self.input_dropout(self.input_norm(self.embedding(batch.tokens)), keys)
        layers = [hidden]
        for block in self.blocks:
            hidden = block(hidden, whole if block.is_global else near)
            layers.append(hidden)
        return Output(hidden=self.final_norm(hidden), layers=tuple(layers) if all_layers else None)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary: `(m, d)` -> `(m, v)`. Raises: ConfigError where there is no head."""
        if self.head is None:
            raise encoder.no_head()
        scores: Tensor = self.head(hidden, self.embedding.weight)
        return scores

    def new_cache(self, num_sequences: int) -> KVCache:
        """Raises: ConfigError: an encoder has no cache."""
        raise encoder.no_cache("modernbert")

    def dense(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The call that people know: padded ids and mask `(b, t)` -> logits `(b, t, v)`, zero at padding."""
        return dense_logits(self, input_ids, attention_mask)

    @classmethod
    def hf_form(cls, config: Config) -> tuple[dict[str, Any] | None, str | None]:
        """(config.json of transformers, None), or (None, the reason why it has no form for such a model)."""
        return cls.hugging_face.form(cls, config)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Config:
        """Our config from a config.json of `hf_model_types`. Raises: ConfigError."""
        options: ModernBert.Config = build_options(cls, cls.hugging_face.options(cls, config), "config.json")
        return options

    @classmethod
    def state_from_hf(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Their tensors under our names. Raises: CheckpointError naming what is unknown, missing or not ours."""
        return cls.hugging_face.state_in(cls, config, tensors)

    def state_to_hf(self) -> dict[str, Tensor]:
        """Our tensors under their names. Raises: ConfigError where there is no form."""
        return self.hugging_face.state_out(self)

    @classmethod
    def tiny(cls, **changes: Any) -> ModernBert:
        """A small random model for tests; `changes` go into its config."""
        sizes = {"num_layers": 4, "num_heads": 4, "width": 32, "vocab_size": 61, "max_positions": 48, "local_window": 8}
        return cls(cls.Config(**{**sizes, **changes}))


def norm(config: ModernBert.Config) -> LayerNorm:
    """A LayerNorm without bias."""
    return LayerNorm(LayerNorm.Config(eps=config.norm_eps, bias=False), config.width)
