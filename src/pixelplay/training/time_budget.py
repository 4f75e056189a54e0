"""Time budget: measure throughput, then plan stages, epochs and cached views that fit."""

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from pixelplay.config import FinetuneConfig
from pixelplay.data.sampling import epoch_length
from pixelplay.errors import PixelPlayError
from pixelplay.model.backbone import stage_modules
from pixelplay.model.device import InsufficientMemoryError, is_out_of_memory
from pixelplay.model.split_backbone import FrozenStages, TrainableStages, split_backbone
from pixelplay.training.batch_inputs import Batch, CachedViews, stream
from pixelplay.training.cpu_parallel import parallel_forward
from pixelplay.training.finetune_task import FinetuneTask
from pixelplay.training.optim import make_optimizer
from pixelplay.training.plan_file import FinetunePlan, read_plan
from pixelplay.training.settings_conflicts import FinetunedMethod
from pixelplay.training.trainer import training_memory_message

AIM = 0.85  # fraction of the budget to plan for; the rest covers a machine that slows down
MIN_EPOCHS, MAX_EPOCHS = 3, 24
ENOUGH_EPOCHS, ENOUGH_FOLD_EPOCHS = 8, 5  # with fewer, training one stage less for longer is better
EPOCHS_PER_VIEW = 3  # epochs per cached view at which another view starts to pay off
MAX_STAGES = 5  # of partial fine-tuning; more were not tried (benchmarks/DECISIONS.md)
REPEATS = 2
CPU_BATCH, GPU_BATCH, SMALLEST_BATCH = 32, 128, 8
MEASURED_BATCHES = 2
MEASURED_VIEWS = 64


class TimeBudgetError(PixelPlayError):
    """No useful training fits into the time budget, the cache or the disk."""


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Measured cost per image for one number of trained stages."""

    unfreeze_stages: int | None  # None for all
    view_s: float  # seconds to augment an image and compute its feature maps at the cut
    step_s: float  # seconds for forward, backward and update behind the cut
    bytes_per_view: int  # on disk


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Number of images in each piece of work."""

    n_train: int  # images of which views are cached
    n_drawn: int  # per epoch, by all networks together
    n_refit: int  # drawn in all refit epochs together
    n_val: int  # evaluated after each epoch
    n_plain: int  # views without augmentation to cache
    enough_epochs: int  # with fewer, training one stage less for longer is better
    n_eval: int  # views evaluated with the finished network
    max_view_bytes: int  # room on disk for all cached views

    @classmethod
    def of(cls, task: FinetuneTask) -> "Workload":
        """Count the images of a fine-tuning."""
        config, data = task.ctx.config, task.data
        n_drawn = epoch_length(task.counts, task.imbalance, config.oversample_to)
        n_views = 2 if config.hflip else 1
        if task.n_networks > 1:
            return cls(
                n_train=len(data.fit_rows),
                n_drawn=n_drawn * task.n_networks,
                n_refit=0,
                n_val=0,
                n_plain=n_views * len(data.fit_rows),
                enough_epochs=ENOUGH_FOLD_EPOCHS,
                n_eval=n_views * len(data.split.test),
                max_view_bytes=task.max_view_bytes,
            )
        refit_epochs = config.finetuning.refit_epochs
        return cls(
            n_train=len(data.fit_rows if refit_epochs else task.train),
            n_drawn=n_drawn,
            n_refit=refit_epochs * round(n_drawn * len(data.fit_rows) / len(task.train)),
            n_val=len(task.val),
            n_plain=len(task.val),
            enough_epochs=ENOUGH_EPOCHS,
            n_eval=n_views * (len(task.val) + len(data.split.test)),
            max_view_bytes=task.max_view_bytes,
        )

    def max_views(self, throughput: Throughput) -> int:
        """Return how many views per image fit on the disk."""
        return self.max_view_bytes // max(1, throughput.bytes_per_view * self.n_train)


def make_plan(task: FinetuneTask, method: FinetunedMethod) -> FinetunePlan:
    """Return the plan to repeat or resume, or make one for the time that is left.

    Raises:
        TimeBudgetError: no useful training fits; the message says what would.
        ConfigError: the plan cannot be read, or the network cannot be split.
    """
    ctx = task.ctx
    if ctx.plan is not None:
        return ctx.plan
    path = os.path.join(ctx.run_dir, "plan.json")
    if os.path.isfile(path):  # of an interrupted run, or of the first fold
        plan = read_plan(path)
    else:
        plan = _plan_partial(task) if method == "partial" else _plan_full(task)
    if 2 * plan.batch_size <= (default := _default_batch_size(task)):  # folds differ by an image
        ctx.log.note(f"using batches of {plan.batch_size} images; {default} do not fit into memory")
    return plan


def fit_plan(
    throughputs: Sequence[Throughput],
    work: Workload,
    left_s: float | None,
    settings: FinetuneConfig,
    batch_size: int,
) -> FinetunePlan | None:
    """Train as many stages as leave time for enough epochs; None where too few epochs fit with the first.

    Args:
        throughputs: with one trained stage, with two, and so on; or of training all layers.
        left_s: seconds available; None where `settings` has the number of epochs.
    """
    best = None
    for each in throughputs:
        max_views = work.max_views(each)
        if best is not None and max_views < (settings.cached_views or 1):
            break  # the feature maps at this cut are too large to be cached

        def n_views(epochs: int, each: Throughput = each, max_views: int = max_views) -> int | None:
            if each.unfreeze_stages is None:
                return None
            return settings.cached_views or max(1, min(max_views, math.ceil(epochs / EPOCHS_PER_VIEW)))

        def cost_s(epochs: int, each: Throughput = each) -> dict[str, float]:
            return _cost_s(each, work, epochs, n_views(epochs))

        fitting = (
            n for n in range(MAX_EPOCHS, MIN_EPOCHS - 1, -1) if sum(cost_s(n).values()) <= (left_s or 0)
        )
        epochs = settings.epochs or next(fitting, 0)
        if not epochs or (
            best is not None and epochs < min(work.enough_epochs, settings.epochs or work.enough_epochs)
        ):
            break
        best = FinetunePlan(
            finetune="partial" if each.unfreeze_stages else "full",
            unfreeze_stages=each.unfreeze_stages,
            cached_views=n_views(epochs),
            epochs=epochs,
            batch_size=batch_size,
            seconds={name: round(value, 1) for name, value in cost_s(epochs).items()},
        )
    return best


def shortest_training_s(throughput: Throughput, work: Workload, task_views: int | None = None) -> float:
    """Return the seconds of the shortest useful training."""
    n_views = task_views or math.ceil(MIN_EPOCHS / EPOCHS_PER_VIEW)
    views = n_views if throughput.unfreeze_stages else None
    return sum(_cost_s(throughput, work, MIN_EPOCHS, views).values())


def _cost_s(throughput: Throughput, work: Workload, epochs: int, n_views: int | None) -> dict[str, float]:
    """Return the seconds of each piece of work; without views all layers are trained."""
    view_s, step_s = throughput.view_s, throughput.step_s
    # without a cut images are decoded and augmented each time
    train_s = step_s if throughput.unfreeze_stages else view_s + step_s
    # a forward pass costs a third of a step, in both halves
    return {
        "views": 0.0 if n_views is None else view_s * (n_views * work.n_train + work.n_plain),
        "training": epochs * (train_s * work.n_drawn + step_s / 3 * work.n_val),
        "refit": train_s * work.n_refit,
        "evaluation": (view_s + 2 * step_s / 3) * work.n_eval,
    }


def _left_s(task: FinetuneTask) -> float:
    """Return the seconds left of the fraction of the budget that is planned for."""
    return AIM * task.ctx.budget_s - task.ctx.elapsed_s() - task.probe_refit_s()


def _too_short(task: FinetuneTask, method: FinetunedMethod, throughput: Throughput) -> TimeBudgetError:
    ctx, spent_s = task.ctx, task.ctx.elapsed_s() + task.probe_refit_s()
    n_images = len(task.data.fit_rows if task.n_networks > 1 else task.train)
    needed_s = shortest_training_s(throughput, Workload.of(task), ctx.config.finetuning.cached_views)
    total_s = (spent_s + needed_s) / AIM
    enough = f"{math.ceil(total_s / 10) * 10}s" if total_s < 100 else f"{math.ceil(total_s / 60)}m"
    return TimeBudgetError(
        f"--time-budget {ctx.config.time_budget} is too short for --finetune {method} on "
        f"{n_images:,} images; use at least {enough} here, or --finetune none"
    )


def _plan_partial(task: FinetuneTask) -> FinetunePlan:
    settings, backbone = task.ctx.config.finetuning, task.ctx.backbone.backbone
    batch_size = _default_batch_size(task)
    limit = max(1, min(MAX_STAGES, len(stage_modules(backbone.network)) - 1))
    choices = [settings.unfreeze_stages] if settings.unfreeze_stages else list(range(1, limit + 1))
    if settings.epochs is not None:
        return _plan_fixed_epochs(task, choices, batch_size)
    throughputs: list[Throughput] = []
    plan = None
    for n_stages in choices:
        batch_size, throughput = _measure(task, n_stages, batch_size)
        if not throughputs and (error := _lack_of_room(task, throughput)):
            raise error
        throughputs.append(throughput)
        # measuring takes time too, so the plan is made again each time
        plan = fit_plan(throughputs, Workload.of(task), _left_s(task), settings, batch_size) or plan
        if plan is None:
            raise _too_short(task, "partial", throughput)
        if plan.unfreeze_stages != n_stages:
            break
    assert plan is not None
    return plan


def _plan_fixed_epochs(task: FinetuneTask, choices: list[int], batch_size: int) -> FinetunePlan:
    """Train the configured number of epochs with the earliest cut whose views can be cached."""
    device, settings = task.ctx.device, task.ctx.config.finetuning
    for n_stages in reversed(choices):
        frozen, _ = _split(task, n_stages)
        assert frozen is not None
        n_bytes = CachedViews.bytes_per_view(frozen, device)
        throughput = Throughput(unfreeze_stages=n_stages, view_s=0, step_s=0, bytes_per_view=n_bytes)
        if not (error := _lack_of_room(task, throughput)):
            break
    else:
        assert error is not None
        raise error
    if device.name == "cuda":  # only a trial shows which batch fits
        batch_size, throughput = _measure(task, n_stages, batch_size)
    plan = fit_plan([throughput], Workload.of(task), None, settings, batch_size)
    assert plan is not None, "a configured number of epochs always fits"
    return plan if device.name == "cuda" else replace(plan, seconds={})


def _plan_full(task: FinetuneTask) -> FinetunePlan:
    settings, batch_size = task.ctx.config.finetuning, _default_batch_size(task)
    throughput = Throughput(unfreeze_stages=None, view_s=0, step_s=0, bytes_per_view=0)
    is_measured = settings.epochs is None or task.ctx.device.name == "cuda"
    if is_measured:
        batch_size, throughput = _measure(task, None, batch_size)
    plan = fit_plan([throughput], Workload.of(task), _left_s(task), settings, batch_size)
    if plan is None:
        raise _too_short(task, "full", throughput)
    return plan if is_measured else replace(plan, seconds={})


def _lack_of_room(task: FinetuneTask, throughput: Throughput) -> TimeBudgetError | None:
    """Return the error for cached views that do not fit; None where they do."""
    work, n_views = Workload.of(task), task.ctx.config.finetuning.cached_views
    if work.max_views(throughput) >= (n_views or 1):
        return None
    needed = (n_views or 1) * throughput.bytes_per_view * work.n_train
    return TimeBudgetError(
        f"{n_views or 1} cached views of {work.n_train:,} images need {needed / 1e6:,.1f} MB but there is "
        f"room for {work.max_view_bytes / 1e6:,.1f} MB; raise --cache-gb or "
        f"{'lower --cached-views' if n_views else 'use --finetune none'}"
    )


def _measure(task: FinetuneTask, n_stages: int | None, batch_size: int) -> tuple[int, Throughput]:
    """Halve the batch until it fits into memory; return its size and the throughput."""
    device = task.ctx.device
    while True:
        try:
            if n_stages is None:
                return batch_size, _measure_full(task, batch_size)
            return batch_size, _measure_partial(task, n_stages, batch_size)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if task.ctx.config.finetuning.train_batch_size is not None or batch_size <= SMALLEST_BATCH:
                message = training_memory_message(device.name, batch_size)
                raise InsufficientMemoryError(message) from None
            batch_size //= 2
            if device.name == "cuda":
                torch.cuda.empty_cache()


def _measure_partial(task: FinetuneTask, n_stages: int, batch_size: int) -> Throughput:
    device, (frozen, trainable) = task.ctx.device, _split(task, n_stages)
    assert frozen is not None
    views = task.cached_views(frozen, 1)
    n_cores = torch.get_num_threads() if device.name == "cpu" else 1
    size, num_workers = task.eval_batch_size, task.ctx.config.compute.num_workers
    rows = task.train[: max(MEASURED_VIEWS, MEASURED_BATCHES * size * n_cores)]
    view_s = min(views.measure_s(rows, size, num_workers, n_warmup=n_cores) for _ in range(REPEATS))
    maps = torch.zeros(batch_size, *frozen.map_shape).to(device.name, memory_format=torch.channels_last)
    stats = torch.zeros(batch_size, frozen.n_stats, device=device.name)
    with _train_step(task, frozen, trainable, maps.bfloat16() if device.is_bf16 else maps, stats) as step:
        step_s = time_per_image(step, batch_size, device.name)
    return Throughput(
        unfreeze_stages=n_stages,
        view_s=view_s,
        step_s=step_s,
        bytes_per_view=CachedViews.bytes_per_view(frozen, device),
    )


def _measure_full(task: FinetuneTask, batch_size: int) -> Throughput:
    """Measure complete steps: decoding, augmentation, transfer, forward, backward and update."""
    device, size = task.ctx.device, task.ctx.backbone.preprocessing.input_size
    rows = np.resize(task.train, MEASURED_BATCHES * batch_size)
    images = torch.zeros(batch_size, 3, *size).to(device.name, memory_format=torch.channels_last)

    def work() -> None:
        parts = np.array_split(rows, MEASURED_BATCHES)
        batches = [Batch(part, np.zeros_like(part), np.ones(len(part), np.float32)) for part in parts]
        num_workers = task.ctx.config.compute.num_workers
        for _ in stream(batches, lambda batch: task.pixels.train_batch(batch, 0, size), num_workers):
            step()

    _, trainable = _split(task, None)
    with _train_step(task, None, trainable, images, images.new_empty(batch_size, 0)) as step:
        step_s = time_per_image(work, len(rows), device.name)
    return Throughput(unfreeze_stages=None, view_s=0.0, step_s=step_s, bytes_per_view=0)


@contextmanager
def _train_step(
    task: FinetuneTask,
    frozen: FrozenStages | None,
    trainable: TrainableStages,
    maps: torch.Tensor,
    stats: torch.Tensor,
) -> Iterator[Callable[[], None]]:
    """Provide a training step on one batch that changes nothing."""
    device, settings = task.ctx.device, task.ctx.config.finetuning
    classifier = task.classifier(frozen, trainable)
    classifier.to(maps.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = make_optimizer(classifier, settings, len(maps))
    classifier.train()

    def step() -> None:
        with device.autocast():
            loss = forward(maps, stats).float().logsumexp(1).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()  # with a learning rate of 0
        optimizer.zero_grad()

    with parallel_forward(classifier, device, len(maps)) as forward:
        yield step


def time_per_image(work: Callable[[], object], n: int, device: str) -> float:
    """Return the seconds per image of some work on n images: the best of REPEATS after a warm-up."""
    ends = []
    for _ in range(1 + REPEATS):
        work()
        if device in ("cuda", "mps"):
            getattr(torch, device).synchronize()
        ends.append(time.perf_counter())
    return float(np.diff(ends).min()) / n


def _split(task: FinetuneTask, n_stages: int | None) -> tuple[FrozenStages | None, TrainableStages]:
    backbone = task.ctx.backbone
    return split_backbone(backbone.backbone, n_stages, backbone.preprocessing.input_size)


def _default_batch_size(task: FinetuneTask) -> int:
    """Return the images per batch if memory allows."""
    usual = GPU_BATCH if task.ctx.device.name == "cuda" else CPU_BATCH
    return min(task.ctx.config.finetuning.train_batch_size or usual, len(task.train))
