"""Several objectives in one stage: each document goes to the first that can read it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import Field, field_validator

from isoform.contracts import Document, Encoded, Ints, Objective, Prompt, Sample, Tokenizer
from isoform.errors import ConfigError, DataError
from isoform.objectives.crossentropy import TokenObjective
from isoform.objectives.fields import place
from isoform.registry import Options, component, register


@register("objective", "mixture")
class Mixture(TokenObjective):
    """sum over documents of weight(part) x loss / sum over documents of weight(part) x targets, in nats a target.

    A document goes to the first part, in the order written, whose fields it has; that part makes its samples and
    prompts. All parts must be objectives whose targets are tokens.
    """

    class Config(Options):
        parts: dict[str, dict[str, Any]] = Field(min_length=1)
        # name -> {kind, weight, and the kind's own options}; weight multiplies the part's targets, default 1

        @field_validator("parts")
        @classmethod
        def _weights(cls, parts: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
            for name, options in parts.items():
                weight = options.get("weight", 1.0)
                if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight > 0:
                    raise ValueError(f"{name}.weight is {weight!r}, a number above 0 is expected")
            return parts

    def __init__(self, config: Config, tokenizer: Tokenizer, max_tokens: int) -> None:
        super().__init__(config, tokenizer, max_tokens)
        self.parts: list[Any] = []
        self.weights: list[float] = []
        for name, options in config.parts.items():
            where = f"objective.parts.{name}"
            cls, checked = component("objective", {k: v for k, v in options.items() if k != "weight"}, where)
            if not issubclass(cls, TokenObjective) or cls is Mixture:
                raise ConfigError(f"{where}.kind: {options['kind']!r} cannot be mixed; its targets are not tokens")
            build: Any = cls
            self.parts.append(build(checked, tokenizer, max_tokens))
            self.weights.append(float(options.get("weight", 1.0)))
        readers = [part for part in self.parts if ("text",) in part.alternatives][:1]
        self.alternatives = tuple(dict.fromkeys(way for part in self.parts for way in part.alternatives))
        self.optional_fields = tuple(dict.fromkeys(field for part in self.parts for field in part.optional_fields))
        self.needs: frozenset[str] = frozenset().union(*(part.needs for part in self.parts))
        self.stochastic = any(part.stochastic for part in self.parts)
        self.windowed = any(part.windowed for part in readers)
        self.window_tokens = max(part.window_tokens for part in readers or self.parts)
        self.metrics = ("loss", "perplexity", "token_accuracy")

    def _part(self, fields: Mapping[str, Any]) -> int | None:
        """The first part that can read these fields."""
        for index, part in enumerate(self.parts):
            for way in part.alternatives:
                if all(field in fields or field in part.optional_fields for field in way):
                    return index
        return None

    def _reader(self, encoded: Encoded) -> Objective:
        index = self._part(encoded.fields)
        assert index is not None, "encode has found a part"
        part: Objective = self.parts[index]
        return part

    def encode(self, document: Document) -> Encoded:
        index = self._part(document.fields)
        if index is None:
            wanted = " or ".join(" + ".join(way) for way in self.alternatives)
            raise DataError(
                f"{place(document)}: fields {', '.join(document.fields)} given, {wanted} expected; name the columns "
                "with `data.text`, `data.question`, `data.answer`, or add a part that reads these"
            )
        encoded: Encoded = self.parts[index].encode(document)
        return encoded

    def encoding_key(self) -> str:
        return "mixture of " + " | ".join(part.encoding_key() for part in self.parts)

    def planned_tokens(self, field_tokens: Mapping[str, Ints]) -> Ints:
        """The longest plan of the parts that read a document's fields; a field that it has not has no tokens."""
        plans = [
            np.where(field_tokens[way[0]] > 0, part.planned_tokens(field_tokens), 0)
            for part in self.parts
            for way in part.alternatives
            if all(field in field_tokens for field in way)
        ]
        longest: Ints = np.max(np.stack(plans), axis=0)
        return longest

    def prepare(self, encoded: Encoded, rng: np.random.Generator) -> Sample:
        index = self._part(encoded.fields)
        assert index is not None, "encode has found a part"
        sample: Sample = self.parts[index].prepare(encoded, rng)
        return dataclasses.replace(sample, weight=self.weights[index])

    def prompt(self, encoded: Encoded) -> Prompt | None:
        return self._reader(encoded).prompt(encoded)
