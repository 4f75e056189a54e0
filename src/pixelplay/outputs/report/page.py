"""Render the templates to one self-contained HTML file."""

import base64
import hashlib
import json
import os
import re
from collections.abc import Mapping
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from pixelplay.atomic import write_bytes
from pixelplay.outputs.report import charts
from pixelplay.outputs.report.images import ReportImages
from pixelplay.text import percent

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

TEMPLATES = os.path.join(os.path.dirname(__file__), "templates")
MAX_NAME = 60  # letters of a class name in the confusion matrix; longer ones are cut in the middle
MAX_UPRIGHT = 8  # classes whose names are not rotated above the confusion matrix
MAX_ROWS = 30  # of a table; a longer one scrolls within the page
MAX_OPEN = 6  # sets of duplicates that are shown without a click
GENERATOR = '<meta name="generator" content="PixelPlay'  # marks a file as a report of ours


def render_run(contents: Mapping[str, Any], images: ReportImages, root: str) -> str:
    """Render the page of a run; paths are shown without the folder `root`."""
    # called last by the template: images that are visible at once come before those behind a click
    values = {**contents, "images": images, "script_data": partial(_script_data, contents, images, root)}
    return _render("page.html", root=root, script="page.js", **values)


def render_model(contents: Mapping[str, Any]) -> str:
    """Render the page of a model without run records."""
    return _render("model.html", **contents)


def _render(template: str, *, script: str | None = None, root: str = "", **contents: Any) -> str:
    """Fill a template; autoescape makes every name, file and table cell plain text."""
    from markupsafe import Markup

    css, javascript = _read_template("page.css"), "" if script is None else _read_template(script)
    return (
        _environment()
        .get_template(template)
        .render(
            **contents,
            root=root,
            style=Markup(css),
            script=Markup(javascript),
            style_hash=_hash(css),
            script_hash=_hash(javascript),
            size=charts,
            max_name=MAX_NAME,
            max_upright=MAX_UPRIGHT,
            max_rows=MAX_ROWS,
            max_open=MAX_OPEN,
        )
    )


def make_environment(folder: str) -> "Environment":
    """Set up Jinja for a folder of HTML templates: values are escaped, undefined ones are errors."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )


@cache
def _environment() -> "Environment":
    """Set up Jinja; compiling the templates takes longer than filling them, so it is done once."""
    from jinja2 import pass_context

    environment = make_environment(TEMPLATES)
    environment.filters["shown"] = pass_context(lambda context, path: path.removeprefix(context["root"]))
    environment.filters["nowrap"] = lambda text: text.replace(" %", "\u00a0%")  # no line break before a unit
    environment.filters |= {"percent": percent, "shortened": shorten, "breakable": _allow_breaks}
    return environment


def shorten(name: str) -> str:
    """Cut a long name in the middle, because the ends tell similar names apart."""
    if len(name) <= MAX_NAME:
        return name
    n_last = (MAX_NAME - 1) // 2
    return f"{name[: MAX_NAME - 1 - n_last]}…{name[-n_last:]}"


def _allow_breaks(name: str) -> "Markup":
    """Allow line breaks after the characters that join words in class names."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"([_/.-]+)", r"\1<wbr>", str(escape(name))))


def write_page(html: str, path: str) -> None:
    """Write a page atomically; file names that are not valid Unicode show a replacement character."""
    write_bytes(html.encode("utf-8", "replace"), path)


def is_report(path: str) -> bool:
    """Return True for a PixelPlay report, which may be replaced."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return GENERATOR in file.read(1000)
    except OSError:
        return False


def _script_data(contents: Mapping[str, Any], images: ReportImages, root: str) -> dict[str, Any]:
    """Collect what the script needs: images of each matrix cell, label issues, classes, corrections."""
    if contents["matrix"] is None:
        named = {f"c{k}": cell for k, cell in enumerate(contents["confusions"])}
    else:
        rows = [list(enumerate(row)) for row in contents["matrix"]]
        named = {f"{i},{j}": cell for i, row in enumerate(rows) for j, cell in row if cell["n"]}
    numbers: dict[str, int] = {}  # path → position in "images"
    cells = {
        key: {
            **{name: cell[name] for name in ("label", "prediction", "n")},
            "images": [numbers.setdefault(path, len(numbers)) for path in cell["paths"]],
        }
        for key, cell in named.items()
    }
    shown = ("path", "label", "suggested")
    label_issues = [{name: getattr(issue, name) for name in shown} for issue in contents["label_issues"]]
    reviewed = json.dumps([label_issues, contents["classes"]])
    return {
        "id": hashlib.sha256(reviewed.encode()).hexdigest()[:16],  # the browser keeps choices under this id
        "cells": cells,
        "images": [{"path": path.removeprefix(root), "src": images.small(path)} for path in numbers],
        "classes": contents["classes"],
        "corrections": contents["corrections"],
        "label_issues": label_issues,
    }


def _read_template(name: str) -> str:
    with open(os.path.join(TEMPLATES, name), encoding="utf-8") as file:
        return file.read()


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
