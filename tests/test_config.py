"""Settings refuse what they cannot mean, and come back from JSON as they were."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pixelplay.config import AugmentConfig, ComputeConfig, DataConfig, FinetuneConfig, TrainConfig, to_json
from pixelplay.errors import ConfigError
from pixelplay.text import suggest


@pytest.mark.parametrize(
    ("kind", "name", "value", "range_"),
    [
        (TrainConfig, "test_frac", 0.95, "0 to 0.9"),
        (TrainConfig, "test_frac", -0.1, "0 to 0.9"),
        (TrainConfig, "test_frac", float("nan"), "0 to 0.9"),
        (TrainConfig, "n_folds", 1, "2 to 20"),
        (TrainConfig, "n_folds", 21, "2 to 20"),
        (TrainConfig, "seed", -1, "0 to 4294967295"),
        (TrainConfig, "seed", 2**32, "0 to 4294967295"),
        (ComputeConfig, "batch_size", 0, "1 to 4096"),
        (ComputeConfig, "batch_size", 5000, "1 to 4096"),
        (ComputeConfig, "num_workers", 0, "1 to 256"),
        (TrainConfig, "cache_gb", -1, "0 to 1000000"),
        (TrainConfig, "cache_gb", float("inf"), "0 to 1000000"),
    ],
)
def test_a_number_outside_its_range_is_refused_with_value_and_range(
    kind: type, name: str, value: object, range_: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        kind(**{name: value})
    assert str(caught.value) == f"{name}={value!r} is outside its range {range_}"


@pytest.mark.parametrize(("kind", "name"), [(TrainConfig, "n_folds"), (ComputeConfig, "batch_size")])
def test_a_count_is_a_whole_number(kind: type, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}=2.5 is no whole number; its range is "):
        kind(**{name: 2.5})


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (TrainConfig, {"test_frac": 0}),
        (TrainConfig, {"test_frac": 0.9}),
        (TrainConfig, {"n_folds": 2}),
        (TrainConfig, {"n_folds": 20}),
        (TrainConfig, {"seed": 2**32 - 1}),
        (ComputeConfig, {"batch_size": 1}),
        (ComputeConfig, {"batch_size": 4096}),
        (ComputeConfig, {"num_workers": None}),
        (TrainConfig, {"cache_gb": 0}),
    ],
)
def test_the_ends_of_a_range_belong_to_it(kind: type, settings: dict[str, Any]) -> None:
    assert to_json(kind(**settings)).items() >= settings.items()


@pytest.mark.parametrize(
    ("kind", "name", "value", "choices"),
    [
        (TrainConfig, "metric", "f1", "accuracy, balanced_accuracy, macro_f1"),
        (TrainConfig, "finetune", "deep", "auto, probe, partial, full"),
        (ComputeConfig, "device", "gpu", "auto, cpu, cuda, mps"),
        (ComputeConfig, "precision", "fp16", "auto, fp32, bf16"),
    ],
)
def test_an_unknown_choice_is_refused_with_the_known_ones(
    kind: type, name: str, value: str, choices: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        kind(**{name: value})
    assert str(caught.value) == f"{name}={value!r} is not one of {choices}"


@pytest.mark.parametrize(
    "ways",
    [
        {"group_column": "patient", "group_by_folder": True},
        {"group_column": "patient", "group_regex": "cam([0-9]+)"},
        {"group_regex": "cam([0-9]+)", "group_by_folder": True},
        {"group_column": "patient", "group_regex": "cam([0-9]+)", "group_by_folder": True},
    ],
)
def test_two_ways_to_name_a_group_exclude_each_other(ways: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="exclude each other: give one"):
        DataConfig(**ways)


def test_a_broken_group_regex_is_refused_before_any_path_is_read() -> None:
    with pytest.raises(ConfigError, match=r"group_regex='\(' is not a regular expression: "):
        DataConfig(group_regex="(")


def test_settings_are_stored_as_nested_json() -> None:
    stored = json.loads(json.dumps(to_json(TrainConfig(seed=7, data=DataConfig(label_column="grade")))))
    assert stored["seed"] == 7
    assert stored["data"]["label_column"] == "grade"


@pytest.mark.parametrize("kind", [TrainConfig, DataConfig, ComputeConfig])
def test_settings_cannot_be_changed_behind_their_checks(kind: type) -> None:
    config = kind()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1
    with pytest.raises(TypeError):
        kind("positional")


def test_suggestions_name_the_nearest_or_nothing() -> None:
    assert suggest("lable", ["label", "path"]) == "; did you mean 'label'?"
    assert suggest("qqq", ["label", "path"]) == ""


def test_classes_are_raised_to_a_number_or_to_the_largest() -> None:
    with pytest.raises(ConfigError, match="oversample_to='max' is not one of largest"):
        TrainConfig(finetune="partial", oversample_to="max")  # type: ignore[arg-type]


def test_rates_follow_the_depth_where_none_are_given() -> None:
    assert FinetuneConfig().rates(is_full=False) != FinetuneConfig().rates(is_full=True)
    assert FinetuneConfig(lr=0.5, layer_decay=0.9).rates(is_full=True) == (0.5, 0.9)


@pytest.mark.parametrize("value", ["5", np.int64(5), None])
def test_what_is_no_plain_number_is_called_that(value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(n_folds=value)  # type: ignore[arg-type]
    assert str(caught.value) == f"n_folds={value!r} is no plain number; its range is 2 to 20"


def test_paths_become_texts() -> None:
    given: dict[str, Any] = {name: Path("a/b") for name in ("weights", "classes", "relabel", "cache_dir")}
    config = TrainConfig(**given, data=DataConfig(images_dir=Path("c")))  # type: ignore[arg-type]
    kept = json.loads(json.dumps(to_json(config)))
    assert {name: kept[name] for name in given} == dict.fromkeys(given, "a/b")
    assert kept["data"]["images_dir"] == "c"


@pytest.mark.parametrize("value", [5, True, ("a",)])
def test_what_is_no_path_is_called_that(value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(weights=value)
    assert str(caught.value) == f"weights={value!r} is no path; give a text"


def test_one_name_in_place_of_several_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        AugmentConfig(augment="mixup")  # type: ignore[arg-type]
    assert str(caught.value) == "augment='mixup' is one text; give a tuple, ('mixup',)"


@pytest.mark.parametrize("name", ["finetune", "augmenting", "data", "compute"])
def test_a_group_of_settings_is_no_dictionary(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**{name: {"lr": 1}})
    kind = type(getattr(TrainConfig(), name)).__name__
    assert str(caught.value) == f"{name}={{'lr': 1}} is no {kind}; give {kind}(...)"
