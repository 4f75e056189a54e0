"""Settings that mean nothing, at a depth or without another setting, are named."""

from collections.abc import Callable
from typing import Any

import pytest

from pixelplay.config import RECIPES, AugmentConfig, FinetuneConfig, Imbalance, TrainConfig
from pixelplay.errors import ConfigError
from pixelplay.training.compatibility import Depth, check_depth, unused_settings


@pytest.mark.parametrize(
    ("depth", "settings", "unused"),
    [
        ("partial", FinetuneConfig(n_views=2, epochs=3), []),
        ("full", FinetuneConfig(n_views=2, n_stages=1), ["n_views=2", "n_stages=1"]),
        ("partial", FinetuneConfig(first_size_frac=0.5), ["first_size_frac=0.5"]),
        ("full", FinetuneConfig(first_size_frac=0.5), []),
        ("probe", FinetuneConfig(epochs=3, lr=0.1), ["epochs=3", "lr=0.1"]),
        ("probe", FinetuneConfig(), []),
    ],
)
def test_settings_that_a_depth_has_no_use_for(
    depth: Depth, settings: FinetuneConfig, unused: list[str]
) -> None:
    assert unused_settings(depth, TrainConfig(finetune=settings)) == unused


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
        check_depth(TrainConfig(augmenting=AugmentConfig(**settings)))
    assert str(caught.value) == line


@pytest.mark.parametrize(("name", "way"), [("logit_tau", "logit_adjusted"), ("focal_gamma", "focal")])
def test_the_strength_of_a_correction_that_is_not_chosen_is_refused(name: str, way: Imbalance) -> None:
    with pytest.raises(ConfigError) as caught:
        check_depth(TrainConfig(**{name: 0.5}))
    assert str(caught.value) == f"{name}=0.5 says nothing without --imbalance {way}; give both"
    check_depth(TrainConfig(imbalance=way, **{name: 0.5}))
    with pytest.raises(ConfigError) as caught:
        check_depth(TrainConfig(tune="probe", imbalance=way, **{name: 0.5}))
    assert str(caught.value) == f"--tune probe has no use for {name}=0.5; leave one of them out"


@pytest.mark.parametrize(
    "settings",
    [{"augmenting": AugmentConfig(augment=("crop", "mixup"))}, {"tune": "full", "head": "mlp"}],
    ids=["mixed", "batch norm"],
)
def test_a_focus_that_weights_do_not_make_up_for_is_refused(settings: dict[str, Any]) -> None:
    head = {"head": settings.pop("head")} if "head" in settings else {}
    for focus in (0.0, FinetuneConfig().focus):  # none, and the default that makes way
        check_depth(TrainConfig(**settings, finetune=FinetuneConfig(focus=focus, **head)))
    with pytest.raises(ConfigError) as caught:
        check_depth(TrainConfig(**settings, finetune=FinetuneConfig(focus=0.3, **head)))
    assert str(caught.value) == "focus=0.3 says nothing with mixup, cutmix or head='mlp'; leave one out"


@pytest.mark.parametrize("recipe", RECIPES.values())
def test_every_recipe_means_something(recipe: Callable[[], TrainConfig]) -> None:
    check_depth(recipe())
