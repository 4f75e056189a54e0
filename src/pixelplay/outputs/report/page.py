"""A model without the records of its run → the little that it says about itself."""

import base64
import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from pixelplay import __version__
from pixelplay.evaluation.intervals import wilson
from pixelplay.evaluation.selective import risk_coverage
from pixelplay.model.bundle import ModelBundle
from pixelplay.outputs.report import charts
from pixelplay.outputs.report.charts import Chart, risk_chart
from pixelplay.outputs.report.contents import FEW_LEARNED, HELD_OUT_IN, Page
from pixelplay.text import percent

HELD_OUT = {
    "oof": "images held out in turn while it was made",
    "val": "the validation part of its run",
}
MISSING = (
    "Figures of each class, the confusion matrix, mistakes, suspect labels and what was wrong with the "
    "images: they stand in the run's own folder, which pixelplay train or crossval has made. "
    "For figures on other labelled images: pixelplay evaluate MODEL LABELLED_PHOTOS."
)


@dataclass(frozen=True, kw_only=True)
class ModelPage:
    """What the template of a model alone needs."""

    title: str
    version: str
    verdict: str
    facts: Mapping[str, Any]
    priors: Mapping[str, float]
    chart: Chart
    missing: str


def make_model_page(bundle: ModelBundle, folder: str) -> ModelPage:
    """Tell what the bundle knows: its classes, how it decides, its held-out scores."""
    held_out = bundle.held_out
    right, n = int(held_out.is_right.sum()), len(held_out.is_right)
    accuracy = wilson(right, n)
    curve, _ = risk_coverage(held_out.confidence, held_out.is_right.astype(bool))
    return ModelPage(
        title=_name(os.path.abspath(folder)),
        version=__version__,
        verdict=(
            f"Right on {percent(accuracy.value)} of {n:,} {HELD_OUT.get(held_out.split, 'images')} "
            f"(95 % interval {percent(accuracy.low)} to {percent(accuracy.high)}; they also chose, so "
            "slightly optimistic)."
        ),
        facts={
            "backbone": bundle.backbone.name,
            **bundle.made_by,
            "image size": f"{bundle.preprocessing.input_size} px",
            "different images learned from": f"{len(bundle.trained_on):,}",
            "temperature": f"{bundle.temperature:.3f}",
            "tau": f"{bundle.tau:.2g}",
            "decisions tuned for": bundle.metric,
        },
        priors={name: float(p) for name, p in zip(bundle.classes, bundle.priors, strict=True)},
        chart=risk_chart([{"coverage": c, "risk": r} for c, r in curve]),
        missing=MISSING,
    )


def _name(folder: str) -> str:
    """What people call a model: the folder of the run that holds it, or its own."""
    name = os.path.basename(folder)
    return os.path.basename(os.path.dirname(folder)) or name if name == "model" else name


HERE = os.path.join(os.path.dirname(__file__), "templates")
GENERATOR = '<meta name="generator" content="PixelPlay'  # by which a page of ours is known


def render(page: Page) -> str:
    """Fill the template of a run's page."""
    script = _own_file("page.js")
    return _fill(
        "page.html",
        page=page,
        pictures=page.pictures,
        island=partial(_island, page),  # filled last: what the page itself shows has precedence
        script=script,
        root=page.root,
        few=FEW_LEARNED,
        held_out_in=HELD_OUT_IN,
    )


def render_model(page: ModelPage) -> str:
    """Fill the template of a model without its run."""
    return _fill("model.html", page=page)


def _fill(template: str, *, script: str = "", root: str = "", **content: Any) -> str:
    """Fill a template; what comes from names, files and tables is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["shown"] = partial(_shown, root=root)
    style = _own_file("page.css")
    return environment.get_template(template).render(
        **content,
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        width=charts.WIDTH,
        height=charts.HEIGHT,
        left=charts.LEFT,
        right=charts.RIGHT,
        bottom=charts.BOTTOM,
    )


def write_page(html: str, path: str) -> None:
    """Write a page under a temporary name, then rename; names that are no valid text show a mark."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8", errors="replace", newline="\n") as file:
            file.write(html)
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            os.remove(temporary)
        raise


def is_ours(path: str) -> bool:
    """Whether a file is a page that PixelPlay wrote, and so may be written anew."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return GENERATOR in file.read(1000)
    except OSError:
        return False


def _island(page: Page) -> dict[str, Any]:
    """What the page's script needs: the cells' images, the suspects, the classes."""
    pictures: dict[str, int] = {}
    cells = {}
    if page.taken.matrix is not None:
        drawn = {
            f"{i},{j}": (page.taken.names[i], page.taken.names[j], cell)
            for i, row in enumerate(page.taken.matrix)
            for j, cell in enumerate(row)
        }
    else:
        drawn = {f"c{k}": found for k, found in enumerate(page.taken.confusions)}
    for key, (given, label, cell) in drawn.items():
        if cell.n:
            numbers = [pictures.setdefault(path, len(pictures)) for path in cell.paths]
            cells[key] = {"given": given, "label": label, "n": cell.n, "pictures": numbers}
    label_issues = [
        {"path": d.suspect.path, "label": d.suspect.label, "proposed": d.suspect.suggested}
        for d in page.labels.doubts
    ]
    judged = json.dumps([label_issues, page.taken.names])
    return {
        "id": hashlib.sha256(judged.encode()).hexdigest()[:16],  # the same questions, the same marks
        "cells": cells,
        "pictures": [
            {"path": _shown(path, page.root), "src": page.pictures.small(path)} for path in pictures
        ],
        "classes": list(page.taken.names),
        "corrections": list(page.labels.corrections),
        "label_issues": label_issues,
    }


def _shown(path: str, root: str) -> str:
    """A path as people need it: without the folder that all absolute ones share."""
    return path.removeprefix(root)


def _own_file(name: str) -> str:
    with open(os.path.join(HERE, name), encoding="utf-8") as file:
        return file.read()


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
