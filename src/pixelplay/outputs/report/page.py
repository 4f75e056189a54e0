"""Content → HTML: one file, without address of anything outside, in which every name is text."""

import base64
import hashlib
import json
import os
from contextlib import suppress
from functools import partial
from typing import Any

from pixelplay.outputs.report import charts
from pixelplay.outputs.report.content import FEW_LEARNED, HELD_OUT_IN
from pixelplay.outputs.report.model_page import ModelPage
from pixelplay.outputs.report.sections import Page

HERE = os.path.dirname(__file__)
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
    """What the page's script needs: the cells' photographs, the suspects, the classes."""
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
    suspects = [
        {"path": d.suspect.path, "label": d.suspect.label, "proposed": d.suspect.proposed}
        for d in page.labels.doubts
    ]
    judged = json.dumps([suspects, page.taken.names])
    return {
        "id": hashlib.sha256(judged.encode()).hexdigest()[:16],  # the same questions, the same marks
        "cells": cells,
        "pictures": [
            {"path": _shown(path, page.root), "src": page.pictures.small(path)} for path in pictures
        ],
        "classes": list(page.taken.names),
        "corrections": list(page.labels.corrections),
        "suspects": suspects,
    }


def _shown(path: str, root: str) -> str:
    """A path as people need it: without the folder that all absolute ones share."""
    return path.removeprefix(root)


def _own_file(name: str) -> str:
    with open(os.path.join(HERE, name), encoding="utf-8") as file:
        return file.read()


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
