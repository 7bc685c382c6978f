"""The report in its three forms: it says what the numbers say, it is safe to open, and nothing missing breaks it."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from fixtures.synthetic_study import write_run, write_study
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from isoform import storage
from isoform.errors import ConfigError, DataError, DiskError
from isoform.evaluation.breakdown import Breakdown
from isoform.studies import charts, curves, wording
from isoform.studies.answers import is_right, read_answers
from isoform.studies.curves import arm_colours, stage_curves
from isoform.studies.records import Records
from isoform.studies.report import escape_markdown, render_html, render_markdown, write_report
from isoform.studies.terminal import print_run, print_study, verdict_sentence

TAGS = """html head meta title style body header h1 h2 h3 h4 p nav a main section div span strong b table thead tbody
tr th td svg path line circle rect polygon text bdi ul li figure figcaption code br details summary pre dl
dt dd footer input label"""
ATTRIBUTES = """lang charset http-equiv content name class dir id href scope aria-label aria-hidden role viewbox colspan
data-label d x y x1 x2 y1 y2 cx cy r rx width height points transform text-anchor type name for checked"""
PAYLOADS = [
    "<!--<script>",
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "</style><script>alert(1)</script>",
    "</title><img src=x onerror=alert(1)>",
    "<img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "'><svg/onload=alert(1)>",
    '" onmouseover="alert(1)',
    "' onfocus='alert(1)' autofocus='",
    "<iframe src=javascript:alert(1)>",
    "<a href='javascript:alert(1)'>x</a>",
    "javascript:alert(1)",
    "<base href=//evil.example>",
    "<meta http-equiv=refresh content=0;url=//evil.example>",
    "<link rel=stylesheet href=//evil.example/a.css>",
    "<object data=x></object>",
    "<embed src=x>",
    "<form action=//evil.example><input>",
    "<math><mtext></mtext><mglyph><style><!--</style>",
    "<svg><foreignObject><body onload=alert(1)>",
    "<![CDATA[<script>alert(1)</script>]]>",
    "<?php echo 1 ?>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "&#60;script&#62;",
    "{{ 7 * 7 }}{% raw %}",
    "</pre></details></body></html>",
    "--><script>alert(1)</script><!--",
    "<details open ontoggle=alert(1)>",
    "]]></text></svg><script>alert(1)</script>",
    "<plaintext>",
    "[red]bold[/red] \\[x",
]


class Page(HTMLParser):
    """Everything that a browser would make of the page: tags, attributes, shown text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str | None]] = []
        self.open: list[str] = []
        self.shown: list[str] = []
        self.headings: list[list[str]] = []  # each heading's following text, until the next one
        self.comments: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in {"meta", "br", "input"}:
            self.open.append(tag)
        if tag == "h2":
            self.headings.append([])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.shown.append(data)
            if self.headings and self.open[-1:] != ["h2"] and "footer" not in self.open:
                self.headings[-1].append(data)

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)

    @property
    def text(self) -> str:
        return "".join(self.shown)


def check_page(html: str) -> Page:
    """The page is whole, safe and free of figures that are none."""
    page = Page(html)
    assert not page.open and not page.comments
    assert page.tags <= set(TAGS.split())
    assert {name for _, name, _ in page.attributes} <= set(ATTRIBUTES.split())
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert f'<meta http-equiv="Content-Security-Policy" content="{policy}">' in html
    links = [str(value) for _, name, value in page.attributes if name == "href"]
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert all(link.startswith("#") and link[1:] in ids for link in links)
    assert len(set(ids)) == len(ids)
    assert all("".join(words).strip() for words in page.headings), "an empty section"
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert not re.search(r"\b(nan|inf|None|undefined)\b", page.text), "a figure that is none"
    assert not re.search(r'="[^"]*\bnan\b', html)
    return page


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("studies") / "study")


@pytest.fixture
def own_study(study: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(study, tmp_path / "own"))


def change(folder: Path, **changes: Any) -> dict[str, Any]:
    results = {**storage.read_json(folder / "results.json"), **changes}
    storage.write_json(folder / "results.json", results)
    return results


# --------------------------------------------------------------------------------------------------------------- words


def question(**changes: Any) -> dict[str, Any]:
    base = {"pair": ["learned", "rope"], "metric": "exact_match", "split": "dev", "difference": 0.012, "low": -0.02}
    base |= {"high": 0.044, "p": 0.31, "p_adjusted": 0.31, "verdict": "cannot-tell", "smallest_difference": 0.041}
    return base | {"seeds_needed": 11, "num_seeds": 4, "num_examples": 500, "margin": None, "notes": []} | changes


def said(asked: dict[str, Any], **results: Any) -> str:
    return verdict_sentence(asked, {"questions": [asked, asked], **results}).replace("\N{NO-BREAK SPACE}", " ")


def test_verdicts_in_words() -> None:
    assert said(question()) == (
        "We cannot tell learned and rope apart on exact match on dev: the difference is +1.2 points (95 % interval "
        "−2.0 to +4.4, p = 0.31 after Holm over 2 questions; 4 seeds × 500 examples). With these seeds the study could "
        "have seen 4.1 points; about 11 seeds would be needed to settle a difference of this size."
    )
    better = question(verdict="better", difference=0.382, low=0.33, high=0.435, p_adjusted=0.0004)
    assert said(better) == (
        "rope is better than learned: +38.2 points of exact match on dev (95 % interval +33.0 to +43.5, p = 0.0004 "
        "after Holm over 2 questions; 4 seeds × 500 examples)."
    )
    worse = question(verdict="worse", metric="loss", difference=0.5, low=0.4, high=0.6, p_adjusted=1e-9)
    assert said(worse).startswith(
        "rope is worse than learned: +0.500 nats of loss on dev, lower is better (95 % interval"
    )
    assert "+0.400 to +0.600, p < 0.0001 after" in said(worse)
    named = said(worse | {"metric": "bits_per_byte"})
    assert named.startswith("rope is worse than learned: +0.500 bits per byte on dev, lower is better (95")
    equivalent = question(verdict="equivalent", difference=0.001, low=-0.005, high=0.007, margin=0.02)
    assert "learned and rope are equivalent on exact match on dev: the difference is +0.1 points" in said(equivalent)
    assert "within the margin of ±2.0 points that was set beforehand" in said(equivalent)


def test_one_seed_and_missing_parts_in_words() -> None:
    assert "these two models, not of the methods" in said(question(num_seeds=1))
    assert "these two models" not in said(question(num_seeds=2))
    assert (
        said(question(difference=None))
        == "learned and rope were not compared on exact match on dev: no difference could be computed."
    )
    bare = question(low=None, high=None, p=None, p_adjusted=None, num_seeds=None, num_examples=None)
    assert "(no interval)" in said(bare | {"seeds_needed": None, "smallest_difference": None})
    assert "seeds would be needed" not in said(question(seeds_needed=3)), "fewer than there are"


def test_warnings_stand_in_the_verdicts_own_line() -> None:
    audit = [
        {"check": "selection artefact", "level": "warn", "message": "the verdict flips", "pair": ["rope", "learned"]},
        {"check": "schedule", "level": "warn", "message": "rises after its peak", "pair": ["a", "rope"]},
        {"check": "terms", "level": "inform", "message": "same tokens", "pair": ["learned", "rope"]},
    ]
    sentence = said(question(notes=["one seed diverged."]), audit=audit)
    assert sentence.count("Caution: the verdict flips.") == 1
    assert sentence.count("Caution: one seed diverged.") == 1
    assert said(question(notes=["the verdict flips"]), audit=audit).count("the verdict flips") == 1
    assert "peak" not in sentence and "tokens" not in sentence


@pytest.mark.parametrize(
    ("metric", "value", "expected"),
    [
        ("exact_match", 0.262, "26.2 %"),
        ("macro_f1", 1.0, "100.0 %"),
        ("loss", 0.5512, "0.551 nats"),
        ("bits_per_byte", 2.13, "2.130 bits"),
        ("perplexity", 1234.5, "1,234.50"),
        ("perplexity", 4.2e9, "4.2e+09"),
        ("bleu", 31.4, "31.400"),
        ("accuracy", None, "–"),
        ("accuracy", float("nan"), "–"),
        ("loss", -0.0, "0.000 nats"),
    ],
)
def test_values_have_their_units(metric: str, value: Any, expected: str) -> None:
    assert wording.value_text(value, metric).replace("\N{NO-BREAK SPACE}", " ") == expected


def test_neighbouring_ticks_are_told_apart():
    rates = [2e-4, 1.5e-4, 1e-4, 5e-5, 0.0, 0.02]
    assert [curves._short(rate) for rate in rates] == ["2e-4", "1.5e-4", "1e-4", "5e-5", "0", "0.02"]


def test_a_share_of_answers_is_told_in_points():
    assert wording.difference_text(0.227, "ended") == "+22.7 points"
    assert wording.metric_words("ended") == "answers ended"


def test_a_metric_is_written_as_its_field_writes_it():
    assert [wording.metric_words(name) for name in ("bits_per_byte", "macro_f1", "chrf")] == [
        "bits per byte",
        "macro F1",
        "chrF",
    ]
    assert [wording.capitalised(text) for text in ("loss on dev", "chrF on dev")] == ["Loss on dev", "chrF on dev"]


def test_small_numbers() -> None:
    assert wording.signed_text(-0.0001, "accuracy") == "0.0" == wording.signed_text(0.0001, "accuracy")
    assert wording.difference_decimals({"metric": "accuracy", "low": 0.0001, "high": 0.0004}) == 3
    assert [wording.p_bare(p) for p in (0.5, 0.0213, 0.00043, 1e-7, None)] == [
        "0.50",
        "0.021",
        "0.0004",
        "< 0.0001",
        "–",
    ]
    counts = [
        wording.count_text(value).replace("\N{NO-BREAK SPACE}", " ") for value in (0, 160, 9_999, 655_360, 3_323_392)
    ]
    assert counts == ["0", "160", "9,999", "655 k", "3.32 M"]
    times = [wording.duration_text(value).replace("\N{NO-BREAK SPACE}", " ") for value in (4.21, 42, 185, 7_800, None)]
    assert times == ["4.2 s", "42 s", "3 min 05 s", "2 h 10 min", "–"]


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=st.characters(), max_size=40))
def test_cleaned_text_can_be_written_and_holds_no_controls(text: str) -> None:
    cleaned = wording.clean(text)
    cleaned.encode("utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", cleaned)
    assert all(character in cleaned for character in text if character.isalnum() and character.isascii())


# -------------------------------------------------------------------------------------------------------------- charts

finite_floats = st.floats(-1e6, 1e6)


@settings(max_examples=60, deadline=None)
@given(st.lists(finite_floats, min_size=3, max_size=3))
def test_rows_stay_inside_their_field(values: list[float]) -> None:
    low, value, high = sorted(values)
    domain = charts.span([low, value, high], (0.0,))
    svg = ElementTree.fromstring(
        str(charts.interval_row(value, low, high, domain, "better", 'a "label" <b>', margin=1e9))
    )
    strip = ElementTree.fromstring(str(charts.strip_row(values, value, low, high, domain, "x", values)))
    for node in [*svg.iter(), *strip.iter()]:
        places = [float(node.attrib[name]) for name in ("x", "x1", "x2", "cx") if name in node.attrib]
        assert all(0 <= place <= charts.ROW_WIDTH for place in places)
        assert float(node.attrib.get("width", 0)) >= 0


@settings(max_examples=60, deadline=None)
@given(finite_floats, finite_floats, st.integers(2, 8))
def test_ticks_are_round_and_inside(one: float, other: float, count: int) -> None:
    low, high = charts.span([one, other])
    ticks = charts.nice_ticks(low, high, count)
    slack = (high - low) * 1e-6
    assert all(low - slack <= tick <= high + slack for tick in ticks)
    assert len(ticks) <= count + 2


def test_curves_leave_out_what_is_not_a_number() -> None:
    x = np.arange(5.0)
    y = np.array([3.0, np.nan, 2.0, np.inf, 1.0])
    svg = charts.curves([charts.Series("a", 0, x, y)], "loss", "steps", "nats", str, str, log_y=True)
    assert svg is not None and "nan" not in svg and "inf" not in svg
    assert ElementTree.fromstring(str(svg)).find("path").attrib["d"].count("L") == 2
    assert charts.curves([charts.Series("a", 0, x, np.full(5, np.nan))], "", "", "", str, str) is None
    flat = charts.curves([charts.Series("a", 0, x, np.zeros(5))], "", "", "", str, str)
    assert flat is not None and ">-" not in flat, "a share of nothing has no negative axis"


# ------------------------------------------------------------------------------------------------------------ the page


def test_the_page_says_what_the_study_found(study: Path) -> None:
    html = render_html(study)
    page = check_page(html)
    results = Records(study).results
    for asked in results["questions"]:
        words = wording.verdict_words(asked, results)
        assert words.claim in page.text and words.evidence in page.text
        assert all(caution in page.text for caution in words.cautions)
    order = (
        "What was found, Beside the published, Differences and, The arms, Learning curves, Predictions side, Audit, "
    )
    order += "What each arm does, Data, What it cost, How to run it again, How to read a verdict"
    places = [html.index(f"<h2>{heading}") for heading in order.split(", ")]
    assert places == sorted(places)
    assert results["command"] in page.text and "model.position.kind = rope" in page.text
    assert len(html.encode()) < 300_000
    assert render_html(study) == html, "the same folder, the same page"


def test_published_figures_stand_beside_ours(study: Path) -> None:
    text = check_page(render_html(study)).text
    assert "20.6\N{NO-BREAK SPACE}%" in text and "published run, one seed" in text and "never ran" in text


def test_audit_levels_have_signs_and_words(study: Path) -> None:
    text = render_html(study)
    for level, (sign, word) in wording.LEVELS.items():
        if level != "refuse":
            assert f'<span class="sign" aria-hidden="true">{sign}</span>{word}' in text


def test_a_refusal_comes_before_everything(own_study: Path) -> None:
    row = {
        "check": "dead option",
        "level": "refuse",
        "message": "model.dropout changes nothing",
        "pair": ["scratch", "pretrained"],
    }
    change(own_study, audit=[row])
    html = render_html(own_study)
    assert html.index("The audit refuses the comparison of scratch and pretrained") < html.index("What was found")
    assert "Caution:</b> model.dropout changes nothing." in html


@pytest.mark.parametrize("payload", PAYLOADS)
def test_run_text_is_shown_and_never_obeyed(study: Path, tmp_path: Path, payload: str) -> None:
    results = storage.read_json(study / "results.json")
    arm, run = results["arms"][2], results["arms"][2]["runs"][0]
    folder = tmp_path / "bad"
    shutil.copytree(study / run["final"], folder / "run")
    run["final"] = run["stages"][-1]["folder"] = "run"
    arm |= {"name": payload, "runs": [run], "differences": {payload: payload}, "stages": ["pretrain", payload]}
    run["stages"][-1]["name"] = payload
    results |= {"name": payload, "question": payload, "command": payload, "precision": payload, "finished": payload}
    results |= {
        "arms": [arm],
        "questions": [question(pair=[payload, payload], split=payload, notes=[payload], published=payload)],
    }
    results |= {
        "published": [{"arm": payload, "metric": payload, "split": payload, "source": payload, "note": payload}]
    }
    results |= {
        "audit": [
            {"check": payload, "level": level, "message": payload, "pair": [payload, "a"]}
            for level in ("refuse", "odd")
        ]
    }
    results |= {"data": {payload: {payload: payload}, "overlap": {payload: payload}}, "machine": {payload: payload}}
    results |= {"code": {"version": payload, "packages": {payload: payload}}}
    storage.write_json(folder / "results.json", results)
    storage.write_text(folder / "run" / "config.yaml", payload)
    row = {"id": payload, "split": "dev", "input": payload, "gold": payload, "prediction": payload, "stats": {}}
    storage.write_text(folder / "run" / "predictions.jsonl", storage.json_line(row))
    page = check_page(render_html(folder))
    assert page.text.count(payload) > 20, "shown as it is"
    markdown = render_markdown(folder)
    assert not re.search(r"(?<!\\)<|\{\{ 7", markdown)
    console = Console(file=io.StringIO(), width=100)
    print_study(Records(folder).results, console)
    assert payload in console.file.getvalue()


def test_odd_characters(own_study: Path) -> None:
    odd = "nul\x00 escape\x1b[31m bidi\u202e lone\ud800 حرف 東京 e\u0301"
    text = json.dumps({**storage.read_json(own_study / "results.json"), "name": odd, "question": "\ud800"})
    storage.write_text(own_study / "results.json", text)
    path = write_report(own_study)
    written = path.read_text(encoding="utf-8")
    assert "حرف 東京" in written and "\x1b" not in written and "\x00" not in written and "\u202e" not in written
    assert "␀" in written


def keys_to_lose(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key of the results, once for each kind of place."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*path, key)
            if key not in ("packages", "machine", "data", "tuning"):
                yield from keys_to_lose(inner, (*path, key))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        yield from keys_to_lose(value[0], (*path, 0))


@pytest.mark.parametrize("instead", ["absent", None, []])
def test_nothing_that_is_missing_breaks_the_page(tmp_path: Path, instead: Any) -> None:
    folder = write_study(tmp_path / "tiny", {"a": 0.1, "b": 0.5}, 1, 1, num_steps=50)
    whole = (folder / "results.json").read_text(encoding="utf-8")
    for name in (folder / "runs").rglob("*.jsonl"):
        name.write_text("".join(name.read_text(encoding="utf-8").splitlines(True)[:6]), encoding="utf-8")
    for path in keys_to_lose(json.loads(whole)):
        results = json.loads(whole)
        place = results
        for key in path[:-1]:
            place = place[key]
        if instead == "absent":
            del place[path[-1]]
        elif instead is None:
            place[path[-1]] = None
        elif isinstance(place[path[-1]], list | dict):
            place[path[-1]] = type(place[path[-1]])()
        else:
            continue
        (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
        check_page(render_html(folder))
        print_study(results, Console(file=io.StringIO()))


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl", "predictions.jsonl", "config.yaml", "eval.json"])
@pytest.mark.parametrize(
    "content", [None, "", '{"step": 1, "loss": NaN, "los', '[1, "x"]\n{"step": "x", "rows": [3], "stats": 4}\n{bad\n']
)
def test_damaged_run_files_leave_a_page(tmp_path: Path, name: str, content: str | None) -> None:
    folder = write_study(tmp_path / "study", {"a": 0.1, "b": 0.5}, 1, 1, num_steps=50)
    for path in folder.rglob(name):
        path.unlink()
        if content is not None:
            path.write_text(content, encoding="utf-8")
    page = check_page(render_html(folder))
    assert ("A file is damaged" in page.text) == (name.endswith(".jsonl") and "{bad" in (content or ""))


@pytest.mark.parametrize(("num_arms", "num_seeds", "num_questions"), [(30, 1, 29), (1, 1, 0), (2, 2, 0)])
def test_many_arms_one_arm_no_question(tmp_path: Path, num_arms: int, num_seeds: int, num_questions: int) -> None:
    arms = {f"arm-{index}" + "-of-a-very-long-name" * (index % 3): 0.1 + index / 50 for index in range(num_arms)}
    folder = write_study(tmp_path / "study", arms, num_seeds, num_questions, num_steps=100)
    html = render_html(folder)
    page = check_page(html)
    assert all(name in page.text for name in arms)
    assert ("What was found" in html) == (num_questions > 0) == ("How to read a verdict" in html)
    assert len(html.encode()) < 300_000
    colours = list(arm_colours(Records(folder).results).values())
    assert sum(colour is not None for colour in colours) == min(num_arms, charts.NUM_COLOURS)


def test_a_single_run_has_its_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    page = check_page(render_html(folder))
    assert (
        "What was measured" in page.text
        and "2.134\N{NO-BREAK SPACE}bits" in page.text
        and "2.118 to 2.151" in page.text
    )
    assert "Training loss" in page.text and "Learning rate" in page.text and "the warm-up ends at step 60" in page.text
    assert "learning_rate: 0.0006" in page.text and "verdict" not in page.text.lower()
    assert "shakespeare-char" in page.text and "isoform train config.yaml" in page.text and "onnx" not in page.text
    assert "bits per byte" in render_markdown(folder)


def write_breakdown(folder: Path, labels: list[str], temperature: float | None = 1.4, text: str = "a text") -> Path:
    """What 300 answers leave behind, a third of them wrong; on dev the temperature was fitted."""
    rng = np.random.default_rng(0)
    splits = {}
    for split, known in (("dev", None), ("test", temperature)):
        watch = Breakdown(labels, known)
        for at in range(300):
            shares = rng.dirichlet(np.full(len(labels), 0.4))
            gold = int(shares.argmax()) if at % 3 else at % len(labels)
            stats = {f"gold.{index}": float(index == gold) for index in range(len(labels))}
            stats |= {f"probability.{index}": float(share) for index, share in enumerate(shares)}
            watch.add({"id": f"d{at}", "input": f"{text} {at}" + " word" * (at % 9)}, stats)
        splits[split] = watch.values()
    fitted_on = None if temperature is None else "dev"
    storage.write_json(
        folder / "breakdown.json", {"temperature": temperature, "fitted_on": fitted_on, "splits": splits}
    )
    return folder


def test_a_classifiers_errors_can_be_looked_through(tmp_path: Path) -> None:
    folder = write_breakdown(write_run(tmp_path / "run"), ["bad", "good", "so-so"])
    html = render_html(folder)
    page = check_page(html)
    text = page.text.replace("\N{NO-BREAK SPACE}", " ")
    assert "Where it errs" in text and text.count("300 examples of") == 2
    assert "With the scores divided by the temperature 1.4, fitted on dev:" in text
    assert "The temperature 1.4 was fitted on these very examples" in text
    part = storage.read_json(folder / "breakdown.json")["splits"]["test"]
    assert f"{part['confusion'][1][0]}" in text and f"{100 * part['slices'][0]['accuracy']:.1f}" in text
    # Each mistake can be picked by its pair of labels, by the style sheet alone.
    picks = {value for tag, name, value in page.attributes if tag == "input" and name == "class"}
    rows = [value for tag, name, value in page.attributes if tag == "tr" and name == "class"]
    assert picks and {pick.replace("pick", "pair") for pick in picks} <= set(rows)
    assert all(f".{pick}:checked ~ .wide tbody tr:not(.{pick.replace('pick', 'pair')})" in html for pick in picks)
    markdown = render_markdown(folder)
    assert "| expected | said bad | said good | said so-so | all |" in markdown and "| label: good |" in markdown


@pytest.mark.parametrize("temperature", [None, 0.5])
@pytest.mark.parametrize("labels", [["0", "1"], [f"label {at}" for at in range(40)]])
def test_errors_of_any_number_of_labels(temperature: float | None, labels: list[str], tmp_path: Path) -> None:
    folder = write_breakdown(write_run(tmp_path / "run"), labels, temperature)
    page = check_page(render_html(folder))
    assert ("The most frequent confusions" in page.text) == (len(labels) > 12)
    assert ("No temperature" in page.text) == (temperature is None)
    assert "Where it errs" in render_markdown(folder)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_the_text_of_a_mistake_is_shown_and_never_obeyed(payload: str, tmp_path: Path) -> None:
    folder = write_breakdown(write_run(tmp_path / "run"), ["bad", payload], text=payload)
    assert payload[:20] in check_page(render_html(folder)).text


@pytest.mark.parametrize(
    "damage", ["{}", "[]", "{bad", '{"splits": {"dev": {"labels": ["a"]}}}', '{"splits": {"dev": 3}}']
)
def test_a_damaged_breakdown_leaves_a_page(damage: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "breakdown.json").write_text(damage)
    assert "Where it errs" not in check_page(render_html(folder)).text


def test_the_arms_of_a_study_show_where_their_first_seed_errs(own_study: Path) -> None:
    for arm in storage.read_json(own_study / "results.json")["arms"]:
        write_breakdown(own_study / arm["runs"][0]["final"], ["bad", "good"])
    text = check_page(render_html(own_study)).text
    assert "Where the arms err" in text and text.count("300 examples of dev") == 3
    assert "The surest 30 of" in text


def test_the_data_of_every_stage(study: Path, own_study: Path) -> None:
    text = check_page(render_html(study)).text
    assert "2,937" in text and "1 exact, 0 near, such as “Where was George Stone born?”" in text
    assert "tokens dropped" in text and "cecb1b705c6540c2" not in text
    files = {"builtin:a": ".jsonl 0ac9d88a", "b.tsv": ".tsv 6cc0b8c5"}
    change(own_study, data={"one": {"datasets": {}, "splits": {"sources": {"train": files}}}})
    page = check_page(render_html(own_study))
    assert all(word in page.text for word in ("builtin:a", "b.tsv", "0ac9d88a", "6cc0b8c5"))
    assert "{" not in page.text and "| train | b.tsv | 6cc0b8c5 |" in render_markdown(own_study)
    change(own_study, data={"train": {"documents": 77_777}, "overlap": {"exact": 3}})
    text = check_page(render_html(own_study)).text
    assert "77,777" in text and "overlap, exact" in text


def test_the_cost_says_how_many_ran_at_a_time_and_which_tokens_are_counted(own_study: Path) -> None:
    change(own_study, jobs=None)
    assert "at a time" not in check_page(render_html(own_study)).text
    storage.write_json(own_study / "manifest.json", {"jobs": 2})
    text = check_page(render_html(own_study)).text
    assert ", 2 at a time" in text, "an older study says so in its manifest"
    change(own_study, jobs=3)
    text = check_page(render_html(own_study)).text
    assert ", 3 at a time" in text and "target tokens" in text and "tokens trained on" not in text


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither a study"):
        render_html(tmp_path)
    (tmp_path / "results.json").write_text("{torn", encoding="utf-8")
    with pytest.raises(DataError, match=r"results\.json"):
        render_html(tmp_path)
    with pytest.raises(ConfigError, match="html or md"):
        write_report(tmp_path, "pdf")  # type: ignore[arg-type]


def test_a_report_is_written_whole_or_not_at_all(own_study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_report(own_study)
    before = path.read_bytes()
    change(own_study, name="another name")

    def full_disk(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(DiskError, match=r"report\.html"):
        write_report(own_study)
    assert path.read_bytes() == before and not list(own_study.glob(".*.tmp"))


def test_a_report_is_made_without_torch() -> None:
    code = "import sys, isoform.studies.report, isoform.studies.terminal; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


# --------------------------------------------------------------------------------------------------- curves and answers


def test_a_step_repeated_after_a_resume_counts_once(tmp_path: Path) -> None:
    rows = [
        {"step": step, "tokens": step * 10, "loss": loss} for step, loss in ((1, 5.0), (2, 9.0), (2, 4.0), (3, None))
    ]
    storage.write_text(tmp_path / "metrics.jsonl", "".join(map(storage.json_line, rows)) + '{"step": 4, "lo')
    columns = Records(tmp_path).training_columns(".")
    assert columns["step"].tolist() == [1, 2, 3]
    assert columns["loss"][:2].tolist() == [5.0, 4.0] and np.isnan(columns["loss"][2])
    assert "lr" not in columns


def test_a_shared_stage_is_one_line_and_stages_stand_in_order(own_study: Path) -> None:
    results = storage.read_json(own_study / "results.json")
    for run, other in zip(results["arms"][2]["runs"], results["arms"][1]["runs"], strict=True):
        run["stages"][0] = other["stages"][0]
    storage.write_json(own_study / "results.json", results)
    found = stage_curves(Records(own_study))
    assert [stage.stage for stage in found] == ["pretrain", "finetune"]
    assert [name for _, name in found[0].legend] == ["pretrained and pretrained-rope"]
    assert [name for _, name in found[1].legend] == ["scratch", "pretrained", "pretrained-rope"]
    assert [chart.title for chart in found[1].charts] == [
        "Training loss",
        "Exact match on holdout",
        "Loss on holdout",
        "Learning rate",
    ]


def test_disagreements_come_first_and_pairs_are_counted(study: Path) -> None:
    results = Records(study).results
    answers = read_answers(Records(study))
    assert answers is not None and answers.num_examples == 120 and answers.judged
    mixed = [len({answer.right for answer in example.answers}) > 1 for example in answers.examples]
    assert mixed == sorted(mixed, reverse=True) and mixed[0]
    for counted in answers.agreements:
        assert counted.total == 4 * 120
        runs = {arm["name"]: arm["runs"] for arm in results["arms"]}
        right = [
            sum(run["metrics"][0]["value"] for run in runs[name]) * 120 for name in (counted.first, counted.second)
        ]
        assert [counted.both + counted.only_first, counted.both + counted.only_second] == pytest.approx(right)


def test_a_run_shows_the_split_that_was_scored_last(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    names = [(split, number) for split in ("holdout", "dev") for number in range(3)]
    rows = [{"id": f"{split} {number}", "split": split, "prediction": "x", "gold": "x"} for split, number in names]
    storage.write_text(folder / "predictions.jsonl", "".join(map(storage.json_line, rows)))
    answers = read_answers(Records(folder))
    assert answers is not None and (answers.split, answers.num_examples) == ("dev", 3)


def test_what_counts_as_right() -> None:
    row = {"gold": "Paris", "prediction": "Paris"}
    assert is_right(row, "exact_match") is True and is_right(row | {"prediction": "paris"}, "exact_match") is False
    assert is_right(row | {"stats": {"correct": 0}}, "exact_match") is False
    assert is_right(row | {"stats": {"exact_match": True}, "prediction": "x"}, "exact_match") is True
    assert is_right({"prediction": "x"}, "exact_match") is None


# --------------------------------------------------------------------------------------------- markdown and terminal


def test_markdown_says_the_same(study: Path) -> None:
    text = render_markdown(study)
    results = Records(study).results
    for asked in results["questions"]:
        assert escape_markdown(wording.verdict_words(asked, results).evidence) in text
    widths = {}
    for line in text.splitlines():
        if line.startswith("|"):
            columns = len(re.findall(r"(?<!\\)\|", line))
            assert columns == widths.setdefault("now", columns), line
        else:
            widths.clear()
    assert write_report(study, "md").read_text(encoding="utf-8") == text


def test_markdown_escapes_what_means_something_and_no_more() -> None:
    assert escape_markdown("see (train.max_epochs), at last!") == "see (train.max_epochs), at last!"
    assert escape_markdown("_a_ *b* [c](d) x_ __y") == r"\_a\_ \*b\* \[c\](d) x\_ \_\_y"
    assert escape_markdown("# a") == r"\# a" and escape_markdown("a #1") == "a #1"
    assert escape_markdown("1. a") == r"1\. a" and escape_markdown("1) a") == r"1\) a"
    assert escape_markdown("{a} {{ b }} {% c %}") == r"{a} \{\{ b }} \{% c %}"


def printed(study: Path, **options: Any) -> str:
    console = Console(file=io.StringIO(), **options)
    print_study(Records(study).results, console)
    return console.file.getvalue()


def test_a_pipe_gets_plain_lines(study: Path) -> None:
    text = printed(study, width=40)
    assert "\x1b" not in text and "│" not in text
    results = Records(study).results
    for asked in results["questions"]:
        assert verdict_sentence(asked, results).replace("\N{NO-BREAK SPACE}", " ") in text
    assert sum("points" in line for line in text.splitlines()) == 2, "one line a verdict"


def test_a_screen_gets_colour_and_a_poor_one_ascii(study: Path) -> None:
    assert "\x1b[" in printed(study, force_terminal=True, width=80)
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    print_study(Records(study).results, Console(file=file))
    file.flush()
    assert b"-1.9 to +4.5" in raw.getvalue() and b"4 seeds x 120" in raw.getvalue()


def test_a_run_in_the_terminal(tmp_path: Path) -> None:
    console = Console(file=io.StringIO())
    print_run(write_run(tmp_path / "run"), console)
    text = console.file.getvalue()
    assert "bits per byte  dev    2.134 bits  2.118 to 2.151" in text and "steps: 600" in text
