"""How deep to train, and which settings mean something then."""

from typing import Literal

from pixelplay.config import TrainConfig
from pixelplay.data.augment import HEEDED_BY
from pixelplay.errors import ConfigError

TunedDepth = Literal["partial", "full"]


Depth = Literal["probe", "partial", "full"]


ONLY_PARTIAL, ONLY_FULL = ("n_stages", "n_views"), ("first_size_frac",)


def unused_settings(depth: Depth, config: TrainConfig) -> list[str]:
    """Settings, as "name=value", that were changed and that training this deep has no use for."""
    changed = [
        f"{name}={value!r}"
        for group in ("finetune", "augmenting")
        for name, value in vars(getattr(config, group)).items()
        if value != getattr(getattr(TrainConfig(), group), name)
    ]
    if depth == "probe":
        return changed
    foreign = ONLY_FULL if depth == "partial" else ONLY_PARTIAL
    return [setting for setting in changed if setting.partition("=")[0] in foreign]


def may_focus(config: TrainConfig) -> bool:
    """Whether some photographs may come more often: each is learned from alone, and by no batch norm."""
    return config.finetune.head == "linear" and not {"mixup", "cutmix"} & {*config.augmenting.augment}


def check_depth(config: TrainConfig) -> None:
    """Refuse settings that mean nothing at the depth, or without another setting, that is asked for.

    Raises:
        ConfigError: the first of them is named.
    """
    if config.tune != "auto" and (unused := unused_settings(config.tune, config)):
        raise ConfigError(f"--tune {config.tune} has no use for {unused[0]}; leave one of them out")
    usual, augmenting = TrainConfig(), config.augmenting
    for name, ways in HEEDED_BY.items():
        is_heeded = bool({*ways} & {*augmenting.augment})
        if getattr(augmenting, name) != getattr(usual.augmenting, name) and not is_heeded:
            raise ConfigError(
                f"{name}={getattr(augmenting, name)!r} says nothing without {' or '.join(ways)}; "
                "name it in --augment"
            )
    if config.finetune.focus not in (0, usual.finetune.focus) and not may_focus(config):
        raise ConfigError(
            f"focus={config.finetune.focus} says nothing with mixup, cutmix or head='mlp'; leave one out"
        )
    for name, way in (("logit_tau", "logit_adjusted"), ("focal_gamma", "focal")):
        value = getattr(config, name)
        if value != getattr(usual, name) and config.imbalance != way:
            raise ConfigError(f"{name}={value!r} says nothing without --imbalance {way}; give both")
        if value != getattr(usual, name) and config.tune == "probe":
            raise ConfigError(f"--tune probe has no use for {name}={value!r}; leave one of them out")
