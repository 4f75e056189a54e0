"""Every setting: its default, unit and legal range.

The command line, its help and the JSON beside a model are generated from these classes, so
they cannot differ. Off is None.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

from tyro.conf import arg

from pixelplay.errors import ConfigError

Metric = Literal["accuracy", "balanced_accuracy", "macro_f1"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "fp32", "bf16"]
Part = Literal["train", "val", "test"]
PARTS: tuple[Part, ...] = get_args(Part)


def shown(metavar: str | None = None) -> object:
    """Say how help shows a setting: a word for its value, and its default unless that is None."""
    return arg(
        metavar=metavar,
        help_behavior_hint=lambda value: "" if value == "None" else f"(default: {value})",
    )


# hflip is on by default, so the command line has --no-hflip, which needs its own words
TELL_MIRRORED = "Tell a photograph from its mirror image, as digits, arrows and text need."
Flag = Annotated[bool, arg(help_behavior_hint="")]
Count = Annotated[int, shown("N")]
File = Annotated[str | None, shown("FILE")]
Folder = Annotated[str | None, shown("FOLDER")]
Column = Annotated[str | None, shown("COLUMN")]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How paths, labels, parts and groups are read."""

    path_column: Column = None
    """Column of a table that names the photograph; found by its usual names when not given."""
    label_column: Column = None
    """Column of a table that holds the class name; found by its usual names when not given."""
    part_column: Column = None
    """Column of a table that says train, val or test; found by its usual names when not given."""
    group_column: Column = None
    """Column of a table naming what must stay on one side of a split: patient, camera, burst."""
    group_regex: Annotated[str | None, shown("REGEX")] = None
    """Regular expression on the path; its first bracket (or whole match) names the group."""
    group_by_folder: Flag = False
    """Photographs of one folder below the class folder are one group."""
    images_dir: Folder = None
    """Folder that the paths or ids of a table are looked up in (default: the table's own folder)."""

    def __post_init__(self) -> None:
        if self.group_regex is not None:
            try:
                re.compile(self.group_regex)
            except re.error as error:
                raise ConfigError(
                    f"group_regex={self.group_regex!r} is not a regular expression: {error}"
                ) from None
        ways = [self.group_column is not None, self.group_regex is not None, self.group_by_folder]
        if sum(ways) > 1:
            raise ConfigError("group_column, group_regex and group_by_folder exclude each other: give one")


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """What the work runs on."""

    device: Device = "auto"
    """Where the network runs; auto takes cuda, then mps, then cpu."""
    precision: Precision = "auto"
    """Number format of the network; auto takes bf16 where the device computes it natively."""
    batch_size: Count = 32
    """Photographs a batch, 1 to 4096."""
    num_workers: Annotated[int | None, shown("N")] = None
    """Threads that read and decode (default: one a core, at most 16)."""

    def __post_init__(self) -> None:
        _check_choice("device", self.device, get_args(Device))
        _check_choice("precision", self.precision, get_args(Precision))
        _check_count("batch_size", self.batch_size, 1, 4096)
        if self.num_workers is not None:
            _check_count("num_workers", self.num_workers, 1, 256)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a classifier is learned."""

    metric: Metric = "accuracy"
    """What decisions are tuned for: accuracy; balanced_accuracy or macro_f1 where rare classes count."""
    tune: Literal["probe"] = "probe"
    """Depth of training; probe fits a linear head on frozen features."""
    backbone: Annotated[str, shown("NAME")] = "auto"
    """auto, lite0, lite2 (both offline), or any timm model name."""
    weights: File = None
    """Local .safetensors or .pth file with the backbone's weights."""
    classes: File = None
    """File of the classes that the test side expects: a list, `class,count` rows, a sample submission."""
    hflip: Annotated[bool, arg(help=TELL_MIRRORED, help_behavior_hint="")] = True
    """A photograph and its mirror image mean the same; switch off for digits, arrows, text."""
    test_frac: Annotated[float, shown("FRACTION")] = 0.2
    """Fraction held out as test part when the data gives none, 0 to 0.9; 0 holds out nothing."""
    n_folds: Count = 5
    """Folds inside the learning part that choose regularisation, temperature and tau, 2 to 20."""
    seed: Count = 0
    """Seed of everything random."""
    cache_dir: Folder = None
    """Folder of the feature cache (default: the user's cache folder)."""
    cache_gb: Annotated[float, shown("GB")] = 2.0
    """Upper bound of the cache in gigabytes; 0 neither reads nor writes it."""
    offline: Flag = False
    """Never touch the network, even where weights are missing."""
    data: DataConfig = field(default_factory=DataConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def __post_init__(self) -> None:
        _check_choice("metric", self.metric, get_args(Metric))
        _check_choice("tune", self.tune, ("probe",))
        _check_range("test_frac", self.test_frac, 0, 0.9)
        _check_count("n_folds", self.n_folds, 2, 20)
        _check_count("seed", self.seed, 0, 2**32 - 1)
        _check_range("cache_gb", self.cache_gb, 0, 1_000_000)


def to_json(config: Any) -> dict[str, Any]:
    """Turn a configuration into the nested dictionary that is stored beside a model."""
    return dataclasses.asdict(config)


def suggest(name: str, known: Sequence[str], n: int = 3) -> str:
    """Name the closest known words: "; did you mean 'a' or 'b'?", or nothing."""
    close = difflib.get_close_matches(name, known, n=n, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def _check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}={value!r} is not one of {', '.join(choices)}")


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not isinstance(value, int | float) or not math.isfinite(value) or not low <= value <= high:
        raise ConfigError(f"{name}={value!r} is outside its range {low} to {high}")


def _check_count(name: str, value: int, low: int, high: int) -> None:
    _check_range(name, value, low, high)
    if not isinstance(value, int):
        raise ConfigError(f"{name}={value!r} is no whole number; its range is {low} to {high}")
