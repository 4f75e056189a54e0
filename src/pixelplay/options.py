"""What several commands share: how arguments are named and shown, and lists of photographs from stdin."""

import os
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated

from tyro.conf import OmitArgPrefixes, Positional, arg

from pixelplay.config import CautionConfig, ComputeConfig, DataConfig, TrainConfig

Data = Annotated[Positional[str], arg(metavar="DATA")]
Run = Annotated[Positional[str], arg(metavar="RUN")]
Images = Annotated[Positional[tuple[str, ...]], arg(metavar="IMAGES...", help_behavior_hint="(required)")]
WithRuns = Annotated[tuple[str, ...], arg(name="with", metavar="[RUN ...]", help_behavior_hint="")]
# the name of a group of settings is the title of its section in the help
DataSection = Annotated[OmitArgPrefixes[DataConfig], arg(name="data")]
CautionSection = Annotated[OmitArgPrefixes[CautionConfig], arg(name="caution")]
ComputeSection = Annotated[OmitArgPrefixes[ComputeConfig], arg(name="compute")]
TrainSection = Annotated[OmitArgPrefixes[TrainConfig], arg(name="")]
Decode = Annotated[
    bool, arg(help="Open no photograph; look at names and for duplicates only.", help_behavior_hint="")
]


def check_some(images: Sequence[str]) -> None:
    """Exit with status 2 where no photographs are named."""
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
