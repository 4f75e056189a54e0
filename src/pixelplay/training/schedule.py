"""What a training learns, and from what; its schedule follows from it."""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from pixelplay.arrays import Float32Array, Float64Array, IntArray
from pixelplay.config import Imbalance, TrainConfig
from pixelplay.data.sampling import class_priors, draw_epoch, epoch_length, expected_draws, whole_draws
from pixelplay.model.device import Device, TooLittleMemoryError
from pixelplay.training.compatibility import may_repeat_hard_examples
from pixelplay.training.inputs import Batch, InputSource
from pixelplay.training.losses import LossFunction

SIZE_STEP_PX = 32  # networks halve their maps five times


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is learned, and from what.

    Attributes:
        source: gives the inputs.
        labels: (N,) in [0, K) of all images of the material.
        train: positions that are learned from.
        val: positions that choose the epoch; empty where nothing is left to choose.
        offset: (K,) added to logits to make them natural.
        loss: of logits (B, K) and soft targets (B, K).
        imbalance: how rare classes are helped, "auto" resolved.
        epochs: passes over what an epoch draws.
        batch_size: images a batch.
        is_compiled: compile the network first.
        limit_s: training time after which it ends early; None for never.
        device: where it runs.
        input_size: side of the network's images, px.
        beside: (n, K) natural logits of the probe for `val`, where it may answer together with the
            tuned network; None where it may not.
        lr_frac: factor on the peak learning rates.
        epochs_before: epochs of an earlier job; what chance drew in them is not drawn again.
        config: everything else.
    """

    source: InputSource
    labels: IntArray
    train: IntArray
    val: IntArray
    offset: Float64Array
    loss: LossFunction
    imbalance: Imbalance
    config: TrainConfig
    epochs: int
    batch_size: int
    compile: bool
    limit_s: float | None
    device: Device
    input_size: int
    beside: Float32Array | None = None
    lr_frac: float = 1.0
    epochs_before: int = 0

    @property
    def n_classes(self) -> int:
        """K."""
        return len(self.offset)

    @cached_property
    def priors(self) -> Float64Array:
        """Class mix (K,) of what is learned from."""
        return class_priors(self._counts)

    @cached_property
    def _counts(self) -> IntArray:
        return np.bincount(self.labels[self.train], minlength=self.n_classes)

    @cached_property
    def n_epoch(self) -> int:
        """Images drawn in an epoch."""
        return epoch_length(self._counts, self.imbalance, self.config.oversample_to)

    @property
    def batches_per_epoch(self) -> int:
        """Forward passes in an epoch."""
        return max(1, -(-self.n_epoch // self.batch_size))

    @property
    def batches_per_step(self) -> int:
        """Forward passes behind an optimizer step; none reaches over the end of an epoch."""
        return min(self.config.finetuning.grad_accum_steps, self.batches_per_epoch)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return -(-self.batches_per_epoch // self.batches_per_step)

    @property
    def n_steps(self) -> int:
        """Optimizer steps in all."""
        return self.epochs * self.steps_per_epoch

    @property
    def images_per_step(self) -> float:
        """Mean number behind an optimizer step; batches are even, and the last step may have fewer."""
        return self.n_epoch / self.steps_per_epoch

    @property
    def hard_example_frac(self) -> float:
        """Share of an epoch that goes to what was wrong; 0 where weights do not make up for that.

        They do not where images are mixed, nor in the statistics of a batch norm.
        """
        return self.config.finetuning.hard_example_frac if may_repeat_hard_examples(self.config) else 0.0

    def answers(self, logits: Float32Array) -> dict[bool, Float32Array]:
        """Whether the probe answers too → logits (n, K) of the validation part, for what may be deployed.

        Args:
            logits: (n, K) the tuned network's own, natural.
        """
        if self.beside is None:
            return {False: logits}
        alone = {} if self.config.finetuning.ensemble_probe == "on" else {False: logits}
        return {**alone, True: (logits + self.beside) / np.float32(2)}

    def batches(self, epoch: int, misses: Float32Array) -> list[Batch]:
        """What each batch of an epoch is made of; their sizes differ by one at most.

        Args:
            misses: (N,) how wrong the network was about each image when it last learned from it: 1 less
                the probability of its class.
        """
        rng = np.random.default_rng([self.config.seed, self.epochs_before + epoch])
        drawn = draw_epoch(self.labels[self.train], self.imbalance, self.config.oversample_to, rng)
        weights = np.ones(len(drawn), dtype=np.float32)
        if self.hard_example_frac:
            expected = expected_draws(misses[self.train[drawn]], self.hard_example_frac)  # (n,)
            order = rng.permutation(np.repeat(np.arange(len(drawn)), whole_draws(expected, rng)))
            drawn, weights = drawn[order], (1 / expected[order]).astype(np.float32)
        seen: Counter[int] = Counter()
        times = np.zeros(len(drawn), dtype=np.int64)
        for n, i in enumerate(drawn.tolist()):
            times[n] = seen[i]
            seen[i] += 1
        columns = (self.train[drawn], times, weights)
        chunks = [np.array_split(values, self.batches_per_epoch) for values in columns]
        return [Batch(*parts) for parts in zip(*chunks, strict=True)]

    def size_px(self, epoch: int) -> int:
        """Side of the images in an epoch: it grows in the first half, in steps of 32."""
        full = self.input_size
        share = self.config.finetuning.initial_size_frac
        progress = min(1.0, 2 * epoch / self.epochs)
        if share == 1 or progress == 1 or self.epochs == 1:
            return full  # which need not be a multiple of 32
        grown = share + (1 - share) * progress
        return min(full, max(SIZE_STEP_PX, round(full * grown / SIZE_STEP_PX) * SIZE_STEP_PX))


def set_cublas_workspace(config: TrainConfig, device: Device) -> None:
    """Let a GPU's matrix products be the same in every run, where that is wished.

    It is heeded only before the first of them.

    Source: cuBLAS documentation, "Results reproducibility".
    """
    if config.finetuning.deterministic and device.name == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def deterministic_algorithms(job: Job) -> Iterator[None]:
    """Ask a GPU for the same sums in every run, where that is wished, and give its settings back."""
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    was_warning = torch.is_deterministic_algorithms_warn_only_enabled()
    was_trying = torch.backends.cudnn.benchmark
    is_deterministic = job.config.finetuning.deterministic and job.device.name == "cuda"
    if job.device.name == "cuda":
        torch.use_deterministic_algorithms(is_deterministic, warn_only=True)
        torch.backends.cudnn.benchmark = not is_deterministic
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_deterministic, warn_only=was_warning)
        torch.backends.cudnn.benchmark = was_trying


def training_memory_error(device: str, batch_size: int) -> TooLittleMemoryError:
    """The error that says what to lower."""
    return TooLittleMemoryError(
        f"{device} has too little memory for steps of {batch_size} images; lower --train-batch-size "
        "and raise --grad-accum-steps as much"
    )
