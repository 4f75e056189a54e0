"""A small plan and a small job, for tests to change."""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pixelplay.training.plan import FinetunePlan

from pixelplay.config import TrainConfig
from pixelplay.model.device import Device
from pixelplay.training.inputs import InputSource
from pixelplay.training.losses import make_loss
from pixelplay.training.schedule import Job

PLAN = FinetunePlan(
    finetune="partial",
    unfreeze_stages=2,
    cached_views=4,
    epochs=8,
    batch_size=32,
    compile=False,
    seconds={"views": 32.5, "training": 150.0, "reading and measuring": 9.1},
)


def plain_job(
    source: InputSource, labels: NDArray[np.int64], n_val: int, config: TrainConfig, **changes: Any
) -> Job:
    """A job with a plain loss on the CPU, whose last `n_val` images choose."""
    n_classes = int(labels.max()) + 1
    n_train = len(labels) - n_val
    counts = np.bincount(labels[:n_train], minlength=n_classes)
    job = Job(
        source=source,
        labels=labels,
        train=np.arange(n_train),
        val=np.arange(n_train, len(labels)),
        offset=np.zeros(n_classes),
        loss=make_loss("none", counts, logit_tau=1, focal_gamma=2, label_smoothing=0),
        imbalance="none",
        config=config,
        epochs=2,
        batch_size=8,
        compile=False,
        limit_s=None,
        device=Device(name="cpu", precision="fp32"),
        input_size=160,
    )
    return replace(job, **changes)
