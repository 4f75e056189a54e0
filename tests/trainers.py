"""A small schedule, trainer and fine-tuning for tests to change."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from conftest import TINY, draw_folder
from contexts import context_of, training_data_of
from pixelplay.array_types import IntArray
from pixelplay.config import TrainConfig
from pixelplay.data.sampling import class_priors
from pixelplay.model.classifier import Classifier, LinearHead
from pixelplay.run_log import RunLog
from pixelplay.training.batch_inputs import InputSource
from pixelplay.training.finetune_task import FinetuneTask
from pixelplay.training.linear_probe import LinearProbe
from pixelplay.training.losses import LossFunction, make_loss
from pixelplay.training.schedule import Schedule
from pixelplay.training.trainer import Trainer, Validation


def make_schedule(labels: IntArray, n_val: int, config: TrainConfig, **changes: Any) -> Schedule:
    """Create a schedule for all images but the last `n_val`."""
    schedule = Schedule(
        labels=labels,
        rows=np.arange(len(labels) - n_val),
        n_classes=int(labels.max()) + 1,
        imbalance="none",
        epochs=2,
        batch_size=8,
        input_size=(160, 160),
        config=config,
    )
    return replace(schedule, **changes)


def make_trainer(
    classifier: Classifier,
    inputs: InputSource,
    schedule: Schedule,
    val: IntArray,
    run_dir: Path,
    *,
    loss: LossFunction | None = None,
    log: RunLog | None = None,
    **options: Any,
) -> Trainer:
    """Create a trainer with cross entropy, whose validation images are `val`.

    Args:
        options: of `Trainer`.
    """
    counts = np.bincount(schedule.labels[schedule.rows], minlength=schedule.n_classes)
    validation = Validation(
        rows=val,
        labels=schedule.labels[val],
        offset=np.zeros(schedule.n_classes),
        priors=class_priors(counts),
        metric=schedule.config.metric,
    )
    return Trainer(
        classifier,
        inputs,
        schedule,
        validation,
        loss or make_loss("none", counts, logit_tau=1, focal_gamma=2, label_smoothing=0),
        context_of(schedule.config, log, str(run_dir)),
        **options,
    )


def make_task(config: TrainConfig, tmp_path: Path, weights: Path) -> FinetuneTask:
    """Create a fine-tuning of the tiny network whose linear probe knows nothing.

    Of its two classes 12 and 3 images are in train, and 3 and 9 in val; features are random.
    """
    draw_folder(tmp_path / "photos/train", {"bars": 12, "dots": 3})
    draw_folder(tmp_path / "photos/val", {"bars": 3, "dots": 9}, first_seed=50)
    config = replace(config, backbone=TINY, weights=str(weights), offline=True, test_frac=0.0)
    data = training_data_of(tmp_path / "photos", config)
    ctx = context_of(config, run_dir=str(tmp_path))
    n_features = ctx.backbone.backbone.n_features
    features = np.random.default_rng(0).normal(size=(len(data.dataset), n_features)).astype(np.float32)
    head = LinearHead(weight=np.zeros((2, n_features), np.float32), bias=np.zeros(2, np.float32))
    probe = LinearProbe(
        head=head, factors=None, C=1.0, nll_by_C={1.0: 0.7}, oof_logits=np.zeros((15, 2), np.float32)
    )
    return FinetuneTask(replace(data, features=features), probe, ctx)
