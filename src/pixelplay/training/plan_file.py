"""plan.json: the decisions of a fine-tuning that depend on time, so that it can be repeated."""

import dataclasses
import json
import os
from dataclasses import dataclass, replace
from typing import Any

from pixelplay.atomic import write_json
from pixelplay.config import MIN_MLP_BATCH, TrainConfig
from pixelplay.errors import ConfigError
from pixelplay.text import counted, name_some, suggest
from pixelplay.training.settings_conflicts import FinetunedMethod


@dataclass(frozen=True, kw_only=True)
class FinetunePlan:
    """Everything about a fine-tuning that the time budget decides."""

    finetune: FinetunedMethod
    unfreeze_stages: int | None  # last stages that are trained; None for all
    cached_views: int | None  # augmented views cached per image; None for full fine-tuning
    epochs: int
    batch_size: int
    seconds: dict[str, float]  # estimated, by piece of work; empty where nothing was measured

    def describe(self, n_train: int, n_networks: int = 1) -> str:
        """Summarise the plan in one line."""
        n, n_views = self.unfreeze_stages, self.cached_views
        layers = "all layers" if n is None else "last stage" if n == 1 else f"last {n} stages"
        views = "" if n_views is None else f", {counted(n_views, 'cached view')} per image"
        took = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.seconds.items() if seconds)
        images = (
            f"{n_train:,} images" if n_networks == 1 else f"{n_networks} networks on {n_train:,} images each"
        )
        return (
            f"fine-tuning ({self.finetune}): {layers}, {images}, "
            f"{counted(self.epochs, 'epoch')}{views}{f' ({took})' if took else ''}"
        )


def write_plan(plan: FinetunePlan, path: str) -> None:
    """Write plan.json."""
    write_json(dataclasses.asdict(plan), path)


def read_plan(path: str) -> FinetunePlan:
    """Read the plan that a run has written.

    Raises:
        ConfigError: no such file, not a plan, or an unknown key (the nearest known key is named).
    """
    try:
        with open(path, encoding="utf-8") as file:
            content: Any = json.load(file)
    except OSError as error:
        hint = "; a linear probe has no plan" if isinstance(error, FileNotFoundError) else ""
        raise ConfigError(f"could not read plan {path}: {error.strerror}{hint}") from None
    except ValueError as error:
        raise ConfigError(f"plan {path} is not valid JSON: {error}") from None
    known = [field.name for field in dataclasses.fields(FinetunePlan)]
    if not isinstance(content, dict) or not set(known) & set(content):
        raise ConfigError(f"{path} is not a plan; pass the plan.json of a run of pixelplay train")
    for name in content:
        if name not in known:
            raise ConfigError(f"plan {path} has the unknown key {name!r}{suggest(name, known)}")
    if missing := [name for name in known if name not in content]:
        raise ConfigError(f"plan {path} lacks {name_some(missing)}; pass an unedited plan.json")
    _check_values(content, path)
    return FinetunePlan(**content)


def apply_plan(plan: FinetunePlan, config: TrainConfig) -> TrainConfig:
    """Return the settings that repeat a plan; raise ConfigError where one contradicts it."""
    finetuning = config.finetuning
    settings = {
        "finetune": (None if config.finetune == "auto" else config.finetune, plan.finetune),
        "epochs": (finetuning.epochs, plan.epochs),
        "unfreeze_stages": (finetuning.unfreeze_stages, plan.unfreeze_stages),
        "cached_views": (finetuning.cached_views, plan.cached_views),
        "train_batch_size": (finetuning.train_batch_size, plan.batch_size),
    }
    for name, (value, planned) in settings.items():
        if value is not None and value != planned:
            raise ConfigError(f"{name}={value!r} contradicts {planned!r} in the plan; omit one of them")
    if finetuning.head == "mlp" and plan.batch_size < MIN_MLP_BATCH:
        raise ConfigError(
            f"the plan has batches of {plan.batch_size} images but head='mlp' needs {MIN_MLP_BATCH}; "
            "omit the plan or the head"
        )
    return replace(config, finetune=plan.finetune)


def has_same_plan(run_dir: str, plan: FinetunePlan) -> bool:
    """Return True if a run followed a plan, apart from the estimated times."""
    path = os.path.join(run_dir, "plan.json")
    return os.path.isfile(path) and replace(read_plan(path), seconds={}) == replace(plan, seconds={})


def _check_values(content: dict[str, Any], path: str) -> None:
    is_partial, seconds = content["finetune"] == "partial", content["seconds"]
    is_valid = {
        "finetune": content["finetune"] in ("partial", "full"),
        **{name: _is_count(content[name]) for name in ("epochs", "batch_size")},
        **{
            name: _is_count(content[name]) if is_partial else content[name] is None
            for name in ("unfreeze_stages", "cached_views")
        },
        "seconds": isinstance(seconds, dict) and all(isinstance(s, int | float) for s in seconds.values()),
    }
    if invalid := [name for name, ok in is_valid.items() if not ok]:
        raise ConfigError(f"plan {path} has the invalid {invalid[0]} {content[invalid[0]]!r}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
