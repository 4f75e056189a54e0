"""Arguments that several commands share, and settings built from the command line."""

import functools
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Any

from tyro.conf import DisallowNone, Positional, arg
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructTypeInfo

from pixelplay.config import (
    RECIPES,
    AugmentConfig,
    ComputeConfig,
    DataConfig,
    FinetuneConfig,
    Flag,
    Recipe,
    TrainConfig,
    Tta,
    UncertaintyConfig,
    metavar,
)
from pixelplay.errors import ConfigError, PixelPlayError
from pixelplay.run_log import RunLog
from pixelplay.serving.settings import LimitsConfig, ServerConfig

SETTINGS = (
    DataConfig,
    UncertaintyConfig,
    ComputeConfig,
    FinetuneConfig,
    AugmentConfig,
    TrainConfig,
    ServerConfig,
    LimitsConfig,
)

words_typed: ContextVar[Sequence[str]] = ContextVar("words_typed", default=())  # after `pixelplay`


@dataclass(frozen=True, kw_only=True)
class LogOptions:
    """Options for progress and notes on stderr."""

    quiet: Flag = False
    """Hide progress and notes."""
    json_progress: Flag = False
    """Print progress and notes to stderr as JSON, one object per line."""

    def make_log(self) -> RunLog:
        """Make the run log of this command."""
        return RunLog(quiet=self.quiet, json_progress=self.json_progress)


@dataclass(frozen=True, kw_only=True)
class OutputOptions(LogOptions):
    """Options for output to stdout and stderr."""

    json: Flag = False
    """Print the result to stdout as JSON."""


Data = Annotated[Positional[str], arg(metavar="DATA")]
Run = Annotated[Positional[str], arg(metavar="RUN")]
Images = Annotated[Positional[tuple[str, ...]], arg(metavar="IMAGES...", help_behavior_hint="(required)")]
EnsembleWith = Annotated[tuple[str, ...], arg(metavar="[RUN ...]", help_behavior_hint="")]
ClassName = DisallowNone[Annotated[str | None, metavar("CLASS")]]
Views = DisallowNone[Annotated[Tta | None, metavar("VIEWS")]]
Report = Annotated[bool, arg(help="Do not write RUN/report.html.", help_behavior_hint="")]


def print_result(output: OutputOptions, as_json: Callable[[], Any], as_text: Callable[[], str]) -> None:
    """Print the result of a command to stdout, as JSON or as text."""
    print(json.dumps(as_json(), indent=1, allow_nan=False) if output.json else as_text())


def typed_command() -> str | None:
    """Return the command as typed; None where a command function was called from Python."""
    return shlex.join(("pixelplay", *words_typed.get())) if words_typed.get() else None


def find_recipe(argv: Sequence[str]) -> Recipe:
    """Find the recipe on a command line; its values are the defaults of all other settings."""
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]
    named = [value for flag, value in pairwise(words) if flag == "--recipe" and value in RECIPES]
    return named[-1] if named else "pixelplay"


def find_repeated(argv: Sequence[str]) -> str | None:
    """Find the first option that occurs twice, written with - or _; tyro would use only the last."""
    flags = [word.split("=", 1)[0].replace("_", "-") for word in argv if word.startswith("--")]
    return next((flag for i, flag in enumerate(flags) if flag in flags[:i]), None)


def settings_registry(recipe: Recipe) -> ConstructorRegistry:
    """Make tyro build settings with the defaults of a recipe and pass on their errors.

    tyro would report a ConfigError, which is a ValueError, as wrong usage of an argument with an
    internal name.
    """
    registry = ConstructorRegistry()
    in_progress: set[type] = set()

    @registry.struct_rule
    def _build_settings(info: StructTypeInfo) -> StructConstructorSpec | None:
        if info.type in in_progress or info.type not in SETTINGS:
            return None
        if info.type is TrainConfig:
            info = replace(info, default=RECIPES[recipe]())
        in_progress.add(info.type)  # so that the lookup below finds tyro's own rule
        spec = ConstructorRegistry.get_struct_spec(info)
        in_progress.remove(info.type)
        assert isinstance(spec, StructConstructorSpec)

        @functools.wraps(info.type, updated=())
        def build(**settings: Any) -> Any:
            try:
                return info.type(**settings)
            except ConfigError as error:
                raise PixelPlayError(str(error)) from None

        return replace(spec, instantiate=build)

    return registry


def read_sources(images: Sequence[str]) -> list[str]:
    """Replace "-" by the lines of stdin; exit with status 2 if no images are named."""
    if not images:
        message = "no IMAGES named; add folders, files, tables or zip archives, or - for a list on stdin"
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2)
    return [source for image in images for source in (_read_lines() if image == "-" else [image])]


def _read_lines() -> list[str]:
    if sys.stdin is None:
        raise PixelPlayError("- reads a list of files from stdin, which is closed; name the files instead")
    text = os.fsdecode(sys.stdin.buffer.read())  # a file name need not be valid UTF-8
    return [line for line in text.replace("\r\n", "\n").split("\n") if line]
