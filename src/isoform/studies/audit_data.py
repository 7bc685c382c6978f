"""Where the compared documents have been before: in training, in pretraining, in the choice of weights."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from isoform.contracts import Document, Source
from isoform.data.overlap import find_overlap
from isoform.studies.audit_rows import ANSWERS, OVERLAP, SELECTION, Pair, Row, names, row, trained
from isoform.studies.layout import Layout

if TYPE_CHECKING:
    from isoform.studies.audit_probe import Probe, Probes

# Text that is searched for answers; a larger corpus is searched up to here, and the message says so.
MAX_CHARACTERS = 10_000_000
WORD = re.compile(r"\w+")
# A run of capitalised words that does not begin the question.
NAME = re.compile(r"(?<=\s)[^\W\d_a-z]\w*(?:[ '.-]+[^\W\d_a-z]\w*)*")
AFTER_POLICY = {"refuse": "refuse", "drop_from_train": "warn", "keep": "warn"}

Words = tuple[str, ...]
Findings = dict[tuple[str, str], list[str]]
# (level, message) -> arms


def compared_splits(layout: Layout, arm: str) -> list[str]:
    """The splits on which an arm is compared."""
    settings = layout.study.compare
    asked = [question.split or settings.split for question in layout.study.questions if arm in question.pair]
    return list(dict.fromkeys(asked or [settings.split]))


# ------------------------------------------------------------------------------------------------------------- overlap


def overlaps(layout: Layout, probes: Probes) -> list[Row]:
    """Within every stage, and between the training text of earlier stages and the splits that are compared."""
    found: Findings = defaultdict(list)
    for arm in trained(layout):
        chain = probes.chain(arm)
        for stage, probe in chain.items():
            for finding in _within(stage, probe):
                found[finding].append(arm)
        *earlier, last = chain
        for stage in earlier:
            for split in compared_splits(layout, arm):
                for finding in _between(stage, chain[stage], chain[last], split):
                    found[finding].append(arm)
    return [row(OVERLAP, level, f"{names(arms)}: {message}") for (level, message), arms in found.items()]  # type: ignore[arg-type]


def _within(stage: str, probe: Probe) -> Iterable[tuple[str, str]]:
    report = probe.run.splits.report
    dropped = int(report.get("dropped_from_train", 0))
    if dropped:
        yield "inform", f"stage {stage}: {dropped} training documents that stand in another split were dropped"
    for pair in report.get("overlap", ()):
        first, second = pair["splits"]
        if not pair["exact"] + pair["near"] or (first == "train" and report["policy"] == "drop_from_train"):
            continue
        cleaned = report["policy"] == "drop_from_train"
        policy = f"data.overlap: {report['policy']}" + (", which cleans training alone" if cleaned else "")
        advice = "clean the files" + ("" if cleaned else ", or set data.overlap to drop_from_train")
        yield "warn", f"stage {stage}: {_counts(pair, second, first)} and were kept ({policy}); {advice}"


def _between(stage: str, earlier: Probe, last: Probe, split: str) -> Iterable[tuple[str, str]]:
    sources = last.run.splits.splits
    if split not in sources:
        return
    data = earlier.run.config.data
    pair = find_overlap(
        {"train": earlier.run.splits.splits["train"], split: sources[split]}, data.near_fraction
    ).report[0]
    if pair["exact"] or pair["near"]:
        yield (
            AFTER_POLICY[data.overlap],
            f"{_counts(pair, split, f'the training text of stage {stage}')}; take them out, or set "
            f"{stage}.data.overlap to keep",
        )


def _counts(pair: Mapping[str, Any], second: str, first: str) -> str:
    return f"{pair['exact']} documents of {second} stand exactly and {pair['near']} nearly in {first}"


# ----------------------------------------------------------------------------------------------- answers in pretraining


def answers_seen(layout: Layout, probes: Probes) -> list[Row]:
    """How many of the compared questions have their answer somewhere in an earlier stage's training text."""
    found: Findings = defaultdict(list)
    for arm in trained(layout):
        chain = probes.chain(arm)
        *earlier, last = chain
        for split in compared_splits(layout, arm):
            source = chain[last].run.splits.splits.get(split)
            questions = [d for d in source or () if d.fields.get("answer")]
            texts = [chain[stage].run.splits.splits["train"] for stage in earlier]
            if not questions or not texts:
                continue
            seen, beside, whole = count_answers(questions, texts)
            how = "" if whole else f" (its first {MAX_CHARACTERS:,} characters)"
            message = (
                f"the training text of {', '.join(earlier)}{how} contains the answer to {seen} of {len(questions)} "
                f"questions of {split}, to {beside} of them in one line with a name from the question"
            )
            if seen:
                found["inform", message].append(arm)
    return [row(ANSWERS, "inform", f"{names(arms)}: {message}") for (_, message), arms in found.items()]


def count_answers(questions: Iterable[Document], texts: Iterable[Source]) -> tuple[int, int, bool]:
    """(questions whose answer occurs, those whose answer and name share a line, whether all text was read)."""
    answers = {document.id: _words(document.fields["answer"]) for document in questions}
    named = {d.id: [_words(name) for name in NAME.findall(d.fields.get("question", ""))] for d in questions}
    asking: dict[Words, list[str]] = defaultdict(list)
    for identity, its_names in named.items():
        for name in its_names:
            asking[name].append(identity)
    wanted = set(answers.values()) | set(asking)
    lengths = sorted({len(words) for words in wanted if words})
    seen: set[Words] = set()
    beside: set[str] = set()
    room = MAX_CHARACTERS
    for source in texts:
        for document in source:
            for line in "\n".join(document.fields.values()).splitlines():
                words = _words(line)
                runs = {words[i : i + n] for n in lengths for i in range(len(words) - n + 1)} & wanted
                seen |= runs
                beside |= {i for name in runs & asking.keys() for i in asking[name] if answers[i] in runs}
                room -= len(line)
            if room < 0:
                return sum(words in seen for words in answers.values()), len(beside), False
    return sum(words in seen for words in answers.values()), len(beside), True


def _words(text: str) -> Words:
    return tuple(WORD.findall(text.lower()))


# ----------------------------------------------------------------------------------------------------------- selection


def selected_on_compared(layout: Layout, probes: Probes) -> list[Row]:
    """A checkpoint, a stopping time or a setting must not be chosen on the documents that then judge it."""
    found: dict[tuple[str, Pair | None], list[str]] = defaultdict(list)
    settings = layout.study.compare
    asked: list[tuple[str, Pair | None]] = [(q.split or settings.split, q.pair) for q in layout.study.questions]
    for split, pair in asked or [(settings.split, None)]:
        for arm in pair or trained(layout):
            if arm not in trained(layout):
                continue
            chain = probes.chain(arm)
            compared = list(chain.values())[-1].run.splits.splits.get(split)
            for stage, probe in chain.items():
                select = probe.run.config.train.select
                chosen_on = probe.run.splits.splits.get(select.split)
                if select.metric == "last" or chosen_on is None or compared is None:
                    continue
                if chosen_on.fingerprint() == compared.fingerprint():
                    message = (
                        f"{stage}.train.select.split: {select.split} holds the documents of {split}, on which the arms "
                        f"are compared; select on another split (data.holdout carves one from train)"
                    )
                    found[message, pair].append(arm)
    return [row(SELECTION, "refuse", f"{names(arms)}: {message}", pair) for (message, pair), arms in found.items()]
