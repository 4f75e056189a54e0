"""What a network in training makes of the validation part."""

from collections.abc import Mapping

import numpy as np
import torch

from pixelplay.arrays import Float32Array, IntArray
from pixelplay.evaluation.decision_rule import held_out_score
from pixelplay.model.classifier import Classifier
from pixelplay.model.device import on_every_core
from pixelplay.training.batches import Inputs, stream
from pixelplay.training.job import Job


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
    found = list(on_every_core(see, inputs, job.device.name))
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
