"""Settings that mean nothing, at a depth or without another setting, are named."""

from collections.abc import Callable
from typing import Any

import pytest

from pixelplay.config import RECIPES, AugmentConfig, FinetuneConfig, Imbalance, TrainConfig
from pixelplay.errors import ConfigError
from pixelplay.training.compatibility import TrainedMethod, check_compatible, unused_settings


@pytest.mark.parametrize(
    ("method", "settings", "unused"),
    [
        ("partial", FinetuneConfig(cached_views=2, epochs=3), []),
        ("full", FinetuneConfig(cached_views=2, unfreeze_stages=1), ["n_views=2", "unfreeze_stages=1"]),
        ("partial", FinetuneConfig(initial_size_frac=0.5), ["initial_size_frac=0.5"]),
        ("full", FinetuneConfig(initial_size_frac=0.5), []),
        ("none", FinetuneConfig(epochs=3, lr=0.1), ["epochs=3", "lr=0.1"]),
        ("none", FinetuneConfig(), []),
    ],
)
def test_settings_that_a_depth_has_no_use_for(
    method: TrainedMethod, settings: FinetuneConfig, unused: list[str]
) -> None:
    assert unused_settings(method, TrainConfig(finetuning=settings)) == unused


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"mixup_alpha": 0.4}, "mixup_alpha=0.4 says nothing without mixup; name it in --augment"),
        ({"mix_prob": 0.1}, "mix_prob=0.1 says nothing without mixup or cutmix; name it in --augment"),
        (
            {"augment": (), "crop_scale": 0.2},
            "crop_scale=0.2 says nothing without crop; name it in --augment",
        ),
    ],
)
def test_the_strength_of_a_variation_that_is_not_named_is_refused(
    settings: dict[str, Any], line: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_compatible(TrainConfig(augmenting=AugmentConfig(**settings)))
    assert str(caught.value) == line


@pytest.mark.parametrize(("name", "way"), [("logit_tau", "logit_adjusted"), ("focal_gamma", "focal")])
def test_the_strength_of_a_correction_that_is_not_chosen_is_refused(name: str, way: Imbalance) -> None:
    with pytest.raises(ConfigError) as caught:
        check_compatible(TrainConfig(**{name: 0.5}))
    assert str(caught.value) == f"{name}=0.5 says nothing without --imbalance {way}; give both"
    check_compatible(TrainConfig(imbalance=way, **{name: 0.5}))
    with pytest.raises(ConfigError) as caught:
        check_compatible(TrainConfig(finetune="none", imbalance=way, **{name: 0.5}))
    assert str(caught.value) == f"--finetune none has no use for {name}=0.5; leave one of them out"


@pytest.mark.parametrize(
    "settings",
    [{"augmenting": AugmentConfig(augment=("crop", "mixup"))}, {"finetune": "full", "head": "mlp"}],
    ids=["mixed", "batch norm"],
)
def test_a_focus_that_weights_do_not_make_up_for_is_refused(settings: dict[str, Any]) -> None:
    head = {"head": settings.pop("head")} if "head" in settings else {}
    for hard_example_frac in (
        0.0,
        FinetuneConfig().hard_example_frac,
    ):  # none, and the default that makes way
        check_compatible(
            TrainConfig(**settings, finetuning=FinetuneConfig(hard_example_frac=hard_example_frac, **head))
        )
    with pytest.raises(ConfigError) as caught:
        check_compatible(TrainConfig(**settings, finetuning=FinetuneConfig(hard_example_frac=0.3, **head)))
    assert (
        str(caught.value)
        == "hard_example_frac=0.3 says nothing with mixup, cutmix or head='mlp'; leave one out"
    )


@pytest.mark.parametrize("recipe", RECIPES.values())
def test_every_recipe_means_something(recipe: Callable[[], TrainConfig]) -> None:
    check_compatible(recipe())
