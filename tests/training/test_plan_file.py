"""plan.json: written, read and checked, so that a fine-tuning can be repeated."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from contexts import PLAN
from pixelplay.config import FinetuneConfig, TrainConfig
from pixelplay.errors import ConfigError
from pixelplay.training.plan_file import (
    FinetunePlan,
    apply_plan,
    has_same_plan,
    read_plan,
    write_plan,
)


def write(path: Path, content: object) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


@pytest.mark.parametrize(
    "plan", [PLAN, replace(PLAN, finetune="full", unfreeze_stages=None, cached_views=None)]
)
def test_plan_is_read_as_it_was_written(plan: FinetunePlan, tmp_path: Path) -> None:
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
        {"finetuning": FinetuneConfig(epochs=8, unfreeze_stages=2, cached_views=4, train_batch_size=32)},
    ],
)
def test_plan_is_followed_where_no_setting_contradicts_it(settings: dict[str, Any]) -> None:
    config = TrainConfig(**settings)
    assert apply_plan(PLAN, config) == replace(config, finetune="partial")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"finetune": "full"}, "finetune='full' .*'partial'"),
        ({"finetune": "none"}, "finetune='none' .*'partial'"),
        ({"finetuning": FinetuneConfig(epochs=9)}, "epochs=9 contradicts 8 in the plan"),
        ({"finetuning": FinetuneConfig(unfreeze_stages=1)}, "unfreeze_stages=1 contradicts 2 in the plan"),
        ({"finetuning": FinetuneConfig(cached_views=1)}, "cached_views=1 contradicts 4 in the plan"),
        ({"finetuning": FinetuneConfig(train_batch_size=8)}, "train_batch_size=8 contradicts 32 in the plan"),
    ],
)
def test_plan_contradicted_by_a_setting_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        apply_plan(PLAN, TrainConfig(**settings))


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_plan_with_batches_too_small_for_a_batch_norm_is_refused(batch_size: int) -> None:
    plan = replace(PLAN, batch_size=batch_size)
    config = TrainConfig(finetune="partial", finetuning=FinetuneConfig(head="mlp"))
    if batch_size == 3:
        assert apply_plan(plan, config) == config
        return
    with pytest.raises(ConfigError, match=rf"batches of {batch_size} images .*head='mlp' .*\b3;"):
        apply_plan(plan, config)


def refusal_of(path: str) -> str:
    """Read a plan that is refused; return the message."""
    with pytest.raises(ConfigError) as caught:
        read_plan(path)
    line = str(caught.value)
    assert "\n" not in line
    assert path in line
    return line


def test_missing_plan_is_named_with_the_reason(tmp_path: Path) -> None:
    assert "No such file or directory" in refusal_of(str(tmp_path / "nowhere.json"))
    assert "Is a directory" in refusal_of(str(tmp_path))


@pytest.mark.parametrize("content", ["", "{", "epochs: 3", "\x00"])
def test_plan_that_is_not_json_is_refused(content: str, tmp_path: Path) -> None:
    assert "JSON" in refusal_of(write(tmp_path / "plan.json", content))


def test_plan_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x80")
    assert "JSON" in refusal_of(str(tmp_path / "plan.json"))


@pytest.mark.parametrize("content", [[], {}, 3, "plan", None, {"format_version": 1}])
def test_other_json_is_not_a_plan(content: object, tmp_path: Path) -> None:
    line = refusal_of(write(tmp_path / "plan.json", json.dumps(content)))
    assert "not a plan" in line
    assert "plan.json of a run of pixelplay train" in line


def test_unknown_key_of_a_plan_is_named_with_the_nearest_known(tmp_path: Path) -> None:
    line = refusal_of(write(tmp_path / "plan.json", {**asdict(PLAN), "epoch": 3}))
    assert "unknown key 'epoch'" in line
    assert "did you mean 'epochs'" in line


def test_misspelt_key_of_a_plan_is_named_with_the_nearest_known(tmp_path: Path) -> None:
    content = asdict(PLAN)
    content["batchsize"] = content.pop("batch_size")
    line = refusal_of(write(tmp_path / "plan.json", content))
    assert "unknown key 'batchsize'" in line
    assert "did you mean 'batch_size'" in line


def test_missing_key_of_a_plan_is_named(tmp_path: Path) -> None:
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
        {"seconds": None},
        {"seconds": [1, 2]},
        {"seconds": {"training": "long"}},
        {"finetune": "full", "unfreeze_stages": 2, "cached_views": None},
        {"finetune": "full", "unfreeze_stages": None, "cached_views": 3},
    ],
    ids=str,
)
def test_invalid_value_of_a_plan_is_named(changes: dict[str, Any], tmp_path: Path) -> None:
    line = refusal_of(write(tmp_path / "plan.json", {**asdict(PLAN), **changes}))
    named = [name for name in asdict(PLAN) if f"invalid {name} " in line]
    assert len(named) == 1
    assert named[0] in changes
    assert repr(changes[named[0]]) in line


def test_same_plan_ignores_the_estimated_times(tmp_path: Path) -> None:
    assert not has_same_plan(str(tmp_path), PLAN)  # no plan.json
    write_plan(PLAN, str(tmp_path / "plan.json"))
    assert has_same_plan(str(tmp_path), replace(PLAN, seconds={"training": 1.0}))
    assert not has_same_plan(str(tmp_path), replace(PLAN, epochs=9))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ["last 2 stages", "1,234 images", "8 epochs", "4 cached views", "training 150 s"]),
        ({"unfreeze_stages": 1}, ["last stage,"]),
        ({"finetune": "full", "unfreeze_stages": None, "cached_views": None}, ["(full)", "all layers"]),
    ],
    ids=str,
)
def test_plan_is_described_in_one_line(changes: dict[str, Any], words: list[str]) -> None:
    plan = replace(PLAN, **changes)
    line = plan.describe(1234)
    assert "\n" not in line
    assert [word for word in words if word not in line] == []
    assert "150 s" not in replace(plan, seconds={}).describe(1234)
