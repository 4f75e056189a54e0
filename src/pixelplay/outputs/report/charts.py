"""Figures → lines and points in the coordinates of a drawing; the page's template draws them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pixelplay.text import percent

WIDTH, HEIGHT = 360, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 24, 12, 40  # margins for the axes' labels
Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Line:
    """A named line, and how it looks.

    Attributes:
        name: as the legend has it; empty: not in it.
        style: class of the page's style sheet.
        points: "x,y x,y …" in px.
        dots: (x, y, words) of each point that is drawn and says what it is.
    """

    name: str
    style: str
    points: str
    dots: tuple[tuple[float, float, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A drawing with two axes.

    Attributes:
        title: what it shows, for those who cannot see it too.
        x_name, y_name: of the axes, with their unit.
        x_ticks, y_ticks: place in px and words.
        lines: what is drawn.
    """

    title: str
    x_name: str
    y_name: str
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class _Axes:
    """Ranges of both axes; places values in the drawing."""

    x: tuple[float, float]
    y: tuple[float, float]

    def place(self, point: Point) -> Point:
        across = (point[0] - self.x[0]) / (self.x[1] - self.x[0] or 1)
        up = (point[1] - self.y[0]) / (self.y[1] - self.y[0] or 1)
        left = LEFT + across * (WIDTH - LEFT - RIGHT)
        return round(left, 1), round(HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM), 1)

    def line(self, name: str, style: str, points: Sequence[Point], words: Sequence[str] = ()) -> Line:
        placed = [self.place(point) for point in points]
        dots = tuple((x, y, text) for (x, y), text in zip(placed, words, strict=False))
        return Line(name=name, style=style, points=" ".join(f"{x},{y}" for x, y in placed), dots=dots)

    def x_ticks(self, ticks: Mapping[float, str]) -> tuple[tuple[float, str], ...]:
        return tuple((self.place((value, self.y[0]))[0], text) for value, text in ticks.items())

    def y_ticks(self, ticks: Mapping[float, str]) -> tuple[tuple[float, str], ...]:
        return tuple((self.place((self.x[0], value))[1], text) for value, text in ticks.items())


SHARES = {0.0: "0 %", 0.25: "25 %", 0.5: "50 %", 0.75: "75 %", 1.0: "100 %"}


def reliability_chart(calibration: Mapping[str, Any]) -> Chart:
    """Confidence against accuracy, before and after the temperature."""
    axes = _Axes((0, 1), (0, 1))
    lines = [axes.line("as it should be", "ideal", [(0, 0), (1, 1)])]
    for name, style in (("before", "muted"), ("after", "main")):
        bins = [each for each in calibration[name]["bins"] if each["n"]]
        points = [(each["confidence"], each["accuracy"]) for each in bins]
        words = [
            f"{each['n']} images answered with {percent(each['confidence'], 0)}: "
            f"{percent(each['accuracy'], 0)} right"
            for each in bins
        ]
        lines.append(axes.line(f"{name} calibration", style, points, words))
    return Chart(
        title="Probability against how often it was right",
        x_name="probability of the answer",
        y_name="right",
        x_ticks=axes.x_ticks(SHARES),
        y_ticks=axes.y_ticks(SHARES),
        lines=tuple(lines),
    )


def risk_chart(risk_coverage: Sequence[Mapping[str, float]]) -> Chart:
    """Share of wrong answers if only the surest images are answered."""
    points = [(each["coverage"], each["risk"]) for each in risk_coverage]
    top = max((risk for _, risk in points), default=0.0) or 0.01
    axes = _Axes((0, 1), (0, top * 1.1))
    words = [
        f"the surest {percent(coverage, 0)} answered: {percent(risk)} of the answers wrong"
        for coverage, risk in points
    ]
    return Chart(
        title="Wrong answers if only the surest images are answered",
        x_name="images answered, the surest first",
        y_name="wrong",
        x_ticks=axes.x_ticks(SHARES),
        y_ticks=axes.y_ticks(
            {value: percent(value, 1 if top < 0.05 else 0) for value in _round_ticks(axes.y)}
        ),
        lines=(axes.line("", "main", points, words),),
    )


def learning_chart(points: Sequence[Mapping[str, float]]) -> Chart:
    """Accuracy of a probe by how many images it learned from, with its intervals."""
    low, high = min(p["low"] for p in points), max(p["high"] for p in points)
    axes = _Axes((0, points[-1]["n_train"]), (max(0.0, low - 0.05), min(1.0, high + 0.05)))
    drawn = [(p["n_train"], p["value"]) for p in points]
    words = [
        f"{p['n_train']:,} images learned from: {p['value']:.3f} ({p['low']:.3f}–{p['high']:.3f})"
        for p in points
    ]
    return Chart(
        title="Accuracy by images learned from",
        x_name="images learned from",
        y_name="accuracy",
        x_ticks=axes.x_ticks({n: f"{n:,.0f}" for n in (0, *(n for n, _ in drawn))}),
        y_ticks=axes.y_ticks({value: f"{value:.3g}" for value in _round_ticks(axes.y)}),
        lines=(
            axes.line("95 % interval", "ideal", [(p["n_train"], p["low"]) for p in points]),
            axes.line("", "ideal", [(p["n_train"], p["high"]) for p in points]),
            axes.line("accuracy, out of fold", "main", drawn, words),
        ),
    )


def history_chart(
    history: Sequence[Mapping[str, float]], columns: Mapping[str, str], title: str
) -> Chart | None:
    """Some columns of the history by epoch; None where there is nothing to draw.

    Args:
        columns: column → its name in the legend; the last is the main one.
    """
    drawn = {
        column: [(float(i), row[column]) for i, row in enumerate(history) if column in row]
        for column in columns
    }
    values = [value for points in drawn.values() for _, value in points]
    if len(history) < 2 or not values:
        return None
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 0.05
    axes = _Axes((0, len(history) - 1), (low - margin, high + margin))
    step = max(1, (len(history) - 1) // 5)
    styles = ["muted"] * (len(columns) - 1) + ["main"]
    return Chart(
        title=title,
        x_name="epoch",
        y_name="",
        x_ticks=axes.x_ticks({float(i): str(i) for i in range(0, len(history), step)}),
        y_ticks=axes.y_ticks({value: f"{value:.3g}" for value in _round_ticks(axes.y)}),
        lines=tuple(
            axes.line(columns[column], style, points, [f"epoch {x:.0f}: {y:.4g}" for x, y in points])
            for (column, points), style in zip(drawn.items(), styles, strict=True)
            if points
        ),
    )


def _round_ticks(ends: tuple[float, float]) -> list[float]:
    """Two to six round numbers between the ends of an axis."""
    low, high = ends
    size = 10.0 ** math.floor(math.log10(max(high - low, 1e-9)))
    step = next(step for step in (size / 5, size / 2, size, 2 * size) if (high - low) / step <= 5)
    return [round(n * step, 10) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
