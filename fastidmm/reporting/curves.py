"""Curves as inline SVG, coloured by the page's style sheet."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 408, 58, 212  # of the plotting area
MOST_POINTS = 80  # more are averaged: single batches say little
MARKED_POINTS = 24  # a curve of so few shows each
TICKS = 5  # distances between an axis's numbers, roughly


@dataclass(frozen=True, slots=True)
class Series:
    """One curve: its name and its points (epoch, value)."""

    name: str
    points: Sequence[tuple[float, float]]


def chart(title: str, series: Sequence[Series], *, unit: str = "") -> Markup:
    """Curves over epochs with axes and the last values, as one SVG element."""
    drawn = [Series(s.name, _thinned(s.points)) for s in series if s.points]
    everything = [point for s in drawn for point in s.points]
    end = max(x for x, _ in everything)
    x_ticks = [tick for tick in ticks(0.0, end) if tick <= end]
    y_ticks = ticks(min(y for _, y in everything), max(y for _, y in everything))
    scale = _Scale(end, y_ticks[0], y_ticks[-1])
    # One curve needs no name: the title says what it is.
    names = [s.name if len(drawn) > 1 else "last" for s in drawn]
    last = [f"{name} {s.points[-1][1]:.4g}{unit}" for name, s in zip(names, drawn, strict=True)]
    parts = [
        Markup("<title>{}, by epoch: {}</title>").format(title, ", ".join(last)),
        _text(8, 18, title, "title"),
        _text(RIGHT, HEIGHT - 6, "epoch", "label end"),
        *(_across(scale.y(value), f"{value:g}{unit}") for value in y_ticks),
        *(_text(scale.x(value), BOTTOM + 17, f"{value:g}", "label middle") for value in x_ticks),
        *(_curve(s, scale, number) for number, s in enumerate(drawn)),
        *_pointed_at(drawn, scale, unit),
        *(_legend(text, number, len(last)) for number, text in enumerate(last)),
    ]
    return Markup('<svg class="chart" role="img" viewBox="0 0 {} {}">{}</svg>').format(
        WIDTH, HEIGHT, Markup("").join(parts)
    )


def ticks(low: float, high: float) -> list[float]:
    """Round numbers at even distances that enclose `low` and `high`."""
    if low == high:
        low, high = (0.0, high) if high > 0 else (low, low + 1.0)
    rough = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1.0, 2.0, 2.5, 5.0, 10.0) if m * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


@dataclass(frozen=True, slots=True)
class _Scale:
    end: float
    low: float
    high: float

    def x(self, value: float) -> float:
        return LEFT + value / self.end * (RIGHT - LEFT)

    def y(self, value: float) -> float:
        return BOTTOM - (value - self.low) / (self.high - self.low) * (BOTTOM - TOP)


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means over runs of neighbours; the last point stays as it is."""
    every = math.ceil(len(points) / MOST_POINTS)
    if every == 1:
        return list(points)
    parts = [points[i : i + every] for i in range(0, len(points) - 1, every)]
    means = [(sum(x for x, _ in p) / len(p), sum(y for _, y in p) / len(p)) for p in parts]
    return [*means, points[-1]]


def _curve(series: Series, scale: _Scale, number: int) -> Markup:
    places = [(f"{scale.x(x):.1f}", f"{scale.y(y):.1f}") for x, y in series.points]
    line = Markup('<polyline class="curve s{}" points="{}"/>').format(
        number % 4, " ".join(f"{x},{y}" for x, y in places)
    )
    if len(places) > MARKED_POINTS:
        return line
    dot = Markup('<circle class="dot s{}" cx="{}" cy="{}" r="2.5"/>')
    return line + Markup("").join(dot.format(number % 4, x, y) for x, y in places)


def _pointed_at(drawn: Sequence[Series], scale: _Scale, unit: str) -> Iterator[Markup]:
    """A band for each epoch with points, whose values the style sheet shows to who points at it."""
    values = [{x: f"{y:.4g}{unit}" for x, y in s.points} for s in drawn]
    places = sorted({x for told in values for x in told})
    middles = [(scale.x(a) + scale.x(b)) / 2 for a, b in pairwise(places)]
    edges = [float(LEFT), *middles, float(RIGHT)]
    for x, (left, right) in zip(places, pairwise(edges), strict=True):
        told = Markup(" · ").join(
            Markup('<tspan class="s{}">{}</tspan>').format(number % 4, of_it.get(x, "none"))
            for number, of_it in enumerate(values)
        )
        shown = Markup("epoch {}: {}").format(f"{x:.4g}", told)
        band = Markup('<rect x="{:.1f}" width="{:.1f}" y="{}" height="{}"/>')
        cursor = Markup('<line x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>')
        yield Markup('<g class="at">{}{}{}</g>').format(
            band.format(left, right - left, TOP, BOTTOM - TOP),
            cursor.format(scale.x(x), TOP, BOTTOM),
            _text(LEFT, HEIGHT - 6, shown, "label"),
        )


def _across(y: float, text: str) -> Markup:
    line = Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>')
    return line.format(LEFT, RIGHT, y, y) + _text(LEFT - 6, y + 4, text, "label end")


def _legend(text: str, number: int, count: int) -> Markup:
    x = 8 + number * (WIDTH - 16) / count
    stroke = Markup('<line class="curve s{}" x1="{:.1f}" x2="{:.1f}" y1="36" y2="36"/>')
    return stroke.format(number % 4, x, x + 18) + _text(x + 24, 40, text, "label")


def _text(x: float, y: float, text: str, kind: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>').format(kind, x, y, text)
