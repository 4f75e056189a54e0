"""What a network in training makes of the validation part."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pixelplay.arrays import Float32Array, IntArray
from pixelplay.evaluation.calibration import nll_of
from pixelplay.evaluation.decision_rule import held_out_score
from pixelplay.evaluation.metrics import LABEL_METRICS, Counts, count_labels
from pixelplay.model.classifier import Classifier
from pixelplay.model.device import explain_memory_errors, map_on_cores, to_device
from pixelplay.run_log import RunLog
from pixelplay.training.checkpoint import State, Where, copy_of, read_checkpoint, restore, write_checkpoint
from pixelplay.training.cpu_parallel import Forward, compiled_for_training, forward_for_training
from pixelplay.training.inputs import Batch, Inputs, stream
from pixelplay.training.mixup import mix_batch
from pixelplay.training.optim import lr_factor, make_optimizer
from pixelplay.training.schedule import Job, deterministic_algorithms, training_memory_error


def best_answer(job: Job, logits: Float32Array) -> tuple[Float32Array, float]:
    """What would be deployed of these weights, the network alone or together with the probe, and its score.

    Without validation part the network alone, and NaN.
    """
    if not len(logits):
        return logits, float("nan")
    answers = job.answers(logits).values()
    labels, metric = job.labels[job.val], job.config.metric
    scored = [(held_out_score(answer, labels, job.priors, metric), answer) for answer in answers]
    score, answer = min(scored, key=lambda pair: pair[0])
    return answer, score


def predict_logits(job: Job, classifier: Classifier) -> Float32Array:
    """Natural-prior logits (n, K) of the validation part, one view each."""
    if not len(job.val):
        return np.empty((0, job.n_classes), np.float32)
    classifier.eval()
    batches = [job.val[start : start + job.batch_size] for start in range(0, len(job.val), job.batch_size)]

    @torch.no_grad()  # each thread has its own
    def see(loaded: tuple[IntArray, Inputs]) -> Float32Array:
        with job.device.autocast():
            return np.asarray(classifier(*loaded[1]).float().cpu().numpy())

    inputs = stream(batches, job.source.plain_batch, job.config.compute.num_workers)
    found = list(map_on_cores(see, inputs, job.device.name))
    return (np.concatenate(found) + job.offset).astype(np.float32)


def describe_epoch(row: Mapping[str, float], n_epochs: int, *, is_lowest: bool) -> str:
    """One line for people; the lowest score so far chooses, that before the first epoch included."""
    if np.isnan(row["val_accuracy"]):  # a loss is NaN too where weights are spoilt
        held_out = "train and val together"
    else:
        held_out = (
            f"val loss {row['val_loss']:.3f}, accuracy {row['val_accuracy']:.3f}, balanced "
            f"{row['val_balanced_accuracy']:.3f}, macro-F1 {row['val_macro_f1']:.3f}, "
            f"score {row['val_score']:.3f}{', the lowest' if is_lowest and row['epoch'] else ''}"
        )
    if not row["epoch"]:
        return f"before the first epoch: {held_out}"
    return (
        f"epoch {row['epoch']} of {n_epochs}: train loss {row['train_loss']:.3f}, {held_out}, "
        f"lr {row['lr']:.1e}, {row['img_per_s']:.0f} img/s"
    )


NAN = float("nan")
OUT_OF_TIME = "the time budget was used up"
CHECKPOINT_EVERY_S = 20.0
CHECK_EVERY = 50  # batches between looks at a GPU's losses: each look waits for it


def finetune(job: Job, classifier: Classifier, checkpoints: str, log: RunLog, *, resume: bool) -> Where:
    """Train a classifier in place; it ends with the weights of its best epoch.

    Epoch 0 of the history is the classifier as it starts, so the result is never worse than that on the
    validation part.

    Args:
        checkpoints: folder that holds the resumable state meanwhile.

    Raises:
        ConfigError: too little memory; the message says what to lower.
    """
    with (
        torch.random.fork_rng(devices=job.device.generators()),
        deterministic_algorithms(job),
        explain_memory_errors(training_memory_error(job.device.name, job.batch_size)),
    ):
        run = _Run(job, classifier, checkpoints, log)
        if resume:
            read_checkpoint(run.state, checkpoints)
        run.train()
        if (n := run.state.progress.epochs) < job.epochs:
            part = "training" if len(job.val) else "learning from train and val together"
            log.note(f"{part} takes longer than was planned: {n} of {job.epochs} epochs")
        restore(classifier, run.state.best)
    return run.state.progress


class _Run:
    """A training under way."""

    def __init__(self, job: Job, classifier: Classifier, checkpoints: str, log: RunLog) -> None:
        classifier.to(job.device.name, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.job, self.classifier = job, classifier
        self.checkpoints, self.log = checkpoints, log
        classifier.zero_grad()  # a training that was stopped between two steps leaves some
        settings = job.config.finetuning
        optimizer = make_optimizer(classifier, settings, job.images_per_step, lr_frac=job.lr_frac)
        self.state = State(
            network=classifier,
            optimizer=optimizer,
            best=copy_of(classifier),
            progress=Where(tally=_zeros(job.n_classes), limit_s=job.limit_s, epochs=job.epochs),
            misses=torch.ones(len(job.labels)),
            misses_before=torch.ones(len(job.labels)),
        )
        self._forward: Forward = classifier
        self._losses: list[tuple[int, Batch, Tensor, Tensor, Tensor]] = []  # not yet looked at

    def train(self) -> None:
        """Go through what is left of the plan, until something stops it."""
        where, n_planned = self.state.progress, self.job.epochs
        self._plan_for(where.epochs)
        job = self.job
        if not where.history:
            self.finish_epoch()
            where.began_s = where.seconds
        n_all = job.epochs * job.batches_per_epoch
        with (
            forward_for_training(self.classifier, job.device, job.batch_size) as forward,
            self.log.progress("training", n_all, "batches") as bar,
        ):
            self._forward = forward
            if job.compile:
                self._forward = compiled_for_training(self.classifier, forward, job, self.log)
            bar.update(max(0, where.epoch - 1) * job.batches_per_epoch + where.n_batches)
            while where.epoch <= where.epochs and not where.stopped:
                self.train_epoch(bar.update)
                if where.stopped and not where.n_batches:
                    break  # the weights are spoilt
                self.finish_epoch()
                self._keep_to_time(n_planned)
                bar.expect(where.epochs * job.batches_per_epoch)
                self.save()

    def _keep_to_time(self, n_planned: int) -> None:
        """Leave out epochs that there will be no time for, so that the learning rate still falls to 0.

        As many come as would if each took as long as the last. Half an epoch too many does not matter where
        the best is kept, for the rate is near 0 there; the last epochs on everything are to be whole.
        """
        where = self.state.progress
        epoch_s, where.began_s = where.seconds - where.began_s, where.seconds
        done = where.epoch - 1
        if where.limit_s is None or where.stopped or done >= where.epochs:
            return
        left = (where.limit_s - where.seconds) / max(epoch_s, 1e-9)
        n_more = round(left) if len(self.job.val) else int(left)
        self._plan_for(min(n_planned, done + max(1, n_more)))

    def _plan_for(self, epochs: int) -> None:
        self.job, self.state.progress.epochs = replace(self.job, epochs=epochs), epochs

    def save(self) -> None:
        """Write the state down; the next one knows how long that took."""
        start = time.monotonic()
        write_checkpoint(self.state, self.checkpoints)
        self.state.progress.seconds += time.monotonic() - start

    def train_epoch(self, on_batch: Callable[[int], object]) -> None:
        """Go through what is left of an epoch."""
        job, where = self.job, self.state.progress
        epoch, start = where.epoch, time.monotonic()
        todo = job.batches(epoch, self.state.misses_before.numpy())[where.n_batches :]
        saved = start
        self.classifier.train()
        size = job.size_px(epoch - 1)
        batches = stream(
            todo,
            lambda batch: job.source.train_batch(batch, job.epochs_before + epoch, size),
            job.config.compute.num_workers,
        )
        for batch, inputs in batches:
            is_step = self._learn(batch, inputs)
            on_batch(1)
            now = time.monotonic()
            is_last = epoch == job.epochs and where.n_batches == job.batches_per_epoch
            is_late = (
                where.limit_s is not None and where.seconds + now - start > where.limit_s and not is_last
            )
            is_to_save = is_step and now - saved > CHECKPOINT_EVERY_S
            if job.device.name == "cpu" or is_late or is_to_save or len(self._losses) >= CHECK_EVERY:
                self._look_at_losses()
            if where.stopped:
                break  # what is spoilt is neither saved nor measured
            if is_late:
                where.stopped = f"{OUT_OF_TIME} after step {where.step} of {job.n_steps}"
                break
            if is_to_save:
                where.seconds += now - start
                where.epoch_s += now - start
                self.save()
                start = saved = time.monotonic()
        self._look_at_losses()
        spent = time.monotonic() - start
        where.seconds += spent
        where.epoch_s += spent

    def _learn(self, batch: Batch, inputs: Inputs) -> bool:
        """Take one batch; returns whether the weights have moved."""
        job, where, optimizer = self.job, self.state.progress, self.state.optimizer
        settings = job.config.finetuning
        place = (job.config.seed, job.epochs_before + where.epoch, where.n_batches)
        torch.manual_seed(_seed_of(*place))  # dropout, drop path
        labels = to_device(torch.from_numpy(job.labels[batch.rows]), job.device.name)
        weights = to_device(torch.from_numpy(batch.weights), job.device.name)
        is_class = torch.nn.functional.one_hot(labels, job.n_classes)  # (B, K)
        targets = is_class * weights[:, None]
        maps, stats = inputs
        mixing = job.config.augmenting
        rng = np.random.default_rng(place)
        if where.step < (1 - mixing.mix_off_frac) * job.n_steps and rng.random() < mixing.mix_prob:
            maps, stats, targets = mix_batch(maps, stats, targets, mixing, rng)
        with job.device.autocast():
            logits = self._forward(maps, stats)
        loss = job.loss(logits, targets)
        first = where.n_batches - where.n_batches % job.batches_per_step
        n_together = min(job.batches_per_step, job.batches_per_epoch - first)  # the last group may be short
        (loss / n_together).backward()  # type: ignore[no-untyped-call]
        probs = logits.detach().float().softmax(1)  # (B, K)
        misses = 1 - (probs * is_class).sum(1)  # (B,)
        self._losses.append((where.step, batch, loss.detach(), misses, probs.argmax(1)))
        where.n_batches += 1
        if where.n_batches < first + n_together:
            return False
        factor = lr_factor(where.step, job.n_steps, settings.warmup_frac)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        if settings.clip_grad_norm is not None:
            values = [value for group in optimizer.param_groups for value in group["params"]]
            torch.nn.utils.clip_grad_norm_(values, settings.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        where.step += 1
        return True

    def _look_at_losses(self) -> None:
        """Bring losses and predictions to the host, and stop where a loss is not finite."""
        job, where = self.job, self.state.progress
        for step, batch, loss, misses, pred in self._losses:
            value = float(loss)
            if not np.isfinite(value) and not where.stopped:
                where.stopped = f"the loss is {value} at step {step + 1} of {job.n_steps}"
                where.n_batches = 0  # what this epoch has made of the weights is worth nothing
            where.loss_sum += value * len(batch.rows)
            where.n_seen += len(batch.rows)
            labels, weights = job.labels[batch.rows], batch.weights[None]
            counts = count_labels(pred.cpu().numpy(), labels, job.n_classes, weights)  # each (1, K)
            where.tally = (np.array(where.tally) + np.concatenate(counts)).tolist()
            # numpy: of an image that stands twice in a batch the last one counts
            self.state.misses.numpy()[batch.rows] = misses.cpu().nan_to_num(1.0).numpy()
        self._losses = []

    def finish_epoch(self) -> None:
        """Measure on the validation part, keep the best weights, write the history's row.

        Without a validation part the last weights are the best.
        """
        job, where = self.job, self.state.progress
        start = time.monotonic()
        job.source.flush()
        logits, score = best_answer(job, predict_logits(job, self.classifier))  # (n, K), natural
        if score < where.best_score or not len(logits):
            where.best_score, where.best_epoch = score, where.epoch
            for name, value in copy_of(self.classifier).items():
                self.state.best[name].copy_(value)
        row = self._describe(logits, score)
        where.history.append(row)
        losses = [past["val_loss"] for past in where.history]
        patience = job.config.finetuning.patience
        is_over = where.epoch == job.epochs
        if patience is not None and not is_over and len(losses) - 1 - int(np.argmin(losses)) >= patience:
            where.stopped = where.stopped or f"validation loss has not fallen for {patience} epochs"
        self.state.misses_before.copy_(self.state.misses)
        where.epoch, where.n_batches = where.epoch + 1, 0
        where.loss_sum, where.n_seen, where.epoch_s, where.tally = 0.0, 0, 0.0, _zeros(job.n_classes)
        where.seconds += time.monotonic() - start
        if row["epoch"] or len(logits):
            is_lowest = where.best_epoch == row["epoch"]
            self.log.tell(describe_epoch(row, job.epochs, is_lowest=is_lowest))

    def _describe(self, logits: Float32Array, score: float) -> dict[str, float]:
        job, where = self.job, self.state.progress
        labels = job.labels[job.val]
        held_out = count_labels(logits.argmax(1), labels, job.n_classes)
        return {
            "epoch": where.epoch,
            "step": where.step,
            "lr": self._last_lr(),
            "train_loss": where.loss_sum / where.n_seen if where.n_seen else NAN,
            **_figures("train", Counts(*np.array(where.tally))),
            "val_loss": nll_of(logits, labels) if len(labels) else NAN,
            **_figures("val", held_out),
            "val_score": score,
            "img_per_s": where.n_seen / where.epoch_s if where.epoch_s else 0.0,
            "seconds": where.epoch_s,
        }

    def _last_lr(self) -> float:
        """Highest learning rate of the last step; the optimizer's own is lost when a run is killed."""
        job, step = self.job, self.state.progress.step
        peak: float = max(group["peak_lr"] for group in self.state.optimizer.param_groups)
        return peak * lr_factor(step - 1, job.n_steps, job.config.finetuning.warmup_frac) if step else 0.0


def _figures(part: str, counts: Counts) -> dict[str, float]:
    """Label metrics of counts (K,); NaN where nothing was counted."""
    return {f"{part}_{name}": float(metric(counts)) for name, metric in LABEL_METRICS.items()}


def _zeros(n_classes: int) -> list[list[float]]:
    return [[0.0] * n_classes for _ in range(3)]


def _seed_of(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
