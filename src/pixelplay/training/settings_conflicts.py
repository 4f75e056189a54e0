"""Settings that have no effect together, or with the chosen fine-tuning method."""

from typing import Literal

from pixelplay.config import TrainConfig
from pixelplay.data.augment import SETTING_USED_BY
from pixelplay.errors import ConfigError

FinetunedMethod = Literal["partial", "full"]
TrainedMethod = Literal["none", "partial", "full"]
ONLY_PARTIAL, ONLY_FULL = ("unfreeze_stages", "cached_views"), ("initial_size_frac",)


def unused_settings(method: TrainedMethod, config: TrainConfig) -> list[str]:
    """List changed settings, as "name=value", that have no effect with a fine-tuning method."""
    changed = [
        f"{name}={value!r}"
        for group in ("finetuning", "augmenting")
        for name, value in vars(getattr(config, group)).items()
        if value != getattr(getattr(TrainConfig(), group), name)
    ]
    if method == "none":
        return changed
    unused = ONLY_FULL if method == "partial" else ONLY_PARTIAL
    return [setting for setting in changed if setting.partition("=")[0] in unused]


def can_repeat_hard_examples(config: TrainConfig) -> bool:
    """Return True unless mixed images or a head with a batch norm forbid repeating hard examples."""
    return config.finetuning.head == "linear" and not {"mixup", "cutmix"} & {*config.augmenting.augment}


def check_compatible(config: TrainConfig) -> None:
    """Raise ConfigError for the first setting that has no effect with the method or without another one."""
    defaults, augmenting = TrainConfig(), config.augmenting
    if config.finetune != "auto" and (unused := unused_settings(config.finetune, config)):
        raise ConfigError(f"{unused[0]} has no effect with --finetune {config.finetune}; omit one of them")
    for name, users in SETTING_USED_BY.items():
        value, is_used = getattr(augmenting, name), bool({*users} & {*augmenting.augment})
        if value != getattr(defaults.augmenting, name) and not is_used:
            raise ConfigError(f"{name}={value!r} has no effect without --augment {' or '.join(users)}")
    frac = config.finetuning.hard_example_frac
    if frac not in (0, defaults.finetuning.hard_example_frac) and not can_repeat_hard_examples(config):
        raise ConfigError(f"hard_example_frac={frac} has no effect with mixup, cutmix or head='mlp'")
    for name, method in (("logit_tau", "logit_adjusted"), ("focal_gamma", "focal")):
        value = getattr(config, name)
        if value == getattr(defaults, name):
            continue
        if config.imbalance != method:
            raise ConfigError(f"{name}={value!r} has no effect without --imbalance {method}")
        if config.finetune == "none":
            raise ConfigError(f"{name}={value!r} has no effect with --finetune none; omit one of them")
