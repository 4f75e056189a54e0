"""What fits into a time budget, and the file that says what was decided."""

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pixelplay.training.plan import (
    ENOUGH_EPOCHS,
    EPOCHS_PER_VIEW,
    MAX_EPOCHS,
    MIN_EPOCHS,
    FinetunePlan,
    StepTimes,
    WorkAmount,
    apply_plan,
    plan_full,
    plan_partial,
    read_plan,
    shortest_s,
    time_per_image,
    write_plan,
)

from jobs import PLAN
from pixelplay.config import FinetuneConfig, TrainConfig
from pixelplay.errors import ConfigError

AMOUNT = WorkAmount(n_train=1000, n_epoch=1200, n_refit=0, n_val=150, n_final=800, max_view_bytes=10**12)
# one stage more costs more in training, and less in front of the cut
SPEEDS = [
    StepTimes(unfreeze_stages=1, view_s=0.010, step_s=0.006, bytes_per_view=10_000),
    StepTimes(unfreeze_stages=2, view_s=0.008, step_s=0.015, bytes_per_view=20_000),
    StepTimes(unfreeze_stages=3, view_s=0.005, step_s=0.030, bytes_per_view=40_000),
]
FULL = StepTimes(unfreeze_stages=None, view_s=0.0, step_s=0.05, bytes_per_view=0)


def partial(
    left_s: float | None,
    speeds: list[StepTimes] = SPEEDS,
    amount: WorkAmount = AMOUNT,
    epochs: int | None = None,
    cached_views: int | None = None,
) -> FinetunePlan | None:
    settings = FinetuneConfig(epochs=epochs, cached_views=cached_views)
    return plan_partial(speeds, amount, left_s, settings, batch_size=32)


def full(
    left_s: float | None, speed: StepTimes = FULL, amount: WorkAmount = AMOUNT, epochs: int | None = None
) -> FinetunePlan | None:
    settings = FinetuneConfig(epochs=epochs)
    return plan_full(speed, amount, left_s, settings, batch_size=64)


def cost_s(plan: FinetunePlan, speed: StepTimes, amount: WorkAmount) -> float:
    """What a plan takes, added up by hand: a forward pass is a third of a step."""
    cached_views = plan.cached_views or 0
    ahead = speed.view_s * (amount.n_train * cached_views + (amount.n_val if cached_views else 0))
    learning = speed.step_s * (amount.n_epoch + amount.n_val / 3) * plan.epochs
    learning += speed.step_s * amount.n_refit
    return ahead + learning + (speed.view_s + 2 * speed.step_s / 3) * amount.n_final


# --- partial ---


def test_the_deepest_cut_with_enough_epochs_wins() -> None:
    # eight epochs of three stages on three views: 300 s of steps, 15 s of views, 21 s of the rest
    plan = partial(350)
    assert plan is not None
    assert (plan.finetune, plan.unfreeze_stages, plan.epochs, plan.cached_views) == ("partial", 3, 8, 3)
    assert (plan.batch_size, plan.compile) == (32, False)
    assert plan.seconds == {"views": 15.8, "training": 300.0, "refit": 0.0, "reading and measuring": 20.0}


def test_with_less_time_fewer_stages_are_trained() -> None:
    plans = [partial(left_s) for left_s in (320, 150, 60)]
    assert [plan and plan.unfreeze_stages for plan in plans] == [2, 1, 1]
    assert [plan is not None and plan.epochs >= ENOUGH_EPOCHS for plan in plans] == [True, True, False]


def test_one_stage_is_trained_for_a_few_epochs_before_nothing_is() -> None:
    needed = shortest_s(SPEEDS[0], AMOUNT)
    plan = partial(needed + 0.1)
    assert plan is not None
    assert (plan.unfreeze_stages, plan.epochs, plan.cached_views) == (1, MIN_EPOCHS, 1)
    assert partial(needed - 0.1) is None
    assert partial(0) is None
    assert partial(-5) is None


def test_the_time_that_is_said_to_be_needed_is_enough() -> None:
    for cached_views in (None, 1, 9):
        needed = shortest_s(SPEEDS[2], AMOUNT, cached_views)
        assert partial(needed + 0.01, speeds=SPEEDS[2:], cached_views=cached_views) is not None
        assert partial(needed - 0.01, speeds=SPEEDS[2:], cached_views=cached_views) is None
    needed = shortest_s(FULL, AMOUNT)
    assert full(needed + 0.01) is not None
    assert full(needed - 0.01) is None


def test_more_time_than_can_be_used_is_not_used() -> None:
    plan = partial(10**6)
    assert plan is not None
    assert (plan.unfreeze_stages, plan.epochs, plan.cached_views) == (
        3,
        MAX_EPOCHS,
        MAX_EPOCHS // EPOCHS_PER_VIEW,
    )


def test_views_are_bounded_by_the_disk() -> None:
    room = replace(AMOUNT, max_view_bytes=3 * SPEEDS[2].bytes_per_view * AMOUNT.n_train + 5)
    plan = partial(10**6, amount=room)
    assert plan is not None
    assert plan.cached_views == 3
    none = partial(10**6, amount=replace(AMOUNT, max_view_bytes=0))
    assert none is not None
    assert none.cached_views == 1


def test_what_is_asked_for_is_kept() -> None:
    asked = partial(None, speeds=SPEEDS[1:2], epochs=5)
    assert asked is not None
    assert (asked.unfreeze_stages, asked.epochs, asked.cached_views) == (2, 5, 2)
    one = partial(None, speeds=SPEEDS[:1], epochs=1, cached_views=7)
    assert one is not None
    assert (one.unfreeze_stages, one.epochs, one.cached_views) == (1, 1, 7)
    views = partial(400, speeds=SPEEDS[:1], cached_views=11)
    assert views is not None
    assert (views.unfreeze_stages, views.cached_views) == (1, 11)
    long = partial(None, epochs=MAX_EPOCHS + 76)
    assert long is not None
    assert long.epochs == MAX_EPOCHS + 76


SECONDS = st.floats(1e-5, 0.5)
SPEED = st.builds(
    StepTimes,
    unfreeze_stages=st.just(1),
    view_s=SECONDS,
    step_s=SECONDS,
    bytes_per_view=st.integers(1, 10**6),
)
AMOUNTS = st.builds(
    WorkAmount,
    n_train=st.integers(2, 5000),
    n_epoch=st.integers(2, 9000),
    n_refit=st.integers(0, 9000),
    n_val=st.integers(1, 900),
    n_final=st.integers(1, 3000),
    max_view_bytes=st.integers(0, 10**9),
)


@given(st.lists(SPEED, min_size=1, max_size=4), AMOUNTS, st.floats(0, 5000))
def test_a_partial_plan_never_takes_more_than_the_time_given(
    speeds: list[StepTimes], amount: WorkAmount, left_s: float
) -> None:
    speeds = [replace(speed, unfreeze_stages=n) for n, speed in enumerate(speeds, start=1)]
    plan = partial(left_s, speeds, amount)
    if plan is None:
        assert shortest_s(speeds[0], amount) > left_s * (1 - 1e-9)
        return
    assert plan.unfreeze_stages is not None
    speed = speeds[plan.unfreeze_stages - 1]
    assert MIN_EPOCHS <= plan.epochs <= MAX_EPOCHS
    assert cost_s(plan, speed, amount) <= left_s * (1 + 1e-9)
    assert sum(plan.seconds.values()) == pytest.approx(cost_s(plan, speed, amount), abs=0.16)
    assert plan.cached_views is not None
    fits = plan.cached_views * speed.bytes_per_view * amount.n_train <= amount.max_view_bytes
    assert fits or plan.cached_views == 1
    assert plan.cached_views <= -(-plan.epochs // EPOCHS_PER_VIEW)
    assert plan.unfreeze_stages == 1 or plan.epochs >= ENOUGH_EPOCHS


# --- full ---


@given(SPEED, AMOUNTS, st.floats(0, 5000))
def test_a_full_plan_takes_as_many_epochs_as_fit(speed: StepTimes, amount: WorkAmount, left_s: float) -> None:
    speed = replace(speed, unfreeze_stages=None, view_s=0.0)
    plan = full(left_s, speed, amount)
    if plan is None:
        assert shortest_s(speed, amount) > left_s * (1 - 1e-9)
        return
    assert (plan.finetune, plan.unfreeze_stages, plan.cached_views) == ("full", None, None)
    assert (plan.batch_size, plan.compile) == (64, False)
    assert MIN_EPOCHS <= plan.epochs <= MAX_EPOCHS
    assert cost_s(plan, speed, amount) <= left_s * (1 + 1e-9)
    longer = replace(plan, epochs=plan.epochs + 1)
    assert plan.epochs == MAX_EPOCHS or cost_s(longer, speed, amount) > left_s * (1 - 1e-9)


def test_full_keeps_the_epochs_that_are_asked_for() -> None:
    plans = [full(left_s, epochs=epochs) for left_s, epochs in ((0, 1), (-9, 50), (10**6, 2))]
    assert [plan and plan.epochs for plan in plans] == [1, 50, 2]
    assert full(60) is None


# --- measuring ---


def test_a_measurement_leaves_the_first_run_out_and_counts_photographs() -> None:
    pauses_s = iter([0.5, *[0.04] * 20])  # only the first is slow
    assert 0.01 <= time_per_image(lambda: time.sleep(next(pauses_s)), 4, "cpu") < 0.1


# --- the file ---


def write(path: Path, content: object) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


@pytest.mark.parametrize(
    "plan", [PLAN, replace(PLAN, finetune="full", unfreeze_stages=None, cached_views=None)]
)
def test_a_plan_is_read_as_it_was_written(plan: FinetunePlan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_plan(plan, str(path))
    assert read_plan(str(path)) == plan
    assert json.loads(path.read_text()) == asdict(plan)
    assert [found.name for found in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"finetune": "partial", "time_budget": "1s"},
        {
            "finetune": FinetuneConfig(
                epochs=8, unfreeze_stages=2, cached_views=4, train_batch_size=32, compile="off"
            )
        },
    ],
)
def test_a_plan_is_followed_where_no_setting_says_otherwise(settings: dict[str, Any]) -> None:
    config = TrainConfig(**settings)
    assert apply_plan(PLAN, config) == replace(config, finetune="partial")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"finetune": "full"}, "the plan has tune='partial', not 'full'"),
        ({"finetune": "none"}, "the plan has tune='partial', not 'probe'"),
        ({"finetune": FinetuneConfig(epochs=9)}, "the plan has epochs=8, not 9"),
        ({"finetune": FinetuneConfig(unfreeze_stages=1)}, "the plan has unfreeze_stages=2, not 1"),
        ({"finetune": FinetuneConfig(cached_views=1)}, "the plan has n_views=4, not 1"),
        ({"finetune": FinetuneConfig(train_batch_size=8)}, "the plan has train_batch_size=32, not 8"),
        ({"finetune": FinetuneConfig(compile="on")}, "the plan has compile='off', not 'on'"),
    ],
)
def test_a_setting_that_says_otherwise_than_the_plan_is_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        apply_plan(PLAN, TrainConfig(**settings))
    assert str(caught.value) == f"{words}; leave out the plan or the setting"


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_plan_whose_batches_are_too_small_for_a_batch_norm_is_refused(batch_size: int) -> None:
    plan = replace(PLAN, batch_size=batch_size)
    config = TrainConfig(finetune="partial", finetuning=FinetuneConfig(head="mlp"))
    if batch_size == 3:
        assert apply_plan(plan, config) == config
        return
    with pytest.raises(ConfigError) as caught:
        apply_plan(plan, config)
    assert str(caught.value) == (
        f"the plan has batches of {batch_size} images, and head='mlp' needs 3; leave out the plan or the head"
    )


def refusal_of(path: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read_plan(path)
    line = str(caught.value)
    assert "\n" not in line
    assert path in line
    return line


def test_a_plan_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert "cannot be read: No such file or directory" in refusal_of(str(tmp_path / "nowhere.json"))
    assert "cannot be read: Is a directory" in refusal_of(str(tmp_path))


@pytest.mark.parametrize("content", ["", "{", "epochs: 3", "\x00"])
def test_what_is_no_json_is_no_plan(content: str, tmp_path: Path) -> None:
    assert "is no JSON" in refusal_of(write(tmp_path / "plan.json", content))


def test_bytes_that_are_no_text_are_no_plan(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x80")
    assert "is no JSON" in refusal_of(str(tmp_path / "plan.json"))


@pytest.mark.parametrize("content", [[], {}, 3, "plan", None, {"format_version": 1}])
def test_other_json_is_no_plan(content: object, tmp_path: Path) -> None:
    line = refusal_of(write(tmp_path / "plan.json", json.dumps(content)))
    assert "is no plan; give the plan.json of a run of pixelplay train" in line


def test_an_unknown_key_is_named_with_the_nearest_known(tmp_path: Path) -> None:
    line = refusal_of(write(tmp_path / "plan.json", {**asdict(PLAN), "epoch": 3}))
    assert "unknown key 'epoch'" in line
    assert "did you mean 'epochs'" in line


def test_a_key_written_otherwise_is_named_with_the_nearest_known(tmp_path: Path) -> None:
    content = asdict(PLAN)
    content["batchsize"] = content.pop("batch_size")
    line = refusal_of(write(tmp_path / "plan.json", content))
    assert "unknown key 'batchsize'" in line
    assert "did you mean 'batch_size'" in line


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    content = asdict(PLAN)
    del content["cached_views"]
    assert "cached_views" in refusal_of(write(tmp_path / "plan.json", content))


@pytest.mark.parametrize(
    "changes",
    [
        {"finetune": "none"},
        {"finetune": None},
        {"finetune": ["partial"]},
        {"epochs": 0},
        {"epochs": 2.5},
        {"epochs": "8"},
        {"epochs": True},
        {"batch_size": -1},
        {"batch_size": None},
        {"unfreeze_stages": 0},
        {"unfreeze_stages": None},
        {"cached_views": None},
        {"cached_views": "many"},
        {"is_compiled": "yes"},
        {"seconds": None},
        {"seconds": [1, 2]},
        {"seconds": {"training": "long"}},
        {"finetune": "full", "unfreeze_stages": 2, "cached_views": None},
        {"finetune": "full", "unfreeze_stages": None, "cached_views": 3},
    ],
    ids=str,
)
def test_a_value_that_no_run_has_written_is_named(changes: dict[str, Any], tmp_path: Path) -> None:
    line = refusal_of(write(tmp_path / "plan.json", {**asdict(PLAN), **changes}))
    named = [name for name in asdict(PLAN) if f"{name}=" in line]
    assert len(named) == 1
    assert named[0] in changes
    assert repr(changes[named[0]]) in line


def test_a_cut_whose_maps_cannot_be_kept_is_not_made() -> None:
    room = replace(AMOUNT, max_view_bytes=30_000 * AMOUNT.n_train)
    plan = partial(10_000, amount=room)
    assert plan is not None
    assert (plan.unfreeze_stages, plan.cached_views) == (2, 1)
    fewer = partial(10_000, amount=room, cached_views=2)
    assert fewer is not None
    assert (fewer.unfreeze_stages, fewer.cached_views) == (1, 2)
