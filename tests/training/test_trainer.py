"""Trainer: gradient accumulation, hard examples, early stopping, NaN guard, resume and the time limit."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from networks import shared_backbone
from pixelplay.array_types import Float32Array, IntArray
from pixelplay.config import FinetuneConfig, TrainConfig
from pixelplay.data.transforms import Size
from pixelplay.errors import ConfigError
from pixelplay.model.classifier import Classifier, TrainableLinearHead
from pixelplay.model.device import translate_memory_errors
from pixelplay.model.split_backbone import TrainableStages
from pixelplay.run_log import RunLog
from pixelplay.training.batch_inputs import Batch, Inputs
from pixelplay.training.checkpoint import TrainState, has_checkpoint
from pixelplay.training.losses import make_loss
from pixelplay.training.schedule import Schedule
from pixelplay.training.trainer import OUT_OF_TIME, Trainer, _describe_epoch, training_memory_message
from trainers import make_schedule, make_trainer

LABELS = np.arange(24) % 3
VAL = np.arange(20, 24)  # selects the epoch
NO_VAL = VAL[:0]  # nothing to select: the last weights are kept
STILL = {"lr": 1e-8, "head_lr": 1e-8}  # so that every batch meets the same weights


class InMemory:
    """Fixed inputs at the cut."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._maps = torch.randn(len(LABELS), 32, 8, 8, generator=generator)
        self._stats = torch.randn(len(LABELS), 144, generator=generator)

    def train_batch(self, batch: Batch, epoch: int, size: Size) -> Callable[[], Inputs]:
        return self.plain_batch(batch.rows)

    def plain_batch(self, rows: IntArray, *, mirrored: bool = False) -> Callable[[], Inputs]:
        return lambda: (self._maps[rows], self._stats[rows])

    def flush(self) -> None:
        pass


class Recorded(InMemory):
    """Fixed inputs that remember which batches were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[IntArray] = []
        self.sizes: list[tuple[int, int]] = []  # epoch, px

    def train_batch(self, batch: Batch, epoch: int, size: Size) -> Callable[[], Inputs]:
        self.rows.append(batch.rows)
        self.sizes.append((epoch, size))
        return super().train_batch(batch, epoch, size)


class Slow(InMemory):
    """Fixed inputs that take a while."""

    def train_batch(self, batch: Batch, epoch: int, size: Size) -> Callable[[], Inputs]:
        time.sleep(0.05)
        return super().train_batch(batch, epoch, size)


class NotANumber(InMemory):
    """Inputs that are NaN."""

    def train_batch(self, batch: Batch, epoch: int, size: Size) -> Callable[[], Inputs]:
        maps, stats = super().train_batch(batch, epoch, size)()
        return lambda: (maps * np.nan, stats)


def make_small_schedule(epochs: int = 2, *, seed: int = 0, **finetuning: Any) -> Schedule:
    """Create a schedule of four batches per epoch, with settings of fine-tuning."""
    config = TrainConfig(finetune="partial", seed=seed, finetuning=FinetuneConfig(**finetuning))
    return make_schedule(LABELS, len(VAL), config, batch_size=5, epochs=epochs)


def make_classifier() -> Classifier:
    backbone = shared_backbone("test_efficientnet")
    n = backbone.n_features
    head = TrainableLinearHead(np.zeros(n, np.float32), np.ones(n, np.float32), 3, start=None, dropout=0.0)
    return Classifier(TrainableStages(backbone, 3), head)


def make_opinionated_classifier() -> Classifier:
    """Create a classifier with random head weights: it is right, wrong and unsure."""
    classifier = make_classifier()
    with torch.no_grad():
        weight = classifier.head.linear.weight
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)) / 4)
    return classifier


def make_small_trainer(
    run_dir: Path,
    schedule: Schedule,
    *,
    classifier: Classifier | None = None,
    inputs: InMemory | None = None,
    val: IntArray = VAL,
    **options: Any,
) -> Trainer:
    return make_trainer(
        classifier or make_classifier(), inputs or InMemory(), schedule, val, run_dir, **options
    )


def fit(trainer: Trainer) -> tuple[dict[str, Tensor], TrainState]:
    """Train; return the weights of the best epoch, and the state."""
    state = trainer.fit()
    return {name: value.clone() for name, value in trainer.classifier.state_dict().items()}, state


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


# --- gradient accumulation ---


def test_left_over_gradients_are_ignored(tmp_path: Path) -> None:
    clean, _ = fit(make_small_trainer(tmp_path / "clean", make_small_schedule(), val=NO_VAL))
    classifier = make_classifier()
    for value in classifier.parameters():
        value.grad = torch.full_like(value, 100.0)
    trainer = make_small_trainer(tmp_path / "left", make_small_schedule(), val=NO_VAL, classifier=classifier)
    left, state = fit(trainer)
    assert state.best_epoch == 2
    assert_same(left, clean)


def test_grad_accum_steps_beyond_an_epoch_make_one_step_of_it(tmp_path: Path) -> None:
    schedules = make_small_schedule(grad_accum_steps=4), make_small_schedule(grad_accum_steps=1000)
    all_four, _ = fit(make_small_trainer(tmp_path / "four", schedules[0], val=NO_VAL))
    more, state = fit(make_small_trainer(tmp_path / "more", schedules[1], val=NO_VAL))
    assert (state.step, state.best_epoch) == (2, 2)
    assert_same(more, all_four)


def test_grad_accum_steps_average_a_short_last_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms: dict[int, list[float]] = {1: [], 3: []}
    for grad_accum_steps, found in norms.items():
        schedule = make_small_schedule(epochs=1, grad_accum_steps=grad_accum_steps, **STILL)
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", record_norm(found))
        fit(make_small_trainer(tmp_path / str(grad_accum_steps), schedule))
    assert [len(found) for found in norms.values()] == [4, 2]
    assert norms[3][1] == pytest.approx(norms[1][3], rel=1e-3)


def record_norm(found: list[float]) -> Callable[[list[Tensor], float], None]:
    """Create a stand-in for gradient clipping that records the norm."""
    return lambda values, limit: found.append(
        float(torch.cat([value.grad.flatten() for value in values if value.grad is not None]).norm())
    )


def test_learning_rates_follow_the_images_per_step(tmp_path: Path) -> None:
    schedule = make_small_schedule(grad_accum_steps=3)  # 20 images in batches of 5: steps of 15 and of 5
    optimizer = make_small_trainer(tmp_path, schedule).state.optimizer
    rates = [group["peak_lr"] for group in optimizer.param_groups]
    assert max(rates) == pytest.approx(1e-3 * (10 / 32) ** 0.5)


def test_lr_frac_scales_every_learning_rate(tmp_path: Path) -> None:
    trainers = (make_small_trainer(tmp_path, make_small_schedule(), lr_frac=frac) for frac in (1.0, 0.25))
    usual, quarter = (
        [group["peak_lr"] for group in trainer.state.optimizer.param_groups] for trainer in trainers
    )
    assert quarter == pytest.approx([lr / 4 for lr in usual])


# --- time limit ---


def test_time_limit_stops_a_training(tmp_path: Path) -> None:
    _, state = fit(make_small_trainer(tmp_path, make_small_schedule(), time_limit_s=0.0))
    assert state.stopped == f"{OUT_OF_TIME} after step 1 of 8"


def test_resume_keeps_the_time_limit_of_the_first_process(tmp_path: Path) -> None:
    schedule = make_small_schedule(epochs=3)
    trainer = make_small_trainer(tmp_path, schedule, time_limit_s=1e9)
    trainer._evaluate_epoch()
    trainer._save()
    _, state = fit(make_small_trainer(tmp_path, schedule, time_limit_s=0.0))
    assert (state.stopped, state.time_limit_s, state.step) == ("", 1e9, 12)


@pytest.mark.parametrize(
    ("limit_s", "n_val", "epochs"),
    [
        (None, 4, 5),
        (170.0, 4, 9),  # the last epoch counts, not the first, which had more to do
        (500.0, 4, 9),
        (156.0, 4, 8),
        (154.0, 4, 7),
        (154.0, 0, 7),
        (156.0, 0, 7),  # without validation the last epoch must be complete
        (101.0, 4, 3),
        (1.0, 4, 3),
    ],
)
def test_time_limit_decides_how_many_epochs_follow(
    limit_s: float | None, n_val: int, epochs: int, tmp_path: Path
) -> None:
    schedule = make_small_schedule(epochs=9)
    trainer = make_small_trainer(tmp_path, schedule, val=VAL[:n_val], time_limit_s=limit_s)
    trainer._set_epochs(5)  # as it seemed after the first epoch
    state = trainer.state
    state.epoch, state.seconds, state.epoch_start_s = 3, 100.0, 90.0  # two are done
    trainer._fit_epochs_to_time()
    assert (state.epochs, trainer.schedule.epochs, trainer.schedule.n_steps) == (epochs, epochs, epochs * 4)


def test_resume_keeps_the_epochs_that_the_time_limit_left(tmp_path: Path) -> None:
    schedule = make_small_schedule(epochs=9)
    trainer = make_small_trainer(tmp_path, schedule, time_limit_s=1e9)
    trainer._evaluate_epoch()
    trainer.state.epochs, trainer.state.epoch = 4, 5
    trainer._save()
    resumed = make_small_trainer(tmp_path, schedule, time_limit_s=1e9)
    resumed.fit()
    assert (resumed.schedule.epochs, resumed.schedule.n_steps, resumed.state.step) == (4, 16, 0)


@pytest.mark.parametrize(("n_val", "title"), [(4, "training"), (0, "refit on train and val")])
def test_time_limit_on_a_slow_machine_still_decays_the_learning_rate(
    n_val: int,
    title: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pixelplay.training.schedule.LR_DOWN", 1.0)  # rates are not limited by the loss
    schedule, log = make_small_schedule(epochs=30, warmup_frac=0.1), RunLog(json_progress=True)
    state = make_small_trainer(
        tmp_path, schedule, val=VAL[:n_val], inputs=Slow(), log=log, time_limit_s=1.5, title=title
    ).fit()
    assert 2 <= state.epochs < 15
    assert log.notes == [f"{title}: only {state.epochs} of 30 planned epochs fit the time budget"]
    lrs = [row["lr"] for row in state.history]
    assert lrs[-1] < 0.1 * max(lrs)
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    counted = [each for each in events if "progress" in each]
    assert counted[0]["total"] == 30 * schedule.batches_per_epoch
    assert counted[-1]["total"] == state.epochs * schedule.batches_per_epoch
    # the last epoch may be cut short
    assert counted[-1]["n"] > (state.epochs - 1) * schedule.batches_per_epoch


# --- resume ---


@pytest.mark.parametrize("n_done", [1, 2, 5])
def test_resume_ends_with_the_weights_of_an_uninterrupted_training(
    n_done: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    class Mortal(InMemory):
        n_left = n_done + 4  # after the batches that measure the initial loss

        def train_batch(self, batch: Batch, epoch: int, size: Size) -> Callable[[], Inputs]:
            load = super().train_batch(batch, epoch, size)

            def bring() -> Inputs:
                self.n_left -= 1
                if self.n_left < 0:
                    raise Killed
                return load()

            return bring

    monkeypatch.setattr("pixelplay.training.trainer.CHECKPOINT_EVERY_S", -1.0)  # after every step
    schedule = make_small_schedule(epochs=2)
    expected, uninterrupted = fit(make_small_trainer(tmp_path / "whole", schedule))
    with pytest.raises(Killed):
        make_small_trainer(tmp_path / "killed", schedule, inputs=Mortal()).fit()
    assert has_checkpoint(str(tmp_path / "killed/checkpoint"))
    found, state = fit(make_small_trainer(tmp_path / "killed", schedule))
    assert_same(found, expected)
    assert describe_history(state) == describe_history(uninterrupted)


def describe_history(state: TrainState) -> list[dict[str, str]]:
    """Return the history without its times, with every digit; NaN equals NaN."""
    times = ("img_per_s", "seconds")
    return [{name: str(value) for name, value in row.items() if name not in times} for row in state.history]


# --- hard examples ---


def errors_of(classifier: Classifier, inputs: InMemory, rows: IntArray) -> Float32Array:
    """Return 1 minus the probability of its label, for each image."""
    with torch.no_grad():
        probs = classifier(*inputs.plain_batch(rows)()).softmax(1)
    return 1 - probs[torch.arange(len(rows)), torch.from_numpy(LABELS[rows])].numpy()


@pytest.mark.parametrize("imbalance", ["none", "class_weights", "balanced_softmax"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_hard_examples_are_known_by_their_errors_whatever_the_loss(
    imbalance: Literal["none", "class_weights", "balanced_softmax"], label_smoothing: float, tmp_path: Path
) -> None:
    counts, classifier, schedule = (
        np.array([10, 7, 3]),
        make_opinionated_classifier(),
        make_small_schedule(**STILL),
    )
    loss = make_loss(imbalance, counts, logit_tau=1, focal_gamma=2, label_smoothing=label_smoothing)
    state = make_small_trainer(tmp_path, schedule, classifier=classifier, loss=loss).fit()
    expected = errors_of(classifier, InMemory(), schedule.rows)
    assert expected.min() < 0.2
    assert expected.max() > 0.8
    found = state.errors.numpy()
    # the draws of the second epoch have different weights
    np.testing.assert_allclose(found[schedule.rows], expected, atol=1e-3)
    assert (found[VAL] == 1).all()  # not trained on


def test_hard_examples_of_an_epoch_follow_the_errors_before_it(tmp_path: Path) -> None:
    schedule, classifier, inputs = (
        make_small_schedule(epochs=3, **STILL),
        make_opinionated_classifier(),
        Recorded(),
    )
    make_small_trainer(tmp_path, schedule, classifier=classifier, inputs=inputs).fit()
    errors = np.ones(len(LABELS), np.float32)
    errors[schedule.rows] = errors_of(classifier, inputs, schedule.rows)
    trained = inputs.rows[schedule.batches_per_epoch :]  # the first ones measure the initial loss
    epochs = np.split(np.concatenate(trained), 3)
    assert np.bincount(epochs[0]).tolist() == [1] * len(schedule.rows)  # no errors known yet
    for epoch in (2, 3):
        expected = np.concatenate([batch.rows for batch in schedule.batches(epoch, errors)])
        np.testing.assert_array_equal(epochs[epoch - 1], expected)
        assert np.bincount(expected).max() == 2


def test_hard_examples_do_not_bias_the_loss(tmp_path: Path) -> None:
    def losses(hard_example_frac: float, seed: int) -> list[float]:
        schedule = make_small_schedule(epochs=6, seed=seed, hard_example_frac=hard_example_frac, **STILL)
        run_dir = tmp_path / f"{hard_example_frac}{seed}"
        state = make_small_trainer(run_dir, schedule, classifier=make_opinionated_classifier()).fit()
        return [row["train_loss"] for row in state.history[2:]]

    plain = losses(0.0, 0)
    assert np.ptp(plain) < 1e-3
    focused = [loss for seed in range(12) for loss in losses(0.5, seed)]
    assert np.std(focused) > 0.01  # random draws
    # without weights it would be 1.5 times as large
    assert np.mean(focused) == pytest.approx(plain[0], rel=0.05)


def test_images_have_the_size_of_their_epoch(tmp_path: Path) -> None:
    schedule, inputs = make_small_schedule(epochs=6, initial_size_frac=0.4), Recorded()
    make_small_trainer(tmp_path, schedule, classifier=make_opinionated_classifier(), inputs=inputs).fit()
    sizes = [schedule.size(epoch) for epoch in range(6)]
    assert sizes[0] < sizes[1] < sizes[3] == schedule.input_size
    assert sorted(set(inputs.sizes)) == list(enumerate(sizes, 1))


# --- NaN guard, early stopping ---


def test_nan_loss_stops_the_training_and_keeps_the_initial_weights(tmp_path: Path) -> None:
    trainer = make_small_trainer(
        tmp_path, make_small_schedule(), classifier=make_opinionated_classifier(), inputs=NotANumber()
    )
    expected = {name: value.clone() for name, value in trainer.classifier.state_dict().items()}
    found, state = fit(trainer)
    assert state.stopped.startswith("the loss is nan")
    assert state.errors.isfinite().all()
    assert_same(found, expected)


@pytest.mark.parametrize("loss", [0.5, float("nan")])
@pytest.mark.parametrize("has_val", [True, False])
def test_epoch_line_has_the_validation_metrics_even_with_nan_loss(loss: float, has_val: bool) -> None:
    row = {"epoch": 2, "train_loss": 1.0, "val_loss": loss, "val_accuracy": 0.25}
    if not has_val:
        row |= {"val_loss": float("nan"), "val_accuracy": float("nan")}
    line = _describe_epoch(row, 3, is_best=False)
    val = f"  val loss {loss:.3f}  val acc 0.250" if has_val else ""
    assert line == f"  epoch 2/3  train loss 1.000{val}"


@pytest.mark.parametrize(("epochs", "stopped"), [(1, ""), (2, ""), (3, "after 2")])
def test_early_stopping_waits_for_patience_and_not_after_the_last_epoch(
    epochs: int, stopped: str, tmp_path: Path
) -> None:
    schedule = make_small_schedule(epochs=epochs, lr=10.0, head_lr=10.0, patience=2)
    _, state = fit(make_small_trainer(tmp_path, schedule))
    losses = [row["val_loss"] for row in state.history]
    assert min(losses) == losses[0]  # every epoch is worse
    assert state.stopped == ("validation loss has not improved for 2 epochs" if stopped else "")
    assert len(losses) == 1 + min(epochs, 2)


# --- memory ---


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
        RuntimeError("MPS backend out of memory (MPS allocated: 9.06 GB)."),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "mps", "python"],
)
def test_out_of_memory_names_the_setting_to_lower(error: Exception) -> None:
    with (
        pytest.raises(
            ConfigError, match=r"cpu .*batches of 64 images.*--train-batch-size.*--grad-accum-steps"
        ),
        translate_memory_errors(training_memory_message("cpu", 64)),
    ):
        raise error


def test_out_of_memory_during_training_is_explained(tmp_path: Path) -> None:
    class Huge(InMemory):
        def train_batch(self, batch: Batch, epoch: int, size: Size) -> Callable[[], Inputs]:
            raise MemoryError

    with pytest.raises(ConfigError, match=r"cpu .*batches of 5 images.*--train-batch-size"):
        make_small_trainer(tmp_path, make_small_schedule(), inputs=Huge()).fit()


def test_other_errors_are_not_out_of_memory() -> None:
    with (
        pytest.raises(RuntimeError, match="sizes do not match"),
        translate_memory_errors(training_memory_message("cpu", 64)),
    ):
        raise RuntimeError("sizes do not match")
