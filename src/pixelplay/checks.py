"""Whether a setting is legal."""

import dataclasses
import math
import numbers
import os
import re
from collections.abc import Sequence
from typing import Any

from pixelplay.errors import ConfigError, suggest


def parse_duration(text: str) -> float:
    """Seconds of a duration written 90s, 5m or 2h.

    Raises:
        ConfigError: written otherwise, or nothing.
    """
    matched = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh])", str(text).strip())
    seconds = float(matched[1]) * {"s": 1, "m": 60, "h": 3600}[matched[2]] if matched else 0.0
    if not seconds:
        raise ConfigError(f"time_budget={text!r} is no duration; write 90s, 5m or 2h")
    return seconds


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise ConfigError unless a setting has one of the values that there are."""
    if value not in choices:
        raise ConfigError(f"{name}={value!r} is not one of {', '.join(choices)}")


def check_names(name: str, noun: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Raise ConfigError unless a setting is a sequence of known names."""
    if isinstance(names, str):
        raise ConfigError(f"{name}={names!r} is one text; give a tuple, ({names!r},)")
    for each in names:
        if each not in known:
            raise ConfigError(
                f"{noun} {each!r} is unknown{suggest(each, known)}; there are {', '.join(known)}"
            )


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raise ConfigError unless a setting is a number in its range, ends included."""
    if not isinstance(value, int | float):
        raise ConfigError(f"{name}={value!r} is no plain number; its range is {low} to {high}")
    if not math.isfinite(value) or not low <= value <= high:
        raise ConfigError(f"{name}={value!r} is outside its range {low} to {high}")


def check_count(name: str, value: int, low: int, high: int) -> None:
    """Raise ConfigError unless a setting is a whole number in its range."""
    check_range(name, value, low, high)
    if not isinstance(value, int):
        raise ConfigError(f"{name}={value!r} is no whole number; its range is {low} to {high}")


def check_regex(name: str, pattern: str) -> None:
    """Raise ConfigError unless a setting is a regular expression."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"{name}={pattern!r} is not a regular expression: {error}") from None


def check_groups(config: Any) -> None:
    """Raise ConfigError where a group of settings in a configuration is something else."""
    for field in dataclasses.fields(config):
        kind, value = field.default_factory, getattr(config, field.name)
        if isinstance(kind, type) and not isinstance(value, kind):
            raise ConfigError(f"{field.name}={value!r} is no {kind.__name__}; give {kind.__name__}(...)")


def take_paths(config: object, *names: str) -> None:
    """Make texts of a frozen configuration's paths, as its JSON holds them."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not isinstance(value, str | os.PathLike):
            raise ConfigError(f"{name}={value!r} is no path; give a text")
        if value is not None:
            object.__setattr__(config, name, os.fsdecode(value))


def check_share(name: str, value: float) -> None:
    """Raise ConfigError unless a setting lies between 0 and 1, both excluded."""
    if not isinstance(value, numbers.Real) or not 0 < value < 1:
        raise ConfigError(f"{name}={value!r} is outside its range, above 0 and below 1; ask for 0.9, say")
