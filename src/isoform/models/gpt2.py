"""GPT-2: a causal decoder with learned positions, LayerNorm before each arm, and a GELU feed-forward layer.

What research swaps is an object passed in: position, norm, feed-forward layer, window, grouped heads.
Source: Radford et al. 2019; HF `GPT2LMHeadModel`, with which logits and gradients agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from isoform.config import Component, Positive
from isoform.contracts import Batch, Output, Sequences
from isoform.errors import ConfigError
from isoform.layers.block import Block, SelfAttention, Stream
from isoform.layers.cache import KVCache
from isoform.layers.dropout import Dropout, name_sites, token_keys
from isoform.layers.init import embedding, initialize, linear
from isoform.models import gpt2_forms as forms
from isoform.models import names
from isoform.registry import Options, build_options, component, register

Rate = Field(None, ge=0, lt=1)


@register("model", "gpt2")
class GPT2(nn.Module):
    """A causal language model.

    x = embedding[token] + position;  x = block(x) for each block;  hidden = norm(x);  logits = head hidden

    Shapes: tokens `(n,)`, hidden `(n, d)`, logits `(m, v)` at the m places that ask.
    Source: see the head of this file. Differs: the head may be untied, biases may be left out.
    """

    capabilities: ClassVar[frozenset[str]] = frozenset({"causal", "cache"})
    hf_model_types: ClassVar[tuple[str, ...]] = ("gpt2", "gpt_neox")

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
        # none | learned | sinusoidal | rope | alibi
        norm: Component = Field({"kind": "layernorm"})
        # layernorm | rmsnorm
        feedforward: Component = Field({"kind": "gelu-tanh"})
        # gelu | gelu-tanh | relu | relu-squared | geglu | swiglu
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

        @field_validator("position", "norm", "feedforward")
        @classmethod
        def _spelt_out(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
            """The component's options with every default in them. Raises: ConfigError."""
            _, options = component(str(info.field_name), value, f"model.{info.field_name}")
            return {"kind": value["kind"], **options.model_dump(mode="json")}

        @property
        def rates(self) -> dict[str, float]:
            """Dropout rates: embedding, residual, attention."""
            given = {
                "embedding": self.embedding_dropout,
                "residual": self.residual_dropout,
                "attention": self.attention_dropout,
            }
            return {site: self.dropout if rate is None else rate for site, rate in given.items()}

    def __init__(self, config: Config, seed: int | None = 0) -> None:
        """Draws the parameters from `seed`; None leaves them undrawn, for weights that are loaded at once."""
        super().__init__()
        vocab_size, width, heads = _checked(config), config.width, config.num_heads
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
        self.head = None if config.tied else linear(width, vocab_size, bias=False)
        name_sites(self)
        if seed is not None:
            initialize(self, seed, num_layers=config.num_layers)

    def forward(self, batch: Batch, *, cache: KVCache | None = None, all_layers: bool = False) -> Output:
        self._check_length(batch.sequences, cache)
        keys = token_keys(batch)
        stream = Stream(batch.positions, batch.sequences, self.position, keys, cache)
        hidden = self.embedding_dropout(self.position.embed(self.embedding(batch.tokens), batch.positions), keys)
        layers = [hidden]
        for block in self.blocks:
            hidden = block(hidden, stream)
            layers.append(hidden)
        if cache is not None:
            cache.advance(batch.sequences)
        return Output(hidden=self.final_norm(hidden), layers=tuple(layers) if all_layers else None)

    def _check_length(self, sequences: Sequences, cache: KVCache | None) -> None:
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
        return nn.functional.linear(hidden, self.embedding.weight if self.head is None else self.head.weight)

    def new_cache(self, num_sequences: int) -> KVCache:
        """An empty cache for so many sequences."""
        return KVCache(num_sequences, self.config.num_layers)

    def dense(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The call that people know: padded ids and mask `(b, t)` -> logits `(b, t, v)`, zero at padding."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        real = mask.bool()
        sequences = Sequences(real.sum(dim=1).tolist())
        positions = (real.cumsum(dim=1) - 1)[real]
        keys = torch.arange(len(input_ids), device=input_ids.device)
        output = self(Batch(input_ids[real], positions, sequences, keys))
        logits = self.logits(output.hidden)
        return logits.new_zeros(*input_ids.shape, logits.shape[-1]).masked_scatter(real[..., None], logits)

    @classmethod
    def hf_form(cls, config: Config) -> tuple[dict[str, Any] | None, str | None]:
        """(config.json of transformers, None), or (None, the reason why it has no form for such a model)."""
        model_type, reason = forms.choose(config)
        if model_type is None:
            return None, reason
        form = forms.write_config(config, model_type, config.rates)
        if _resolved(cls.from_hf(form)) != _resolved(config):
            # What the form cannot say (a fixed position table, left-out biases) is read again from here.
            form["isoform"] = config.model_dump(mode="json")
        return form, None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Config:
        """Our config from a config.json of `hf_model_types`. Raises: ConfigError."""
        kept = config.get("isoform")
        options: GPT2.Config = build_options(cls, dict(kept or forms.read_config(config)), "config.json")
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
        ours = cls.from_hf(config)
        with torch.device("meta"):
            expected = cls(ours, seed=None).state_dict()
        model_type = config["model_type"]
        table = forms.table(ours, model_type)
        return names.to_ours(forms.with_prefix(tensors, model_type), table, ours.num_layers, expected)

    def state_to_hf(self) -> dict[str, Tensor]:
        """Our tensors under their names. Raises: ConfigError where there is no form."""
        model_type = self.to_hf(self.config)["model_type"]
        return names.to_theirs(self.state_dict(), forms.table(self.config, model_type), self.config.num_layers)

    @classmethod
    def tiny(cls, **changes: object) -> GPT2:
        """A small random model for tests; `changes` go into its config."""
        sizes = {"num_layers": 2, "num_heads": 4, "width": 32, "vocab_size": 61, "max_positions": 48, "dropout": 0.0}
        return cls(cls.Config(**{**sizes, **changes}))


def _resolved(config: GPT2.Config) -> dict[str, Any]:
    """The config with what None stands for, so that equal models are equal."""
    shape = {
        "num_kv_heads": config.num_kv_heads or config.num_heads,
        "feedforward_width": config.feedforward_width or 4 * config.width,
        "dropout": None,
        **{f"{site}_dropout": rate for site, rate in config.rates.items()},
    }
    return {**config.model_dump(), **shape}


def _checked(config: GPT2.Config) -> int:
    """The vocabulary's size, where widths and heads fit together. Raises: ConfigError."""
    if config.vocab_size is None:
        raise ConfigError("model.vocab_size: missing; give it, or a tokenizer that knows it")
    if config.width % config.num_heads:
        raise ConfigError(
            f"model.num_heads: {config.num_heads} given, a divisor of model.width {config.width} is expected"
        )
    if config.num_heads % (config.num_kv_heads or config.num_heads):
        raise ConfigError(
            f"model.num_kv_heads: {config.num_kv_heads} given, "
            f"a divisor of model.num_heads {config.num_heads} is expected"
        )
    return config.vocab_size
