"""T5: an encoder that sees its whole source, and a causal decoder that looks at it; positions are learned scores.

Norms without a shift before each arm, no biases, no scaling of scores; v1.1 has a gated feed-forward layer and a head
of its own.
Source: Raffel et al. 2020, section 2.1, and for v1.1 Shazeer 2020; HF `T5ForConditionalGeneration`, with which logits
and gradients agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from isoform.config import Component, Positive
from isoform.contracts import Batch, Output, Sequences
from isoform.errors import ConfigError
from isoform.layers import fused
from isoform.layers.block import Block, SelfAttention, Stream
from isoform.layers.cache import CrossCache, EncoderDecoderCache, KVCache
from isoform.layers.cross import CrossAttention, DecoderBlock, Memory
from isoform.layers.dropout import Dropout, name_sites, token_keys
from isoform.layers.init import embedding, linear, normal
from isoform.layers.norm import RMSNorm
from isoform.layers.position import RelativeBias
from isoform.models import names, t5_forms
from isoform.models.fixed import refuse_swaps
from isoform.models.hf_fields import own_options
from isoform.registry import Options, build_options, component, register


@register("model", "t5")
class T5(nn.Module):
    """An encoder-decoder language model: p(target token | target tokens before it, the whole source).

    m = encoder(embedding[source]);  hidden = decoder(embedding[shifted target], m);  logits = head hidden

    where the head is the embedding and hidden is multiplied by 1 / sqrt(d), or a matrix of its own (v1.1).
    Shapes: tokens `(n,)`, source tokens `(m,)`, hidden `(n, d)`, logits `(places, v)` at the places that ask.
    Source: see the head of this file. Differs: no dropout inside the feed-forward layer.
    """

    capabilities: ClassVar[frozenset[str]] = frozenset({"encoder-decoder", "cache"})
    hf_model_types: ClassVar[tuple[str, ...]] = ("t5",)
    max_positions: ClassVar[int | None] = None

    class Config(Options):
        num_layers: Positive = 6
        # of the encoder
        num_decoder_layers: Positive | None = None
        # null: num_layers
        num_heads: Positive = 8
        head_width: Positive | None = None
        # null: width / num_heads
        width: Positive = 512
        feedforward_width: Positive | None = None
        # null: 4 width
        vocab_size: Positive | None = None
        # null: the tokenizer's
        feedforward: Component = Field({"kind": "relu"})
        # relu: T5; geglu-tanh: v1.1
        num_buckets: int = Field(32, ge=4, multiple_of=2)
        max_distance: int = Field(128, gt=1)
        # tokens; of the learned scores, see position t5
        norm_eps: float = Field(1e-6, gt=0)
        dropout: float = Field(0.1, ge=0, lt=1)
        tied: bool = True
        # whether the head is the embedding
        start_id: int | None = None
        # of the token that the decoder begins with; null: that of padding
        scale_logits: bool | None = None
        # whether logits are divided by sqrt(width); null: where the head is the embedding

        @model_validator(mode="before")
        @classmethod
        def _fixed(cls, values: dict[str, Any]) -> dict[str, Any]:
            """Raises: ConfigError naming a part that other families swap and this one does not, and why."""
            refuse_swaps(
                values,
                ("position", "norm", "window"),
                "T5's stacks share one table of learned scores, RMSNorm and no window; "
                "families gpt2, llama and bert swap them",
            )
            return values

        @property
        def scaled(self) -> bool:
            """Whether logits are divided by sqrt(width)."""
            return self.tied if self.scale_logits is None else self.scale_logits

        @property
        def key_width(self) -> int:
            """Width of a head."""
            return self.head_width or self.width // self.num_heads

        def keeping(self, layers: Sequence[int]) -> dict[str, int | None]:
            """What changes where these layers alone are kept in both stacks, see `depth`."""
            return {"num_layers": len(layers), "num_decoder_layers": None}

    def __init__(self, config: Config, seed: int | None = 0) -> None:
        """Draws the parameters from `seed`; None leaves them undrawn, for weights that are loaded at once."""
        super().__init__()
        if config.vocab_size is None:
            raise ConfigError("model.vocab_size: missing; give it, or a tokenizer that knows it")
        if config.head_width is None and config.width % config.num_heads:
            raise ConfigError(
                f"model.num_heads: {config.num_heads} given, a divisor of model.width {config.width} is expected where "
                "model.head_width is not given"
            )
        self.config = config
        self.embedding = embedding(config.vocab_size, config.width)
        self.encoder = Stack(config, decoder=False)
        self.decoder = Stack(config, decoder=True)
        self.head = None if config.tied else linear(config.width, config.vocab_size, bias=False)
        name_sites(self)
        if seed is not None:
            _initialize(self, seed)

    def forward(self, batch: Batch, *, cache: EncoderDecoderCache | None = None, all_layers: bool = False) -> Output:
        memory = self._memory(batch, cache)
        own = None if cache is None else cache.own
        layers = self.decoder(self.embedding(batch.tokens), batch, memory, own)
        return Output(layers[-1], layers=tuple(layers[:-1]) if all_layers else None, encoder=memory.hidden)

    def _memory(self, batch: Batch, cache: EncoderDecoderCache | None) -> Memory:
        """The encoder's states, or the cache that has kept what the decoder needs of them."""
        kept = None if cache is None else cache.source
        if kept is not None and kept.sequences is not None:
            return Memory(None, kept.sequences, kept)
        source = batch.source
        if source is None:
            raise ConfigError("objective.kind: this one gives no source; a T5 needs text-to-text or t5-spans")
        states = self.encoder(self.embedding(source.tokens), source)[-1]
        if kept is not None:
            kept.sequences = source.sequences
        return Memory(states, source.sequences, kept)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary: `(places, d)` -> `(places, v)`."""
        scaled = hidden * self.config.width**-0.5 if self.config.scaled else hidden
        return fused.linear(scaled, self.embedding.weight if self.head is None else self.head.weight, None)

    def new_cache(self, num_sequences: int) -> EncoderDecoderCache:
        """An empty cache for so many sequences; the first pass that it is given reads the source."""
        num_layers = len(self.decoder.blocks)
        return EncoderDecoderCache(KVCache(num_sequences, num_layers), CrossCache(num_layers))

    def dense(
        self,
        input_ids: Tensor,
        decoder_input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """The call that people know: padded ids and masks `(b, s)` and `(b, t)` -> logits `(b, t, v)`, 0 at padding."""
        batch, real = _ragged(decoder_input_ids, decoder_attention_mask)
        batch.source, _ = _ragged(input_ids, attention_mask)
        logits = self.logits(self(batch).hidden)
        shape = *decoder_input_ids.shape, logits.shape[-1]
        return logits.new_zeros(shape).masked_scatter(real[..., None], logits)

    @classmethod
    def hf_form(cls, config: Config) -> tuple[dict[str, Any] | None, str | None]:
        """(config.json of transformers, None), or (None, the reason why it has no form for such a model)."""
        form, reason = t5_forms.write_config(config)
        if form is not None and config.tied and not config.scaled:
            # What the form cannot tell from v1.1 is read again from here.
            form["isoform"] = config.model_dump(mode="json")
        return form, reason

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Config:
        """Our config from a config.json. Raises: ConfigError."""
        kept = own_options(config)
        options: T5.Config = build_options(cls, kept or t5_forms.read_config(config), "config.json")
        return options

    @classmethod
    def to_hf(cls, config: Config) -> dict[str, Any]:
        """config.json of transformers. Raises: ConfigError with the reason where there is none."""
        form, reason = cls.hf_form(config)
        if form is None:
            raise ConfigError(f"model: no Hugging Face form: {reason}")
        return form

    @classmethod
    def state_from_hf(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Their tensors under our names. Raises: CheckpointError naming what is unknown, missing or not ours."""
        ours = cls.from_hf({"tensor_names": list(tensors), **config})
        with torch.device("meta"):
            expected = cls(ours, seed=None).state_dict()
        return names.to_ours(tensors, t5_forms.table(ours), 1, expected)

    def state_to_hf(self) -> dict[str, Tensor]:
        """Our tensors under their names. Raises: ConfigError where there is no form."""
        self.to_hf(self.config)
        return names.to_theirs(self.state_dict(), t5_forms.table(self.config), 1)

    @classmethod
    def tiny(cls, **changes: object) -> T5:
        """A small random model for tests; `changes` go into its config."""
        sizes = {"num_layers": 2, "num_heads": 4, "width": 32, "feedforward_width": 64, "vocab_size": 61}
        return cls(cls.Config(**{**sizes, "dropout": 0.0, **changes}))


class Stack(nn.Module):
    """The encoder or the decoder: blocks that share one table of learned scores, a norm, and dropout at both ends."""

    def __init__(self, config: T5.Config, *, decoder: bool) -> None:
        super().__init__()
        width, heads = config.width, config.num_heads
        scores = RelativeBias.Config(num_buckets=config.num_buckets, max_distance=config.max_distance)
        self.position = RelativeBias(
            scores, width=width, num_heads=heads, head_width=config.key_width, max_positions=None
        )
        num_layers = config.num_decoder_layers if decoder and config.num_decoder_layers else config.num_layers
        self.blocks = nn.ModuleList(_block(config, layer, decoder=decoder) for layer in range(num_layers))
        self.final_norm = _norm(config)
        self.embedding_dropout, self.final_dropout = Dropout(config.dropout), Dropout(config.dropout)

    def forward(
        self, hidden: Tensor, batch: Batch, memory: Memory | None = None, cache: KVCache | None = None
    ) -> list[Tensor]:
        """States `(n, d)` before each block, after the last, and after the norm."""
        keys = token_keys(batch)
        stream = Stream(batch.positions, batch.sequences, self.position, keys, cache)
        layers = [self.embedding_dropout(hidden, keys)]
        for block in self.blocks:
            layers.append(block(layers[-1], stream) if memory is None else block(layers[-1], stream, memory))
        if cache is not None:
            cache.advance(batch.sequences)
        return [*layers, self.final_dropout(self.final_norm(layers[-1]), keys)]


def _block(config: T5.Config, layer: int, *, decoder: bool) -> nn.Module:
    width, heads = config.width, config.num_heads
    shape: dict[str, Any] = {"head_width": config.key_width, "scale": 1.0, "bias": False, "dropout": config.dropout}
    attention = SelfAttention(width, heads, heads, layer=layer, causal=decoder, window=None, **shape)
    cls, options = component("feedforward", config.feedforward, "model.feedforward")
    inner = cls(options, width, config.feedforward_width or 4 * width, bias=False)
    if not decoder:
        return Block(attention, inner, _norm(config), _norm(config), norm_first=True, dropout=config.dropout)
    cross = CrossAttention(width, heads, layer=layer, **shape)
    norms = _norm(config), _norm(config), _norm(config)
    return DecoderBlock(attention, cross, inner, norms, dropout=config.dropout)


def _norm(config: T5.Config) -> RMSNorm:
    return RMSNorm(RMSNorm.Config(eps=config.norm_eps), config.width)


@torch.no_grad()
def _initialize(model: T5, seed: int) -> None:
    """Draws every parameter from its own stream.

    | parameter                     | distribution       |
    |-------------------------------|--------------------|
    | scales of norms               | 1                  |
    | embedding, head               | N(0, 1)            |
    | rows of queries               | N(0, 1 / (d k))    |
    | learned scores                | N(0, 1 / d)        |
    | every other matrix, x columns | N(0, 1 / x)        |

    So scores have about unit deviation without being scaled.
    Source: Raffel et al.'s code; HF `T5PreTrainedModel._init_weights`. Differs: nothing.
    """
    config = model.config
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
            continue
        drawn = normal(parameter.shape, seed, name)
        if "position" in name:
            drawn *= config.width**-0.5
        elif not name.startswith(("embedding", "head")):
            drawn *= parameter.shape[1] ** -0.5
        if name.endswith(("qkv.weight", "query.weight")):
            drawn[: config.num_heads * config.key_width] *= config.key_width**-0.5
        parameter.copy_(drawn)


def _ragged(ids: Tensor, mask: Tensor | None) -> tuple[Batch, Tensor]:
    """Padded ids and mask `(b, t)` as a ragged batch, and which places are real `(b, t)`."""
    real = (torch.ones_like(ids) if mask is None else mask).bool()
    keys = torch.arange(len(ids), device=ids.device)
    return Batch(ids[real], (real.cumsum(dim=1) - 1)[real], Sequences(real.sum(dim=1).tolist()), keys), real
