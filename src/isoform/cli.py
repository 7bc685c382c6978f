"""One verb per command: parse, call, print. No logic."""

from __future__ import annotations

import itertools
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

app = typer.Typer(
    name="isoform",
    help="Trains transformers, and tells you which one is better and whether you can believe it.",
    no_args_is_help=True,
    add_completion=True,
    # Coloured help would import a Markdown parser, which doubles the time until help is there.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Recipe = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A recipe's name (see `isoform recipes`) or a YAML file.")
]
Model = Annotated[str, typer.Argument(help="A run, a model folder, a .gguf file, pkg:NAME or hf:owner/name.")]
Settings = Annotated[list[str] | None, typer.Option("--set", metavar="a.b=c", help="Change a field; may be repeated.")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder to write to; default: runs/NAME.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Base = Annotated[str | None, typer.Option("--base", metavar="MODEL", help="Of an adapter whose folder does not say.")]
Split = Annotated[str | None, typer.Option("--split", help="One of the run's own splits.")]


def _print_json(value: Any) -> None:
    from isoform.storage import finite

    typer.echo(json.dumps(finite(value), ensure_ascii=False, allow_nan=False))


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        import isoform

        typer.echo(f"isoform {isoform.__version__}")
        raise typer.Exit


def _names(given: str | None) -> list[str] | None:
    """`a, b` as names; None where nothing is given."""
    return None if given is None else [name.strip() for name in given.split(",") if name.strip()]


@app.command()
def study(
    config: Recipe,
    settings: Settings = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Number of seeds of every arm.")] = None,
    arms: Annotated[str | None, typer.Option(help="Some of its arms, now: a,b; more may be asked for later.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs side by side, each with a share of the cores.")] = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Train every arm, audit, compare, report. Run it again to go on where it was stopped."""
    import isoform
    from isoform.studies.terminal import print_study

    values = isoform.study(
        config, set=settings or [], seeds=seeds, arms=_names(arms), jobs=jobs, out=out, quiet=as_json
    )
    if as_json:
        _print_json(values)
        return
    print_study(values, _console())
    typer.echo(str(Path(values["folder"]) / "report.html"))


@app.command()
def train(
    config: Recipe,
    settings: Settings = None,
    out: Out = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    as_json: Json = False,
) -> None:
    """Train and evaluate one run."""
    import isoform
    from isoform.studies.terminal import print_run

    rows = isoform.train(config, set=settings or [], out=out, resume=resume, quiet=as_json)
    if as_json:
        _print_json(rows)
        return
    folder = isoform.run_folder(config, set=settings or [], out=out)
    print_run(folder, _console())
    typer.echo(str(folder / "report.html"))


@app.command("eval")
def evaluate(
    model: Model,
    data: Annotated[str | None, typer.Option("--data", help="A source: file, folder, hf:..., builtin:...")] = None,
    split: Split = None,
    metric: Annotated[list[str] | None, typer.Option("--metric", help="May be repeated; default: the run's.")] = None,
    base: Base = None,
    int8: Annotated[bool, typer.Option("--int8", help="Also with weights of 8 bits: what they cost.")] = False,
    as_json: Json = False,
) -> None:
    """Metrics with intervals on a source, or on a split of the run."""
    _forget_shapes()
    import isoform
    from isoform.studies.listings import print_rows

    rows = isoform.evaluate(model, data=data, split=split, metrics=metric, base=base, int8=int8)
    _print_json(rows) if as_json else print_rows(rows, _console())


@app.command()
def predict(
    model: Model,
    texts: Annotated[list[str] | None, typer.Argument(help="Inputs; or use --in, or standard input.")] = None,
    source: Annotated[
        Path | None,
        typer.Option("--in", help="A file with one input a line, or csv, tsv, json, jsonl, parquet, conll."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write .csv, .jsonl, .txt or .conll instead of a table.")
    ] = None,
    base: Base = None,
    int8: Annotated[bool, typer.Option("--int8", help="Weights of 8 bits; `eval --int8` tells their cost.")] = False,
    as_json: Json = False,
) -> None:
    """Answers or labels for new inputs, in order."""
    _forget_shapes()
    import time

    from isoform.serving.predict import predict as answer
    from isoform.serving.predict import read_inputs, with_rate, write_answers
    from isoform.serving.use import open_model
    from isoform.studies.listings import print_answers

    opened = open_model(model, base=base, int8=int8)
    answers = answer(opened, texts or read_inputs(opened, source))
    if out is not None:
        began = time.monotonic()
        count, unknown = write_answers(with_rate(answers, _console(stderr=True)), out)
        rate = count / max(1e-9, time.monotonic() - began)
        typer.echo(f"{count} answers written to {out}, {rate:,.0f} a second" + _unknown(unknown))
    elif as_json:
        found = list(answers)
        _print_json([item.as_dict() for item in found])
        _say_unknown(sum(item.num_unknown for item in found))
    else:
        _say_unknown(print_answers(answers, _console()))


def _forget_shapes() -> None:
    """Before torch is loaded: no two batches of a long file are of one size, and kernels kept for each size add up."""
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "16")


def _unknown(count: int) -> str:
    return f"; {count} input tokens were unknown to the tokenizer and read as <unk>" if count else ""


def _say_unknown(count: int) -> None:
    if count:
        typer.echo(_unknown(count).removeprefix("; "), err=True)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option("--prompt", help="Text to continue, or with --chat a message.")] = "",
    chat: Annotated[bool, typer.Option("--chat", help="Answer the prompt by the model's chat template.")] = False,
    temperature: Annotated[float | None, typer.Option(min=0, help="0: greedy. Default: 1, with --chat 0.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1)] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1)] = None,
    beams: Annotated[int, typer.Option(min=1, help="Beam search instead of sampling, where more than 1.")] = 1,
    length_penalty: Annotated[float, typer.Option(help="Of beams: above 0 favours long texts.")] = 1.0,
    early_stopping: Annotated[bool, typer.Option(help="Of beams: stop at so many finished texts.")] = False,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 200,
    base: Base = None,
    int8: Annotated[bool, typer.Option("--int8", help="Weights of 8 bits: faster, a little less exact.")] = False,
    as_json: Json = False,
) -> None:
    """Continue a text or answer a message, streaming."""
    import isoform

    pieces = isoform.generate(
        model,
        prompt,
        chat=chat,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        beams=beams,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        seed=seed,
        max_new_tokens=max_new_tokens,
        base=base,
        int8=int8,
    )
    if as_json:
        _print_json({"prompt": prompt, "text": "".join(pieces)})
        return
    # Only now is the model loaded: a refusal must not stand behind the prompt.
    first = next(pieces, "")
    for piece in itertools.chain([first if chat else prompt + first], pieces):
        typer.echo(piece, nl=False)
        sys.stdout.flush()
    typer.echo()


@app.command()
def plan(
    config: Recipe,
    settings: Settings = None,
    seeds: Annotated[int | None, typer.Option(min=1)] = None,
    arms: Annotated[str | None, typer.Option(help="Of a study, these alone: a,b")] = None,
    attempt: Annotated[bool, typer.Option("--try", help="Also one real step, evaluation, save and reload.")] = False,
    as_json: Json = False,
) -> None:
    """What it will take: size, FLOPs, memory, disk, time. Nothing is kept."""
    import isoform
    from isoform.studies.listings import print_plan

    values = isoform.plan(config, set=settings or [], seeds=seeds, arms=_names(arms), attempt=attempt)
    _print_json(values) if as_json else print_plan(values, _console())


@app.command()
def bench(
    config: Annotated[
        str | None, typer.Argument(metavar="[CONFIG]", help="A recipe's name or a YAML file; default: a small GPT.")
    ] = None,
    settings: Settings = None,
    seconds: Annotated[float, typer.Option(min=0, help="How long steps are timed, about.")] = 10.0,
    as_json: Json = False,
) -> None:
    """What this machine can do, and where a step's time goes."""
    import isoform
    from isoform.studies.listings import print_bench

    values = isoform.bench(config, set=settings or [], seconds=seconds)
    _print_json(values) if as_json else print_bench(values, _console())


@app.command()
def data(
    source: Annotated[str, typer.Argument(help="A file, folder, hf:owner/name[@revision] or builtin:name.")],
    against: Annotated[list[str] | None, typer.Option("--against", help="A source that must not overlap.")] = None,
    columns: Annotated[str | None, typer.Option(help="Names of the columns of a file without a header: a,b")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Context length for the share that is cut off.")] = 256,
    tokenizer: Annotated[str, typer.Option(help="char, word, bpe, wordpiece, or a folder with one.")] = "char",
    as_json: Json = False,
) -> None:
    """What is in a source: sizes, lengths, duplicates, leaks."""
    import isoform
    from isoform.data.passport import render

    names = columns.split(",") if columns else None
    values = isoform.passport(source, columns=names, against=against or [], max_tokens=max_tokens, tokenizer=tokenizer)
    _print_json(values) if as_json else render(values, _console())


@app.command()
def compare(
    results: Annotated[list[Path], typer.Argument(help="Run folders or predictions.csv files, two or more.")],
    metric: Annotated[str | None, typer.Option(help="Default: the first that all have.")] = None,
    split: Split = None,
    margin: Annotated[float | None, typer.Option(help="A difference that would not matter.")] = None,
    as_json: Json = False,
) -> None:
    """Audit and statistics over results that exist, from any tool."""
    import isoform
    from isoform.studies.terminal import print_study

    values = isoform.compare(*results, metric=metric, split=split, margin=margin)
    _print_json(values) if as_json else print_study(values, _console())
    if any(row["level"] == "refuse" for row in values["audit"]):
        raise typer.Exit(10)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A run or study folder.")],
    to: Annotated[Literal["html", "md"], typer.Option("--to", help="html or md")] = "html",
    as_json: Json = False,
) -> None:
    """Write the page of a run or study again."""
    import isoform

    path = str(isoform.report(folder, to=to))
    _print_json({"path": path}) if as_json else typer.echo(path)


@app.command()
def export(
    model: Model,
    to: Annotated[Literal["hf", "peft", "onnx", "gguf"], typer.Option("--to", help="hf, peft, onnx or gguf")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to write to; default: export/FORMAT in the run.")
    ] = None,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Write a model for another program, and compare it there."""
    import isoform
    from isoform.studies.listings import print_export

    values = isoform.export(model, to, out=out, base=base)
    _print_json(values) if as_json else print_export(values, _console())


@app.command()
def recipes(as_json: Json = False) -> None:
    """What there is to run."""
    import isoform
    from isoform.studies.listings import print_recipes

    rows = isoform.recipes()
    _print_json(rows) if as_json else print_recipes(rows, _console())


@app.command()
def doctor(
    path: Annotated[str | None, typer.Argument(help="A model or run folder; nothing: this machine.")] = None,
    as_json: Json = False,
) -> None:
    """What is wrong with this machine, a model or a run."""
    import isoform
    from isoform.studies.listings import print_findings

    rows = isoform.doctor(path)
    _print_json(rows) if as_json else print_findings(rows, _console())
    if any(row["level"] == "error" for row in rows):
        raise typer.Exit(4)


def _console(*, stderr: bool = False) -> Any:
    from rich.console import Console

    return Console(stderr=stderr)


def _show_warnings_as_lines() -> None:
    """Our own warnings are for the reader, one line each; those of libraries stay as they are."""
    from isoform.errors import IsoformWarning

    default = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, IsoformWarning):
            typer.echo(f"isoform: {message}", err=True)
        else:
            default(message, category, *place, **more)

    warnings.showwarning = show
    warnings.simplefilter("always", IsoformWarning)


def main() -> None:
    """The command `isoform`: a person's mistake is one line and an exit code; ours is a traceback."""
    from isoform.errors import IsoformError

    # Read when torch is loaded. A thread that spins while it waits takes the core from whatever else runs here, and
    # then from the thread that it waits for: steps become ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _show_warnings_as_lines()
    try:
        app()
    except IsoformError as error:
        typer.echo(f"isoform: {error}", err=True)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        typer.echo("isoform: stopped before there was anything to save", err=True)
        raise SystemExit(130) from None
    except BrokenPipeError:
        raise SystemExit(0) from None


if __name__ == "__main__":
    main()
