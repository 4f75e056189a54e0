"""The file list is a map of the program, imports point one way, and a light command stays light."""

import ast
import importlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import pixelplay
from pixelplay.cli.commands import COMMANDS
from pixelplay.cli.main import main

PACKAGE = Path(pixelplay.__file__).parent
README = PACKAGE.parents[1] / "README.md"
MODULES = sorted(PACKAGE.rglob("*.py"))

# a stage imports itself and what stands before it; the journal is as early as the configuration
STAGES = (
    "errors",
    "config",
    "data",
    "evaluation",
    "model",
    "training",
    "inference",
    "outputs",
    "api",
    "cli",
)
SAME_STAGE = {
    "text": "errors",
    "arrays": "errors",
    "atomic": "config",
    "run_log": "config",
    "thread_pool": "config",
    "dataset_scan": "api",
    "__main__": "cli",
}
BANNED = {"utils", "common", "helpers", "base"}
HEAVY = ("torch", "torchvision", "timm", "sklearn", "scipy", "pyarrow", "numpy", "PIL")

PUBLIC = {
    "AugmentConfig",
    "BundleError",
    "UncertaintyConfig",
    "ComputeConfig",
    "ConfigError",
    "DataConfig",
    "DataError",
    "FinetuneConfig",
    "ImageError",
    "MissingExtraError",
    "PixelPlayError",
    "Predictions",
    "Predictor",
    "TrainConfig",
    "cross_validate",
    "evaluate",
    "explain",
    "original_recipe",
    "predict",
    "read_label_issues",
    "report",
    "scan",
    "train",
}


def _stage(module: str) -> int | None:
    """Position of a dotted module's stage; None for the package itself, which names every stage."""
    parts = module.split(".")
    return None if len(parts) == 1 else STAGES.index(SAME_STAGE.get(parts[1], parts[1]))


def _module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            yield node.module
            # `from pixelplay import workflow` names a module too
            if node.module == "pixelplay":
                yield from (
                    f"pixelplay.{alias.name}" for alias in node.names if not alias.name.startswith("__")
                )


def _public_definitions(path: Path) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Functions and classes of a module, and their methods that no protocol there explains already."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    explained: set[str] = set()
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            methods = [child for child in node.body if isinstance(child, ast.FunctionDef)]
            yield from (m for m in methods if not m.name.startswith("_") and m.name not in explained)
            if any(isinstance(base, ast.Name) and base.id == "Protocol" for base in node.bases):
                explained |= {method.name for method in methods}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_to_earlier_stages(path: Path) -> None:
    own = _stage(_module_name(path))
    if own is None:
        return
    ours = [name for name in _imports(path) if name.split(".")[0] == "pixelplay"]
    later = [name for name in ours if (_stage(name) or 0) > own]
    assert not later, f"{path.name} imports from later stages: {later}"


def test_every_module_belongs_to_a_stage() -> None:
    top = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in MODULES} - {"__init__"}
    assert top <= set(STAGES) | set(SAME_STAGE)


def test_no_module_is_a_drawer_for_everything() -> None:
    assert not BANNED & {part for path in MODULES for part in path.relative_to(PACKAGE).with_suffix("").parts}


def test_modules_fit_on_a_few_screens() -> None:
    lengths = {path.relative_to(PACKAGE).as_posix(): len(path.read_text().splitlines()) for path in MODULES}
    assert {name: n for name, n in lengths.items() if n > 620} == {}


def test_functions_are_short() -> None:
    too_long, sizes = [], []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef):
                continue
            first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
            sizes.append(node.end_lineno - first.lineno + 1)  # type: ignore[operator]
            if sizes[-1] > 80:
                too_long.append(f"{path.name}: {node.name} has {sizes[-1]} lines")
    assert not too_long
    assert sorted(sizes)[len(sizes) // 2] <= 10
    assert sorted(sizes)[int(0.95 * len(sizes))] <= 40


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_what_is_public_says_what_it_is(path: Path) -> None:
    silent = [node.name for node in _public_definitions(path) if not ast.get_docstring(node)]
    assert not silent
    source = path.read_text(encoding="utf-8")
    assert not source.strip() or ast.get_docstring(ast.parse(source))


def test_public_names_are_the_listed_ones() -> None:
    assert set(pixelplay.__all__) == PUBLIC
    assert len(pixelplay.__all__) == len(PUBLIC)
    assert dir(pixelplay) == sorted(PUBLIC)
    for name in PUBLIC:
        found = getattr(pixelplay, name)
        assert found is getattr(importlib.import_module(found.__module__), name)


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'pixelplay' has no attribute 'Trainer'"):
        pixelplay.Trainer  # noqa: B018


@pytest.mark.skipif(not README.exists(), reason="no README yet")
def test_the_readme_shows_every_command() -> None:
    text = README.read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"pixelplay {name}" not in text] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    summary = (COMMANDS[command].__doc__ or "").splitlines()[0]
    assert f"usage: pixelplay {command}" in shown
    assert summary in shown
    # neither Python's words for types nor defaults that say nothing
    assert not re.search(r"\bSTR\b|\bINT\b|\bFLOAT\b|None|default: (True|False|\))|config\.", shown)


def test_help_lists_the_commands_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"• {name}" in shown for name in COMMANDS)
    assert "pixelplay train photos --out run" in shown


@pytest.mark.parametrize(
    "program", ["import pixelplay", "from pixelplay.cli.main import main; main(['--help'])"]
)
def test_a_light_command_loads_nothing_heavy(program: str) -> None:
    check = f"{program}; import sys; print(*(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == ""


@pytest.mark.parametrize(
    "arguments", [["-c", "import pixelplay"], ["-m", "pixelplay", "--help"], ["-m", "pixelplay", "--version"]]
)
def test_a_light_command_answers_within_half_a_second(arguments: list[str]) -> None:
    times = []
    for _ in range(8):  # the machine may be busy: the best try counts
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
        times.append(time.perf_counter() - start)
        if times[-1] <= 0.5:
            return
    pytest.fail(f"took {min(times):.2f} s at best; the limit is 0.5 s")
