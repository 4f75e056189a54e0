"""Define what every exported model computes, whatever runs it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pixelplay.array_types import Float64Array, IntArray, UInt8Array
from pixelplay.exporting.metadata import Metadata


@dataclass(frozen=True, eq=False)
class ExportedOutputs:
    """Outputs of an exported model for B images."""

    probs: Float64Array  # (B, K)
    pred: IntArray  # (B,)
    novelty: Float64Array  # (B,)


class ExportedModel(Protocol):
    """An exported file, ready to run."""

    metadata: Metadata
    engine: str  # name and version of what runs the file

    def __call__(self, pixels: UInt8Array, /) -> ExportedOutputs:
        """Classify prepared pixels (B, H, W, 3)."""
        ...


def as_outputs(arrays: Sequence[Any]) -> ExportedOutputs:
    """Convert the arrays that an engine returns."""
    probs, pred, novelty = map(np.asarray, arrays)
    return ExportedOutputs(
        probs.astype(np.float64), pred.astype(np.int64), np.asarray(novelty.astype(np.float64))
    )
