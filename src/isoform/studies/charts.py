"""Inline SVG charts: an interval on an axis, a strip of dots, curves with bands. No script, no file, no font.

Colours are CSS classes (`s0` .. `s6` for series, `better`, ... for verdicts), so that one style sheet serves light,
dark and paper. Every figure carries its content as words in `aria-label`; series also differ by dashes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup, escape

from isoform.studies.wording import clean

if TYPE_CHECKING:
    import numpy.typing as npt

    Column = npt.NDArray[np.float64]

NUM_COLOURS = 7
_TICK_MANTISSAS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Scale:
    """Maps data `low..high` to pixels `start..end`, linearly or by the logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self._inner(self.low), self._inner(self.high)
        return self.start + (self._inner(value) - low) / (high - low) * (self.end - self.start)

    def _inner(self, value: float) -> float:
        return math.log(max(value, 1e-300)) if self.log else value

    def ticks(self, count: int) -> list[float]:
        return log_ticks(self.low, self.high, count) if self.log else nice_ticks(self.low, self.high, count)


@dataclass(frozen=True)
class Series:
    """One line of a chart: x, y `(points,)` and, over seeds, the lowest and highest. `colour` None is drawn in grey."""

    name: str
    colour: int | None
    x: Column
    y: Column
    low: Column | None = None
    high: Column | None = None


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values inside [low, high], about `count` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(mantissa * power for mantissa in _TICK_MANTISSAS if mantissa * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def log_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Values 1, 2, 5 times powers of ten inside [low, high], thinned to powers where there are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [m * 10.0**power for power in powers for m in mantissas if low <= m * 10.0**power <= high]
        if len(ticks) <= count + 2:
            break
    return ticks if len(ticks) > 1 else nice_ticks(low, high, count)


def span(values: Sequence[float], include: Sequence[float] = (), pad_fraction: float = 0.06) -> tuple[float, float]:
    """The range of the finite values, a little wider; never empty."""
    finite = [value for value in (*values, *include) if math.isfinite(value)]
    if not finite:
        return 0.0, 1.0
    low, high = min(finite), max(finite)
    pad = (high - low) * pad_fraction or abs(high) * 0.1 or 0.1
    return low - pad, high + pad


# ------------------------------------------------------------------------------------------ intervals and strips

ROW_WIDTH, ROW_HEIGHT, ROW_EDGE = 340, 26, 14


def interval_row(
    value: float,
    low: float | None,
    high: float | None,
    domain: tuple[float, float],
    verdict: str,
    label: str,
    margin: float | None = None,
) -> Markup:
    """One row of a forest plot: the difference, its interval, the line of no difference, the margin as a pale field."""
    x, middle = _row_scale(domain), ROW_HEIGHT / 2
    parts = []
    if margin is not None:
        left, right = x(max(-margin, domain[0])), x(min(margin, domain[1]))
        parts.append(f'<rect class="margin" x="{left:.1f}" y="0" width="{right - left:.1f}" height="{ROW_HEIGHT}"/>')
    if domain[0] <= 0 <= domain[1]:
        parts.append(f'<line class="zero" x1="{x(0):.1f}" x2="{x(0):.1f}" y1="0" y2="{ROW_HEIGHT}"/>')
    css = str(escape(verdict))
    if low is not None and high is not None:
        parts.append(f'<line class="whisker {css}" x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{middle}" y2="{middle}"/>')
        for end in (low, high):
            parts.append(
                f'<line class="whisker {css}" x1="{x(end):.1f}" x2="{x(end):.1f}" y1="{middle - 5}" y2="{middle + 5}"/>'
            )
    parts.append(f'<circle class="dot {css}" cx="{x(value):.1f}" cy="{middle}" r="4.5"/>')
    return _svg(ROW_WIDTH, ROW_HEIGHT, label, parts, "row")


def strip_row(
    values: Sequence[float],
    mean: float | None,
    low: float | None,
    high: float | None,
    domain: tuple[float, float],
    label: str,
    published: Sequence[float] = (),
) -> Markup:
    """Each seed's value as a ring, the mean as an upright bar on its interval, published figures as diamonds."""
    x, middle = _row_scale(domain), ROW_HEIGHT / 2
    parts = [f'<line class="rail" x1="{ROW_EDGE}" x2="{ROW_WIDTH - ROW_EDGE}" y1="{middle}" y2="{middle}"/>']
    if low is not None and high is not None:
        width = max(x(high) - x(low), 1.0)
        parts.append(
            f'<rect class="interval" x="{x(low):.1f}" y="{middle - 5}" width="{width:.1f}" height="10" rx="2"/>'
        )
    parts += [f'<circle class="seed" cx="{x(value):.1f}" cy="{middle}" r="4"/>' for value in values]
    if mean is not None:
        parts.append(f'<line class="mean" x1="{x(mean):.1f}" x2="{x(mean):.1f}" y1="{middle - 9}" y2="{middle + 9}"/>')
    for centre in map(x, published):
        corners = (
            f"{centre:.1f},{middle - 6} {centre + 6:.1f},{middle} {centre:.1f},{middle + 6} {centre - 6:.1f},{middle}"
        )
        parts.append(f'<polygon class="published" points="{corners}"/>')
    return _svg(ROW_WIDTH, ROW_HEIGHT, label, parts, "row")


def axis_row(domain: tuple[float, float], text: Callable[[float], str], label: str) -> Markup:
    """The axis below rows that share a domain."""
    x = _row_scale(domain)
    parts = [f'<line class="axis" x1="{ROW_EDGE}" x2="{ROW_WIDTH - ROW_EDGE}" y1="1" y2="1"/>']
    for tick in nice_ticks(*domain, 4):
        place = x(tick)
        parts.append(f'<line class="axis" x1="{place:.1f}" x2="{place:.1f}" y1="1" y2="5"/>')
        words = text(tick)
        half = 3.3 * len(words)
        parts.append(_text(min(max(place, half), ROW_WIDTH - half), 17, words, "middle"))
    return _svg(ROW_WIDTH, 20, label, parts, "row")


def _row_scale(domain: tuple[float, float]) -> Scale:
    return Scale(domain[0], domain[1], ROW_EDGE, ROW_WIDTH - ROW_EDGE)


# -------------------------------------------------------------------------------------------------------- reliability

SQUARE, SQUARE_LEFT = 300, 46
# Radius of the dot that stands for every example, and the least.
LARGEST_DOT, SMALLEST_DOT = 13.0, 2.5


def reliability(
    plain: Sequence[tuple[float, float, int]], scaled: Sequence[tuple[float, float, int]], label: str
) -> Markup:
    """Share of right answers over confidence: a dot a bin, by area as large as it has examples, on a line.

    plain, scaled: (confidence, accuracy, examples) of each bin; the dotted line is where both are equal.
    """
    low = min([min(confidence, accuracy) for confidence, accuracy, _ in (*plain, *scaled)], default=0.0)
    start = math.floor(10 * low) / 10 if low < 1 else 0.9
    x = Scale(start, 1.0, SQUARE_LEFT, SQUARE - 16)
    y = Scale(start, 1.0, SQUARE - 40, 16)
    parts = []
    for tick in nice_ticks(start, 1.0, 5):
        across, up, words = x(tick), y(tick), f"{100 * tick:.4g}"
        parts.append(f'<line class="grid" x1="{SQUARE_LEFT}" x2="{SQUARE - 16}" y1="{up:.1f}" y2="{up:.1f}"/>')
        parts.append(_text(SQUARE_LEFT - 6, up + 4, words, "end"))
        parts.append(_text(across, SQUARE - 24, words, "middle"))
    parts.append(f'<line class="zero" x1="{x(start)}" x2="{x(1)}" y1="{y(start)}" y2="{y(1)}"/>')
    parts.append(_text((SQUARE_LEFT + SQUARE - 16) / 2, SQUARE - 6, "confidence, %", "middle"))
    turned = f'transform="translate(12 {(SQUARE - 24) / 2:.0f}) rotate(-90)" text-anchor="middle"'
    parts.append(f'<text class="label" {turned}>right, %</text>')
    total = max(1, sum(number for *_, number in plain))
    for colour, bins in ((0, plain), (1, scaled)):
        places = [(x(confidence), y(accuracy), number) for confidence, accuracy, number in bins]
        if len(places) > 1:
            parts.append(
                f'<path class="line {_css(colour)}" d="M{"L".join(f"{a:.1f} {b:.1f}" for a, b, _ in places)}"/>'
            )
        for across, up, number in places:
            radius = max(SMALLEST_DOT, LARGEST_DOT * math.sqrt(number / total))
            title = f"<title>{number:,} examples</title>"
            parts.append(
                f'<circle class="bin {_css(colour)}" cx="{across:.1f}" cy="{up:.1f}" r="{radius:.1f}">{title}</circle>'
            )
    return _svg(SQUARE, SQUARE, label, parts, "square")


# ------------------------------------------------------------------------------------------------------------- curves

WIDTH, HEIGHT = 440, 250
# Room on the left for ticks of seven characters beside the turned label.
LEFT, RIGHT, TOP, BOTTOM = 76, 12, 12, 40


def curves(
    series: Sequence[Series],
    label: str,
    x_label: str,
    y_label: str,
    x_text: Callable[[float], str],
    y_text: Callable[[float], str],
    log_y: bool = False,
) -> Markup | None:
    """Lines with bands on shared axes, grey ones below; None where there is nothing to draw."""
    drawn = [kept for kept in map(_finite, series) if len(kept.x) > 1]
    if not drawn:
        return None
    every_y = np.concatenate([side for line in drawn for side in (line.y, line.low, line.high) if side is not None])
    log_y = log_y and every_y.min() > 0
    low, high = _log_span(every_y) if log_y else span((float(every_y.min()), float(every_y.max())))
    if not log_y and every_y.min() >= 0 and (low < 0 or every_y.min() < 0.4 * every_y.max()):
        low = 0.0
    x_high = max(float(line.x.max()) for line in drawn)
    x = Scale(min(0.0, *(float(line.x.min()) for line in drawn)), x_high or 1.0, LEFT, WIDTH - RIGHT)
    y = Scale(low, high, HEIGHT - BOTTOM, TOP, log_y)
    parts = _frame(x, y, x_label, y_label, x_text, y_text)
    ordered = sorted(drawn, key=lambda line: line.colour is not None)
    parts += [_band(line, x, y) for line in ordered if line.low is not None and line.colour is not None]
    parts += [_line(line, x, y) for line in ordered]
    return _svg(WIDTH, HEIGHT, label, parts, "chart")


def swatch(colour: int | None) -> Markup:
    """A short piece of a series' line, for a legend."""
    path = f'<path class="line {_css(colour)}" d="M1 5H25"/>'
    return Markup(f'<svg class="swatch" viewBox="0 0 26 10" aria-hidden="true">{path}</svg>')


def _frame(
    x: Scale, y: Scale, x_label: str, y_label: str, x_text: Callable[[float], str], y_text: Callable[[float], str]
) -> list[str]:
    parts = []
    for tick in y.ticks(5):
        place = y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>')
        parts.append(_text(LEFT - 6, place + 4, y_text(tick), "end"))
    for tick in x.ticks(4):
        words = x_text(tick)
        parts.append(_text(min(x(tick), WIDTH - 3.3 * len(words)), HEIGHT - BOTTOM + 16, words, "middle"))
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>')
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label, "middle"))
    centre = (TOP + HEIGHT - BOTTOM) / 2
    turned = f'transform="translate(12 {centre:.0f}) rotate(-90)" text-anchor="middle"'
    parts.append(f'<text class="label" {turned}>{escape(clean(y_label))}</text>')
    return parts


def _band(line: Series, x: Scale, y: Scale) -> str:
    assert line.low is not None and line.high is not None
    there = _points(line.x, line.high, x, y)
    back = _points(line.x[::-1], line.low[::-1], x, y)
    return f'<path class="band {_css(line.colour)}" d="M{there}L{back}Z"/>'


def _line(line: Series, x: Scale, y: Scale) -> str:
    title = escape(clean(line.name))
    return f'<path class="line {_css(line.colour)}" d="M{_points(line.x, line.y, x, y)}"><title>{title}</title></path>'


def _points(xs: Column, ys: Column, x: Scale, y: Scale) -> str:
    return "L".join(f"{x(float(a)):.1f} {y(float(b)):.1f}" for a, b in zip(xs, ys, strict=True))


def _finite(line: Series) -> Series:
    """The series without the points that cannot be drawn."""
    columns = [column for column in (line.x, line.y, line.low, line.high) if column is not None]
    keep = np.all([np.isfinite(column) for column in columns], axis=0)
    low, high = (None if side is None else side[keep] for side in (line.low, line.high))
    return Series(line.name, line.colour, line.x[keep], line.y[keep], low, high)


def _log_span(values: Column) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    pad = (high / low) ** 0.04 if high > low else 1.1
    return low / pad, high * pad


def _css(colour: int | None) -> str:
    return "rest" if colour is None else f"s{colour % NUM_COLOURS}"


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text class="label" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(clean(words))}</text>'


def _svg(width: int, height: int, label: str, parts: Sequence[str], css: str) -> Markup:
    head = f'<svg class="{css}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(clean(label))}">'
    return Markup(f"{head}{''.join(parts)}</svg>")
