"""Training data, a plan and run contexts without a network."""

import time
from pathlib import Path

import numpy as np

from pixelplay.config import TrainConfig
from pixelplay.data.audit import digest_bytes
from pixelplay.data.dataset import ImageDataset
from pixelplay.data.sources import open_dataset
from pixelplay.model.device import Device
from pixelplay.model.features import ImageFeatures
from pixelplay.run_log import RunLog
from pixelplay.training.plan_file import FinetunePlan
from pixelplay.training.run_context import RunContext
from pixelplay.training.training_data import TrainingData, build_training_data

PLAN = FinetunePlan(
    finetune="partial",
    unfreeze_stages=2,
    cached_views=4,
    epochs=8,
    batch_size=32,
    seconds={"views": 32.5, "training": 150.0, "refit": 0.0, "evaluation": 9.1},
)


def training_data_of(root: Path, config: TrainConfig) -> TrainingData:
    """Build the training data of a folder with constant features."""
    dataset = open_dataset(str(root))
    return build_training_data(dataset, featureless(dataset), config)


def featureless(dataset: ImageDataset) -> ImageFeatures:
    """Return constant features and the true digests of all images."""
    return ImageFeatures(
        values=np.zeros((len(dataset), 2), dtype=np.float32),
        digests=[digest_bytes(dataset.storage.read(path)) for path in dataset.paths],
        errors={},
    )


def context_of(config: TrainConfig, log: RunLog | None = None, run_dir: str = "") -> RunContext:
    """Create a run context on the CPU."""
    device = Device(name="cpu", precision="fp32")
    return RunContext(
        config=config, device=device, run_dir=run_dir, log=log or RunLog(quiet=True), started=time.monotonic()
    )
