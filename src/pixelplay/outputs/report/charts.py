"""Line charts of metrics; the page template draws them as SVG."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pixelplay.text import counted, percent

WIDTH, HEIGHT = 360, 250  # px
LEFT, RIGHT, TOP, BOTTOM = 60, 24, 12, 40  # margins for the axis labels, px
Point = tuple[float, float]
PERCENT_TICKS = {0.0: "0 %", 0.25: "25 %", 0.5: "50 %", 0.75: "75 %", 1.0: "100 %"}


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A line chart; ticks map a value to its label, and `_make_line` makes the series."""

    title: str
    x_name: str
    y_name: str
    x_range: Point
    y_range: Point
    x_ticks: Mapping[float, str]
    y_ticks: Mapping[float, str]
    series: Sequence[Mapping[str, Any]]

    def x_px(self, x: float) -> float:
        """Convert a value to pixels from the left."""
        low, high = self.x_range
        return round(LEFT + (x - low) / (high - low or 1) * (WIDTH - LEFT - RIGHT), 1)

    def y_px(self, y: float) -> float:
        """Convert a value to pixels from the top."""
        low, high = self.y_range
        return round(HEIGHT - BOTTOM - (y - low) / (high - low or 1) * (HEIGHT - TOP - BOTTOM), 1)


def _make_line(name: str, style: str, points: Sequence[Point], texts: Sequence[str] = ()) -> dict[str, Any]:
    """Make a line of a chart.

    Args:
        name: legend entry; "" for none.
        style: CSS class: "main", "muted" or "reference".
        points: (x, y) in data units.
        texts: description of each point; without them the line has no markers.
    """
    return {"name": name, "style": style, "points": points, "texts": texts}


def reliability_chart(calibration: Mapping[str, Any]) -> Chart:
    """Plot confidence against accuracy, before and after temperature scaling."""
    series = [_make_line("perfect calibration", "reference", [(0, 0), (1, 1)])]
    for name, style in (("before", "muted"), ("after", "main")):
        bins = [each for each in calibration[name]["bins"] if each["n"]]
        texts = [
            f"{counted(each['n'], 'image')} with {percent(each['confidence'], 0)} confidence: "
            f"{percent(each['accuracy'], 0)} correct"
            for each in bins
        ]
        points = [(each["confidence"], each["accuracy"]) for each in bins]
        series.append(_make_line(f"{name} temperature scaling", style, points, texts))
    return Chart(
        title="Reliability diagram",
        x_name="confidence",
        y_name="accuracy",
        x_range=(0, 1),
        y_range=(0, 1),
        x_ticks=PERCENT_TICKS,
        y_ticks=PERCENT_TICKS,
        series=series,
    )


def risk_chart(risk_coverage: Sequence[Mapping[str, float]]) -> Chart:
    """Plot the error rate against the fraction of images that get a prediction."""
    points = [(each["coverage"], each["risk"]) for each in risk_coverage]
    top = max((risk for _, risk in points), default=0.0) or 0.01
    texts = [f"most confident {percent(coverage, 0)}: {percent(risk)} errors" for coverage, risk in points]
    y_range = (0.0, top * 1.1)
    decimals = 0 if top >= 0.05 else 1 if top >= 0.005 else 2
    return Chart(
        title="Error rate by coverage",
        x_name="coverage (most confident images first)",
        y_name="error rate",
        x_range=(0, 1),
        y_range=y_range,
        x_ticks=PERCENT_TICKS,
        y_ticks={value: percent(value, decimals) for value in _round_ticks(y_range)},
        series=[_make_line("", "main", points, texts)],
    )


def learning_chart(points: Sequence[Mapping[str, float]]) -> Chart:
    """Plot the accuracy of a linear probe against the number of training images."""
    sizes = [p["n_train"] for p in points]
    low, high = min(p["low"] for p in points), max(p["high"] for p in points)
    y_range = (max(0.0, low - 0.05), min(1.0, high + 0.05))
    texts = [
        f"{p['n_train']:,} training images: {p['value']:.3f} ({p['low']:.3f}–{p['high']:.3f})" for p in points
    ]
    bounds = {side: [(p["n_train"], p[side]) for p in points] for side in ("low", "value", "high")}
    return Chart(
        title="Learning curve",
        x_name="training images",
        y_name="accuracy",
        x_range=(0, sizes[-1]),
        y_range=y_range,
        x_ticks={n: f"{n:,.0f}" for n in (0, *sizes)},
        y_ticks={value: f"{value:.3g}" for value in _round_ticks(y_range)},
        series=[
            _make_line("95 % confidence interval", "reference", bounds["low"]),
            _make_line("", "reference", bounds["high"]),
            _make_line("accuracy (out of fold)", "main", bounds["value"], texts),
        ],
    )


def history_chart(
    history: Sequence[Mapping[str, float]], columns: Mapping[str, str], title: str
) -> Chart | None:
    """Plot columns of the training history by epoch; None with fewer than two epochs or without values.

    Args:
        columns: column → legend entry; the last is drawn as the main line.
    """
    points = {
        column: [(float(i), row[column]) for i, row in enumerate(history) if column in row]
        for column in columns
    }
    values = [value for found in points.values() for _, value in found]
    if len(history) < 2 or not values:
        return None
    margin = 0.08 * (max(values) - min(values)) or 0.05
    y_range = (min(values) - margin, max(values) + margin)
    step = max(1, (len(history) - 1) // 5)
    return Chart(
        title=title,
        x_name="epoch",
        y_name="",
        x_range=(0, len(history) - 1),
        y_range=y_range,
        x_ticks={float(i): str(i) for i in range(0, len(history), step)},
        y_ticks={value: f"{value:.3g}" for value in _round_ticks(y_range)},
        series=[
            _make_line(
                name,
                "main" if column == list(columns)[-1] else "muted",
                points[column],
                [f"epoch {x:.0f}: {y:.4g}" for x, y in points[column]],
            )
            for column, name in columns.items()
            if points[column]
        ],
    )


def _round_ticks(ends: Point) -> list[float]:
    """Return up to six round numbers within an axis."""
    low, high = ends
    size = 10.0 ** math.floor(math.log10(max(high - low, 1e-9)))
    step = next(step for step in (size / 5, size / 2, size, 2 * size) if (high - low) / step <= 5)
    return [round(n * step, 10) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
