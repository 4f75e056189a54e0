"""Help texts: the most important options of a command, or all of them under headings.

Types, ranges and defaults come from the annotations that also check the settings.
"""

import dataclasses
import inspect
import shutil
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args, get_origin

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
from pixelplay.serving.settings import LimitsConfig, ServerConfig

HEADINGS: Mapping[type, str] = {
    TrainConfig: "Training",
    DataConfig: "Data",
    FinetuneConfig: "Fine-tuning",
    AugmentConfig: "Augmentation",
    UncertaintyConfig: "Uncertainty",
    ComputeConfig: "Compute",
    ServerConfig: "Server",
    LimitsConfig: "Limits",
    LogOptions: "Output",
    OutputOptions: "Output",
}
# command → the options that --help shows; commands that are missing here show all of them
MAIN_OPTIONS: Mapping[str, str] = {
    "scan": "data near_duplicates names_only classes label_column images_dir json",
    "train": "data out finetune time_budget metric backbone imbalance test_frac hflip seed resume force",
    "crossval": "data out n_folds finetune time_budget metric backbone imbalance hflip seed resume force",
    "evaluate": "run data split against at_precision positive tta out force json",
    "predict": "run images out submission images_dir ensemble_with tta coverage min_confidence strict force",
    "serve": "run host port token_file token coverage min_confidence insecure_no_token max_queue timeout",
    "explain": "run images out class_name method ensemble_with images_dir force",
}
USAGE_COLUMNS = 25


class Option(NamedTuple):
    """One argument of a command; `usage` is how it is typed, `text` describes it with range and default."""

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
    """Format the help of a command from the signature and docstring of its function.

    Args:
        config: defaults of the settings for training.
        full: show all options under headings.
    """
    options = {option.name: option for option in command_options(function, config)}
    required = " ".join(option.usage for option in options.values() if option.required)
    lines = [f"usage: pixelplay {command} {required} [options]".replace("  ", " "), ""]
    lines += [(function.__doc__ or "").splitlines()[0], ""]
    present = {option.heading for option in options.values()}
    headings = [each for each in dict.fromkeys(["Options", *HEADINGS.values()]) if each in present]
    if not full and (named := MAIN_OPTIONS.get(command, "").split()):
        lines += [line for name in named for line in _format_option(options[name])]
        *others, last = [each.lower() for each in headings if each not in ("Options", "Training")]
        listed = f"{', '.join(others)} and {last}".capitalize()
        return "\n".join([*lines, "", f"{listed} options: pixelplay {command} --help-all"])
    for heading in headings:
        own = [option for option in options.values() if option.heading == heading]
        lines += [f"{heading}:", *(line for option in own for line in _format_option(option)), ""]
    return "\n".join(lines[:-1])


def command_options(function: Callable[..., None], config: TrainConfig) -> list[Option]:
    """List all arguments of a command; the settings for training have the defaults of `config`."""
    parameters = inspect.signature(function).parameters.values()
    values = {each.name: config if each.name == "config" else each.default for each in parameters}
    return list(list_options(function, values))


def list_options(owner: Any, values: Mapping[str, Any], heading: str = "Options") -> Iterator[Option]:
    """List the arguments of a function or the fields of a settings class, groups of settings included."""
    classes = [each for each in getattr(owner, "__mro__", ()) if dataclasses.is_dataclass(each)]
    parsed = [docstring_parser.parse_from_object(each) for each in classes]
    documented = parsed or [docstring_parser.parse(owner.__doc__ or "")]
    texts = {each.arg_name: each.description or "" for doc in documented for each in doc.params}
    for name, value in values.items():
        allowed, metadata = field_types(owner)[name]
        if dataclasses.is_dataclass(value):
            yield from list_options(type(value), vars(value), HEADINGS[type(value)])
        else:
            yield _make_option(name, (allowed, metadata), value, texts[name], heading)


def _make_option(
    name: str, annotation: tuple[tuple[Any, ...], tuple[Any, ...]], default: Any, text: str, heading: str
) -> Option:
    """Combine annotation, default and description, in which "(default: …)" explains None."""
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
