"""DistilBERT: BERT with half the layers and no segments, distilled from it.

Source: Sanh et al. 2019; HF `DistilBertForMaskedLM`, with which logits and gradients agree.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

from pydantic import NonNegativeInt, model_validator

from isoform.config import Positive
from isoform.errors import ConfigError
from isoform.layers.dropout import Dropout
from isoform.models import distilbert_forms, encoder, heads
from isoform.models.bert import Bert
from isoform.registry import register

EPS = 1e-12


@register("model", "distilbert")
class DistilBert(Bert):
    """An encoder like BERT, its parts fixed: learned positions, LayerNorm, no segments, no pooler, no window.

    x = dropout(norm(embedding[token] + position));  hidden = x after each block, norms last;  logits = head hidden

    Shapes: tokens `(n,)`, hidden `(n, d)`, logits `(m, v)` at the m places that ask.
    Source: see the head of this file. Differs: nothing; like its model in transformers it has no dropout between
    attention and the sum after it.
    """

    hf_model_types: ClassVar[tuple[str, ...]] = ("distilbert",)
    hugging_face: ClassVar[encoder.HuggingFace] = distilbert_forms.DISTILBERT
    classifier_shape: ClassVar[heads.Shape] = heads.DISTILBERT

    class Config(Bert.Config):
        num_layers: Positive = 6
        num_segments: NonNegativeInt = 0

        @model_validator(mode="after")
        def _fixed(self) -> Self:
            """Raises: ConfigError naming a part that DistilBERT has not, and why."""
            others = {
                "num_segments": self.num_segments > 0,
                "position": self.position["kind"] != "learned",
                "norm": self.norm != {"kind": "layernorm", "eps": EPS, "bias": True},
                "feedforward": self.feedforward["kind"] not in ("gelu", "relu"),
                "window": self.window is not None,
                "pooler": self.pooler != "none",
            }
            for field, other in others.items():
                if other:
                    raise ConfigError(
                        f"model.{field}: DistilBERT was distilled into one form: learned positions, "
                        f"LayerNorm with eps {EPS}, GELU or ReLU, no segments, window or pooler; family bert swaps them"
                    )
            return self

    def __init__(self, config: Any, seed: int | None = 0) -> None:
        super().__init__(config, seed)
        for block in self.blocks:
            block.attention_dropout = Dropout(0.0)
