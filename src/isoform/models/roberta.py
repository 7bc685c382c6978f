"""RoBERTa: BERT with one kind of segment, and positions counted from the padding token's id + 1.

Source: Liu et al. 2019; HF `RobertaForMaskedLM`, with which logits and gradients agree.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, NonNegativeInt, field_validator

from isoform.config import Component
from isoform.errors import ConfigError
from isoform.models import bert_forms, encoder, heads
from isoform.models.bert import Bert
from isoform.registry import register


@register("model", "roberta")
class Roberta(Bert):
    """BERT with one kind of segment, and positions counted from the padding token's id + 1.

    Source: Liu et al. 2019; HF `RobertaForMaskedLM`, whose head always has the exact GELU. Differs: nothing, but that
    the padding token is a token like any other where a text contains it (there it gets the padding's position).
    """

    hf_model_types: ClassVar[tuple[str, ...]] = ("roberta",)
    hugging_face: ClassVar[encoder.HuggingFace] = bert_forms.ROBERTA
    classifier_shape: ClassVar[heads.Shape] = heads.ROBERTA
    head_activation: ClassVar[str | None] = "gelu"

    class Config(Bert.Config):
        num_segments: NonNegativeInt = 1
        norm: Component = Field({"kind": "layernorm", "eps": 1e-5})
        padding_id: NonNegativeInt | None = None
        # the table of positions has padding_id + 1 unused rows before its first; null: the tokenizer's `pad`
        pooler: Any = "none"
        # none | plain

        @field_validator("pooler")
        @classmethod
        def _known(cls, value: Any) -> Any:
            if value not in ("none", "plain"):
                raise ValueError("none or plain is expected; RoBERTa was not trained on pairs of sentences")
            return value

        @property
        def position_offset(self) -> int:
            if self.padding_id is None:
                raise ConfigError(
                    "model.padding_id: missing; RoBERTa counts positions from it: give it, or a tokenizer with the "
                    "special token `pad`"
                )
            return self.padding_id + 1

    @classmethod
    def tiny(cls, **changes: object) -> Bert:
        """A small random model for tests; `changes` go into its config."""
        return super().tiny(**{"padding_id": 1, **changes})
