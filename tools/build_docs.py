"""Build the documentation site: stage the pages, generate the reference, run Zensical, check the links.

Usage: python tools/build_docs.py [--stage-only]

Pages written by hand are in docs/. The command-line page comes from the program's own --help, the API page
from `pixelplay.__all__`, and the pages on results, contributing and changes from the files that GitHub shows.
"""

import html.parser
import inspect
import os
import re
import shutil
import subprocess
import sys
import tomllib
import urllib.parse
from pathlib import Path

import pixelplay

ROOT = Path(__file__).resolve().parents[1]
STAGE = ROOT / "build" / "docs"
SITE = ROOT / "build" / "site"
SHARED_PAGES = {  # page: file that it shows
    "results.md": "benchmarks/RESULTS.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
HELP_WIDTH = 88  # columns of a terminal that help is laid out for


def main() -> int:
    """Build the site; returns 1 if Zensical warns or a link is broken."""
    stage_pages()
    if "--stage-only" in sys.argv[1:]:
        return 0
    shutil.rmtree(SITE, ignore_errors=True)
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])  # for ruff
    built = subprocess.run(command, cwd=ROOT, env={**os.environ, "PATH": path})
    if built.returncode != 0:
        return built.returncode
    problems = check_site(SITE)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        return 1
    print(f"built {os.path.relpath(SITE / 'index.html')}")
    return 0


def stage_pages() -> None:
    """Copy the hand-written pages to build/docs and generate the other pages there."""
    shutil.rmtree(STAGE, ignore_errors=True)
    shutil.copytree(ROOT / "docs", STAGE)
    (STAGE / "command-line.md").write_text(command_line_page(), encoding="utf-8")
    (STAGE / "python-api.md").write_text(api_page(), encoding="utf-8")
    for page, source in SHARED_PAGES.items():
        (STAGE / page).write_text(shared_page(source), encoding="utf-8")


def shared_page(source: str) -> str:
    """Return a Markdown file of the repository, its relative links pointed at the repository."""
    text = (ROOT / source).read_text(encoding="utf-8")
    with open(ROOT / "pyproject.toml", "rb") as file:
        repository = tomllib.load(file)["project"]["urls"]["Repository"]

    def absolute(match: re.Match[str]) -> str:
        target = os.path.normpath(os.path.join(os.path.dirname(source), match[1]))
        page = next((page for page, file in SHARED_PAGES.items() if file == target), None)
        if page is None and target.startswith("docs/"):
            page = target.removeprefix("docs/")
        return f"]({page or f'{repository}/blob/main/{target}'}{match[2] or ''})"

    return re.sub(r"\]\((?![a-z]+:|#|/)([^)#\s]+)(#[^)\s]*)?\)", absolute, text)


def command_line_page() -> str:
    """Write the help of every command as Markdown."""
    overview = run_help()
    lines = [
        "# Command line",
        "",
        "This page is generated from `pixelplay COMMAND --help`.",
        "",
        "Results are printed to stdout, progress and notes to stderr. The exit status is 0 on success, 1 for "
        "an error, 2 for wrong usage and 130 if the command was interrupted.",
        "",
        "```text",
        re.sub(r"\s*[╭╰].*", "", overview, flags=re.DOTALL).strip(),
        "```",
    ]
    for command in command_names(overview):
        lines += ["", f"## {command}", "", *help_sections(help_of(command))]
    return "\n".join(lines) + "\n"


def command_names(overview: str) -> list[str]:
    """Find the commands in the program's help, in its order."""
    if listed := re.search(r"\{([a-z][a-z-]*(?:,\s*[a-z][a-z-]*)+)\}", overview):
        return [name.strip() for name in listed[1].split(",")]
    names = re.findall(r"^[│ ]*(?:• )?(?:pixelplay )?([a-z][a-z-]+)\s{2,}\S", overview, re.MULTILINE)
    if not names:
        raise SystemExit("error: found no command in the output of pixelplay --help")
    return list(dict.fromkeys(names))


def help_of(command: str) -> str:
    """Return all options of a command: its --help-all where it has one, otherwise its --help."""
    short = run_help(command)
    return run_help(command, flag="--help-all") if "--help-all" in short else short


def run_help(*command: str, flag: str = "--help") -> str:
    """Run the program in a separate process, as a user does."""
    environ = {**os.environ, "COLUMNS": str(HELP_WIDTH), "NO_COLOR": "1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-m", "pixelplay", *command, flag],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=environ,
    )
    if done.returncode != 0 or not done.stdout.strip():
        raise SystemExit(f"error: pixelplay {' '.join([*command, flag])} failed: {done.stderr.strip()}")
    return re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)


def help_sections(text: str) -> list[str]:
    """Turn help into Markdown: text blocks, each box of options under its own heading."""
    lines: list[str] = []
    block: list[str] = []

    def close_block() -> None:
        content = "\n".join(block).strip("\n")
        if content.strip():
            lines.extend(["```text", content, "```", ""])
        block.clear()

    for line in text.splitlines():
        if title := re.match(r"╭─ (.+?) ─+╮", line):
            close_block()
            lines.extend([f"### {title[1].capitalize()}", ""])
        elif re.match(r"│ ─+ │", line):  # below the description of a box
            lines.extend([" ".join(block), ""])
            block.clear()
        elif re.match(r"╰─+╯", line):
            close_block()
        else:
            block.append(line[2:-2].rstrip() if line.startswith("│ ") else line.rstrip())
    close_block()
    return lines


def api_page() -> str:
    """List the public names by kind, for mkdocstrings to document."""
    groups: dict[str, list[str]] = {"Functions": [], "Models and results": [], "Settings": [], "Errors": []}
    for name in pixelplay.__all__:
        value = getattr(pixelplay, name)
        if not inspect.isclass(value):
            groups["Functions"].append(name)
        elif issubclass(value, Exception):
            groups["Errors"].append(name)
        elif name.endswith("Config"):
            groups["Settings"].append(name)
        else:
            groups["Models and results"].append(name)
    lines = [
        "# Python API",
        "",
        "This page is generated from the docstrings of the public names, which are all imported from "
        "`pixelplay`. Settings have the same names as the options of the [command line](command-line.md).",
    ]
    for title, names in groups.items():
        if names:
            lines += ["", f"## {title}"]
        for name in names:
            lines += ["", f"::: pixelplay.{name}"]
    return "\n".join(lines) + "\n"


class PageLinks(html.parser.HTMLParser):
    """Collect the anchors of a page, what it links to, and what it loads."""

    def __init__(self) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Read one opening tag."""
        values = dict(attrs)
        self.anchors.update(value for key in ("id", "name") if (value := values.get(key)))
        if tag == "a" and (href := values.get("href")):
            self.links.append(href)
        if tag in ("script", "img", "iframe", "source") and (src := values.get("src")):
            self.loaded.append(src)
        if tag == "link" and values.get("rel") in ("stylesheet", "preconnect", "preload", "icon"):
            self.loaded.append(values.get("href") or "")


def check_site(site: Path) -> list[str]:
    """Find links to missing pages, files or anchors, and anything loaded from another host."""
    pages: dict[Path, PageLinks] = {}
    for path in sorted(site.rglob("*.html")):
        pages[path] = PageLinks()
        pages[path].feed(path.read_text(encoding="utf-8"))
    problems: list[str] = []
    for path, page in pages.items():
        where = path.relative_to(site).as_posix()
        if path.name == "404.html":  # its links are relative to wherever it is shown
            continue
        problems += [
            f"{where} loads {target} from another host"
            for target in page.loaded
            if urllib.parse.urlsplit(target).netloc
        ]
        for target in (*page.links, *page.loaded):
            url = urllib.parse.urlsplit(target)
            if url.scheme or url.netloc:
                continue
            found = (path.parent / urllib.parse.unquote(url.path)).resolve() if url.path else path
            found = found / "index.html" if found.is_dir() else found
            anchor = urllib.parse.unquote(url.fragment)
            if not found.is_file():
                problems.append(f"{where} links to {target}, which does not exist")
            elif anchor and found in pages and anchor not in pages[found].anchors:
                problems.append(f"{where} links to {target}, which has no such anchor")
    return sorted(set(problems))


if __name__ == "__main__":
    sys.exit(main())
