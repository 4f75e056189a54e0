"""Time budget: how many stages, epochs and cached views fit, and what they cost."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from contexts import PLAN
from pixelplay.config import FinetuneConfig, TrainConfig
from pixelplay.run_log import RunLog
from pixelplay.training.plan_file import FinetunePlan, write_plan
from pixelplay.training.time_budget import (
    ENOUGH_EPOCHS,
    EPOCHS_PER_VIEW,
    MAX_EPOCHS,
    MIN_EPOCHS,
    Throughput,
    TimeBudgetError,
    Workload,
    fit_plan,
    make_plan,
    shortest_training_s,
    time_per_image,
)
from trainers import make_task

WORK = Workload(
    n_train=1000,
    n_drawn=1200,
    n_refit=0,
    n_val=150,
    n_plain=150,
    enough_epochs=ENOUGH_EPOCHS,
    n_eval=800,
    max_view_bytes=10**12,
)
# one more stage costs more behind the cut, and less in front of it
THROUGHPUTS = [
    Throughput(unfreeze_stages=1, view_s=0.010, step_s=0.006, bytes_per_view=10_000),
    Throughput(unfreeze_stages=2, view_s=0.008, step_s=0.015, bytes_per_view=20_000),
    Throughput(unfreeze_stages=3, view_s=0.005, step_s=0.030, bytes_per_view=40_000),
]
FULL = Throughput(unfreeze_stages=None, view_s=0.0, step_s=0.05, bytes_per_view=0)


def partial(
    left_s: float | None,
    throughputs: list[Throughput] = THROUGHPUTS,
    work: Workload = WORK,
    epochs: int | None = None,
    cached_views: int | None = None,
) -> FinetunePlan | None:
    settings = FinetuneConfig(epochs=epochs, cached_views=cached_views)
    return fit_plan(throughputs, work, left_s, settings, batch_size=32)


def full(
    left_s: float | None, throughput: Throughput = FULL, work: Workload = WORK, epochs: int | None = None
) -> FinetunePlan | None:
    return fit_plan([throughput], work, left_s, FinetuneConfig(epochs=epochs), batch_size=64)


def cost_s(plan: FinetunePlan, throughput: Throughput, work: Workload) -> float:
    """Add up the seconds of a plan by hand: a forward pass is a third of a step."""
    cached_views = plan.cached_views or 0
    views = throughput.view_s * (work.n_train * cached_views + (work.n_plain if cached_views else 0))
    training = throughput.step_s * (work.n_drawn + work.n_val / 3) * plan.epochs
    training += throughput.step_s * work.n_refit
    return views + training + (throughput.view_s + 2 * throughput.step_s / 3) * work.n_eval


# --- partial ---


def test_time_budget_trains_most_stages_that_leave_enough_epochs() -> None:
    # eight epochs of three stages with three views: 300 s of steps, 16 s of views, 20 s of evaluation
    plan = partial(350)
    assert plan is not None
    assert (plan.finetune, plan.unfreeze_stages, plan.epochs, plan.cached_views) == ("partial", 3, 8, 3)
    assert plan.batch_size == 32
    assert plan.seconds == {"views": 15.8, "training": 300.0, "refit": 0.0, "evaluation": 20.0}


def test_time_budget_decides_the_number_of_stages() -> None:
    plans = [partial(left_s) for left_s in (320, 150, 60)]
    assert [plan and plan.unfreeze_stages for plan in plans] == [2, 1, 1]
    assert [plan is not None and plan.epochs >= ENOUGH_EPOCHS for plan in plans] == [True, True, False]


def test_time_budget_allows_one_stage_for_a_few_epochs_at_least() -> None:
    needed = shortest_training_s(THROUGHPUTS[0], WORK)
    plan = partial(needed + 0.1)
    assert plan is not None
    assert (plan.unfreeze_stages, plan.epochs, plan.cached_views) == (1, MIN_EPOCHS, 1)
    assert partial(needed - 0.1) is None
    assert partial(0) is None
    assert partial(-5) is None


def test_shortest_training_just_fits_its_time_budget() -> None:
    for cached_views in (None, 1, 9):
        needed = shortest_training_s(THROUGHPUTS[2], WORK, cached_views)
        assert partial(needed + 0.01, throughputs=THROUGHPUTS[2:], cached_views=cached_views) is not None
        assert partial(needed - 0.01, throughputs=THROUGHPUTS[2:], cached_views=cached_views) is None
    needed = shortest_training_s(FULL, WORK)
    assert full(needed + 0.01) is not None
    assert full(needed - 0.01) is None


def test_time_budget_beyond_the_most_epochs_is_not_used() -> None:
    plan = partial(10**6)
    assert plan is not None
    assert (plan.unfreeze_stages, plan.epochs, plan.cached_views) == (
        3,
        MAX_EPOCHS,
        MAX_EPOCHS // EPOCHS_PER_VIEW,
    )


def test_cached_views_fit_the_disk() -> None:
    room = replace(WORK, max_view_bytes=3 * THROUGHPUTS[2].bytes_per_view * WORK.n_train + 5)
    plan = partial(10**6, work=room)
    assert plan is not None
    assert plan.cached_views == 3
    none = partial(10**6, work=replace(WORK, max_view_bytes=0))
    assert none is not None
    assert none.cached_views == 1


def test_epochs_and_cached_views_from_settings_are_kept() -> None:
    fixed = partial(None, throughputs=THROUGHPUTS[1:2], epochs=5)
    assert fixed is not None
    assert (fixed.unfreeze_stages, fixed.epochs, fixed.cached_views) == (2, 5, 2)
    one = partial(None, throughputs=THROUGHPUTS[:1], epochs=1, cached_views=7)
    assert one is not None
    assert (one.unfreeze_stages, one.epochs, one.cached_views) == (1, 1, 7)
    views = partial(400, throughputs=THROUGHPUTS[:1], cached_views=11)
    assert views is not None
    assert (views.unfreeze_stages, views.cached_views) == (1, 11)
    long = partial(None, epochs=MAX_EPOCHS + 76)
    assert long is not None
    assert long.epochs == MAX_EPOCHS + 76


SECONDS = st.floats(1e-5, 0.5)
THROUGHPUT = st.builds(
    Throughput,
    unfreeze_stages=st.just(1),
    view_s=SECONDS,
    step_s=SECONDS,
    bytes_per_view=st.integers(1, 10**6),
)
WORKLOADS = st.builds(
    Workload,
    n_train=st.integers(2, 5000),
    n_drawn=st.integers(2, 9000),
    n_refit=st.integers(0, 9000),
    n_val=st.integers(0, 900),
    n_plain=st.integers(1, 9000),
    enough_epochs=st.integers(1, 10),
    n_eval=st.integers(1, 3000),
    max_view_bytes=st.integers(0, 10**9),
)


@given(st.lists(THROUGHPUT, min_size=1, max_size=4), WORKLOADS, st.floats(0, 5000))
def test_partial_plan_fits_the_time_budget(
    throughputs: list[Throughput], work: Workload, left_s: float
) -> None:
    throughputs = [
        replace(throughput, unfreeze_stages=n) for n, throughput in enumerate(throughputs, start=1)
    ]
    plan = partial(left_s, throughputs, work)
    if plan is None:
        assert shortest_training_s(throughputs[0], work) > left_s * (1 - 1e-9)
        return
    assert plan.unfreeze_stages is not None
    throughput = throughputs[plan.unfreeze_stages - 1]
    assert MIN_EPOCHS <= plan.epochs <= MAX_EPOCHS
    assert cost_s(plan, throughput, work) <= left_s * (1 + 1e-9)
    assert sum(plan.seconds.values()) == pytest.approx(cost_s(plan, throughput, work), abs=0.16)
    assert plan.cached_views is not None
    fits = plan.cached_views * throughput.bytes_per_view * work.n_train <= work.max_view_bytes
    assert fits or plan.cached_views == 1
    assert plan.cached_views <= -(-plan.epochs // EPOCHS_PER_VIEW)
    assert plan.unfreeze_stages == 1 or plan.epochs >= work.enough_epochs


def test_cached_views_too_large_for_the_disk_limit_the_stages() -> None:
    room = replace(WORK, max_view_bytes=30_000 * WORK.n_train)
    plan = partial(10_000, work=room)
    assert plan is not None
    assert (plan.unfreeze_stages, plan.cached_views) == (2, 1)
    fewer = partial(10_000, work=room, cached_views=2)
    assert fewer is not None
    assert (fewer.unfreeze_stages, fewer.cached_views) == (1, 2)


# --- full ---


@given(THROUGHPUT, WORKLOADS, st.floats(0, 5000))
def test_full_plan_has_as_many_epochs_as_the_time_budget_allows(
    throughput: Throughput, work: Workload, left_s: float
) -> None:
    throughput = replace(throughput, unfreeze_stages=None, view_s=0.0)
    plan = full(left_s, throughput, work)
    if plan is None:
        assert shortest_training_s(throughput, work) > left_s * (1 - 1e-9)
        return
    assert (plan.finetune, plan.unfreeze_stages, plan.cached_views) == ("full", None, None)
    assert plan.batch_size == 64
    assert MIN_EPOCHS <= plan.epochs <= MAX_EPOCHS
    assert cost_s(plan, throughput, work) <= left_s * (1 + 1e-9)
    longer = replace(plan, epochs=plan.epochs + 1)
    assert plan.epochs == MAX_EPOCHS or cost_s(longer, throughput, work) > left_s * (1 - 1e-9)


def test_full_plan_keeps_epochs_from_settings() -> None:
    plans = [full(left_s, epochs=epochs) for left_s, epochs in ((0, 1), (-9, 50), (10**6, 2))]
    assert [plan and plan.epochs for plan in plans] == [1, 50, 2]
    assert full(60) is None


# --- measuring ---


def test_time_per_image_ignores_the_first_run() -> None:
    pauses_s = iter([0.5, *[0.04] * 20])  # only the first is slow
    assert 0.01 <= time_per_image(lambda: time.sleep(next(pauses_s)), 4, "cpu") < 0.1


# --- making a plan ---


def test_out_of_memory_halves_the_batch_size_with_a_note(
    tmp_path: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(TrainConfig(finetune="partial", time_budget="1h"), tmp_path, tiny_weights)
    zeros = torch.zeros

    def scarce(*shape: Any, **options: Any) -> torch.Tensor:
        if len(shape) == 4 and shape[0] > 8:  # a batch of feature maps
            raise torch.OutOfMemoryError("out of memory")
        return zeros(*shape, **options)

    monkeypatch.setattr(torch, "zeros", scarce)
    assert make_plan(task, "partial").batch_size == 7
    assert task.ctx.log.notes == ["using batches of 7 images; 15 do not fit into memory"]
    monkeypatch.setattr(torch, "zeros", zeros)
    for batch_size, n_notes in ((7, 1), (14, 0)):  # of the interrupted run; of a fold with one image less
        write_plan(replace(PLAN, batch_size=batch_size), str(tmp_path / "plan.json"))
        task.ctx.log = RunLog(quiet=True)
        assert make_plan(task, "partial").batch_size == batch_size
        assert len(task.ctx.log.notes) == n_notes


def test_time_budget_that_is_too_short_names_one_that_is_enough(tmp_path: Path, tiny_weights: Path) -> None:
    config = TrainConfig(finetune="full", time_budget="0.1s")
    task = make_task(config, tmp_path, tiny_weights)
    with pytest.raises(
        TimeBudgetError, match=r"--time-budget 0\.1s .*--finetune full .*15 images.*at least \d+[sm]"
    ):
        make_plan(task, "full")


def test_cached_views_without_room_name_the_space_they_need(tmp_path: Path, tiny_weights: Path) -> None:
    config = TrainConfig(
        finetune="partial", cache_gb=1e-6, finetuning=FinetuneConfig(epochs=3, cached_views=2)
    )
    task = make_task(config, tmp_path, tiny_weights)
    with pytest.raises(TimeBudgetError, match=r"^2 cached views of 27 images .* MB .*0\.0 MB.*--cache-gb"):
        make_plan(task, "partial")


def test_epochs_from_settings_are_planned_without_measuring(tmp_path: Path, tiny_weights: Path) -> None:
    config = TrainConfig(finetune="partial", time_budget="0.1s", finetuning=FinetuneConfig(epochs=5))
    plan = make_plan(make_task(config, tmp_path, tiny_weights), "partial")
    assert (plan.epochs, plan.unfreeze_stages, plan.cached_views, plan.seconds) == (5, 3, 2, {})
