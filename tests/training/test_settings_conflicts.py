"""Settings without effect are refused by name."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pixelplay.config import (
    RECIPES,
    AugmentConfig,
    FinetuneConfig,
    FinetuneMethod,
    HeadKind,
    Imbalance,
    TrainConfig,
)
from pixelplay.errors import ConfigError
from pixelplay.training.settings_conflicts import TrainedMethod, check_compatible, unused_settings


@pytest.mark.parametrize(
    ("method", "settings", "unused"),
    [
        ("partial", FinetuneConfig(cached_views=2, epochs=3), []),
        ("full", FinetuneConfig(cached_views=2, unfreeze_stages=1), ["cached_views=2", "unfreeze_stages=1"]),
        ("partial", FinetuneConfig(initial_size_frac=0.5), ["initial_size_frac=0.5"]),
        ("full", FinetuneConfig(initial_size_frac=0.5), []),
        ("none", FinetuneConfig(epochs=3, lr=0.1), ["epochs=3", "lr=0.1"]),
        ("none", FinetuneConfig(), []),
    ],
)
def test_unused_settings_of_a_method(
    method: TrainedMethod, settings: FinetuneConfig, unused: list[str]
) -> None:
    assert unused_settings(method, TrainConfig(finetuning=settings)) == unused


@pytest.mark.parametrize(
    ("method", "setting", "line"),
    [
        ("none", {"epochs": 3}, r"epochs=3 .*--finetune none"),
        ("partial", {"initial_size_frac": 0.5}, r"initial_size_frac=0\.5 .*--finetune partial"),
        ("full", {"unfreeze_stages": 1}, r"unfreeze_stages=1 .*--finetune full"),
    ],
)
def test_a_setting_without_effect_on_the_method_is_refused(
    method: FinetuneMethod, setting: dict[str, Any], line: str
) -> None:
    config = TrainConfig(finetune=method, finetuning=FinetuneConfig(**setting))
    with pytest.raises(ConfigError, match=line):
        check_compatible(config)
    check_compatible(replace(config, finetune="auto"))


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"mixup_alpha": 0.4}, r"mixup_alpha=0\.4 .*--augment mixup$"),
        ({"mix_prob": 0.1}, r"mix_prob=0\.1 .*--augment mixup or cutmix$"),
        ({"augment": (), "crop_scale": 0.2}, r"crop_scale=0\.2 .*--augment crop$"),
    ],
)
def test_a_setting_of_an_augmentation_that_is_off_is_refused(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        check_compatible(TrainConfig(augmenting=AugmentConfig(**settings)))


@pytest.mark.parametrize(("name", "method"), [("logit_tau", "logit_adjusted"), ("focal_gamma", "focal")])
def test_a_setting_of_another_imbalance_method_is_refused(name: str, method: Imbalance) -> None:
    with pytest.raises(ConfigError, match=rf"{name}=0\.5 .*--imbalance {method}$"):
        check_compatible(TrainConfig(**{name: 0.5}))
    check_compatible(TrainConfig(imbalance=method, **{name: 0.5}))
    with pytest.raises(ConfigError, match=rf"{name}=0\.5 .*--finetune none"):
        check_compatible(TrainConfig(finetune="none", imbalance=method, **{name: 0.5}))


@pytest.mark.parametrize(
    ("settings", "head"),
    [({"augmenting": AugmentConfig(augment=("crop", "mixup"))}, "linear"), ({"finetune": "full"}, "mlp")],
    ids=["mixup", "batch norm"],
)
def test_hard_example_frac_with_mixup_or_batch_norm_is_refused(
    settings: dict[str, Any], head: HeadKind
) -> None:
    def config_with(frac: float) -> TrainConfig:
        return TrainConfig(**settings, finetuning=FinetuneConfig(hard_example_frac=frac, head=head))

    for frac in (0.0, FinetuneConfig().hard_example_frac):  # the default is switched off silently
        check_compatible(config_with(frac))
    with pytest.raises(ConfigError, match=r"hard_example_frac=0\.3 .*mixup, cutmix or head='mlp'"):
        check_compatible(config_with(0.3))


@pytest.mark.parametrize("recipe", RECIPES.values())
def test_every_recipe_is_compatible(recipe: Callable[[], TrainConfig]) -> None:
    check_compatible(recipe())
