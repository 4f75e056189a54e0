"""What job.py promises: every image once an epoch, in even batches, the same for the same seed."""

import os
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from jobs import plain_job
from pixelplay.config import AugmentConfig, FinetuneConfig, Imbalance, TrainConfig
from pixelplay.data.sampling import MOST_DRAWS
from pixelplay.errors import ConfigError
from pixelplay.model.device import Device, explain_memory_errors
from pixelplay.training.inputs import Batch, InputSource
from pixelplay.training.schedule import SIZE_STEP_PX, Job, set_cublas_workspace, training_memory_error

SIZES = (23, 11, 4)
FULL_SIZES = [160, 192, 224, 256, 260, 288, 300, 384]  # lite2 has 260: not in steps of 32


def make_job(
    sizes: tuple[int, ...] = SIZES, *, imbalance: Imbalance = "none", n_val: int = 5, **changes: Any
) -> Job:
    """A job on classes of these sizes, their images mixed among those of the validation part."""
    rng = np.random.default_rng(0)
    settings = {
        key: changes.pop(key)
        for key in ("grad_accum_steps", "initial_size_frac", "hard_example_frac")
        if key in changes
    }
    config = TrainConfig(
        finetune="partial",
        seed=changes.pop("seed", 0),
        imbalance=imbalance,
        oversample_to=changes.pop("oversample_to", None),
        finetuning=FinetuneConfig(**settings),
    )
    labels = np.concatenate([np.repeat(np.arange(len(sizes)), sizes), rng.integers(0, len(sizes), n_val)])
    order = rng.permutation(len(labels))
    schedule = {
        "train": np.flatnonzero(order < sum(sizes)),
        "val": np.flatnonzero(order >= sum(sizes)),
        "imbalance": imbalance,
        "epochs": 6,
    }
    # a schedule asks its source for nothing
    return plain_job(cast(InputSource, None), labels[order], n_val, config, **{**schedule, **changes})


def batches_of(job: Job, epoch: int, misses: NDArray[np.float32] | None = None) -> list[Batch]:
    """An epoch's batches; without misses of a network that was as wrong about all."""
    return job.batches(epoch, np.ones(len(job.labels), np.float32) if misses is None else misses)


def drawn_by(job: Job, epoch: int, misses: NDArray[np.float32] | None = None) -> NDArray[np.int64]:
    return np.concatenate([batch.rows for batch in batches_of(job, epoch, misses)])


@given(
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=5).map(tuple),
    batch_size=st.integers(1, 50),
    epoch=st.integers(0, 1000),
    imbalance=st.sampled_from(["none", "class_weights", "focal", "balanced_softmax", "logit_adjusted"]),
)
def test_an_epoch_shows_every_photograph_once_in_even_batches(
    sizes: tuple[int, ...], batch_size: int, epoch: int, imbalance: Imbalance
) -> None:
    job = make_job(sizes, imbalance=imbalance, batch_size=batch_size)
    np.testing.assert_array_equal(np.sort(drawn_by(job, epoch)), job.train)
    lengths = [len(batch.rows) for batch in batches_of(job, epoch)]
    assert max(lengths) - min(lengths) <= 1
    assert max(lengths) <= batch_size
    assert len(lengths) == job.batches_per_epoch == -(-sum(sizes) // batch_size)


@given(
    sizes=st.lists(st.integers(1, 30), min_size=2, max_size=5).map(tuple),
    batch_size=st.integers(1, 20),
    epoch=st.integers(0, 100),
)
def test_a_sampler_shows_classes_equally_often_in_even_batches(
    sizes: tuple[int, ...], batch_size: int, epoch: int
) -> None:
    job = make_job(sizes, imbalance="sampler", batch_size=batch_size)
    drawn = drawn_by(job, epoch)
    counts = np.bincount(job.labels[drawn], minlength=len(sizes))
    assert counts.max() - counts.min() <= 1
    assert np.isin(drawn, job.train).all()
    lengths = [len(batch.rows) for batch in batches_of(job, epoch)]
    assert len(lengths) == job.batches_per_epoch
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("imbalance", ["none", "sampler"])
def test_smaller_classes_are_raised_to_what_is_asked(imbalance: Imbalance) -> None:
    job = make_job(imbalance=imbalance, oversample_to=12)
    drawn = drawn_by(job, 1)
    assert len(drawn) == 23 + 12 + 12
    assert job.batches_per_epoch == 6
    if imbalance == "none":
        assert np.bincount(job.labels[drawn]).tolist() == [23, 12, 12]


def test_each_time_a_photograph_is_drawn_is_numbered() -> None:
    job = make_job(imbalance="sampler", batch_size=4)
    seen: dict[int, list[int]] = {}
    for batch in batches_of(job, 1):
        for row, time in zip(batch.rows.tolist(), batch.times.tolist(), strict=True):
            seen.setdefault(row, []).append(time)
    assert max(map(len, seen.values())) > 2
    assert all(times == list(range(len(times))) for times in seen.values())


@pytest.mark.parametrize("imbalance", ["none", "sampler"])
def test_the_same_seed_gives_the_same_batches_and_another_others(imbalance: Imbalance) -> None:
    job, again, other = (make_job(imbalance=imbalance, seed=seed) for seed in (3, 3, 4))
    for epoch in (1, 2, 5):
        for batch, expected in zip(batches_of(again, epoch), batches_of(job, epoch), strict=True):
            np.testing.assert_array_equal(batch.rows, expected.rows)
            np.testing.assert_array_equal(batch.times, expected.times)
        assert (drawn_by(other, epoch) != drawn_by(job, epoch)).any()


@pytest.mark.parametrize("imbalance", ["none", "sampler"])
def test_epochs_differ_and_may_be_asked_for_in_any_order(imbalance: Imbalance) -> None:
    job = make_job(imbalance=imbalance)
    forwards = [drawn_by(job, epoch) for epoch in range(1, 7)]
    backwards = [drawn_by(job, epoch) for epoch in range(6, 0, -1)][::-1]
    for first, second in zip(forwards, backwards, strict=True):
        np.testing.assert_array_equal(first, second)
    assert len({tuple(rows) for rows in forwards}) == 6


def test_the_epochs_of_a_later_job_are_others() -> None:
    first, later = make_job(), make_job(epochs_before=6)
    orders = [drawn_by(job, epoch).tolist() for job in (first, later) for epoch in (1, 2)]
    assert len({tuple(order) for order in orders}) == 4
    np.testing.assert_array_equal(drawn_by(first, 7), drawn_by(later, 1))


def miss_some(job: Job, n: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The first n that are learned from were answered wrongly, all others rightly."""
    misses = np.full(len(job.labels), 0.01, np.float32)
    misses[job.train[:n]] = 0.9
    return job.train[:n], misses


def test_what_was_wrong_comes_more_often_and_counts_less() -> None:
    job = make_job()
    wrong, misses = miss_some(job, 5)
    batches = [batch for epoch in range(400) for batch in batches_of(job, epoch, misses)]
    rows = np.concatenate([batch.rows for batch in batches])
    weights = np.concatenate([batch.weights for batch in batches])
    times = np.bincount(rows, minlength=len(job.labels)) / 400
    np.testing.assert_allclose(times[wrong], MOST_DRAWS)
    others = np.setdiff1d(job.train, wrong)
    assert times[others].max() < 1
    # each draw counts the less the more there are: no image counts more than another in the end
    np.testing.assert_allclose(np.bincount(rows, weights)[job.train] / 400, 1, atol=0.15)
    assert weights.mean() == pytest.approx(1, abs=0.01)
    lengths = {len(batch.rows) for batch in batches}
    assert max(lengths) - min(lengths) <= 1
    assert len(batches) == 400 * job.batches_per_epoch


def test_a_photograph_that_comes_twice_shows_two_views() -> None:
    job = make_job()
    wrong, misses = miss_some(job, 5)
    batches = batches_of(job, 1, misses)
    rows = np.concatenate([batch.rows for batch in batches])
    times = np.concatenate([batch.times for batch in batches])
    assert {tuple(times[rows == row]) for row in wrong} == {(0, 1)}


def test_what_comes_twice_comes_at_two_times() -> None:
    job = make_job((200, 200), batch_size=40)
    wrong, misses = miss_some(job, 40)
    in_batches = [set(batch.rows) for batch in batches_of(job, 1, misses)]
    n_batches = [sum(row in rows for rows in in_batches) for row in wrong]
    assert n_batches.count(2) > 30  # of 40; chance brings some of them into one batch


def test_nothing_is_preferred_where_weights_do_not_make_up_for_it() -> None:
    plain = make_job()
    _, misses = miss_some(plain, 5)
    mixed = replace(plain.config, augmenting=AugmentConfig(augment=("crop", "cutmix")))
    normed = replace(plain.config, finetuning=FinetuneConfig(head="mlp"))
    assert plain.hard_example_frac > 0
    for config in (mixed, normed):
        job = replace(plain, config=config)
        assert np.bincount(drawn_by(job, 1, misses))[job.train].tolist() == [1] * len(job.train)


@pytest.mark.parametrize("imbalance", ["none", "sampler"])
def test_without_focus_all_come_alike_whatever_was_wrong(imbalance: Imbalance) -> None:
    job = make_job(imbalance=imbalance, hard_example_frac=0.0)
    _, misses = miss_some(job, 5)
    for batch, expected in zip(batches_of(job, 1, misses), batches_of(job, 1), strict=True):
        np.testing.assert_array_equal(batch.rows, expected.rows)
        np.testing.assert_array_equal(batch.weights, 1)


def test_classes_are_mixed_within_batches() -> None:
    job = make_job((200, 200), batch_size=40)
    for batch in batches_of(job, 1):
        assert np.bincount(job.labels[batch.rows], minlength=2).min() > 5


@pytest.mark.parametrize(
    ("grad_accum_steps", "steps_an_epoch"), [(1, 5), (2, 3), (3, 2), (4, 2), (5, 1), (100, 1)]
)
def test_steps_are_batches_added_up_within_an_epoch(grad_accum_steps: int, steps_an_epoch: int) -> None:
    job = make_job(grad_accum_steps=grad_accum_steps)  # 38 images in batches of 8
    assert job.batches_per_epoch == 5
    assert job.n_steps == 6 * steps_an_epoch
    assert replace(job, epochs=1).n_steps == steps_an_epoch


@pytest.mark.parametrize(
    ("batch_size", "grad_accum_steps"), [(10, 1), (10, 2), (10, 3), (10, 9), (38, 1), (37, 1), (100, 1)]
)
def test_rates_are_for_the_photographs_that_a_step_has(batch_size: int, grad_accum_steps: int) -> None:
    job = make_job(batch_size=batch_size, grad_accum_steps=grad_accum_steps)
    sizes = [len(batch.rows) for batch in batches_of(job, 1)]
    steps = [sum(sizes[start : start + grad_accum_steps]) for start in range(0, len(sizes), grad_accum_steps)]
    assert sum(steps) == job.n_epoch == 38
    assert job.images_per_step == pytest.approx(np.mean(steps))


def test_a_batch_larger_than_the_data_holds_all_of_it() -> None:
    job = make_job(batch_size=1000)
    assert job.batches_per_epoch == 1
    assert job.n_steps == 6
    assert [len(batch.rows) for batch in batches_of(job, 1)] == [sum(SIZES)]


@pytest.mark.parametrize("input_size", FULL_SIZES)
def test_the_size_stays_where_it_need_not_grow(input_size: int) -> None:
    job = make_job(input_size=input_size)
    assert [job.size_px(epoch) for epoch in range(6)] == [input_size] * 6


@pytest.mark.parametrize("epochs", [2, 3, 8, 11])
@pytest.mark.parametrize("input_size", FULL_SIZES)
def test_the_size_grows_to_the_full_one_in_the_first_half(input_size: int, epochs: int) -> None:
    for share in (0.25, 0.5, 0.7, 0.9, 0.99):
        job = make_job(input_size=input_size, epochs=epochs, initial_size_frac=share)
        sizes = np.array([job.size_px(epoch) for epoch in range(epochs)])
        assert (np.diff(sizes) >= 0).all()
        assert (sizes[-(epochs // 2) :] == input_size).all()
        assert abs(sizes[0] - share * input_size) <= SIZE_STEP_PX / 2
        assert sizes.min() >= SIZE_STEP_PX
        assert ((sizes % SIZE_STEP_PX == 0) | (sizes == input_size)).all()


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("is_asked", [True, False])
def test_workspaces_of_a_gpu_are_fixed_where_that_is_asked(
    is_asked: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {})
    set_cublas_workspace(
        TrainConfig(finetuning=FinetuneConfig(deterministic=is_asked)), Device(name=device, precision="fp32")
    )
    assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == (is_asked and device == "cuda")


def test_workspaces_that_the_user_has_chosen_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"CUBLAS_WORKSPACE_CONFIG": ":16:8"})
    set_cublas_workspace(
        TrainConfig(finetuning=FinetuneConfig(deterministic=True)), Device(name="cuda", precision="fp32")
    )
    assert os.environ == {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}


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
def test_too_little_memory_says_what_to_lower(error: Exception) -> None:
    with (
        pytest.raises(ConfigError, match=r"has too little memory for steps of 64 .*lower --train-batch-size"),
        explain_memory_errors(training_memory_error("cpu", 64)),
    ):
        raise error


def test_another_error_is_not_taken_for_too_little_memory() -> None:
    with (
        pytest.raises(RuntimeError, match="sizes do not match"),
        explain_memory_errors(training_memory_error("cpu", 64)),
    ):
        raise RuntimeError("sizes do not match")
