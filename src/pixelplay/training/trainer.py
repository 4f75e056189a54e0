"""Trainer: the training loop with validation, early stopping, checkpoints and a time limit.

A step depends only on the seed, the epoch, the batch, the errors before the epoch and the number of epochs.
So an interrupted training resumes bit by bit, and several processes could each take a shard of every batch
if they exchanged the errors after each epoch.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pixelplay.array_types import Float32Array, Float64Array, IntArray
from pixelplay.config import Metric, Switch
from pixelplay.evaluation.calibration import mean_nll
from pixelplay.evaluation.decision_rule import calibrated_nll
from pixelplay.evaluation.metrics import LABEL_METRICS, ClassCounts, count_labels
from pixelplay.model.classifier import Classifier
from pixelplay.model.device import Device, map_on_cores, to_device, translate_memory_errors
from pixelplay.run_log import Progress
from pixelplay.training.batch_inputs import Batch, Inputs, InputSource, stream
from pixelplay.training.checkpoint import (
    TrainState,
    copy_weights,
    has_checkpoint,
    read_checkpoint,
    restore_weights,
    write_checkpoint,
)
from pixelplay.training.cpu_parallel import Forward, parallel_forward
from pixelplay.training.losses import LossFunction
from pixelplay.training.mixup import mix_batch
from pixelplay.training.optim import make_optimizer
from pixelplay.training.run_context import RunContext
from pixelplay.training.schedule import Schedule, limit_lr, lr_factor

NAN = float("nan")
OUT_OF_TIME = "the time budget was used up"
CHECKPOINT_EVERY_S = 20.0
INITIAL_BATCHES = 16  # that measure the training loss before training
READ_LOSSES_EVERY = 10  # batches or steps on a GPU, where each read waits for the device


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The images that select the epoch, and their selection loss."""

    rows: IntArray  # (n,) positions; empty where nothing is left to select
    labels: IntArray  # (n,)
    offset: Float64Array  # (K,) added to the logits to give them natural priors
    priors: Float64Array  # (K,) class frequencies of the training images
    metric: Metric
    ensemble_probe: Switch = "off"  # auto selects by selection loss
    probe_logits: Float32Array | None = None  # (n, K) natural; None where the probe cannot be averaged in

    def best(self, logits: Float32Array) -> tuple[bool, Float32Array, float]:
        """Select between the network's natural logits (n, K) and their average with the linear probe.

        Returns:
            True if the probe is averaged in; the logits; their selection loss (NaN for n = 0).
        """
        if not len(logits):
            return False, logits, NAN
        candidates = [(False, logits)]
        if self.probe_logits is not None:
            averaged = True, (logits + self.probe_logits) / np.float32(2)
            candidates = [averaged] if self.ensemble_probe == "on" else [*candidates, averaged]
        scored = [
            (*each, calibrated_nll(each[1], self.labels, self.priors, self.metric)) for each in candidates
        ]
        return min(scored, key=lambda candidate: candidate[2])


class Trainer:
    """Trains a classifier in place; afterwards it has the weights of the best epoch.

    Args:
        loss: of logits (B, K) and soft targets (B, K).
        time_limit_s: training time after which it ends early; None for no limit.
        lr_frac: factor on all learning rates.
        title: of the progress bar.
    """

    def __init__(
        self,
        classifier: Classifier,
        inputs: InputSource,
        schedule: Schedule,
        validation: Validation,
        loss: LossFunction,
        ctx: RunContext,
        *,
        time_limit_s: float | None = None,
        lr_frac: float = 1.0,
        title: str = "training",
    ) -> None:
        classifier.to(ctx.device.name, memory_format=torch.channels_last)  # type: ignore[call-overload]
        classifier.zero_grad()  # gradients may remain from a training that was stopped between two steps
        self.classifier, self.inputs, self.schedule = classifier, inputs, schedule
        self.validation, self.loss, self.ctx = validation, loss, ctx
        self.settings, self.device, self.log = schedule.config.finetuning, ctx.device, ctx.log
        self.title, self._n_planned = title, schedule.epochs
        self.forward: Forward = classifier
        optimizer = make_optimizer(classifier, self.settings, schedule.images_per_step, lr_frac=lr_frac)
        self.state = TrainState(
            network=classifier,
            optimizer=optimizer,
            best=copy_weights(classifier),
            errors=torch.ones(len(schedule.labels)),
            errors_before=torch.ones(len(schedule.labels)),
            epochs=schedule.epochs,
            counts=_zeros(schedule.n_classes),
            time_limit_s=time_limit_s,
        )
        self._unread: list[tuple[int, Batch, Tensor, Tensor, Tensor]] = []  # losses still on the device
        self._timer = self._saved_at = 0.0

    def fit(self) -> TrainState:
        """Train until the schedule ends, validation stops improving or time runs out.

        An existing checkpoint is resumed. Epoch 0 of the history evaluates the initial weights, so the result
        is never worse than those on the validation images.

        Raises:
            ConfigError: out of memory; the message says which setting to lower.
            DataError: the checkpoint is damaged.
        """
        state = self.state
        with self._environment() as bar:
            while state.epoch <= state.epochs and not state.stopped:
                self.classifier.train()
                self._timer = self._saved_at = time.monotonic()
                for batch, inputs in self._remaining_batches():
                    loss, logits, is_label = self._forward_loss(batch, inputs)
                    step = self.schedule.accumulated_batches(state.n_batches)
                    (loss / len(step)).backward()  # type: ignore[no-untyped-call]
                    self._record(batch, loss, logits, is_label)
                    if is_step := state.n_batches == step.stop:
                        self._optimizer_step()
                    bar.update(1)
                    if self._should_interrupt(can_save=is_step):
                        break
                self._read_losses()
                self._add_time()
                if state.stopped and not state.n_batches:
                    break  # a non-finite loss has spoilt the weights
                self._evaluate_epoch()
                self._fit_epochs_to_time()
                self._save()
                bar.set_total(state.epochs * self.schedule.batches_per_epoch)
        restore_weights(self.classifier, state.best)
        return state

    @contextmanager
    def _environment(self) -> Iterator[Progress]:
        """Resume, evaluate the initial weights, and set up random state, threads and the progress bar."""
        with (
            torch.random.fork_rng(devices=self.device.rng_devices()),
            _algorithms(self.device, deterministic=self.settings.deterministic),
            translate_memory_errors(training_memory_message(self.device.name, self.schedule.batch_size)),
        ):
            if has_checkpoint(self.ctx.checkpoint_dir):
                read_checkpoint(self.state, self.ctx.checkpoint_dir)
            self._set_epochs(self.state.epochs)
            if not self.state.history:
                self._measure_initial_loss()
                self._evaluate_epoch()
                self.state.epoch_start_s = self.state.seconds
            per_epoch = self.schedule.batches_per_epoch
            with (
                parallel_forward(self.classifier, self.device, self.schedule.batch_size) as self.forward,
                self.log.progress(self.title, self.schedule.epochs * per_epoch, "batches") as bar,
            ):
                bar.update(max(0, self.state.epoch - 1) * per_epoch + self.state.n_batches)
                yield bar
        if (n := self.state.epochs) < self._n_planned:
            self.log.note(f"{self.title}: only {n} of {self._n_planned} planned epochs fit the time budget")

    @torch.no_grad()
    def _measure_initial_loss(self) -> None:
        """Measure the training loss of the initial weights on some batches of the first epoch."""
        schedule, state = self.schedule, self.state
        self.classifier.train()
        batches = schedule.batches(1, state.errors_before.numpy())[:INITIAL_BATCHES]
        for batch in batches:
            inputs = self.inputs.train_batch(batch, schedule.epochs_before + 1, schedule.size(0))()
            loss, _, _ = self._forward_loss(batch, inputs)
            state.loss_sum += float(loss) * len(batch.rows)
            state.n_seen += len(batch.rows)

    def _remaining_batches(self) -> Iterator[tuple[Batch, Inputs]]:
        """Yield the batches of the current epoch that are not done yet, with their inputs."""
        schedule, state = self.schedule, self.state
        epoch, size = state.epoch, schedule.size(state.epoch - 1)
        return stream(
            schedule.batches(epoch, state.errors_before.numpy())[state.n_batches :],
            lambda batch: self.inputs.train_batch(batch, schedule.epochs_before + epoch, size),
            schedule.config.compute.num_workers,
        )

    def _forward_loss(self, batch: Batch, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss, the logits (B, K) and the one-hot labels (B, K) of a batch."""
        schedule, state, mixing = self.schedule, self.state, self.schedule.config.augmenting
        position = (schedule.config.seed, schedule.epochs_before + state.epoch, state.n_batches)
        seed = int(np.random.SeedSequence(position).generate_state(1)[0])
        torch.manual_seed(seed)  # dropout, stochastic depth
        labels = to_device(torch.from_numpy(schedule.labels[batch.rows]), self.device.name)  # (B,)
        weights = to_device(torch.from_numpy(batch.weights), self.device.name)  # (B,)
        is_label = torch.nn.functional.one_hot(labels, schedule.n_classes)  # (B, K)
        targets = is_label * weights[:, None]  # (B, K)
        maps, stats = inputs
        rng = np.random.default_rng(position)
        if state.step < (1 - mixing.mix_off_frac) * schedule.n_steps and rng.random() < mixing.mix_prob:
            maps, stats, targets = mix_batch(maps, stats, targets, mixing, rng)
        with self.device.autocast():
            logits = self.forward(maps, stats)  # (B, K)
        return self.loss(logits, targets), logits, is_label

    def _record(self, batch: Batch, loss: Tensor, logits: Tensor, is_label: Tensor) -> None:
        """Keep loss and predictions on the device until they are read, and count the batch."""
        probs = logits.detach().float().softmax(1)  # (B, K)
        errors = 1 - (probs * is_label).sum(1)  # (B,)
        self._unread.append((self.state.step, batch, loss.detach(), errors, probs.argmax(1)))
        self.state.n_batches += 1

    def _optimizer_step(self) -> None:
        optimizer, state = self.state.optimizer, self.state
        self._limit_lr()
        factor = state.lr_frac * lr_factor(state.step, self.schedule.n_steps, self.settings.warmup_frac)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        if self.settings.clip_grad_norm is not None:
            parameters = [value for group in optimizer.param_groups for value in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self.settings.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        state.step += 1

    def _limit_lr(self) -> None:
        """Lower the learning rates while the loss is above that of the linear probe's head."""
        state, starts_at_probe = (
            self.state,
            self.settings.head_init == "probe" and self.settings.head == "linear",
        )
        if state.step % (1 if self.device.name == "cpu" else READ_LOSSES_EVERY):
            return
        self._read_losses()
        initial = state.history[0]["train_loss"]
        for loss in state.recent_losses if starts_at_probe else ():
            before = initial if state.smoothed_loss is None else state.smoothed_loss
            state.lr_frac, state.smoothed_loss = limit_lr(state.lr_frac, before, loss, initial)
        state.recent_losses = []

    def _should_interrupt(self, *, can_save: bool) -> bool:
        """Read losses and save checkpoints when due; return whether to leave the epoch."""
        state, now = self.state, time.monotonic()
        is_last = state.epoch == self.schedule.epochs and state.n_batches == self.schedule.batches_per_epoch
        limit_s, elapsed_s = state.time_limit_s, state.seconds + now - self._timer
        is_late = limit_s is not None and elapsed_s > limit_s and not is_last
        is_save_due = can_save and now - self._saved_at > CHECKPOINT_EVERY_S
        is_full = len(self._unread) >= READ_LOSSES_EVERY
        if self.device.name == "cpu" or is_late or is_save_due or is_full:
            self._read_losses()
        if state.stopped:
            return True  # spoilt weights are neither saved nor evaluated
        if is_late:
            state.stopped = f"{OUT_OF_TIME} after step {state.step} of {self.schedule.n_steps}"
            return True
        if is_save_due:
            self._add_time()
            self._save()
            self._timer = self._saved_at = time.monotonic()
        return False

    def _add_time(self) -> None:
        elapsed = time.monotonic() - self._timer
        self.state.seconds += elapsed
        self.state.epoch_s += elapsed

    def _read_losses(self) -> None:
        """Copy losses and predictions to the host; stop the training at a non-finite loss."""
        schedule, state = self.schedule, self.state
        for step, batch, loss, errors, pred in self._unread:
            value = float(loss)
            if not np.isfinite(value) and not state.stopped:
                state.stopped = f"the loss is {value} at step {step + 1} of {schedule.n_steps}"
                state.n_batches = 0  # the weights of this epoch are unusable
            state.loss_sum += value * len(batch.rows)
            state.n_seen += len(batch.rows)
            state.recent_losses.append(value)
            labels, weights = schedule.labels[batch.rows], batch.weights[None]
            counts = count_labels(pred.cpu().numpy(), labels, schedule.n_classes, weights)  # each (1, K)
            state.counts = (np.array(state.counts) + np.concatenate(counts)).tolist()
            # numpy: for an image that occurs twice in a batch, the last assignment counts
            state.errors.numpy()[batch.rows] = errors.cpu().nan_to_num(1.0).numpy()
        self._unread = []

    def _evaluate_epoch(self) -> None:
        """Evaluate on the validation images, keep the best weights, and append to the history.

        Without validation images the last weights are the best.
        """
        state, start = self.state, time.monotonic()
        self.inputs.flush()
        _, logits, loss = self.validation.best(self.predict(self.validation.rows))  # (n, K)
        if loss < state.best_loss or not len(logits):
            state.best_loss, state.best_epoch = loss, state.epoch
            for name, value in copy_weights(self.classifier).items():
                state.best[name].copy_(value)
        row = self._history_row(logits, loss)
        state.history.append(row)
        self._check_early_stopping()
        state.errors_before.copy_(state.errors)
        state.epoch, state.n_batches = state.epoch + 1, 0
        state.loss_sum, state.n_seen, state.epoch_s = 0.0, 0, 0.0
        state.counts = _zeros(self.schedule.n_classes)
        state.seconds += time.monotonic() - start
        is_best = bool(row["epoch"]) and state.best_epoch == row["epoch"]
        self.log.info(_describe_epoch(row, self.schedule.epochs, is_best=is_best))

    def _check_early_stopping(self) -> None:
        state, patience = self.state, self.settings.patience
        losses = [row["val_loss"] for row in state.history]
        is_last = state.epoch == self.schedule.epochs
        if patience is not None and not is_last and len(losses) - 1 - int(np.argmin(losses)) >= patience:
            state.stopped = state.stopped or f"validation loss has not improved for {patience} epochs"

    def predict(self, rows: IntArray, *, mirrored: bool = False) -> Float32Array:
        """Return natural logits (n, K) of some images, or of their mirror images."""
        size = self.schedule.batch_size
        if not len(rows):
            return np.empty((0, self.schedule.n_classes), np.float32)
        self.classifier.eval()
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]

        @torch.no_grad()  # the switch is per thread
        def forward(loaded: tuple[IntArray, Inputs]) -> Float32Array:
            with self.device.autocast():
                return np.asarray(self.classifier(*loaded[1]).float().cpu().numpy())

        load = partial(self.inputs.plain_batch, mirrored=mirrored)
        inputs = stream(batches, load, self.schedule.config.compute.num_workers)
        logits = np.concatenate(list(map_on_cores(forward, inputs, self.device.name)))
        return (logits + self.validation.offset).astype(np.float32)

    def _history_row(self, logits: Float32Array, selection_loss: float) -> dict[str, float]:
        state, labels = self.state, self.validation.labels
        val_counts = count_labels(logits.argmax(1), labels, self.schedule.n_classes)
        return {
            "epoch": state.epoch,
            "step": state.step,
            "lr": self._last_lr(),
            "train_loss": state.loss_sum / state.n_seen if state.n_seen else NAN,
            **_metrics("train", ClassCounts(*np.array(state.counts))),
            "val_loss": mean_nll(logits, labels) if len(labels) else NAN,
            **_metrics("val", val_counts),
            "val_selection_loss": selection_loss,
            "img_per_s": state.n_seen / state.epoch_s if state.epoch_s else 0.0,
            "seconds": state.epoch_s,
        }

    def _last_lr(self) -> float:
        """Return the highest learning rate of the last step; a resumed optimizer does not know it."""
        step = self.state.step
        peak: float = max(group["peak_lr"] for group in self.state.optimizer.param_groups)
        if not step:
            return 0.0
        return (
            peak * self.state.lr_frac * lr_factor(step - 1, self.schedule.n_steps, self.settings.warmup_frac)
        )

    def _fit_epochs_to_time(self) -> None:
        """Drop epochs that no longer fit the time limit, so that the learning rate still decays to 0.

        Half an epoch too many is harmless where the best weights are kept, since the rate is near 0 by then;
        a refit without validation must complete its epochs.
        """
        state, n_done = self.state, self.state.epoch - 1
        epoch_s, state.epoch_start_s = state.seconds - state.epoch_start_s, state.seconds
        if state.time_limit_s is None or state.stopped or n_done >= state.epochs:
            return
        n_left = (state.time_limit_s - state.seconds) / max(epoch_s, 1e-9)
        n_more = round(n_left) if len(self.validation.rows) else int(n_left)
        self._set_epochs(min(self._n_planned, n_done + max(1, n_more)))

    def _set_epochs(self, epochs: int) -> None:
        self.schedule, self.state.epochs = replace(self.schedule, epochs=epochs), epochs

    def _save(self) -> None:
        """Write a checkpoint; the next one includes the time this takes."""
        start = time.monotonic()
        write_checkpoint(self.state, self.ctx.checkpoint_dir)
        self.state.seconds += time.monotonic() - start


def training_memory_message(device: str, batch_size: int) -> str:
    """Return the message of an out-of-memory error in training."""
    return (
        f"{device} has too little memory for batches of {batch_size} images; lower --train-batch-size and "
        "raise --grad-accum-steps by the same factor"
    )


@contextmanager
def _algorithms(device: Device, *, deterministic: bool) -> Iterator[None]:
    """Select deterministic or the fastest algorithms on a GPU; restore the previous choice."""
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    warned_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmarked = torch.backends.cudnn.benchmark
    if device.name == "cuda":
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        torch.backends.cudnn.benchmark = not deterministic
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_deterministic, warn_only=warned_only)
        torch.backends.cudnn.benchmark = benchmarked


def _describe_epoch(row: dict[str, float], n_epochs: int, *, is_best: bool) -> str:
    if np.isnan(row["val_accuracy"]):  # the loss is NaN for spoilt weights too
        val = ""
    else:
        val = f"  val loss {row['val_loss']:.3f}  val acc {row['val_accuracy']:.3f}{'  ★' if is_best else ''}"
    return f"  epoch {row['epoch']}/{n_epochs}  train loss {row['train_loss']:.3f}{val}"


def _metrics(split: str, counts: ClassCounts) -> dict[str, float]:
    return {f"{split}_{name}": float(metric(counts)) for name, metric in LABEL_METRICS.items()}


def _zeros(n_classes: int) -> list[list[float]]:
    return [[0.0] * n_classes for _ in range(3)]
