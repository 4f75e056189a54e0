"""Schedule: epochs, batches, optimizer steps, learning rate and image sizes of a training."""

import math
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from itertools import count

import numpy as np

from pixelplay.array_types import Float32Array, IntArray
from pixelplay.config import Imbalance, TrainConfig
from pixelplay.data.sampling import draw_epoch, epoch_length, expected_draws, round_draws
from pixelplay.data.transforms import Size
from pixelplay.training.batch_inputs import Batch
from pixelplay.training.settings_conflicts import can_repeat_hard_examples

SIZE_STEP_PX = 32  # networks halve their feature maps five times
SMOOTHING = 0.15  # weight of a batch in the smoothed training loss
MAX_RISE = 1.05  # of the smoothed loss over the initial one, above which learning rates are lowered
LR_DOWN, LR_UP, MIN_LR_FRAC = 0.65, 1.1, 0.01  # per batch


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Define which images are drawn when, and at which size.

    Everything follows from the seed, the epoch and the errors before it, so any batch can be reproduced.
    """

    labels: IntArray  # (N,) in [0, K), of all images in the training data
    rows: IntArray  # positions of the images to train on
    n_classes: int  # K
    imbalance: Imbalance  # "auto" resolved
    epochs: int
    batch_size: int  # at most
    input_size: Size
    config: TrainConfig
    epochs_before: int = 0  # of an earlier schedule, so that random draws are not repeated

    @cached_property
    def n_drawn(self) -> int:
        """Images drawn per epoch."""
        counts = np.bincount(self.labels[self.rows], minlength=self.n_classes)
        return epoch_length(counts, self.imbalance, self.config.oversample_to)

    @property
    def batches_per_epoch(self) -> int:
        """Forward passes per epoch."""
        return max(1, -(-self.n_drawn // self.batch_size))

    @property
    def batches_per_step(self) -> int:
        """Forward passes per optimizer step; no step spans two epochs."""
        return min(self.config.finetuning.grad_accum_steps, self.batches_per_epoch)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch."""
        return -(-self.batches_per_epoch // self.batches_per_step)

    @property
    def n_steps(self) -> int:
        """Optimizer steps in total."""
        return self.epochs * self.steps_per_epoch

    @property
    def images_per_step(self) -> float:
        """Mean number of images per optimizer step."""
        return self.n_drawn / self.steps_per_epoch

    def accumulated_batches(self, batch: int) -> range:
        """Batches of an epoch that share an optimizer step with a batch; the last group may be short."""
        first = batch - batch % self.batches_per_step
        return range(first, min(first + self.batches_per_step, self.batches_per_epoch))

    @property
    def hard_example_frac(self) -> float:
        """Fraction of an epoch drawn by error; 0 where the loss weights could not compensate for it."""
        return self.config.finetuning.hard_example_frac if can_repeat_hard_examples(self.config) else 0.0

    def batches(self, epoch: int, errors: Float32Array) -> list[Batch]:
        """Draw the batches of an epoch; their sizes differ by at most one.

        Args:
            errors: (N,) 1 minus the probability of its label, when each image was last trained on.
        """
        rng = np.random.default_rng([self.config.seed, self.epochs_before + epoch])
        drawn = draw_epoch(self.labels[self.rows], self.imbalance, self.config.oversample_to, rng)
        weights = np.ones(len(drawn), dtype=np.float32)
        if self.hard_example_frac:
            expected = expected_draws(errors[self.rows[drawn]], self.hard_example_frac)  # (n,)
            order = rng.permutation(np.repeat(np.arange(len(drawn)), round_draws(expected, rng)))
            drawn, weights = drawn[order], (1 / expected[order]).astype(np.float32)
        counters: defaultdict[int, count[int]] = defaultdict(count)
        times = np.array([next(counters[i]) for i in drawn.tolist()], dtype=np.int64)
        columns = (self.rows[drawn], times, weights)
        chunks = [np.array_split(values, self.batches_per_epoch) for values in columns]
        return [Batch(*parts) for parts in zip(*chunks, strict=True)]

    def size(self, epoch: int) -> Size:
        """Return the size of the images in an epoch counted from 0.

        With `initial_size_frac` below 1 it grows during the first half of the training, in steps of 32 px.
        """
        full, initial = self.input_size, self.config.finetuning.initial_size_frac
        progress = min(1.0, 2 * epoch / self.epochs)
        if initial == 1 or progress == 1 or self.epochs == 1:
            return full  # need not be a multiple of 32
        frac = initial + (1 - initial) * progress
        height, width = (
            min(side, max(SIZE_STEP_PX, round(side * frac / SIZE_STEP_PX) * SIZE_STEP_PX)) for side in full
        )
        return height, width

    def sizes(self) -> set[Size]:
        """Return the image sizes of all epochs."""
        return {self.size(epoch) for epoch in range(self.epochs)}


def limit_lr(frac: float, smoothed: float, loss: float, initial: float) -> tuple[float, float]:
    """Lower a factor on the learning rates while the training loss is above the initial one.

    Large steps of a pretrained network that starts from a fitted head destroy more than they teach.

    Args:
        frac: the factor so far.
        smoothed: the smoothed loss so far.
        loss: of the next batch.
        initial: training loss before the first step.

    Returns:
        The new factor and the new smoothed loss.
    """
    smoothed += SMOOTHING * (loss - smoothed)
    if smoothed > MAX_RISE * initial:
        return max(MIN_LR_FRAC, frac * LR_DOWN), smoothed
    return min(1.0, frac * LR_UP), smoothed


def lr_factor(step: int, n_steps: int, warmup_frac: float) -> float:
    """Return the fraction of the peak learning rate at a step counted from 0: warm-up, then cosine.

    Source: Loshchilov and Hutter, "SGDR", ICLR 2017, arXiv:1608.03983, eq. 5.
    """
    n_warmup = round(warmup_frac * n_steps)
    if step < n_warmup:
        return (step + 1) / n_warmup
    return 0.5 * (1 + math.cos(math.pi * (step - n_warmup) / max(1, n_steps - n_warmup)))
