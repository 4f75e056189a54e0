"""Photographs sorted into parts without a network."""

from pathlib import Path

import numpy as np

from pixelplay.config import TrainConfig
from pixelplay.data.audit import digest_bytes
from pixelplay.data.dataset import ImageIndex
from pixelplay.data.sources import scan_source
from pixelplay.model.features import PhotographFeatures
from pixelplay.training.training_data import Material, sort_out


def sort_out_folder(root: Path, config: TrainConfig) -> Material:
    """Material of a folder; its features are of no interest."""
    index = scan_source(str(root))
    return sort_out(index, featureless(index), config)


def featureless(index: ImageIndex) -> PhotographFeatures:
    """All photographs readable, with their digests."""
    return PhotographFeatures(
        values=np.zeros((len(index), 2), dtype=np.float32),
        digests=[digest_bytes(index.store.read(path)) for path in index.paths],
        errors={},
    )
