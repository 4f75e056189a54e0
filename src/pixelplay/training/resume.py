"""Resume: check that an interrupted run, or the run of a plan, had the same settings and images."""

import json
import os
from collections.abc import Iterator, Mapping, Set
from dataclasses import asdict
from typing import Any

import torch

from pixelplay import __version__
from pixelplay.atomic import write_bytes
from pixelplay.config import TrainConfig
from pixelplay.errors import ConfigError, DataError
from pixelplay.model.device import Device
from pixelplay.run_log import RunLog
from pixelplay.text import name_some
from pixelplay.training.checkpoint import has_progress
from pixelplay.training.plan_file import FinetunePlan, apply_plan, read_plan
from pixelplay.training.training_data import TrainingData

START_OVER = "restore them, or use --force instead of --resume"
SETTINGS_FILE, IMAGES_FILE = "settings.json", "images.json"
THREADS = "threads"
# settings that do not affect the weights: what a cache holds can be recomputed
FREE = frozenset({"cache_dir", "cache_gb", "offline", "compute.num_workers", THREADS})
PLANNED = ("epochs", "unfreeze_stages", "cached_views", "train_batch_size")
IN_PLAN = frozenset({"finetune", "time_budget", *(f"finetuning.{name}" for name in PLANNED)})


def check_settings(
    folder: str,
    config: TrainConfig,
    device: Device,
    plan: FinetunePlan | None,
    log: RunLog,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Compare settings with those of the interrupted run in a folder, or record them for a later one.

    A different number of threads is only noted: rounding depends on it.

    Args:
        plan: to repeat; None where the run makes its own.
        options: settings of the command that are not part of `config`.

    Raises:
        ConfigError: some settings differ; they are named with both values.
    """
    own = dict(flatten(asdict(config)))
    own |= {"compute.device": device.name, "compute.precision": device.precision}
    if plan is not None:
        own |= {f"plan.{name}": value for name, value in asdict(plan).items() if name != "seconds"}
    own |= {"pixelplay": __version__, "torch": torch.__version__, **(options or {})}
    own[THREADS] = torch.get_num_threads()
    kept = _read_or_write(folder, SETTINGS_FILE, own)
    # the number of refit epochs depends on the time left
    depends_on_time = plan is None and config.finetuning.epochs is None and config.finetune != "none"
    if changed := differences(kept, own, FREE if depends_on_time else FREE | {"time_budget"}):
        raise ConfigError(f"the interrupted run had other settings: {name_some(changed)}; {START_OVER}")
    if device.name == "cpu" and (before := kept.get(THREADS, own[THREADS])) != own[THREADS]:
        log.note(f"resuming with {own[THREADS]} threads instead of {before}: weights may differ by rounding")


def check_images(folder: str, data: TrainingData, weights_id: str) -> None:
    """Compare images and backbone weights with those of the interrupted run, or record them.

    Raises:
        DataError: images were added, removed, changed, relabelled or moved to another split or group.
        ConfigError: the backbone has other weights.
    """
    split_of = {int(i): name for name, rows in data.split.items() for i in rows}
    groups = data.split.groups.tolist()
    own: dict[str, Any] = {
        path: [data.digests[i].hex(), data.classes[data.labels[i]], split_of.get(i, ""), groups[i]]
        for i, path in enumerate(data.dataset.paths)
    }
    kept = _read_or_write(folder, IMAGES_FILE, {"weights": weights_id, "images": own})
    if kept["weights"] != weights_id:
        raise ConfigError(f"the interrupted run had other backbone weights; {START_OVER}")
    then = kept["images"]
    both = [path for path in own if path in then]
    # a group is identified by its first path
    first_own = {own[path][-1]: path for path in reversed(both)}
    first_then = {then[path][-1]: path for path in reversed(both)}
    moved = {path for path in both if first_own[own[path][-1]] != first_then[then[path][-1]]}
    found = {
        "new": [path for path in own if path not in then],
        "missing": [path for path in then if path not in own],
        "changed": [path for path in both if own[path][:-1] != then[path][:-1] or path in moved],
    }
    if changes := [f"{len(paths)} {kind} ({name_some(paths[:3])})" for kind, paths in found.items() if paths]:
        raise DataError(f"the interrupted run had other images: {', '.join(changes)}; {START_OVER}")


def load_plan(path: str, config: TrainConfig, log: RunLog) -> tuple[FinetunePlan, TrainConfig]:
    """Read a plan to repeat and apply it; note settings that its run had and a plan does not contain.

    Raises:
        ConfigError: the plan cannot be read, or a setting contradicts it.
    """
    plan = read_plan(path)
    config = apply_plan(plan, config)
    try:
        with open(os.path.join(os.path.dirname(path), "config.json"), encoding="utf-8") as file:
            content: Any = json.load(file)
    except (OSError, ValueError):
        return plan, config  # the plan has been moved out of its run
    if isinstance(content, Mapping) and "pixelplay" in content:
        own = dict(flatten(asdict(config)))
        kept = {name: value for name, value in flatten(content) if name in own}
        if changed := differences({**own, **kept}, own, free=FREE | IN_PLAN):
            log.note(f"the run of the plan had other settings: {name_some(changed)}")
    return plan, config


def differences(kept: Mapping[str, Any], own: Mapping[str, Any], free: Set[str] = FREE) -> list[str]:
    """Describe each setting that differs and is not free to."""
    return [
        f"{name} was {kept.get(name)!r}, is {own.get(name)!r}"
        for name in {**kept, **own}
        if name not in free and kept.get(name) != own.get(name)
    ]


def _read_or_write(folder: str, name: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """Read the record of an interrupted run; write it where there is none."""
    path = os.path.join(folder, name)
    if has_progress(folder):
        try:
            with open(path, encoding="utf-8") as file:
                kept: dict[str, Any] = json.load(file)
            return kept
        except (OSError, ValueError) as error:
            raise DataError(f"could not read {path} ({error}); use --force instead of --resume") from None
    os.makedirs(folder, exist_ok=True)
    text = json.dumps(content)
    write_bytes(text.encode(), path)
    return json.loads(text)  # type: ignore[no-any-return]


def flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield name and JSON value of each setting; nested settings are named `group.name`."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, json.loads(json.dumps(value))
