"""How tyro builds our settings from a command line."""

import functools
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, Positional, arg
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructTypeInfo

from pixelplay.config import (
    RECIPES,
    AugmentConfig,
    ComputeConfig,
    DataConfig,
    FinetuneConfig,
    Recipe,
    TrainConfig,
    UncertaintyConfig,
)
from pixelplay.errors import ConfigError, PixelPlayError

SETTINGS = (DataConfig, UncertaintyConfig, ComputeConfig, FinetuneConfig, AugmentConfig, TrainConfig)


def find_recipe(argv: Sequence[str]) -> Recipe:
    """The recipe that is asked for: its values are the defaults of all other settings."""
    words = [split for word in argv for split in (word.split("=", 1) if word.startswith("--") else [word])]
    named = [value for flag, value in pairwise(words) if flag == "--recipe" and value in RECIPES]
    return named[-1] if named else "pixelplay"


def find_repeated(argv: Sequence[str]) -> str | None:
    """The first option that is given more than once, with - or _ in it: only the last would count."""
    flags = [word.split("=", 1)[0].replace("_", "-") for word in argv if word.startswith("--")]
    return next((flag for i, flag in enumerate(flags) if flag in flags[:i]), None)


def registry_of_settings(recipe: Recipe) -> ConstructorRegistry:
    """Let tyro build our settings as it does, with a recipe's defaults, and leave errors in them to us.

    A ConfigError is a ValueError, which tyro would report as wrong usage of an argument whose name
    no user has ever seen.
    """
    registry = ConstructorRegistry()
    asking: set[type] = set()

    @registry.struct_rule
    def _build_settings(info: StructTypeInfo) -> StructConstructorSpec | None:
        if info.type in asking or info.type not in SETTINGS:
            return None
        if info.type is TrainConfig:
            info = replace(info, default=RECIPES[recipe]())
        asking.add(info.type)  # the next rule in line is tyro's own
        spec = ConstructorRegistry.get_struct_spec(info)
        asking.remove(info.type)
        assert isinstance(spec, StructConstructorSpec)

        @functools.wraps(info.type, updated=())
        def build(**settings: Any) -> Any:
            try:
                return info.type(**settings)
            except ConfigError as error:
                raise PixelPlayError(str(error)) from None

        return replace(spec, instantiate=build)

    return registry


Data = Annotated[Positional[str], arg(metavar="DATA")]
Run = Annotated[Positional[str], arg(metavar="RUN")]
Images = Annotated[Positional[tuple[str, ...]], arg(metavar="IMAGES...", help_behavior_hint="(required)")]
EnsembleWith = Annotated[
    tuple[str, ...], arg(name="ensemble-with", metavar="[RUN ...]", help_behavior_hint="")
]
# the name of a group of settings is the title of its section in the help
DataSection = Annotated[OmitArgPrefixes[DataConfig], arg(name="data")]
UncertaintySection = Annotated[OmitArgPrefixes[UncertaintyConfig], arg(name="caution")]
ComputeSection = Annotated[OmitArgPrefixes[ComputeConfig], arg(name="compute")]
TrainSection = Annotated[OmitArgPrefixes[TrainConfig], arg(name="")]


def check_some(images: Sequence[str]) -> None:
    """Exit with status 2 where no images are named."""
    if not images:
        print(
            "error: no IMAGES given; name folders, files, tables or zip archives, or - for a list on stdin",
            file=sys.stderr,
        )
        raise SystemExit(2)


def expand_stdin(images: Sequence[str]) -> Iterator[str]:
    """Put the lines of stdin where the sign for it stands."""
    for source in images:
        if source != "-":
            yield source
            continue
        data = sys.stdin.buffer.read()  # a file name need not be valid text
        yield from (line for line in os.fsdecode(data).replace("\r\n", "\n").split("\n") if line)
