"""How deep to train, and which settings mean something then."""

from typing import Literal

from pixelplay.config import TrainConfig
from pixelplay.data.augment import SETTING_USED_BY
from pixelplay.errors import ConfigError

TunedMethod = Literal["partial", "full"]
TrainedMethod = Literal["none", "partial", "full"]
ONLY_PARTIAL, ONLY_FULL = ("unfreeze_stages", "cached_views"), ("initial_size_frac",)


def unused_settings(method: TrainedMethod, config: TrainConfig) -> list[str]:
    """Settings, as "name=value", that were changed and that training this deep has no use for."""
    changed = [
        f"{name}={value!r}"
        for group in ("finetuning", "augmenting")
        for name, value in vars(getattr(config, group)).items()
        if value != getattr(getattr(TrainConfig(), group), name)
    ]
    if method == "none":
        return changed
    foreign = ONLY_FULL if method == "partial" else ONLY_PARTIAL
    return [setting for setting in changed if setting.partition("=")[0] in foreign]


def may_repeat_hard_examples(config: TrainConfig) -> bool:
    """Whether some images may come more often: each is learned from alone, and by no batch norm."""
    return config.finetuning.head == "linear" and not {"mixup", "cutmix"} & {*config.augmenting.augment}


def check_compatible(config: TrainConfig) -> None:
    """Refuse settings that mean nothing at the depth, or without another setting, that is asked for.

    Raises:
        ConfigError: the first of them is named.
    """
    if config.finetune != "auto" and (unused := unused_settings(config.finetune, config)):
        raise ConfigError(f"--finetune {config.finetune} has no use for {unused[0]}; leave one of them out")
    usual, augmenting = TrainConfig(), config.augmenting
    for name, ways in SETTING_USED_BY.items():
        is_heeded = bool({*ways} & {*augmenting.augment})
        if getattr(augmenting, name) != getattr(usual.augmenting, name) and not is_heeded:
            raise ConfigError(
                f"{name}={getattr(augmenting, name)!r} says nothing without {' or '.join(ways)}; "
                "name it in --augment"
            )
    if config.finetuning.hard_example_frac not in (
        0,
        usual.finetuning.hard_example_frac,
    ) and not may_repeat_hard_examples(config):
        raise ConfigError(
            f"hard_example_frac={config.finetuning.hard_example_frac} says nothing with mixup, cutmix or head='mlp'; leave one out"
        )
    for name, way in (("logit_tau", "logit_adjusted"), ("focal_gamma", "focal")):
        value = getattr(config, name)
        if value != getattr(usual, name) and config.imbalance != way:
            raise ConfigError(f"{name}={value!r} says nothing without --imbalance {way}; give both")
        if value != getattr(usual, name) and config.finetune == "none":
            raise ConfigError(f"--finetune none has no use for {name}={value!r}; leave one of them out")
