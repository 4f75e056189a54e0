"""Measures this machine, and plans a training that fits into the time budget."""

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import numpy as np
import torch

from pixelplay.errors import PixelPlayError
from pixelplay.model.backbone import stage_modules
from pixelplay.model.device import is_out_of_memory
from pixelplay.model.split_backbone import SplitBackbone, split_backbone
from pixelplay.run_log import RunLog
from pixelplay.text import counted
from pixelplay.training.bench import Bench
from pixelplay.training.compatibility import TunedMethod
from pixelplay.training.cpu_parallel import forward_for_training
from pixelplay.training.inputs import Batch, CachedViews, stream
from pixelplay.training.optim import make_optimizer
from pixelplay.training.plan import (
    AIM,
    MAX_STAGES,
    REPEATS,
    FinetunePlan,
    StepTimes,
    plan_full,
    plan_partial,
    read_plan,
    room_for_views,
    shortest_s,
    time_per_image,
)
from pixelplay.training.schedule import training_memory_error

CPU_BATCH, GPU_BATCH, SMALLEST_BATCH = 32, 128, 8
COMPILE_FROM_S = 300.0  # training time that repays a compilation
MEASURED_BATCHES = 2
MEASURED_VIEWS = 64


class TimeBudgetError(PixelPlayError):
    """Time budget, cache or disk have no room for a useful training."""


def make_plan(bench: Bench, method: TunedMethod, log: RunLog) -> FinetunePlan:
    """Repeat the plan at hand, or make one from the time that is left.

    Raises:
        NoPlanError: no useful training fits, or its views do not; the message says what would.
        ConfigError: the plan cannot be read, or the network cannot be cut.
    """
    path = os.path.join(bench.workplace.folder, "plan.json")
    if bench.workplace.plan is not None:
        return bench.workplace.plan
    if os.path.isfile(path):  # of the interrupted run
        plan = read_plan(path)
    else:
        plan = _plan_partial(bench) if method == "partial" else _plan_full(bench)
    if 2 * plan.batch_size <= (usual := _batch_size(bench)):  # another fold may have an image less
        log.note(f"batches are of {plan.batch_size} images, as memory has no room for {usual}")
    return plan


def _too_short(bench: Bench, method: TunedMethod, speed: StepTimes) -> TimeBudgetError:
    """The error that says what would fit."""
    spent = time.monotonic() - bench.workplace.started + bench.fits_to_come_s()
    needed = shortest_s(speed, bench.amount(), bench.config.finetuning.cached_views)
    return TimeBudgetError(
        f"--time-budget {bench.config.time_budget} is too short for {method} tuning on "
        f"{len(bench.train):,} images: about {_round_up((spent + needed) / AIM)} are needed here; "
        "raise --time-budget or use --finetune none"
    )


def _plan_partial(bench: Bench) -> FinetunePlan:
    settings = bench.config.finetuning
    batch_size = _batch_size(bench)
    last = max(1, min(MAX_STAGES, len(stage_modules(bench.loaded.backbone.network)) - 1))
    stages = [settings.unfreeze_stages] if settings.unfreeze_stages else list(range(1, last + 1))
    if settings.epochs is not None:
        return _plan_asked(bench, stages, batch_size)
    speeds: list[StepTimes] = []
    plan = None
    for unfreeze_stages in stages:
        batch_size, speed = _fitting_speed(bench, unfreeze_stages, batch_size)
        if not speeds and not _has_room(bench, speed):
            raise _no_room(bench, speed)
        speeds.append(speed)
        # measuring takes time too, so the plan is made anew each time
        found = plan_partial(speeds, bench.amount(), bench.left_s(), settings, batch_size=batch_size)
        plan = found or plan
        if plan is None:
            raise _too_short(bench, "partial", speed)
        if plan.unfreeze_stages != unfreeze_stages:
            break
    assert plan is not None
    return replace(plan, compile=_is_compiled(bench, plan.seconds["training"]))


def _plan_asked(bench: Bench, choices: list[int], batch_size: int) -> FinetunePlan:
    """So many epochs as are asked for, on the deepest cut whose views can be kept; time plays no part."""
    loaded, device = bench.loaded, bench.workplace.device
    for unfreeze_stages in reversed(choices):
        stages = split_backbone(loaded.backbone, unfreeze_stages, loaded.preprocessing.input_size)
        n_bytes = CachedViews.bytes_per_view(stages, device)
        speed = StepTimes(unfreeze_stages=unfreeze_stages, view_s=0, step_s=0, bytes_per_view=n_bytes)
        if _has_room(bench, speed):
            break
    else:
        raise _no_room(bench, speed)
    if device.name == "cuda":  # which batch fits, and whether compiling repays, is found by trying
        batch_size, speed = _fitting_speed(bench, unfreeze_stages, batch_size)
    plan = plan_partial([speed], bench.amount(), None, bench.config.finetuning, batch_size=batch_size)
    assert plan is not None, "epochs that are asked for always fit"
    plan = replace(plan, compile=_is_compiled(bench, plan.seconds["training"]))
    return plan if device.name == "cuda" else replace(plan, seconds={})  # nothing was measured


def _has_room(bench: Bench, speed: StepTimes) -> bool:
    return room_for_views(speed, bench.amount()) >= (bench.config.finetuning.cached_views or 1)


def _no_room(bench: Bench, speed: StepTimes) -> TimeBudgetError:
    """The error that says what views take, and what to change."""
    amount, asked = bench.amount(), bench.config.finetuning.cached_views
    needed = (asked or 1) * speed.bytes_per_view * amount.n_train
    return TimeBudgetError(
        f"{needed / 1e6:,.1f} MB are needed for {counted(asked or 1, 'view')} of {amount.n_train:,} "
        f"images, and there is room for {amount.max_view_bytes / 1e6:,.1f} MB; raise --cache-gb or "
        f"{'lower --cached-views' if asked else 'use --finetune none'}"
    )


def _plan_full(bench: Bench) -> FinetunePlan:
    settings = bench.config.finetuning
    batch_size = _batch_size(bench)
    speed = StepTimes(unfreeze_stages=None, view_s=0, step_s=0, bytes_per_view=0)
    is_measured = settings.epochs is None or bench.workplace.device.name == "cuda"
    if is_measured:
        batch_size, speed = _fitting_speed(bench, None, batch_size)
    plan = plan_full(speed, bench.amount(), bench.left_s(), settings, batch_size=batch_size)
    if plan is None:
        raise _too_short(bench, "full", speed)
    plan = replace(plan, compile=_is_compiled(bench, plan.seconds["training"]))
    return plan if is_measured else replace(plan, seconds={})


def _fitting_speed(bench: Bench, unfreeze_stages: int | None, batch_size: int) -> tuple[int, StepTimes]:
    """Find a batch that fits into the memory, by halving, and its speed; None: all stages are trained."""
    while True:
        try:
            if unfreeze_stages is None:
                return batch_size, _speed_full(bench, batch_size)
            return batch_size, _speed_partial(bench, unfreeze_stages, batch_size)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if bench.config.finetuning.train_batch_size is not None or batch_size <= SMALLEST_BATCH:
                raise training_memory_error(bench.workplace.device.name, batch_size) from None
            batch_size //= 2
            if bench.workplace.device.name == "cuda":
                torch.cuda.empty_cache()


def _speed_partial(bench: Bench, unfreeze_stages: int, batch_size: int) -> StepTimes:
    size = bench.loaded.preprocessing.input_size
    stages = split_backbone(bench.loaded.backbone, unfreeze_stages, size)
    device = bench.workplace.device
    views = bench.views(stages, 1)
    n_cores = torch.get_num_threads() if device.name == "cpu" else 1
    rows = bench.train[: max(MEASURED_VIEWS, MEASURED_BATCHES * bench.batch_size * n_cores)]
    view_s = min(
        views.try_out(rows, bench.batch_size, bench.config.compute.num_workers, n_first=n_cores)
        for _ in range(REPEATS)
    )
    maps = torch.zeros(batch_size, *stages.shape).to(device.name, memory_format=torch.channels_last)
    stats = torch.zeros(batch_size, stages.n_stats, device=device.name)
    with _step(bench, stages, maps.bfloat16() if device.is_bf16 else maps, stats) as step:
        step_s = time_per_image(step, batch_size, device.name)
    return StepTimes(
        unfreeze_stages=unfreeze_stages,
        view_s=view_s,
        step_s=step_s,
        bytes_per_view=CachedViews.bytes_per_view(stages, device),
    )


def _speed_full(bench: Bench, batch_size: int) -> StepTimes:
    """Measure steps with everything that belongs to them: decoding, augmenting, moving."""
    size = bench.loaded.preprocessing.input_size
    stages = split_backbone(bench.loaded.backbone, None, size)
    rows = np.resize(bench.train, MEASURED_BATCHES * batch_size)
    images = torch.zeros(batch_size, 3, size, size).to(
        bench.workplace.device.name, memory_format=torch.channels_last
    )

    def work() -> None:
        parts = np.array_split(rows, MEASURED_BATCHES)
        batches = [Batch(part, np.zeros_like(part), np.ones(len(part), np.float32)) for part in parts]
        for _ in stream(
            batches,
            lambda batch: bench.pixels.train_batch(batch, 0, size),
            bench.config.compute.num_workers,
        ):
            step()

    with _step(bench, stages, images, images.new_empty(batch_size, 0)) as step:
        step_s = time_per_image(work, len(rows), bench.workplace.device.name)
    return StepTimes(unfreeze_stages=None, view_s=0.0, step_s=step_s, bytes_per_view=0)


@contextmanager
def _step(
    bench: Bench, stages: SplitBackbone, maps: torch.Tensor, stats: torch.Tensor
) -> Iterator[Callable[[], None]]:
    """Give a step of the training on one batch, that changes nothing."""
    device, settings = bench.workplace.device, bench.config.finetuning
    compile = settings.compile == "on"
    classifier = bench.classifier(stages, compile=compile)
    classifier.to(maps.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = make_optimizer(classifier, settings, len(maps))
    classifier.train()

    def step() -> None:
        with device.autocast():
            loss = forward(maps, stats).float().logsumexp(1).mean()
        loss.backward()
        optimizer.step()  # with a learning rate of 0
        optimizer.zero_grad()

    with (
        nullcontext(classifier)  # a compiled one is not shared out
        if compile
        else forward_for_training(classifier, device, len(maps)) as forward
    ):
        yield step


def _is_compiled(bench: Bench, training_s: float) -> bool:
    if bench.config.finetuning.compile != "auto":
        return bench.config.finetuning.compile == "on"
    return bench.workplace.device.name == "cuda" and training_s > COMPILE_FROM_S


def _round_up(seconds: float) -> str:
    return f"{math.ceil(seconds / 10) * 10}s" if seconds < 100 else f"{math.ceil(seconds / 60)}m"


def _batch_size(bench: Bench) -> int:
    """Images a batch, where memory has room for so many."""
    usual = GPU_BATCH if bench.workplace.device.name == "cuda" else CPU_BATCH
    return min(bench.config.finetuning.train_batch_size or usual, len(bench.train))
