"""Settings: ranges, choices and contradictions are refused; JSON stores them as they are."""

import dataclasses
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pixelplay.config import (
    AugmentConfig,
    ComputeConfig,
    DataConfig,
    FinetuneConfig,
    Range,
    TrainConfig,
    UncertaintyConfig,
    field_types,
)
from pixelplay.errors import ConfigError
from pixelplay.text import suggest


def refuse(kind: type, **settings: object) -> str:
    """Return the message with which settings are refused."""
    with pytest.raises(ConfigError) as caught:
        kind(**settings)
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "name", "value", "bounds"),
    [
        (TrainConfig, "test_frac", 0.95, (0, 0.9)),
        (TrainConfig, "test_frac", -0.1, (0, 0.9)),
        (TrainConfig, "test_frac", float("nan"), (0, 0.9)),
        (TrainConfig, "n_folds", 1, (2, 20)),
        (TrainConfig, "n_folds", 21, (2, 20)),
        (TrainConfig, "seed", -1, (0, 4294967295)),
        (TrainConfig, "seed", 2**32, (0, 4294967295)),
        (TrainConfig, "cache_gb", -1, (0, 1000000)),
        (TrainConfig, "cache_gb", float("inf"), (0, 1000000)),
        (ComputeConfig, "batch_size", 0, (1, 4096)),
        (ComputeConfig, "batch_size", 5000, (1, 4096)),
        (ComputeConfig, "num_workers", 0, (1, 256)),
        (UncertaintyConfig, "coverage", 0, (0, 1)),
        (UncertaintyConfig, "coverage", 1, (0, 1)),
        (UncertaintyConfig, "coverage", "0.9", (0, 1)),
        (TrainConfig, "n_folds", 2.5, (2, 20)),
        (ComputeConfig, "batch_size", 2.5, (1, 4096)),
        (TrainConfig, "n_folds", "5", (2, 20)),
        (TrainConfig, "n_folds", np.int64(5), (2, 20)),
        (TrainConfig, "n_folds", None, (2, 20)),
    ],
)
def test_number_outside_its_range_is_refused_with_value_and_range(
    kind: type, name: str, value: object, bounds: tuple[float, float]
) -> None:
    message = refuse(kind, **{name: value})
    assert message.startswith(f"{name}={value!r} ")
    assert f"range {bounds[0]} to {bounds[1]}" in message


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (TrainConfig, {"test_frac": 0}),
        (TrainConfig, {"test_frac": 0.9}),
        (TrainConfig, {"n_folds": 2}),
        (TrainConfig, {"n_folds": 20}),
        (TrainConfig, {"seed": 2**32 - 1}),
        (TrainConfig, {"cache_gb": 0}),
        (ComputeConfig, {"batch_size": 1}),
        (ComputeConfig, {"batch_size": 4096}),
        (ComputeConfig, {"num_workers": None}),
        (UncertaintyConfig, {"min_confidence": 1}),
    ],
)
def test_bounds_of_a_range_are_allowed(kind: type, settings: dict[str, Any]) -> None:
    assert asdict(kind(**settings)).items() >= settings.items()


def test_every_number_has_a_range_that_holds_its_default() -> None:
    for kind in (ComputeConfig, UncertaintyConfig, FinetuneConfig, AugmentConfig, TrainConfig):
        for name, (allowed, metadata) in field_types(kind).items():
            if {int, float} & {*allowed}:
                (range_,) = (each for each in metadata if isinstance(each, Range))
                default = getattr(kind(), name)
                assert default is None or range_.low <= default <= range_.high, name


@pytest.mark.parametrize(
    ("kind", "name", "value", "choices"),
    [
        (TrainConfig, "metric", "f1", "accuracy, balanced_accuracy, macro_f1"),
        (TrainConfig, "finetune", "deep", "auto, none, partial, full"),
        (TrainConfig, "oversample_to", "max", "largest"),
        (ComputeConfig, "device", "gpu", "auto, cpu, cuda, mps"),
        (ComputeConfig, "precision", "fp16", "auto, fp32, bf16"),
        (UncertaintyConfig, "conformal_score", "apz", "lac, aps"),
        (FinetuneConfig, "ensemble_probe", True, "auto, on, off"),
    ],
)
def test_unknown_choice_is_refused_with_the_known_ones(
    kind: type, name: str, value: object, choices: str
) -> None:
    message = refuse(kind, **{name: value})
    assert message.startswith(f"{name}={value!r} ")
    assert choices in message


def test_unknown_augmentation_is_refused_with_a_suggestion() -> None:
    message = refuse(AugmentConfig, augment=("crop", "mixpu"))
    for word in ("augment='mixpu'", "crop, rotation, erasing, mixup, cutmix", "mean 'mixup'"):
        assert word in message


@pytest.mark.parametrize(
    "ways",
    [
        {"group_column": "patient", "group_by_folder": True},
        {"group_column": "patient", "group_regex": "cam([0-9]+)"},
        {"group_regex": "cam([0-9]+)", "group_by_folder": True},
        {"group_column": "patient", "group_regex": "cam([0-9]+)", "group_by_folder": True},
    ],
)
def test_two_sources_of_groups_exclude_each_other(ways: dict[str, Any]) -> None:
    message = refuse(DataConfig, **ways)
    assert all(name in message for name in ("group_column", "group_regex", "group_by_folder"))


def test_invalid_group_regex_is_refused() -> None:
    assert refuse(DataConfig, group_regex="(").startswith("group_regex='(' ")


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        (
            UncertaintyConfig,
            {"min_confidence": 0.5, "target_accuracy": 0.9},
            ["min_confidence", "target_accuracy"],
        ),
        (UncertaintyConfig, {"conformal_score": "aps"}, ["conformal_score='aps'", "--coverage"]),
        (FinetuneConfig, {"head": "mlp", "ensemble_probe": "on"}, ["head='mlp'", "ensemble_probe='on'"]),
        (FinetuneConfig, {"head": "mlp", "train_batch_size": 2}, ["train_batch_size=2", "3 to 10000"]),
        (TrainConfig, {"time_budget": "5x"}, ["time_budget='5x'", "90s, 5m or 2h"]),
        (TrainConfig, {"time_budget": "0s"}, ["time_budget='0s'", "90s, 5m or 2h"]),
        (TrainConfig, {"oversample_to": 20, "imbalance": "focal"}, ["oversample_to=20", "imbalance='focal'"]),
        (TrainConfig, {"oversample_to": 20, "finetune": "none"}, ["oversample_to=20", "--finetune partial"]),
        (TrainConfig, {"finetuning": FinetuneConfig(head="mlp")}, ["head='mlp'", "--finetune partial"]),
        (
            TrainConfig,
            {"imbalance": "focal", "augmenting": AugmentConfig(augment=("cutmix",))},
            ["cutmix", "imbalance='focal'"],
        ),
    ],
)  # fmt: skip
def test_contradictory_settings_are_refused(kind: type, settings: dict[str, Any], words: list[str]) -> None:
    message = refuse(kind, **settings)
    assert [word for word in words if word not in message] == [], message


def test_settings_are_stored_as_nested_json() -> None:
    stored = json.loads(json.dumps(asdict(TrainConfig(seed=7, reading=DataConfig(label_column="grade")))))
    assert stored["seed"] == 7
    assert stored["reading"]["label_column"] == "grade"


@pytest.mark.parametrize("kind", [TrainConfig, DataConfig, ComputeConfig])
def test_settings_are_frozen_and_keyword_only(kind: type) -> None:
    config = kind()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1
    with pytest.raises(TypeError):
        kind("positional")


def test_suggestions_name_the_closest_word_or_nothing() -> None:
    assert suggest("lable", ["label", "path"]) == "; did you mean 'label'?"
    assert suggest("qqq", ["label", "path"]) == ""


def test_learning_rates_depend_on_the_method_unless_set() -> None:
    assert FinetuneConfig().rates(full=False) != FinetuneConfig().rates(full=True)
    assert FinetuneConfig(lr=0.5, layer_decay=0.9).rates(full=True) == (0.5, 0.9)


def test_paths_are_stored_as_text() -> None:
    paths: dict[str, Any] = {name: Path("a/b") for name in ("weights", "classes", "relabel", "cache_dir")}
    config = TrainConfig(**paths, reading=DataConfig(images_dir=Path("c")))  # type: ignore[arg-type]
    stored = json.loads(json.dumps(asdict(config)))
    assert {name: stored[name] for name in paths} == dict.fromkeys(paths, "a/b")
    assert stored["reading"]["images_dir"] == "c"


@pytest.mark.parametrize("value", [5, True, ("a",)])
def test_path_of_another_type_is_refused(value: Any) -> None:
    assert refuse(TrainConfig, weights=value).startswith(f"weights={value!r} ")


def test_string_in_place_of_a_tuple_is_refused() -> None:
    message = refuse(AugmentConfig, augment="mixup")
    assert message.startswith("augment='mixup' ")
    assert "('mixup',)" in message


@pytest.mark.parametrize("name", ["finetuning", "augmenting", "reading", "compute"])
def test_dictionary_in_place_of_settings_is_refused(name: str) -> None:
    kind = type(getattr(TrainConfig(), name)).__name__
    message = refuse(TrainConfig, **{name: {"lr": 1}})
    assert message.startswith(f"{name}={{'lr': 1}} ")
    assert f"{kind}(...)" in message
