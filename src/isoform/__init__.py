"""isoform trains transformers and tells you which one is better, and whether you can believe it.

    import isoform
    isoform.study("quickstart", out="runs/quickstart")          arms x seeds, audited and compared
    isoform.train("classify", set=["train.max_epochs=2"], out="runs/try")
    isoform.predict("runs/try", ["A film of rare charm."])
    model = isoform.load("runs/try").model

Every verb of the command line is a function that returns what `--json` prints, but that `generate` gives pieces of text
and `report` a path. `eval` is `evaluate`, and `data` is `passport`, since the data room has that name. Nothing is
imported until one is called.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from isoform.checkpoints.folders import LoadedModel

__version__ = "0.1.0"
__all__ = [
    "bench",
    "compare",
    "doctor",
    "evaluate",
    "export",
    "generate",
    "load",
    "passport",
    "plan",
    "predict",
    "recipes",
    "report",
    "run_folder",
    "study",
    "train",
]

Config = str | Path | dict[str, Any]


def _values(config: Config, settings: Sequence[str], arms: bool | None) -> dict[str, Any]:
    """Plain values of a recipe, file or mapping with `--set` applied; `arms`: whether a study is expected."""
    from isoform.errors import ConfigError
    from isoform.reading import apply_settings, is_study, read_config

    values = apply_settings(config if isinstance(config, dict) else read_config(config), list(settings))
    if arms is not None and is_study(values) != arms:
        given, verb = ("a study", "study") if is_study(values) else ("a single run", "train")
        raise ConfigError(
            f"{config if not isinstance(config, dict) else 'config'}: this is {given}; use `isoform {verb}`"
        )
    return values


def _folder(out: str | Path | None, name: str) -> Path:
    return Path(out) if out is not None else Path("runs") / name


def study(
    config: Config,
    *,
    set: Sequence[str] = (),
    seeds: int | None = None,
    arms: Sequence[str] | None = None,
    jobs: int | None = None,
    out: str | Path | None = None,
    quiet: bool = True,
) -> dict[str, Any]:
    """Trains every arm at every seed, audits, compares and reports; goes on where an interrupted study was.

    seeds, arms: how many, and which; None: as the study says. More of either may be asked for later.
    A step that takes longer than `train.step_minutes` ends the process, with the exit code 9; null waits for ever.

    Returns: {arms, questions: [{pair, metric, split, difference, low, high, p, p_adjusted, verdict}], audit, ...}.
    Raises: ConfigError, DataError, AuditError, Stopped.
    """
    from isoform.studies.study import study as carry_out

    values = _values(config, set, arms=True)
    if seeds is not None:
        values["seeds"] = seeds
    if jobs is not None:
        values["jobs"] = jobs
    folder = _folder(out, str(values.get("name", "study")))
    command = _command("study", config, set, seeds, folder, arms or [])
    results = carry_out(
        values, folder, arms=arms, command=command, quiet=quiet, say=(lambda line: None) if quiet else _say
    )
    return {**results, "folder": str(folder)}


def _say(line: str) -> None:
    """A line for the person who waits."""
    import sys

    print(line, file=sys.stderr, flush=True)


def _command(
    verb: str, config: Config, settings: Sequence[str], seeds: int | None, folder: Path, arms: Sequence[str] = ()
) -> str:
    """The command line that asks for the same."""
    import shlex

    words = ["isoform", verb, "CONFIG" if isinstance(config, dict) else str(config)]
    for setting in settings:
        words += ["--set", setting]
    words += ["--seeds", str(seeds)] if seeds is not None else []
    words += ["--arms", ",".join(arms)] if arms else []
    return shlex.join([*words, "--out", str(folder)])


def train(
    config: Config,
    *,
    set: Sequence[str] = (),
    out: str | Path | None = None,
    resume: bool = False,
    quiet: bool = True,
) -> list[dict[str, Any]]:
    """One run: training and its evaluation in the folder `out`; returns the rows of eval.json.

    Raises: ConfigError, DataError, CheckpointError, LockedError, NonFiniteError, Stopped.
    """
    from isoform.config import run_config
    from isoform.studies.report import write_report
    from isoform.training.run import train as carry_out

    checked = run_config(_values(config, set, arms=False))
    folder = _folder(out, checked.name)
    rows = carry_out(checked, folder, resume=resume, quiet=quiet).rows
    if (folder / "eval.json").is_file():
        write_report(folder)
    return rows


def run_folder(config: Config, *, set: Sequence[str] = (), out: str | Path | None = None) -> Path:
    """The folder that `train` writes to."""
    return _folder(out, str(_values(config, set, arms=False).get("name", "run")))


def evaluate(
    model: str | Path,
    *,
    data: str | None = None,
    split: str | None = None,
    metrics: Sequence[str] | None = None,
    base: str | Path | None = None,
    int8: bool = False,
) -> list[dict[str, Any]]:
    """Metrics with intervals of a run or model: on a source, or on one of the run's own splits
    (default: test, else dev, else holdout).

    base: of an adapter, see `load`. int8: also from weights of 8 bits, to see what they cost.

    Returns: rows of {metric, split, value, n, low, high}, and with int8 of {value_int8, change}.
    """
    from dataclasses import replace

    from isoform.serving.use import open_model, score

    opened = open_model(model, base=base)
    ways = [opened, replace(opened, int8=True)] if int8 else [opened]
    asked = list(metrics) if metrics else None
    found, *narrow = [score(way, data, split=split, metrics=asked, cache=_cache()).rows for way in ways]
    for others in narrow:
        for row, other in zip(found, others, strict=True):
            row["value_int8"] = other["value"]
            row["change"] = None if None in (row["value"], other["value"]) else other["value"] - row["value"]
    return found


def _cache() -> Path:
    from isoform.training.prepare import cache_folder

    return cache_folder()


def predict(
    model: str | Path, inputs: str | Iterable[str], *, base: str | Path | None = None, int8: bool = False
) -> list[dict[str, Any]]:
    """One object an input, in order: {input, answer}; of classifiers {input, label, probabilities}, {tokens, tags}.

    base: of an adapter, see `load`. int8: from weights of 8 bits; `evaluate` tells what they cost.
    """
    from isoform.serving.predict import predict as answer
    from isoform.serving.use import open_model, tell_unknown

    opened = open_model(model, base=base, int8=int8)
    answers = list(answer(opened, [inputs] if isinstance(inputs, str) else inputs))
    tell_unknown(sum(prediction.num_unknown for prediction in answers))
    return [prediction.as_dict() for prediction in answers]


def generate(
    model: str | Path,
    prompt: str,
    *,
    chat: bool = False,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool = False,
    seed: int = 0,
    max_new_tokens: int = 200,
    base: str | Path | None = None,
    int8: bool = False,
) -> Iterator[str]:
    """The prompt's continuation, piece by piece.

    chat: the prompt is a message to a model with a chat template, what comes is its answer.
    temperature: 0 is greedy; None: 1, or 0 in a chat. beams: more than 1 is beam search, by `length_penalty` and
    `early_stopping` (see `config.Beams`), without temperature; the text comes in one piece. base: of an adapter,
    see `load`. int8: weights of 8 bits.
    """
    from isoform.config import Beams
    from isoform.evaluation.generate import Sampling
    from isoform.serving.use import continue_text, open_model

    chosen = (0.0 if chat else 1.0) if temperature is None else temperature
    sampling = Sampling(temperature=chosen, top_k=top_k, top_p=top_p)
    searched = Beams(num_beams=beams, length_penalty=length_penalty, early_stopping=early_stopping)
    yield from continue_text(
        open_model(model, base=base),
        prompt,
        chat=chat,
        sampling=sampling,
        beams=searched,
        seed=seed,
        max_new_tokens=max_new_tokens,
        int8=int8,
    )


def load(path: str | Path, *, base: str | Path | None = None) -> LoadedModel:
    """A model with its tokenizer from a run, an isoform or Hugging Face folder, a .gguf file, `pkg:NAME`, or
    `hf:owner/name[@revision]`.

    base: of an adapter, where its folder does not say (see `checkpoints.adapters`).
    Raises: CheckpointError that names what is missing, unknown or refused.
    """
    from isoform.checkpoints.folders import load_model

    return load_model(path, base=base)


def plan(
    config: Config,
    *,
    set: Sequence[str] = (),
    seeds: int | None = None,
    arms: Sequence[str] | None = None,
    attempt: bool = False,
) -> dict[str, Any]:
    """What a run or study will take: parameters, FLOPs, memory, disk, time, the rate's curve, warnings.

    seeds, arms: of a study, as there. attempt: also make one real step, evaluation, save and reload (`--try`).
    """
    from isoform.studies.forecast import forecast

    values = _values(config, set, arms=None)
    if seeds is not None:
        values["seeds"] = seeds
    return forecast(values, arms=arms, attempt=attempt)


def bench(config: Config | None = None, *, set: Sequence[str] = (), seconds: float = 10.0) -> dict[str, Any]:
    """This machine's ceilings, and how near to them the config's real steps come; nothing is written.

    config: default, a small GPT on text that comes with isoform. seconds: about how long steps are timed.
    Returns: {ceilings, step: {tokens_per_second, gflops, fraction_of_ceiling, ...}, shares, kernels, precision, ...}.
    """
    from isoform.config import run_config
    from isoform.training.bench import DEFAULT
    from isoform.training.bench import bench as carry_out

    return carry_out(run_config(_values(DEFAULT if config is None else config, set, arms=False)), seconds)


def passport(
    source: str,
    *,
    columns: Sequence[str] | None = None,
    against: Sequence[str] = (),
    max_tokens: int = 256,
    tokenizer: str = "char",
) -> dict[str, Any]:
    """What is in a source: sizes, lengths, truncation, duplicates, and leaks into the sources of `against`."""
    from isoform.studies.inspect import inspect

    names = list(columns) if columns else None
    return inspect(source, columns=names, against=list(against), max_tokens=max_tokens, tokenizer=tokenizer)


def compare(
    *results: str | Path, metric: str | None = None, split: str | None = None, margin: float | None = None
) -> dict[str, Any]:
    """Statistics over results that exist, from any tool: run folders or predictions.csv files, first against each."""
    from isoform.studies.outside import compare_results

    return compare_results([Path(result) for result in results], metric=metric, split=split, margin=margin)


def report(folder: str | Path, *, to: Literal["html", "md"] = "html") -> Path:
    """Writes the page of a run or study again; returns its path."""
    from isoform.studies.report import write_report

    return write_report(Path(folder), to)


def export(
    model: str | Path,
    to: Literal["hf", "peft", "onnx", "gguf"],
    *,
    out: str | Path | None = None,
    base: str | Path | None = None,
) -> dict[str, Any]:
    """Writes a model for another program, reads it again there in a fresh process, and compares what both make of it.

    base: of an adapter, see `load`.

    Returns: {path, format, model, reader, output, num_tokens, error, largest_difference, compared, notes}.
    Raises: CheckpointError with the reason where there is no such form, or with the largest difference; nothing is
    left behind.
    """
    from dataclasses import asdict

    from isoform.checkpoints.export import export_model

    return asdict(export_model(model, to, Path(out) if out is not None else None, base=base))


def recipes() -> list[dict[str, str]]:
    """The recipes that come with isoform: {name, kind, about}."""
    from isoform.reading import is_study, read_config, recipe_names

    rows = []
    for name in recipe_names():
        values = read_config(name)
        kind = "study" if is_study(values) else "run"
        rows.append({"name": name, "kind": kind, "about": str(values.get("question") or values.get("about") or "")})
    return rows


def doctor(path: str | Path | None = None) -> list[dict[str, str]]:
    """What is wrong with this machine, a model folder or a run folder: {level, what, advice}."""
    from isoform.checkpoints.doctor import examine

    return [{"level": item.level, "what": item.what, "advice": item.advice} for item in examine(path)]
