"""Schedule: every image once per epoch, in even batches, reproducible from the seed."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pixelplay.array_types import Float32Array, IntArray
from pixelplay.config import AugmentConfig, FinetuneConfig, Imbalance, TrainConfig
from pixelplay.data.sampling import MAX_DRAWS
from pixelplay.training.batch_inputs import Batch
from pixelplay.training.schedule import MIN_LR_FRAC, SIZE_STEP_PX, Schedule, limit_lr, lr_factor
from trainers import make_schedule

CLASS_SIZES = (23, 11, 4)
INPUT_SIZES = [160, 192, 224, 256, 260, 288, 300, 384]  # lite2 has 260, no multiple of 32


def make_mixed_schedule(
    class_sizes: tuple[int, ...] = CLASS_SIZES,
    *,
    imbalance: Imbalance = "none",
    n_val: int = 5,
    seed: int = 0,
    oversample_to: int | None = None,
    finetuning: FinetuneConfig | None = None,
    **changes: Any,
) -> Schedule:
    """Create a schedule for classes of these sizes, shuffled among the validation images."""
    rng = np.random.default_rng(0)
    n_classes, n_train = len(class_sizes), sum(class_sizes)
    config = TrainConfig(
        finetune="partial",
        seed=seed,
        imbalance=imbalance,
        oversample_to=oversample_to,
        finetuning=finetuning or FinetuneConfig(),
    )
    labels = np.concatenate([np.repeat(np.arange(n_classes), class_sizes), rng.integers(0, n_classes, n_val)])
    order = rng.permutation(len(labels))
    rows = np.flatnonzero(order < n_train)
    defaults = {"rows": rows, "n_classes": n_classes, "imbalance": imbalance, "epochs": 6}
    return make_schedule(labels[order], n_val, config, **{**defaults, **changes})


def batches_of(schedule: Schedule, epoch: int, errors: Float32Array | None = None) -> list[Batch]:
    """Draw an epoch's batches; by default all images have the same error."""
    return schedule.batches(epoch, np.ones(len(schedule.labels), np.float32) if errors is None else errors)


def drawn_by(schedule: Schedule, epoch: int, errors: Float32Array | None = None) -> IntArray:
    return np.concatenate([batch.rows for batch in batches_of(schedule, epoch, errors)])


@given(
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=5).map(tuple),
    batch_size=st.integers(1, 50),
    epoch=st.integers(0, 1000),
    imbalance=st.sampled_from(["none", "class_weights", "focal", "balanced_softmax", "logit_adjusted"]),
)
def test_an_epoch_draws_every_image_once_in_even_batches(
    sizes: tuple[int, ...], batch_size: int, epoch: int, imbalance: Imbalance
) -> None:
    schedule = make_mixed_schedule(sizes, imbalance=imbalance, batch_size=batch_size)
    np.testing.assert_array_equal(np.sort(drawn_by(schedule, epoch)), schedule.rows)
    lengths = [len(batch.rows) for batch in batches_of(schedule, epoch)]
    assert max(lengths) - min(lengths) <= 1
    assert max(lengths) <= batch_size
    assert len(lengths) == schedule.batches_per_epoch == -(-sum(sizes) // batch_size)


@given(
    sizes=st.lists(st.integers(1, 30), min_size=2, max_size=5).map(tuple),
    batch_size=st.integers(1, 20),
    epoch=st.integers(0, 100),
)
def test_sampler_draws_classes_equally_often_in_even_batches(
    sizes: tuple[int, ...], batch_size: int, epoch: int
) -> None:
    schedule = make_mixed_schedule(sizes, imbalance="sampler", batch_size=batch_size)
    drawn = drawn_by(schedule, epoch)
    counts = np.bincount(schedule.labels[drawn], minlength=len(sizes))
    assert counts.max() - counts.min() <= 1
    assert np.isin(drawn, schedule.rows).all()
    lengths = [len(batch.rows) for batch in batches_of(schedule, epoch)]
    assert len(lengths) == schedule.batches_per_epoch
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("imbalance", ["none", "sampler"])
def test_oversample_to_raises_smaller_classes(imbalance: Imbalance) -> None:
    schedule = make_mixed_schedule(imbalance=imbalance, oversample_to=12)
    drawn = drawn_by(schedule, 1)
    assert len(drawn) == 23 + 12 + 12
    assert schedule.batches_per_epoch == 6
    if imbalance == "none":
        assert np.bincount(schedule.labels[drawn]).tolist() == [23, 12, 12]


def test_sampler_numbers_the_draws_of_an_image() -> None:
    schedule = make_mixed_schedule(imbalance="sampler", batch_size=4)
    seen: dict[int, list[int]] = {}
    for batch in batches_of(schedule, 1):
        for row, time in zip(batch.rows.tolist(), batch.times.tolist(), strict=True):
            seen.setdefault(row, []).append(time)
    assert max(map(len, seen.values())) > 2
    assert all(times == list(range(len(times))) for times in seen.values())


@pytest.mark.parametrize("imbalance", ["none", "sampler"])
def test_batches_depend_on_the_seed_only(imbalance: Imbalance) -> None:
    schedule, again, other = (make_mixed_schedule(imbalance=imbalance, seed=seed) for seed in (3, 3, 4))
    for epoch in (1, 2, 5):
        for batch, expected in zip(batches_of(again, epoch), batches_of(schedule, epoch), strict=True):
            np.testing.assert_array_equal(batch.rows, expected.rows)
            np.testing.assert_array_equal(batch.times, expected.times)
        assert (drawn_by(other, epoch) != drawn_by(schedule, epoch)).any()


@pytest.mark.parametrize("imbalance", ["none", "sampler"])
def test_epochs_differ_and_can_be_drawn_in_any_order(imbalance: Imbalance) -> None:
    schedule = make_mixed_schedule(imbalance=imbalance)
    forwards = [drawn_by(schedule, epoch) for epoch in range(1, 7)]
    backwards = [drawn_by(schedule, epoch) for epoch in range(6, 0, -1)][::-1]
    for first, second in zip(forwards, backwards, strict=True):
        np.testing.assert_array_equal(first, second)
    assert len({tuple(rows) for rows in forwards}) == 6


def test_a_later_schedule_continues_the_random_draws() -> None:
    first, later = make_mixed_schedule(), make_mixed_schedule(epochs_before=6)
    orders = [drawn_by(schedule, epoch).tolist() for schedule in (first, later) for epoch in (1, 2)]
    assert len({tuple(order) for order in orders}) == 4
    np.testing.assert_array_equal(drawn_by(first, 7), drawn_by(later, 1))


def make_hard(schedule: Schedule, n: int) -> tuple[IntArray, Float32Array]:
    """Return the first n training images, and errors that are high for them and low for all others."""
    errors = np.full(len(schedule.labels), 0.01, np.float32)
    errors[schedule.rows[:n]] = 0.9
    return schedule.rows[:n], errors


def test_hard_examples_are_drawn_more_often_with_less_weight() -> None:
    schedule = make_mixed_schedule()
    hard, errors = make_hard(schedule, 5)
    batches = [batch for epoch in range(400) for batch in batches_of(schedule, epoch, errors)]
    rows = np.concatenate([batch.rows for batch in batches])
    weights = np.concatenate([batch.weights for batch in batches])
    times = np.bincount(rows, minlength=len(schedule.labels)) / 400
    np.testing.assert_allclose(times[hard], MAX_DRAWS)
    others = np.setdiff1d(schedule.rows, hard)
    assert times[others].max() < 1
    # the weights compensate: in total every image counts the same
    np.testing.assert_allclose(np.bincount(rows, weights)[schedule.rows] / 400, 1, atol=0.15)
    assert weights.mean() == pytest.approx(1, abs=0.01)
    lengths = {len(batch.rows) for batch in batches}
    assert max(lengths) - min(lengths) <= 1
    assert len(batches) == 400 * schedule.batches_per_epoch


def test_hard_examples_drawn_twice_show_two_views() -> None:
    schedule = make_mixed_schedule()
    hard, errors = make_hard(schedule, 5)
    batches = batches_of(schedule, 1, errors)
    rows = np.concatenate([batch.rows for batch in batches])
    times = np.concatenate([batch.times for batch in batches])
    assert {tuple(times[rows == row]) for row in hard} == {(0, 1)}


def test_hard_examples_drawn_twice_are_spread_over_batches() -> None:
    schedule = make_mixed_schedule((200, 200), batch_size=40)
    hard, errors = make_hard(schedule, 40)
    in_batches = [set(batch.rows) for batch in batches_of(schedule, 1, errors)]
    n_batches = [sum(row in rows for rows in in_batches) for row in hard]
    assert n_batches.count(2) > 30  # of 40; some fall into one batch by chance


def test_hard_examples_are_off_with_cutmix_or_batch_norm() -> None:
    plain = make_mixed_schedule()
    _, errors = make_hard(plain, 5)
    mixed = replace(plain.config, augmenting=AugmentConfig(augment=("crop", "cutmix")))
    normed = replace(plain.config, finetuning=FinetuneConfig(head="mlp"))
    assert plain.hard_example_frac > 0
    for config in (mixed, normed):
        schedule = replace(plain, config=config)
        assert np.bincount(drawn_by(schedule, 1, errors))[schedule.rows].tolist() == [1] * len(schedule.rows)


@pytest.mark.parametrize("imbalance", ["none", "sampler"])
def test_without_hard_example_frac_errors_are_ignored(imbalance: Imbalance) -> None:
    schedule = make_mixed_schedule(imbalance=imbalance, finetuning=FinetuneConfig(hard_example_frac=0.0))
    _, errors = make_hard(schedule, 5)
    for batch, expected in zip(batches_of(schedule, 1, errors), batches_of(schedule, 1), strict=True):
        np.testing.assert_array_equal(batch.rows, expected.rows)
        np.testing.assert_array_equal(batch.weights, 1)


def test_batches_mix_the_classes() -> None:
    schedule = make_mixed_schedule((200, 200), batch_size=40)
    for batch in batches_of(schedule, 1):
        assert np.bincount(schedule.labels[batch.rows], minlength=2).min() > 5


@pytest.mark.parametrize(
    ("grad_accum_steps", "steps_per_epoch"), [(1, 5), (2, 3), (3, 2), (4, 2), (5, 1), (100, 1)]
)
def test_grad_accum_steps_add_up_batches_within_an_epoch(grad_accum_steps: int, steps_per_epoch: int) -> None:
    schedule = make_mixed_schedule(finetuning=FinetuneConfig(grad_accum_steps=grad_accum_steps))
    assert schedule.batches_per_epoch == 5  # 38 images in batches of 8
    assert schedule.n_steps == 6 * steps_per_epoch
    assert replace(schedule, epochs=1).n_steps == steps_per_epoch
    groups = dict.fromkeys(schedule.accumulated_batches(batch) for batch in range(5))
    assert len(groups) == steps_per_epoch
    assert [batch for group in groups for batch in group] == list(range(5))


@pytest.mark.parametrize(
    ("batch_size", "grad_accum_steps"), [(10, 1), (10, 2), (10, 3), (10, 9), (38, 1), (37, 1), (100, 1)]
)
def test_images_per_step_is_the_mean_over_steps(batch_size: int, grad_accum_steps: int) -> None:
    schedule = make_mixed_schedule(
        batch_size=batch_size, finetuning=FinetuneConfig(grad_accum_steps=grad_accum_steps)
    )
    sizes = [len(batch.rows) for batch in batches_of(schedule, 1)]
    steps = [sum(sizes[start : start + grad_accum_steps]) for start in range(0, len(sizes), grad_accum_steps)]
    assert sum(steps) == schedule.n_drawn == 38
    assert schedule.images_per_step == pytest.approx(np.mean(steps))


def test_a_batch_larger_than_the_data_holds_all_of_it() -> None:
    schedule = make_mixed_schedule(batch_size=1000)
    assert schedule.batches_per_epoch == 1
    assert schedule.n_steps == 6
    assert [len(batch.rows) for batch in batches_of(schedule, 1)] == [sum(CLASS_SIZES)]


@pytest.mark.parametrize("input_size", INPUT_SIZES)
def test_image_size_is_constant_by_default(input_size: int) -> None:
    schedule = make_mixed_schedule(input_size=(input_size, input_size))
    assert {schedule.size(epoch) for epoch in range(6)} == {(input_size, input_size)}


@pytest.mark.parametrize("epochs", [2, 3, 8, 11])
@pytest.mark.parametrize("input_size", INPUT_SIZES)
def test_image_size_grows_to_full_in_the_first_half(input_size: int, epochs: int) -> None:
    for frac in (0.25, 0.5, 0.7, 0.9, 0.99):
        schedule = make_mixed_schedule(
            input_size=(input_size, input_size),
            epochs=epochs,
            finetuning=FinetuneConfig(initial_size_frac=frac),
        )
        sizes = np.array([schedule.size(epoch)[0] for epoch in range(epochs)])
        assert (np.diff(sizes) >= 0).all()
        assert (sizes[-(epochs // 2) :] == input_size).all()
        assert abs(sizes[0] - frac * input_size) <= SIZE_STEP_PX / 2
        assert sizes.min() >= SIZE_STEP_PX
        assert ((sizes % SIZE_STEP_PX == 0) | (sizes == input_size)).all()


# --- learning rate ---


SCHEDULES = [(1, 0.1), (3, 0.5), (10, 0.1), (37, 0.25), (200, 0.1), (200, 0.0), (1, 0.0)]


@pytest.mark.parametrize(("n_steps", "warmup_frac"), SCHEDULES)
def test_learning_rate_rises_in_warmup_then_decays_to_almost_zero(n_steps: int, warmup_frac: float) -> None:
    factors = np.array([lr_factor(step, n_steps, warmup_frac) for step in range(n_steps)])
    assert ((factors > 0) & (factors <= 1)).all()
    n_warmup = round(warmup_frac * n_steps)
    assert (np.diff(factors[n_warmup:]) < 0).all()
    if warmup_frac <= 0.25:
        assert (np.diff(factors[:n_warmup]) > 0).all()
    if n_steps >= 10:
        assert factors[-1] < 0.04
    assert factors.max() == 1


@pytest.mark.parametrize("n_steps", [1, 7, 100])
def test_learning_rate_without_warmup_is_half_a_cosine(n_steps: int) -> None:
    steps = np.arange(n_steps)
    found = [lr_factor(int(step), n_steps, 0.0) for step in steps]
    np.testing.assert_allclose(found, np.cos(np.pi / 2 * steps / n_steps) ** 2, atol=1e-12)
    assert found[0] == 1


def test_warmup_is_linear_and_starts_above_zero() -> None:
    n_steps = 10_000  # so that the cosine is still near 1
    found = [lr_factor(step, n_steps, 0.01) for step in range(100)]
    np.testing.assert_allclose(found, np.arange(1, 101) / 100, atol=1e-3)


# --- limit of the learning rate by the training loss ---


def run_limit(losses: Sequence[float], initial: float = 1.0) -> list[float]:
    """Return the factor on the learning rates after each loss."""
    frac, smoothed, found = 1.0, initial, []
    for loss in losses:
        frac, smoothed = limit_lr(frac, smoothed, loss, initial)
        found.append(frac)
    return found


def test_learning_rate_is_not_limited_while_the_loss_falls() -> None:
    assert run_limit(np.linspace(1, 0.1, 30).tolist()) == [1.0] * 30


def test_learning_rate_falls_while_the_loss_is_above_the_initial_one() -> None:
    found = run_limit([2.0] * 60)
    assert found == sorted(found, reverse=True)
    assert found[-1] == MIN_LR_FRAC


def test_learning_rate_recovers_after_the_loss() -> None:
    found = run_limit([2.0] * 10 + [0.5] * 60)
    assert min(found) < 0.2
    assert found[-1] == 1.0


def test_learning_rate_ignores_one_high_loss() -> None:
    assert run_limit([0.9] * 5 + [1.5] + [0.9] * 5) == [1.0] * 11
