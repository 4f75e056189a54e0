"""A time budget → views, epochs and depth, decided once and written down."""

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from pixelplay.atomic import write_json
from pixelplay.config import SMALLEST_NORMED, FinetuneConfig, TrainConfig
from pixelplay.errors import ConfigError
from pixelplay.text import name_some, suggest
from pixelplay.training.compatibility import TunedMethod

AIM = 0.85  # of the time budget; the rest is for a machine that gets slower meanwhile
MIN_EPOCHS, MAX_EPOCHS = 3, 24
ENOUGH_EPOCHS = 8  # with fewer, training one stage less for longer is better
EPOCHS_PER_VIEW = 3  # a view is seen so often before another one costs less than it gives
MAX_STAGES = 5  # of partial; more were not tried (benchmarks/LOG.md)
REPEATS = 2


@dataclass(frozen=True, kw_only=True)
class FinetunePlan:
    """What a training does, whatever the clock says later.

    Attributes:
        finetune: "partial" or "full".
        n_stages: last stages that partial trains; None for full.
        n_views: views that partial keeps of each image; None for full.
        epochs: passes over what an epoch draws.
        batch_size: images a batch.
        is_compiled: compile the network.
        seconds: estimates of what each piece of work takes; none where nothing was measured.
    """

    finetune: TunedMethod
    unfreeze_stages: int | None
    cached_views: int | None
    epochs: int
    batch_size: int
    compile: bool
    seconds: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Measured seconds per image with one choice of trained stages.

    Attributes:
        n_stages: last stages trained; None for all.
        view_s: to augment and bring as far as the cut.
        step_s: forward, backward and update, from the cut on.
        bytes_per_view: on the disk.
    """

    unfreeze_stages: int | None
    view_s: float
    step_s: float
    bytes_per_view: int

    @property
    def plain_s(self) -> float:
        """Forward only, from image to logits: a third of a step behind the cut, frozen and tuned."""
        return self.view_s + 2 * self.step_s / 3


@dataclass(frozen=True, kw_only=True)
class WorkAmount:
    """How much work there is.

    Attributes:
        n_train: images that views are made of.
        n_epoch: images drawn in an epoch.
        n_refit: images drawn in all the short last epochs together.
        n_val: images that choose.
        n_final: views read with the finished network.
        max_view_bytes: on the disk, for all views.
    """

    n_train: int
    n_epoch: int
    n_refit: int
    n_val: int
    n_final: int
    max_view_bytes: int


def time_per_image(work: Callable[[], object], n: int, device: str) -> float:
    """Seconds that some work takes for each of n images: the best of a few, after a warm-up."""
    work()
    best = math.inf
    for _ in range(REPEATS):
        _wait_for(device)
        start = time.perf_counter()
        work()
        _wait_for(device)
        best = min(best, time.perf_counter() - start)
    return best / n


def plan_partial(
    speeds: list[StepTimes],
    amount: WorkAmount,
    left_s: float | None,
    settings: FinetuneConfig,
    *,
    batch_size: int,
) -> FinetunePlan | None:
    """Train as many stages as leave time for enough epochs; None where not even one stage does.

    Args:
        speeds: of one stage, of two, and so on.
        left_s: seconds that may be used; None where the epochs are asked for.
        settings: epochs and views that are asked for; None of them: as many as fit, as the epochs suggest.
    """
    best = None
    for speed in speeds:
        room = room_for_views(speed, amount)
        if best is not None and room < (settings.cached_views or 1):
            break  # the maps in front of this cut are too large to be kept

        def n_views_for(epochs: int, room: int = room) -> int:
            return settings.cached_views or max(1, min(room, math.ceil(epochs / EPOCHS_PER_VIEW)))

        def cost_s(epochs: int, speed: StepTimes = speed) -> dict[str, float]:
            return _cost_s(speed, amount, epochs, n_views_for(epochs))

        epochs = settings.epochs or _most_epochs(cost_s, left_s)
        if not epochs or (best is not None and epochs < min(ENOUGH_EPOCHS, settings.epochs or ENOUGH_EPOCHS)):
            break
        best = FinetunePlan(
            finetune="partial",
            unfreeze_stages=speed.unfreeze_stages,
            cached_views=n_views_for(epochs),
            epochs=epochs,
            batch_size=batch_size,
            compile=False,
            seconds=_rounded(cost_s(epochs)),
        )
    return best


def plan_full(
    speed: StepTimes,
    amount: WorkAmount,
    left_s: float | None,
    settings: FinetuneConfig,
    *,
    batch_size: int,
) -> FinetunePlan | None:
    """Train everything for as many epochs as fit; None where too few do."""

    def cost_s(epochs: int) -> dict[str, float]:
        return _cost_s(speed, amount, epochs, None)

    epochs = settings.epochs or _most_epochs(cost_s, left_s)
    if not epochs:
        return None
    return FinetunePlan(
        finetune="full",
        unfreeze_stages=None,
        cached_views=None,
        epochs=epochs,
        batch_size=batch_size,
        compile=False,
        seconds=_rounded(cost_s(epochs)),
    )


def room_for_views(speed: StepTimes, amount: WorkAmount) -> int:
    """How many views of each image can be kept."""
    return amount.max_view_bytes // max(1, speed.bytes_per_view * amount.n_train)


def shortest_s(speed: StepTimes, amount: WorkAmount, cached_views: int | None = None) -> float:
    """Seconds that the shortest useful training takes."""
    shown = cached_views or math.ceil(MIN_EPOCHS / EPOCHS_PER_VIEW)
    return sum(_cost_s(speed, amount, MIN_EPOCHS, shown if speed.unfreeze_stages else None).values())


def _cost_s(speed: StepTimes, amount: WorkAmount, epochs: int, cached_views: int | None) -> dict[str, float]:
    """Seconds of each piece of work; without views everything is trained."""
    views_s = 0.0 if cached_views is None else speed.view_s * (cached_views * amount.n_train + amount.n_val)
    epoch_s = _steps_s(speed, amount.n_epoch) + speed.step_s / 3 * amount.n_val
    return {
        "views": views_s,
        "training": epochs * epoch_s,
        "refit": _steps_s(speed, amount.n_refit),
        "reading and measuring": speed.plain_s * amount.n_final,
    }


def _most_epochs(cost_s: Callable[[int], dict[str, float]], left_s: float | None) -> int:
    """As many as fit; 0 where too few do."""
    fitting = (n for n in range(MAX_EPOCHS, MIN_EPOCHS - 1, -1) if sum(cost_s(n).values()) <= (left_s or 0))
    return next(fitting, 0)


def _rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 1) for name, value in seconds.items()}


def write_plan(plan: FinetunePlan, path: str) -> None:
    """Write plan.json."""
    write_json(dataclasses.asdict(plan), path)


def read_plan(path: str) -> FinetunePlan:
    """Read a plan that a run has written.

    Raises:
        ConfigError: not there, or no plan; an unknown key is named with the nearest known one.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content: Any = json.load(file)
    except OSError as error:
        hint = "; a run that took the probe has none" if isinstance(error, FileNotFoundError) else ""
        raise ConfigError(f"plan {path} cannot be read: {error.strerror}{hint}") from None
    except ValueError as error:
        raise ConfigError(f"plan {path} is no JSON: {error}") from None
    known = [field.name for field in dataclasses.fields(FinetunePlan)]
    if not isinstance(content, dict) or not set(known) & set(content):
        raise ConfigError(f"{path} is no plan; give the plan.json of a run of pixelplay train")
    for name in content:
        if name not in known:
            raise ConfigError(f"plan {path} has the unknown key {name!r}{suggest(name, known)}")
    if missing := [name for name in known if name not in content]:
        raise ConfigError(f"plan {path} lacks {name_some(missing)}; give one as a run has written it")
    _check(content, path)
    return FinetunePlan(**content)


def apply_plan(plan: FinetunePlan, config: TrainConfig) -> TrainConfig:
    """Settings under which a plan is repeated: the plan's depth, and nothing that says otherwise than it.

    Raises:
        ConfigError: a setting asks for something else.
    """
    asked = config.finetuning
    wishes = {
        "finetune": (None if config.finetune == "auto" else config.finetune, plan.finetune),
        "epochs": (asked.epochs, plan.epochs),
        "unfreeze_stages": (asked.unfreeze_stages, plan.unfreeze_stages),
        "cached_views": (asked.cached_views, plan.cached_views),
        "train_batch_size": (asked.train_batch_size, plan.batch_size),
        "compile": (None if asked.compile == "auto" else asked.compile, "on" if plan.compile else "off"),
    }
    for name, (wish, planned) in wishes.items():
        if wish is not None and wish != planned:
            raise ConfigError(
                f"the plan has {name}={planned!r}, not {wish!r}; leave out the plan or the setting"
            )
    if asked.head == "mlp" and plan.batch_size < SMALLEST_NORMED:
        raise ConfigError(
            f"the plan has batches of {plan.batch_size} images, and head='mlp' needs {SMALLEST_NORMED}; "
            "leave out the plan or the head"
        )
    return replace(config, finetune=plan.finetune)


def has_same_plan(run: str, plan: FinetunePlan) -> bool:
    """Whether a run did what a plan says; its estimates of the time do not count."""
    path = os.path.join(run, "plan.json")
    return os.path.isfile(path) and replace(read_plan(path), seconds={}) == replace(plan, seconds={})


def _check(content: dict[str, Any], path: str) -> None:
    is_partial, seconds = content["finetune"] == "partial", content["seconds"]
    is_sound = {
        "finetune": content["finetune"] in ("partial", "full"),
        **{name: _is_count(content[name]) for name in ("epochs", "batch_size")},
        **{
            name: _is_count(content[name]) if is_partial else content[name] is None
            for name in ("unfreeze_stages", "cached_views")
        },
        "is_compiled": isinstance(content["is_compiled"], bool),
        "seconds": isinstance(seconds, dict) and all(isinstance(s, int | float) for s in seconds.values()),
    }
    wrong = [name for name, is_right in is_sound.items() if not is_right]
    if wrong:
        raise ConfigError(f"plan {path} has {wrong[0]}={content[wrong[0]]!r}, which no run has written")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _steps_s(speed: StepTimes, n: int) -> float:
    return (speed.step_s if speed.unfreeze_stages else speed.view_s + speed.step_s) * n


def _wait_for(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()
