"""Images sorted into parts without a network."""

from pathlib import Path

import numpy as np

from pixelplay.config import TrainConfig
from pixelplay.data.audit import digest_bytes
from pixelplay.data.dataset import ImageDataset
from pixelplay.data.sources import scan_source
from pixelplay.model.features import ImageFeatures
from pixelplay.training.training_data import TrainingData, build_training_data


def sort_out_folder(root: Path, config: TrainConfig) -> TrainingData:
    """Material of a folder; its features are of no interest."""
    dataset = scan_source(str(root))
    return build_training_data(dataset, featureless(dataset), config)


def featureless(dataset: ImageDataset) -> ImageFeatures:
    """All images readable, with their digests."""
    return ImageFeatures(
        values=np.zeros((len(dataset), 2), dtype=np.float32),
        digests=[digest_bytes(dataset.storage.read(path)) for path in dataset.paths],
        errors={},
    )
