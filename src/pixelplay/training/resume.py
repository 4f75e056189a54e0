"""Whether a training is the one before: an interrupted one to be continued, or one whose plan is repeated."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import asdict
from typing import Any

import torch

from pixelplay import __version__
from pixelplay.atomic import write_bytes
from pixelplay.config import TrainConfig, to_json
from pixelplay.errors import ConfigError, DataError
from pixelplay.model.device import Device
from pixelplay.run_log import RunLog
from pixelplay.text import name_some
from pixelplay.training.checkpoint import has_progress
from pixelplay.training.plan import FinetunePlan, apply_plan, read_plan
from pixelplay.training.training_data import TrainingData

THREADS = "threads"
SETTINGS, IMAGES = "settings.json", "images.json"
# they change nothing in the weights: the cache holds what could be computed again
FREE = frozenset({"cache_dir", "cache_gb", "offline", "compute.num_workers", THREADS})
# what a plan holds itself, or stands for
OF_A_PLAN = frozenset(
    {"finetune", "time_budget"}
    | {
        f"finetuning.{name}"
        for name in ("epochs", "unfreeze_stages", "cached_views", "train_batch_size", "compile")
    }
)


def check_settings(
    folder: str,
    config: TrainConfig,
    device: Device,
    plan: FinetunePlan | None,
    log: RunLog,
    also: Mapping[str, Any] | None = None,
) -> None:
    """Compare with the settings of the interrupted training, where there is one; else write them down.

    Another number of threads is said only: the last digits of sums depend on it.

    Args:
        device: where it runs, "auto" resolved.
        plan: that it repeats; None where it makes its own.
        also: settings of the command that stand in no configuration.

    Raises:
        ConfigError: some differ; they are named with both values.
    """
    own = dict(flatten(to_json(config)))
    own |= {"compute.device": device.name, "compute.precision": device.precision}
    repeated = {} if plan is None else asdict(plan)
    own |= {f"plan.{name}": value for name, value in repeated.items() if name != "seconds"}
    own |= {"pixelplay": __version__, "torch": torch.__version__, **(also or {})}
    own[THREADS] = torch.get_num_threads()
    kept = _read_or_write(folder, SETTINGS, own)
    # the last epochs are those that time is left for
    has_time = plan is None and config.finetuning.epochs is None and config.finetune != "none"
    if changed := differences(kept, own, FREE if has_time else FREE | {"time_budget"}):
        raise ConfigError(
            f"the interrupted run had other settings: {name_some(changed)}; give the same, "
            "or start anew with --force instead of --resume"
        )
    if device.name == "cpu" and (before := kept.get(THREADS, own[THREADS])) != own[THREADS]:
        log.note(
            f"the interrupted run had {before} threads, this one has {own[THREADS]}: the weights "
            "will differ in last digits from those of a run left alone"
        )


def check_images(folder: str, data: TrainingData, weights_id: str) -> None:
    """Compare with the images and weights of the interrupted training; else write them down.

    Raises:
        DataError: images were added, removed, changed, relabelled or moved to another part or group.
        ConfigError: the backbone has other weights.
    """
    parts = {int(i): name for name, rows in data.split.items() for i in rows}
    groups = data.split.groups.tolist()
    own: dict[str, Any] = {
        path: [data.digests[i].hex(), data.classes[data.labels[i]], parts.get(i, ""), groups[i]]
        for i, path in enumerate(data.dataset.paths)
    }
    kept = _read_or_write(folder, IMAGES, {"weights": weights_id, "images": own})
    if kept["weights"] != weights_id:
        raise ConfigError(
            "the interrupted run had other backbone weights; give the same, or start anew with --force "
            "instead of --resume"
        )
    then = kept["images"]
    both = [path for path in own if path in then]
    moved = _in_other_groups([own[path][-1] for path in both], [then[path][-1] for path in both], both)
    found = {
        "new": [path for path in own if path not in then],
        "missing": [path for path in then if path not in own],
        "changed": [path for path in both if own[path][:-1] != then[path][:-1] or path in moved],
    }
    told = [f"{len(paths)} {what} ({name_some(paths[:3])})" for what, paths in found.items() if paths]
    if told:
        raise DataError(
            f"the images are not those of the interrupted run: {', '.join(told)}; "
            "bring them back, or start anew with --force instead of --resume"
        )


def _in_other_groups(own: Sequence[int], then: Sequence[int], paths: Sequence[str]) -> set[str]:
    """Paths whose group begins with another of them than it did; groups are numbers (n,)."""
    first_own: dict[int, str] = {}
    first_then: dict[int, str] = {}
    found = set()
    for path, group, old in zip(paths, own, then, strict=True):
        if first_own.setdefault(group, path) != first_then.setdefault(old, path):
            found.add(path)
    return found


def repeat_plan(path: str, config: TrainConfig, log: RunLog) -> tuple[FinetunePlan, TrainConfig]:
    """A plan, and the settings under which it is repeated; other settings than its run had are said.

    Raises:
        ConfigError: the plan cannot be read, or a setting asks for something else than it.
    """
    plan = read_plan(path)
    config = apply_plan(plan, config)
    try:
        with open(os.path.join(os.path.dirname(path), "config.json"), encoding="utf-8") as file:
            content: Any = json.load(file)
    except (OSError, ValueError):
        return plan, config  # the plan has left its run
    own = dict(flatten(to_json(config)))
    kept = {name: value for name, value in flatten(content) if name in own} if _is_run(content) else own
    if changed := differences({**own, **kept}, own, free=FREE | OF_A_PLAN):
        log.note(f"the plan's run had other settings, which a plan does not hold: {name_some(changed)}")
    return plan, config


def _is_run(content: Any) -> bool:
    return isinstance(content, Mapping) and "pixelplay" in content


def differences(kept: Mapping[str, Any], own: Mapping[str, Any], free: Set[str] = FREE) -> list[str]:
    """Say of each setting that is not free to differ, and does, what it was and what it is."""
    return [
        f"{name} was {kept.get(name)!r}, is {own.get(name)!r}"
        for name in {**kept, **own}
        if name not in free and kept.get(name) != own.get(name)
    ]


def _read_or_write(folder: str, name: str, content: Mapping[str, Any]) -> dict[str, Any]:
    path = os.path.join(folder, name)
    if has_progress(folder):
        try:
            with open(path, encoding="utf-8") as file:
                kept: dict[str, Any] = json.load(file)
            return kept
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path} cannot be read ({error}); start anew with --force instead of --resume"
            ) from None
    os.makedirs(folder, exist_ok=True)
    text = json.dumps(content)
    write_bytes(text.encode(), path)
    return json.loads(text)  # type: ignore[no-any-return]


def flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield name and value of each setting as JSON has it, those under a heading as `heading.name`."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, json.loads(json.dumps(value))
