"""Fits a bag of words: terms of the training texts, their weights, and the best of a grid on the selection split.

Only fitting needs scikit-learn. What comes out is a model and a tokenizer like any other.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from isoform.contracts import Batch, Document, Floats, Ints, Objective, Output, Sequences, Source
from isoform.data.corpus import build_dataset
from isoform.errors import ConfigError, DataError
from isoform.evaluation.metrics import StreamingMetrics, build_metrics
from isoform.models.bag_of_words import BagOfWords, LogisticRegression, NaiveBayes, as_list, words_of_a_term
from isoform.models.heads import Classifier
from isoform.objectives.fields import required_text
from isoform.registry import build_options, lookup
from isoform.text.ngrams import NGrams, terms_of
from isoform.training.prepare import Prepared, cache_folder

# The option that a family has of its own: how much it is held back.
STRENGTH = {NaiveBayes: "alpha", LogisticRegression: "inverse_penalty"}
MAX_ITERATIONS = 2000
# The log-odds of a label that no training text has.
NEVER = -30.0


@dataclass(frozen=True)
class Trial:
    """One setting of the grid, its fit, and its value on the selection split (None where nothing is chosen by it)."""

    setting: dict[str, Any]
    terms: list[str]
    idf: Floats
    weight: Floats
    bias: Floats
    value: float | None


def family_of(run: Prepared) -> type[Any]:
    """The class of the run's model, which is not there before it is fitted."""
    return lookup("model", str(run.config.model["family"]), "model.family")


def grid(run: Prepared) -> dict[str, list[Any]]:
    """Option -> values to be tried, of every option that may be a list."""
    options = run.resolved["model"]
    names = ("features", "ngrams", "idf", STRENGTH[family_of(run)])
    return {name: as_list(options[name]) for name in names}


def fit(run: Prepared) -> tuple[Prepared, list[dict[str, Any]]]:
    """The run with its model, tokenizer and datasets, and the trials where there is more than one setting.

    Raises: ConfigError without scikit-learn, or with nothing to choose by; DataError where no text has a term.
    """
    _require_scikit_learn()
    choices = grid(run)
    select = run.config.train.select
    several = math.prod(map(len, choices.values())) > 1
    if several and (select.metric == "last" or select.split not in run.splits.splits):
        named = ", ".join(name for name, values in choices.items() if len(values) > 1)
        raise ConfigError(
            f"model.{named}: several values are given and there is nothing to choose by; name train.select.metric, and "
            f"train.select.split among {', '.join(name for name in run.splits.splits if name != 'train') or 'none'}"
        )
    sign = 1 if several and build_metrics([select.metric])[0].higher_is_better else -1
    best, highest, told = None, -math.inf, []
    for trial in _trials(run, choices, several):
        worth = -math.inf if trial.value is None else sign * trial.value
        if best is None or worth > highest:
            best, highest = trial, worth
        setting = {f"model.{name}": value for name, value in trial.setting.items()}
        told.append({"setting": setting, "value": trial.value})
    assert best is not None, "a grid has a setting"
    chosen = {f"model.{name}": value for name, value in best.setting.items()}
    return _fitted(run, best), [{**row, "chosen": row["setting"] == chosen} for row in told if several]


def _fitted(run: Prepared, best: Trial) -> Prepared:
    """The run with the model of a trial."""
    shortest, longest = words_of_a_term(best.setting["ngrams"])
    tokenizer: Any = NGrams(best.terms, shortest, longest)
    asked: Any = run.objective
    objective = type(asked)(asked.config, tokenizer, asked.max_tokens)
    classifier = Classifier(labels=objective.labels, pooling="mean")
    settled = {**best.setting, "vocab_size": tokenizer.vocab_size, "classifier": classifier.model_dump()}
    family = family_of(run)
    model: BagOfWords = family(build_options(family, settled, "model"))
    with torch.no_grad():
        model.idf[1:] = torch.from_numpy(best.idf)
        model.weight[1:] = torch.from_numpy(best.weight)
        model.bias[:] = torch.from_numpy(best.bias)
    datasets = {
        name: build_dataset(
            source,
            tokenizer,
            objective,
            run.config.data,
            objective.max_tokens,
            cache_folder(),
            keep_documents=name != "train",
        )
        for name, source in run.splits.splits.items()
    }
    return dataclasses.replace(
        run,
        tokenizer=tokenizer,
        objective=objective,
        datasets=datasets,
        model=model.to(run.device).eval(),
        fingerprints={**run.fingerprints, "tokenizer": tokenizer.fingerprint()},
    )


# ------------------------------------------------------------------------------------------------------------ the grid


def _trials(run: Prepared, choices: dict[str, list[Any]], several: bool) -> Iterator[Trial]:
    """Every setting, fitted; terms are counted once for each length of theirs."""
    objective: Any = run.objective
    train, select = run.splits.splits["train"], run.config.train.select
    gold = _labels(objective, train)
    scored = run.splits.splits[select.split] if several else None
    wanted = _labels(objective, scored) if scored is not None else None
    family = family_of(run)
    for ngrams in choices["ngrams"]:
        terms, counts, others = _counted(objective, train, scored, ngrams, max(choices["features"]))
        for features, idf in itertools.product(choices["features"], choices["idf"]):
            # Terms are in the order of their frequency: the most frequent ones are the first columns.
            weights = _inverse_frequencies(counts[:, :features], idf)
            x = _normal(counts[:, :features], weights)
            seen = None if others is None else _normal(others[:, :features], weights)
            strength = STRENGTH[family]
            for value in choices[strength]:
                weight, bias = _fit_linear(family, value, x, gold, len(objective.labels))
                found = None
                if seen is not None and wanted is not None:
                    found = _value(objective, select.metric, np.asarray(seen @ weight) + bias, wanted)
                setting = {"features": features, "ngrams": ngrams, "idf": idf, strength: value}
                yield Trial(setting, terms[:features], weights, weight, bias, found)


def _counted(
    objective: Any, train: Source, scored: Source | None, ngrams: str, most: int
) -> tuple[list[str], Any, Any | None]:
    """(terms, the most frequent first; how often each text of train and of the other split has them, sparse `(N, v)`).

    Of terms that are equally frequent the first in the alphabet is the first.
    """
    from sklearn.feature_extraction.text import CountVectorizer

    shortest, longest = words_of_a_term(ngrams)

    def analyse(document: Document) -> Iterator[str]:
        for field in objective.inputs:
            yield from terms_of(required_text(document, field), shortest, longest)

    vectorizer = CountVectorizer(analyzer=analyse, dtype=np.float64)
    try:
        counts = vectorizer.fit_transform(train)
    except ValueError:
        raise DataError(
            f"model.ngrams: no training text has a term of {ngrams} words; a word has two letters at least"
        ) from None
    order = np.argsort(-np.asarray(counts.sum(axis=0)).ravel(), kind="stable")[:most]
    terms = vectorizer.get_feature_names_out()[order].tolist()
    others = None if scored is None else vectorizer.transform(scored)[:, order]
    return terms, counts[:, order], others


def _inverse_frequencies(counts: Any, idf: bool) -> Floats:
    """ln((1 + N) / (1 + N_f)) + 1 for each term, or ones: `(v,)`."""
    having = np.asarray((counts > 0).sum(axis=0)).ravel()
    ones = np.ones(counts.shape[1])
    return np.log((1 + counts.shape[0]) / (1 + having)) + 1 if idf else ones


def _normal(counts: Any, weights: Floats) -> Any:
    """Weighted counts, each text's of length 1, sparse `(N, v)`; a text without terms is 0."""
    from sklearn.preprocessing import normalize

    return normalize(counts.multiply(weights[None]).tocsr())


def _fit_linear(family: Any, strength: float, x: Any, gold: Ints, num_labels: int) -> tuple[Floats, Floats]:
    """W `(v, c)` and b `(c,)` whose softmax are the fitted probabilities."""
    from sklearn import linear_model, naive_bayes
    from sklearn.exceptions import ConvergenceWarning

    weight, bias = np.zeros((x.shape[1], num_labels)), np.full(num_labels, NEVER)
    if family is NaiveBayes:
        bayes = naive_bayes.MultinomialNB(alpha=strength).fit(x, gold)
        weight[:, bayes.classes_], bias[bayes.classes_] = bayes.feature_log_prob_.T, bayes.class_log_prior_
        return weight, bias
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        try:
            model = linear_model.LogisticRegression(C=strength, max_iter=MAX_ITERATIONS).fit(x, gold)
        except ConvergenceWarning:
            raise ConfigError(
                f"model.inverse_penalty: {strength} given, with which {MAX_ITERATIONS} iterations do not find the "
                "least loss; lower it"
            ) from None
    rows, intercepts = model.coef_, model.intercept_
    if len(model.classes_) == 2:  # one row tells two labels apart
        rows, intercepts = np.vstack([-rows / 2, rows / 2]), np.concatenate([-intercepts / 2, intercepts / 2])
    weight[:, model.classes_], bias[model.classes_] = rows.T, intercepts
    return weight, bias


def _labels(objective: Any, source: Source) -> Ints:
    """The number of each document's label `(N,)`. Raises: DataError with source and row."""
    return np.array([objective.label_of(document) for document in source], dtype=np.int64)


def _value(objective: Objective, metric: str, scores: Floats, gold: Ints) -> float | None:
    """A metric of scores `(N, c)` that are there already."""
    none = torch.zeros(0, dtype=torch.int64)
    batch = Batch(none, none, Sequences(()), none, labels=torch.from_numpy(gold))
    stats = objective.statistics(_Told(), batch, Output(torch.from_numpy(scores)))  # type: ignore[arg-type]
    stream = StreamingMetrics(build_metrics([metric], "train.select.metric"))
    stream.add({name: values.numpy() for name, values in stats.items()})
    return stream.values()[metric]


class _Told:
    """A model whose states are the scores."""

    @staticmethod
    def classifier(hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        return hidden


def _require_scikit_learn() -> None:
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise ConfigError(
            "model.family: a bag of words is fitted by scikit-learn, which is not installed; "
            "pip install 'isoform[classical]'"
        ) from None
