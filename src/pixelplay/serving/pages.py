"""The web page and the documentation page; they load nothing from other hosts."""

import os
from typing import Any

from fastapi import FastAPI, Response

from pixelplay.outputs.report.page import TEMPLATES as REPORT_TEMPLATES
from pixelplay.outputs.report.page import make_environment

TEMPLATES = os.path.join(os.path.dirname(__file__), "templates")
HTML = "text/html; charset=utf-8"


def add_pages(app: FastAPI) -> None:
    """Add the page at /, its style and script, and /docs."""
    css = _read(REPORT_TEMPLATES, "page.css") + _read(TEMPLATES, "serve.css")  # one design with the report
    page, script = _read(TEMPLATES, "serve.html"), _read(TEMPLATES, "serve.js")
    add_file(app, "/", page, HTML)
    add_file(app, "/page.css", css, "text/css; charset=utf-8")
    add_file(app, "/page.js", script, "text/javascript; charset=utf-8")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return Response(render_docs(app.openapi()), media_type=HTML)


def add_file(app: FastAPI, path: str, content: str, media_type: str) -> None:
    """Serve a text from memory."""

    @app.get(path, include_in_schema=False)
    async def file() -> Response:
        return Response(content, media_type=media_type)


def render_docs(openapi: dict[str, Any]) -> str:
    """Render an OpenAPI description as a page without scripts."""
    routes = [
        {"path": path, "method": method.upper(), **operation}
        for path, operations in openapi["paths"].items()
        for method, operation in operations.items()
    ]
    return (
        make_environment(TEMPLATES)
        .get_template("docs.html")
        .render(
            title=openapi["info"]["title"],
            version=openapi["info"]["version"],
            routes=routes,
            schemas=openapi["components"]["schemas"],
        )
    )


def _read(folder: str, name: str) -> str:
    with open(os.path.join(folder, name), encoding="utf-8") as file:
        return file.read()
