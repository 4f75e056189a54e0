"""Help texts: the most important options of a command, or all of them under headings.

Types, ranges and defaults come from the annotations that also check the settings.
"""

import dataclasses
import inspect
import shutil
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

import docstring_parser
from tyro.conf import Positional

from pixelplay.cli.options import LogOptions, OutputOptions
from pixelplay.config import (
    AugmentConfig,
    ComputeConfig,
    DataConfig,
    FinetuneConfig,
    Range,
    TrainConfig,
    UncertaintyConfig,
    field_types,
)

HEADINGS: Mapping[type, str] = {
    TrainConfig: "Training",
    DataConfig: "Data",
    FinetuneConfig: "Fine-tuning",
    AugmentConfig: "Augmentation",
    UncertaintyConfig: "Uncertainty",
    ComputeConfig: "Compute",
    LogOptions: "Output",
    OutputOptions: "Output",
}
# command → the options that --help shows; commands that are missing here show all of them
MOST_IMPORTANT: Mapping[str, str] = {
    "scan": "data near_duplicates names_only classes label_column images_dir json",
    "train": "data out finetune time_budget metric backbone imbalance test_frac hflip seed resume force",
    "crossval": "data out n_folds finetune time_budget metric backbone imbalance hflip seed resume force",
    "evaluate": "run data split against at_precision positive tta out force json",
    "predict": "run images out submission images_dir ensemble_with tta coverage min_confidence strict force",
    "explain": "run images out class_name method ensemble_with images_dir force",
}
USAGE_COLUMNS = 25


@dataclass(frozen=True)
class Option:
    """One argument of a command.

    Attributes:
        name: Python name.
        usage: how it is typed: "DATA", "--seed N", "--no-hflip".
        text: description with range and default.
        heading: heading in the full help.
        required: must be typed.
    """

    name: str
    usage: str
    text: str
    heading: str
    required: bool


def format_overview(commands: Mapping[str, Callable[..., None]]) -> str:
    """Format the help of the program: its commands and an example."""
    summaries = [f"  {name:<14}{(run.__doc__ or '').splitlines()[0]}" for name, run in commands.items()]
    return "\n".join(
        [
            "usage: pixelplay COMMAND [options]",
            "",
            "Turn a folder of labelled images into an image classifier you can trust.",
            "",
            *summaries,
            "",
            "Example:",
            "  pixelplay scan photos",
            "  pixelplay train photos --out run",
            "  pixelplay predict run new_photos --out predictions.csv",
            "",
            "Options of a command: pixelplay COMMAND --help. Version: pixelplay --version.",
        ]
    )


def format_help(command: str, function: Callable[..., None], config: TrainConfig, *, full: bool) -> str:
    """Format the help of a command.

    Args:
        command: its name on the command line.
        function: its implementation; signature and docstring describe the arguments.
        config: defaults of the settings for training.
        full: show all options under headings.
    """
    parameters = inspect.signature(function).parameters.values()
    values = {each.name: config if each.name == "config" else each.default for each in parameters}
    options = list(list_options(function, values))
    options.sort(key=lambda option: [*dict.fromkeys(["Options", *HEADINGS.values()])].index(option.heading))
    required = " ".join(option.usage for option in options if option.required)
    lines = [f"usage: pixelplay {command} {required} [options]".replace("  ", " "), ""]
    lines += [(function.__doc__ or "").splitlines()[0], ""]
    named = MOST_IMPORTANT.get(command, "").split()
    if not full and named:
        by_name = {option.name: option for option in options}
        for name in named:
            lines += _format_option(by_name[name])
        others = [heading.lower() for heading in dict.fromkeys(option.heading for option in options)]
        others = [heading for heading in others if heading not in ("options", "training")]
        listed = ", ".join(others[:-1]) + " and " + others[-1]
        return "\n".join([*lines, "", f"{listed.capitalize()} options: pixelplay {command} --help-all"])
    for heading in dict.fromkeys(option.heading for option in options):
        lines += [f"{heading}:"]
        lines += [line for option in options if option.heading == heading for line in _format_option(option)]
        lines += [""]
    return "\n".join(lines[:-1])


def list_options(owner: Any, values: Mapping[str, Any], heading: str = "Options") -> Iterator[Option]:
    """List the arguments of a function or the fields of a settings class, groups of settings included."""
    classes = [each for each in getattr(owner, "__mro__", ()) if dataclasses.is_dataclass(each)]
    parsed = [docstring_parser.parse_from_object(each) for each in classes]
    documented = parsed or [docstring_parser.parse(owner.__doc__ or "")]
    texts = {each.arg_name: each.description or "" for doc in documented for each in doc.params}
    for name, (allowed, metadata) in field_types(owner).items():
        if name == "return":
            continue
        group, value = allowed[0], values[name]
        if dataclasses.is_dataclass(group):
            yield from list_options(group, vars(value), HEADINGS[group])  # type: ignore[index]
        else:
            yield _make_option(name, (allowed, metadata), value, texts[name], heading)


def _make_option(
    name: str, annotation: tuple[tuple[Any, ...], tuple[Any, ...]], default: Any, text: str, heading: str
) -> Option:
    """Combine annotation, default and description, in which "(default: …)" says what None stands for."""
    allowed, metadata = annotation
    shown = next((each for each in metadata if hasattr(each, "metavar")), None)
    flag = (getattr(shown, "name", None) or name).replace("_", "-")
    word = getattr(shown, "metavar", None) or ""
    required = default is inspect.Parameter.empty
    usage = f"--no-{flag}" if default is True else f"--{flag} {word}".rstrip()
    if Positional in metadata:
        usage = word
    text = " ".join((getattr(shown, "help", None) or text).split()).rstrip(".")
    text, _, meaning_of_none = text.partition(" (default: ")
    choices = [choice for kind in allowed if get_origin(kind) is Literal for choice in get_args(kind)]
    if not all(choice in text for choice in choices):
        text += ": " + ", ".join(choices)
    range_ = next((each for each in metadata if isinstance(each, Range)), None)
    text += "" if range_ is None else f" ({range_})"
    if default is None:
        default = meaning_of_none.removesuffix(")")
    elif isinstance(default, tuple):
        default = " ".join(default)
    if not (required or isinstance(default, bool) or default == ""):
        text += f" [{default}]"
    return Option(name, usage, text, heading, required)


def _format_option(option: Option) -> list[str]:
    width = max(60, min(100, shutil.get_terminal_size((100, 24)).columns))
    text = textwrap.wrap(option.text, width - USAGE_COLUMNS - 2, break_on_hyphens=False)
    indent = " " * (USAGE_COLUMNS + 2)
    if len(option.usage) < USAGE_COLUMNS:
        first = f"  {option.usage.ljust(USAGE_COLUMNS)}{text[0]}"
        return [first, *(indent + line for line in text[1:])]
    return [f"  {option.usage}", *(indent + line for line in text)]
