"""Classical classifiers: each label's score is a weighted sum of the terms in a text, wherever they stand.

They are models like any other to whoever scores, saves, loads and predicts; only their training is another: they are
fitted in one go (`training.classical`), which their capability `fits` says.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import BeforeValidator, model_validator
from torch import Tensor, nn

from isoform.contracts import Batch, Cache, Output
from isoform.errors import ConfigError
from isoform.layers import ragged
from isoform.models.heads import Classifier
from isoform.registry import Options, register


def _as_text(value: Any) -> Any:
    """`ngrams: 1` means `ngrams: "1"`, alone and in a list."""
    if isinstance(value, list):
        return [_as_text(item) for item in value]
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class BagOptions(Options):
    """What all of them ask of a text. A list is a grid: its best by `train.select` is kept."""

    features: int | list[int] = 20_000
    # the most frequent terms of the training texts, of which there is a weight each
    ngrams: Annotated[str | list[str], BeforeValidator(_as_text)] = "1"
    # words of a term: 1, 2, or from one to the other: 1-2
    idf: bool | list[bool] = True
    # whether a term counts the less the more training texts have it
    vocab_size: int | None = None
    classifier: Classifier | None = None
    # known when the model is fitted

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        for value in as_list(self.features):
            if value < 1:
                raise ValueError(f"features {value}: at least one is expected")
        for text in as_list(self.ngrams):
            words_of_a_term(text)
        return self


class BagOfWords(nn.Module):
    """Scores of the labels from the terms of a text, term frequency times inverse document frequency.

        x_f = n_f idf_f / sqrt(sum over terms of (n_f idf_f)^2)
        z = W x + b

    n_f: how often the term f stands in the text; idf_f: ln((1 + N) / (1 + N_f)) + 1, N_f of N training texts having
    the term, or 1. Tokens are terms (`text.ngrams`), v of them with the one that stands for no known term.
    Shapes: x `(v,)`, W `(v, c)` as stored, b and z `(c,)`. Source: scikit-learn's `TfidfTransformer`. Differs: nothing.
    """

    Config: type[BagOptions] = BagOptions
    capabilities: ClassVar[frozenset[str]] = frozenset({"classify", "fits"})
    hf_model_types: ClassVar[tuple[str, ...]] = ()
    # A bag has no places: texts are read whole.
    max_positions: int | None = 2**31 - 1

    def __init__(self, config: BagOptions, *, seed: int | None = 0) -> None:
        super().__init__()
        if config.classifier is None or config.vocab_size is None:
            raise ConfigError("model.vocab_size, model.classifier: missing; a bag of words has them when it is fitted")
        self.config = config
        num_labels = len(config.classifier.labels)
        self.idf = nn.Parameter(torch.zeros(config.vocab_size))
        self.weight = nn.Parameter(torch.zeros(config.vocab_size, num_labels))
        self.bias = nn.Parameter(torch.zeros(num_labels))

    def forward(self, batch: Batch, *, cache: Cache | None = None, all_layers: bool = False) -> Output:
        """The scores `(b, c)`, in the place of hidden states."""
        rows = ragged.rows(batch.sequences, batch.tokens.device)
        keys, counts = torch.unique(rows * len(self.idf) + batch.tokens, return_counts=True)
        rows, terms = keys // len(self.idf), keys % len(self.idf)
        values = counts * self.idf[terms]
        squares = values.new_zeros(len(batch.sequences)).index_add(0, rows, values.square())
        values = values / squares.sqrt().clamp(min=torch.finfo(values.dtype).tiny)[rows]
        scores = self.bias.repeat(len(batch.sequences), 1)  # (c,) -> (b, c)
        return Output(scores.index_add(0, rows, values[:, None] * self.weight[terms]))

    def classifier(self, hidden: Tensor, batch: Batch) -> Tensor:
        """What `forward` returns are the scores already."""
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        raise ConfigError("a bag of words has no scores over a vocabulary")

    def new_cache(self, num_sequences: int) -> Cache:
        raise ConfigError("a bag of words does not continue texts")

    @classmethod
    def hf_form(cls, config: BagOptions) -> tuple[None, str]:
        return None, "transformers has no bag of words"


@register("model", "naive-bayes")
class NaiveBayes(BagOfWords):
    """Multinomial naive Bayes: W_fy = ln((sum of x_f over texts of y + alpha) / (that of all terms)), b_y = ln p(y).

    Source: scikit-learn's `MultinomialNB`. Differs: nothing.
    """

    class Config(BagOptions):
        alpha: float | list[float] = 0.1
        # what each term is given beforehand (Lidstone's smoothing)


@register("model", "logistic-regression")
class LogisticRegression(BagOfWords):
    """The W and b of least  C (sum over texts of -log softmax(z)_y) + |W|^2 / 2.

    Source: scikit-learn's `LogisticRegression`. Differs: nothing.
    """

    class Config(BagOptions):
        inverse_penalty: float | list[float] = 1.0
        # C


def as_list(value: Any) -> list[Any]:
    """What is to be tried: the items of a list, or the one value."""
    return list(value) if isinstance(value, list) else [value]


def words_of_a_term(text: str) -> tuple[int, int]:
    """`1-2` -> (1, 2); `2` -> (2, 2). Raises: ValueError."""
    low, _, high = text.partition("-")
    if not (low.isdigit() and (high or low).isdigit()) or not 1 <= int(low) <= int(high or low):
        raise ValueError(f"ngrams {text!r}: a number of words, or from-to such as 1-2, is expected")
    return int(low), int(high or low)
