"""What a page consists of, section by section: plain values, for the template to lay out."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pixelplay.outputs.report.advice import Advice
from pixelplay.outputs.report.charts import Chart
from pixelplay.outputs.report.confusion import Cell
from pixelplay.outputs.report.pictures import Pictures
from pixelplay.outputs.report.reading import Answer
from pixelplay.outputs.suspects import Suspect


@dataclass(frozen=True, kw_only=True)
class Doubt:
    """A suspect and what it stands beside: a typical photograph of either class."""

    suspect: Suspect
    like_label: str | None
    like_proposed: str | None


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """A wrong answer, with where the model looked if that is known."""

    answer: Answer
    large: str | None
    heat: str | None


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What is taken for what: a matrix, or of many classes the commonest confusions."""

    names: tuple[str, ...]
    matrix: tuple[tuple[Cell, ...], ...] | None
    confusions: tuple[tuple[str, str, Cell], ...]


@dataclass(frozen=True, kw_only=True)
class Mistakes:
    """The most confident wrong answers, of how many, and whose sight is drawn."""

    shown: tuple[Mistake, ...]
    n: int
    who_explains: str


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Suspects to be judged, of how many; what was corrected before; and what learns from the corrections."""

    doubts: tuple[Doubt, ...]
    n: int
    corrections: tuple[Mapping[str, Any], ...]
    relabel: str


@dataclass(frozen=True, kw_only=True)
class Trust:
    """What probabilities are worth."""

    calibration: Mapping[str, Any] | None
    charts: tuple[Chart, ...]


@dataclass(frozen=True, kw_only=True)
class Made:
    """How the run was made, and what this page lacks."""

    story: tuple[str, ...]
    command: str | None
    notes: tuple[str, ...]
    settings: Mapping[str, Any]
    missing: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Page:
    """All that the template needs, by section; texts are plain, the template makes them safe."""

    title: str
    version: str
    source: str | None
    root: str
    verdict: str
    where: str
    figures: tuple[Mapping[str, Any], ...]
    also: tuple[str, ...]
    advice: tuple[Advice, ...]
    classes: tuple[Mapping[str, Any], ...]
    taken: Taken
    mistakes: Mistakes
    labels: Labels
    trust: Trust
    data: Mapping[str, Any]
    made: Made
    pictures: Pictures
