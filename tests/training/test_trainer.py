"""What the loop promises of steps, of what an earlier training leaves behind, and of the time limit."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from jobs import plain_job
from networks import shared_backbone
from pixelplay.config import FinetuneConfig, TrainConfig
from pixelplay.model.classifier import Classifier, TrainableLinearHead
from pixelplay.model.split_backbone import TrainableStages
from pixelplay.run_log import RunLog
from pixelplay.training.checkpoint import Where, read_checkpoint
from pixelplay.training.inputs import Batch, Inputs
from pixelplay.training.losses import make_loss
from pixelplay.training.schedule import Job
from pixelplay.training.trainer import OUT_OF_TIME, _Run, describe_epoch, finetune

LABELS = np.arange(24) % 3  # the last four choose the epoch
NONE = np.arange(0)  # nothing chooses: the last weights are kept


class InMemory:
    """A source of fixed inputs at the cut."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._maps = torch.randn(len(LABELS), 32, 8, 8, generator=generator)
        self._moments = torch.randn(len(LABELS), 144, generator=generator)

    def train_batch(self, batch: Batch, epoch: int, size_px: int) -> Callable[[], Inputs]:
        return self.plain_batch(batch.rows)

    def plain_batch(self, rows: NDArray[np.int64]) -> Callable[[], Inputs]:
        return lambda: (self._maps[rows], self._moments[rows])

    def flush(self) -> None:
        pass


def make_job(grad_accum_steps: int = 1, **changes: Any) -> Job:
    config = TrainConfig(finetune="partial", finetuning=FinetuneConfig(grad_accum_steps=grad_accum_steps))
    return plain_job(changes.pop("source", InMemory()), LABELS, 4, config, **{"batch_size": 5, **changes})


def make_classifier() -> Classifier:
    backbone = shared_backbone("test_efficientnet")
    n = backbone.n_features
    head = TrainableLinearHead(np.zeros(n, np.float32), np.ones(n, np.float32), 3, start=None, dropout=0.0)
    return Classifier(TrainableStages(backbone, 3), head)


def tuned(
    job: Job, folder: Path, classifier: Classifier | None = None, *, resume: bool = False
) -> tuple[dict[str, Tensor], Where]:
    """Weights of the best epoch, and where the training ended."""
    classifier = classifier or make_classifier()
    where = finetune(job, classifier, str(folder), RunLog(quiet=True), resume=resume)
    return {name: value.clone() for name, value in classifier.state_dict().items()}, where


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_gradients_that_an_earlier_training_left_do_not_count(tmp_path: Path) -> None:
    clean, _ = tuned(make_job(val=NONE), tmp_path / "clean")
    classifier = make_classifier()
    for value in classifier.parameters():
        value.grad = torch.full_like(value, 100.0)
    left, where = tuned(make_job(val=NONE), tmp_path / "left", classifier)
    assert where.best_epoch == 2
    assert_same(left, clean)


def test_more_gradients_than_an_epoch_has_make_one_step_of_it(tmp_path: Path) -> None:
    all_four, _ = tuned(make_job(grad_accum_steps=4, val=NONE), tmp_path / "four")
    more, where = tuned(make_job(grad_accum_steps=1000, val=NONE), tmp_path / "more")
    assert (where.step, where.best_epoch) == (2, 2)
    assert_same(more, all_four)


def test_a_step_weighs_the_same_where_the_end_of_an_epoch_cuts_it_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms: dict[int, list[float]] = {1: [], 3: []}
    for grad_accum_steps, found in norms.items():
        job = make_job(grad_accum_steps, epochs=1)
        still = replace(job.config.finetuning, lr=1e-8, head_lr=1e-8)  # so that steps compare
        job = replace(job, config=replace(job.config, finetuning=still))
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watch(found))
        tuned(job, tmp_path / str(grad_accum_steps))
    assert [len(found) for found in norms.values()] == [4, 2]
    assert norms[3][1] == pytest.approx(norms[1][3], rel=1e-3)


def watch(found: list[float]) -> Callable[[list[Tensor], float], None]:
    """Writes down the gradients' norm in place of clipping it."""
    return lambda values, limit: found.append(
        float(torch.cat([value.grad.flatten() for value in values if value.grad is not None]).norm())
    )


def test_a_time_limit_stops_a_training_and_says_so(tmp_path: Path) -> None:
    _, where = tuned(make_job(limit_s=0.0), tmp_path)
    assert where.stopped == f"{OUT_OF_TIME} after step 1 of 8"


def test_a_resumed_training_has_the_time_limit_of_the_first_process(tmp_path: Path) -> None:
    run = begin(make_job(epochs=3, limit_s=1e9), tmp_path, make_classifier())
    run.finish_epoch()
    run.save()
    _, where = tuned(make_job(epochs=3, limit_s=0.0), tmp_path, resume=True)
    assert (where.stopped, where.limit_s, where.step) == ("", 1e9, 12)


@pytest.mark.parametrize(
    ("limit_s", "n_val", "epochs"),
    [
        (None, 4, 5),
        (170.0, 4, 9),  # what the first epoch alone had to do does not count
        (500.0, 4, 9),
        (156.0, 4, 8),
        (154.0, 4, 7),
        (154.0, 0, 7),
        (156.0, 0, 7),  # to be whole
        (101.0, 4, 3),
        (1.0, 4, 3),
    ],
)
def test_as_many_epochs_come_as_there_is_time_for(
    limit_s: float | None, n_val: int, epochs: int, tmp_path: Path
) -> None:
    job = make_job(epochs=9, limit_s=limit_s)
    run = begin(replace(job, val=job.val[:n_val]), tmp_path, make_classifier())
    run._plan_for(5)  # as it seemed after the first
    where = run.state.progress
    where.epoch, where.seconds, where.began_s = 3, 100.0, 90.0  # two are done
    run._keep_to_time(9)
    assert (where.epochs, run.job.epochs, run.job.n_steps) == (epochs, epochs, epochs * 4)


def test_averages_look_back_over_the_same_share_of_fewer_steps(tmp_path: Path) -> None:
    job = make_job(epochs=20)
    job = replace(job, config=replace(job.config, finetuning=replace(job.config.finetuning, ema_frac=0.5)))
    run = begin(job, tmp_path, make_classifier())
    run._plan_for(5)
    assert run.state.averaged is not None
    assert run.state.averaged._horizon == 10


def test_a_resumed_training_knows_how_many_epochs_there_is_time_for(tmp_path: Path) -> None:
    run = begin(make_job(epochs=9, limit_s=1e9), tmp_path, make_classifier())
    run.finish_epoch()
    run.state.progress.epochs, run.state.progress.epoch = 4, 5
    run.save()
    resumed = begin(make_job(epochs=9, limit_s=1e9), tmp_path, make_classifier())
    read_checkpoint(resumed.state, str(tmp_path))
    resumed.train()
    assert (resumed.job.epochs, resumed.job.n_steps, resumed.state.progress.step) == (4, 16, 0)


@pytest.mark.parametrize(("n_val", "what"), [(4, "training"), (0, "learning from train and val together")])
def test_on_a_slow_machine_the_learning_rate_falls_to_zero_all_the_same(
    n_val: int, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Slow(InMemory):
        def train_batch(self, batch: Batch, epoch: int, size_px: int) -> Callable[[], Inputs]:
            time.sleep(0.05)
            return super().train_batch(batch, epoch, size_px)

    job, log = make_job(epochs=30, limit_s=1.5, source=Slow()), RunLog(is_json=True)
    job = replace(job, val=job.val[:n_val])
    where = finetune(job, make_classifier(), str(tmp_path), log, resume=False)
    assert 2 <= where.epochs < 15
    assert log.notes == [f"{what} takes longer than was planned: {where.epochs} of 30 epochs"]
    lrs = [row["lr"] for row in where.history]
    assert lrs[-1] < 0.1 * max(lrs)
    said = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    counted = [each for each in said if "progress" in each]
    assert counted[0]["total"] == 30 * job.batches_per_epoch
    assert counted[-1]["total"] == where.epochs * job.batches_per_epoch
    assert counted[-1]["n"] > (where.epochs - 1) * job.batches_per_epoch  # the last one may be cut short


def opinionated() -> Classifier:
    """A classifier whose head has weights at random: it is right, wrong and unsure."""
    classifier = make_classifier()
    with torch.no_grad():
        weight = classifier.head.linear.weight
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)) / 4)
    return classifier


def still(job: Job, **settings: Any) -> Job:
    """A job in which every image meets the same network."""
    finetune_settings = replace(job.config.finetuning, lr=1e-8, head_lr=1e-8, **settings)
    return replace(job, config=replace(job.config, finetuning=finetune_settings))


def wrong_by(classifier: Classifier, job: Job) -> NDArray[np.float32]:
    """1 less the probability of its class, of each image that is learned from."""
    with torch.no_grad():
        probs = classifier(*job.source.plain_batch(job.train)()).softmax(1)
    return 1 - probs[torch.arange(len(job.train)), torch.from_numpy(LABELS[job.train])].numpy()


def begin(job: Job, folder: Path, classifier: Classifier) -> _Run:
    return _Run(job, classifier, str(folder), RunLog(quiet=True))


@pytest.mark.parametrize("imbalance", ["none", "class_weights", "balanced_softmax"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_the_loop_knows_how_wrong_it_was_about_each_whatever_the_loss(
    imbalance: Literal["none", "class_weights", "balanced_softmax"], label_smoothing: float, tmp_path: Path
) -> None:
    counts, classifier = np.array([10, 7, 3]), opinionated()
    loss = make_loss(imbalance, counts, logit_tau=1, focal_gamma=2, label_smoothing=label_smoothing)
    job = still(make_job(loss=loss))
    run = begin(job, tmp_path, classifier)
    run.train()
    expected = wrong_by(classifier, job)
    assert expected.min() < 0.2
    assert expected.max() > 0.8
    found = run.state.misses.numpy()
    # the second epoch had draws that count unlike each other
    np.testing.assert_allclose(found[job.train], expected, atol=1e-3)
    assert (found[job.val] == 1).all()  # nothing was learned from those


def test_an_epoch_is_drawn_by_what_the_ones_before_it_got_wrong(tmp_path: Path) -> None:
    seen: list[NDArray[np.int64]] = []

    class Watched(InMemory):
        def train_batch(self, batch: Batch, epoch: int, size_px: int) -> Callable[[], Inputs]:
            seen.append(batch.rows)
            return super().train_batch(batch, epoch, size_px)

    job, classifier = still(make_job(epochs=3, source=Watched())), opinionated()
    begin(job, tmp_path, classifier).train()
    misses = np.ones(len(LABELS), np.float32)
    misses[job.train] = wrong_by(classifier, job)
    epochs = np.split(np.concatenate(seen), 3)
    assert np.bincount(epochs[0]).tolist() == [1] * len(job.train)  # nothing was known
    for epoch in (2, 3):
        expected = np.concatenate([batch.rows for batch in job.batches(epoch, misses)])
        np.testing.assert_array_equal(epochs[epoch - 1], expected)
        assert np.bincount(expected).max() == 2


def test_images_have_the_size_of_their_epoch(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    class Watched(InMemory):
        def train_batch(self, batch: Batch, epoch: int, size_px: int) -> Callable[[], Inputs]:
            seen.append((epoch, size_px))
            return super().train_batch(batch, epoch, size_px)

    job = make_job(epochs=6, source=Watched())
    grows = replace(job.config.finetuning, initial_size_frac=0.4)
    job = replace(job, config=replace(job.config, finetuning=grows))
    begin(job, tmp_path, opinionated()).train()
    sizes = [job.size_px(epoch) for epoch in range(6)]
    assert sizes[0] < sizes[1] < sizes[3] == job.input_size
    assert sorted(set(seen)) == list(enumerate(sizes, 1))


def test_a_focused_loss_is_that_of_all_photographs_alike(tmp_path: Path) -> None:
    def losses(hard_example_frac: float, seed: int) -> list[float]:
        job = still(make_job(epochs=6), hard_example_frac=hard_example_frac)
        job = replace(job, config=replace(job.config, seed=seed))
        run = begin(job, tmp_path / f"{hard_example_frac}{seed}", opinionated())
        run.train()
        return [row["train_loss"] for row in run.state.progress.history[2:]]

    everything = losses(0.0, 0)
    assert np.ptp(everything) < 1e-3
    focused = [loss for seed in range(12) for loss in losses(0.5, seed)]
    assert np.std(focused) > 0.01  # chance takes part
    # without weights it would be half as much again
    assert np.mean(focused) == pytest.approx(everything[0], rel=0.05)


def test_logits_that_are_not_finite_leave_no_nan_behind(tmp_path: Path) -> None:
    class Spoilt(InMemory):
        def train_batch(self, batch: Batch, epoch: int, size_px: int) -> Callable[[], Inputs]:
            maps, stats = super().train_batch(batch, epoch, size_px)()
            return lambda: (maps * np.nan, stats)

    run = begin(make_job(source=Spoilt()), tmp_path, opinionated())
    run.train()
    assert run.state.progress.stopped.startswith("the loss is nan")
    assert run.state.misses.isfinite().all()


@pytest.mark.parametrize("loss", [0.5, float("nan")])
@pytest.mark.parametrize("has_val", [True, False])
def test_an_epoch_tells_what_was_held_out_even_of_spoilt_weights(loss: float, has_val: bool) -> None:
    row = dict.fromkeys(("train_loss", "lr", "img_per_s"), 1.0) | {"epoch": 2, "val_score": loss}
    row["val_loss"] = loss if has_val else float("nan")
    figures = ("val_accuracy", "val_balanced_accuracy", "val_macro_f1")
    row |= dict.fromkeys(figures, 0.25 if has_val else float("nan"))
    line = describe_epoch(row, 3, is_lowest=False)
    assert line.startswith("epoch 2 of 3: train loss 1.000, ")
    held_out = f"val loss {loss:.3f}, accuracy 0.250, balanced 0.250, macro-F1 0.250, score {loss:.3f},"
    assert (held_out in line) == has_val
    assert ("train and val together," in line) == (not has_val)


@pytest.mark.parametrize(("epochs", "stopped"), [(1, ""), (2, ""), (3, "after 2")])
def test_patience_stops_a_training_that_is_not_over(epochs: int, stopped: str, tmp_path: Path) -> None:
    job = make_job(epochs=epochs)
    worse = replace(job.config.finetuning, lr=10.0, head_lr=10.0, patience=2)
    _, where = tuned(replace(job, config=replace(job.config, finetuning=worse)), tmp_path)
    losses = [row["val_loss"] for row in where.history]
    assert min(losses) == losses[0]  # every epoch is worse
    assert where.stopped == ("validation loss has not fallen for 2 epochs" if stopped else "")
    assert len(losses) == 1 + min(epochs, 2)


def test_rates_are_for_the_photographs_that_a_step_has(tmp_path: Path) -> None:
    job = make_job(grad_accum_steps=3)  # 20 images in fives: of 15 and of 5
    optimizer = begin(job, tmp_path, make_classifier()).state.optimizer
    rates = [group["peak_lr"] for group in optimizer.param_groups]
    assert max(rates) == pytest.approx(2e-3 * (10 / 32) ** 0.5)
