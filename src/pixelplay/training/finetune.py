"""Fine-tuning: plan, cache views, train, refit on train and val, assemble the classifier."""

import copy
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pixelplay.array_types import Float32Array, Float64Array
from pixelplay.data.transforms import describe_size
from pixelplay.errors import ConfigError
from pixelplay.model.backbone import Backbone, input_size_error
from pixelplay.model.classifier import Classifier, LinearHead, TrainableLinearHead
from pixelplay.model.ensemble import average_members, ensemble_member
from pixelplay.model.split_backbone import FrozenStages, TrainableStages, split_backbone
from pixelplay.training.batch_inputs import CachedViews, InputSource
from pixelplay.training.checkpoint import copy_weights, restore_weights
from pixelplay.training.finetune_task import FinetuneTask
from pixelplay.training.plan_file import FinetunePlan, write_plan
from pixelplay.training.schedule import Schedule
from pixelplay.training.settings_conflicts import FinetunedMethod
from pixelplay.training.time_budget import TimeBudgetError, make_plan
from pixelplay.training.trainer import OUT_OF_TIME, Trainer, Validation

REFIT_LR_FRAC = 0.25  # of the peak learning rates, in the refit on train and val


@dataclass(frozen=True, kw_only=True, eq=False)
class Finetuned:
    """A fine-tuned network as the validation split selected it, and what a refit continues from."""

    backbone: Backbone  # with its trained layers
    head: LinearHead  # features → natural-prior logits
    logits: Float32Array  # (n, K) of the validation images, as prediction computes them
    history: list[dict[str, float]]  # one row per epoch, the first before training
    best_epoch: int
    ensemble_probe: bool  # whether the linear probe is averaged in
    plan: FinetunePlan
    classifier: Classifier
    inputs: InputSource
    schedule: Schedule
    validation: Validation


def finetune(task: FinetuneTask, method: FinetunedMethod) -> Finetuned:
    """Train the last stages, or all, starting from the linear probe; validation selects the epoch.

    Raises:
        TimeBudgetError: the time budget or the disk has no room for it; the message says what would fit.
        BackboneSplitError: the network has no last stages that could be trained on their own.
        ConfigError: training failed.
    """
    ctx = task.ctx
    plan, inputs, frozen, trainable = prepare_finetuning(task, method)
    classifier, schedule, validation = (
        task.classifier(frozen, trainable),
        task.schedule(plan),
        task.validation(),
    )
    loss, limit_s = task.loss(task.train), task.time_limit_s(plan)
    state = Trainer(classifier, inputs, schedule, validation, loss, ctx, time_limit_s=limit_s).fit()
    _note_uncached_pixels(task, plan)  # the disk may have filled up meanwhile
    check_stopped(task, state.stopped, state.best_epoch)
    backbone, head = assemble(task, classifier, validation.offset)
    logits = head.logits(task.read(backbone, task.val))  # (n, K)
    with_probe, logits, _ = validation.best(logits)
    return Finetuned(
        backbone=backbone,
        head=head,
        logits=logits,
        history=state.history,
        best_epoch=state.best_epoch,
        ensemble_probe=with_probe,
        plan=plan,
        classifier=classifier,
        inputs=inputs,
        schedule=schedule,
        validation=validation,
    )


def prepare_finetuning(
    task: FinetuneTask, method: FinetunedMethod
) -> tuple[FinetunePlan, InputSource, FrozenStages | None, TrainableStages]:
    """Plan, split the backbone and cache views; errors are those of `finetune`."""
    ctx, pretrained = task.ctx, task.ctx.backbone
    plan = make_plan(task, method)
    os.makedirs(ctx.checkpoint_dir, exist_ok=True)
    write_plan(plan, os.path.join(ctx.run_dir, "plan.json"))
    ctx.log.info(plan.describe(len(task.train), task.n_networks))
    frozen, trainable = split_backbone(
        pretrained.backbone, plan.unfreeze_stages, pretrained.preprocessing.input_size
    )
    inputs: InputSource = task.pixels
    if plan.cached_views is not None:
        assert frozen is not None
        inputs = _cache_views(task, frozen, plan.cached_views)
    schedule = task.schedule(plan)
    if frozen is None:
        _check_sizes(schedule, pretrained.backbone)
    for note in _ineffective_settings(plan, schedule):
        ctx.log.note_for_run(note)
    _note_uncached_pixels(task, plan)
    return plan, inputs, frozen, trainable


def refit(task: FinetuneTask, finetuned: Finetuned) -> tuple[Finetuned, int]:
    """Continue on train and val together, now that validation has made its selections.

    A linear probe is likewise refitted once folds have selected C. The final weights lie halfway between
    those before and after. Temperature and tau remain those of the classifier before the refit, which was
    not trained on the validation images.

    Returns:
        The classifier, with the linear probe averaged in if selected, and the number of refit epochs, if any.

    Source: Wortsman et al., "Model soups", ICML 2022, arXiv:2203.05482.
    """
    ctx, classifier = task.ctx, finetuned.classifier
    epochs = ctx.config.finetuning.refit_epochs if finetuned.best_epoch else 0
    if epochs:
        before = copy_weights(classifier)
        state = _refit_trainer(task, finetuned, epochs).fit()
        if state.stopped:
            ctx.log.note(f"skipped the refit on train and val: {state.stopped}")
            epochs = 0
        else:
            epochs, offset = state.epochs, task.offset(task.data.fit_rows)
            if isinstance(classifier.head, TrainableLinearHead):  # batch-norm statistics cannot be averaged
                restore_weights(classifier, halfway(before, copy_weights(classifier)))
                offset = (finetuned.validation.offset + offset) / 2
            backbone, head = assemble(task, classifier, offset)
            last = finetuned.history[-1]
            more = [
                {**row, "epoch": last["epoch"] + row["epoch"], "step": last["step"] + row["step"]}
                for row in state.history[1:]
            ]
            finetuned = replace(finetuned, backbone=backbone, head=head, history=finetuned.history + more)
    if finetuned.ensemble_probe:
        probe_head = task.refit_probe(task.data.fit_rows) if epochs else task.probe.head
        frozen = task.ctx.backbone.backbone
        probe = ensemble_member(frozen, probe_head, None)
        # the trained stages next to the frozen ones, under a head that averages both logits
        network = ensemble_member(finetuned.backbone, finetuned.head, classifier.stages.n_frozen)
        backbone, head = average_members(frozen, [probe, network])
        finetuned = replace(finetuned, backbone=backbone, head=head)
    return finetuned, epochs


def starts_at_probe(task: FinetuneTask) -> bool:
    """Check whether training starts from the linear probe's head rather than from random weights."""
    settings = task.ctx.config.finetuning
    return settings.head_init == "probe" and settings.head == "linear"


def halfway(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Average two states of a network, on the device of the second."""
    return {name: torch.lerp(before[name].to(value.device), value, 0.5) for name, value in after.items()}


def _refit_trainer(task: FinetuneTask, finetuned: Finetuned, epochs: int) -> Trainer:
    """Set up the short, slow training on train and val; nothing is left to select."""
    config, rows = task.ctx.config, task.data.fit_rows
    settings = replace(config.finetuning, initial_size_frac=1.0, patience=None)
    unmixed = replace(config.augmenting, mix_prob=0.0)
    schedule = replace(
        finetuned.schedule,
        rows=rows,
        epochs=epochs,
        epochs_before=finetuned.plan.epochs,
        config=replace(config, finetuning=settings, augmenting=unmixed),
    )
    empty = task.val[:0]
    validation = replace(
        finetuned.validation, rows=empty, labels=empty, offset=task.offset(rows), probe_logits=None
    )
    return Trainer(
        finetuned.classifier,
        finetuned.inputs,
        schedule,
        validation,
        task.loss(rows),
        task.ctx.derive(run_dir=os.path.join(task.ctx.checkpoint_dir, "refit")),
        time_limit_s=task.time_limit_s(finetuned.plan, refit=True),
        lr_frac=REFIT_LR_FRAC,
        title="refit on train and val",
    )


def _cache_views(task: FinetuneTask, frozen: FrozenStages, n_views: int) -> CachedViews:
    """Compute the feature maps of augmented views up to the cut, in the cache or the run's folder."""
    ctx = task.ctx
    is_folded, fit_rows = task.n_networks > 1, task.data.fit_rows
    rows = fit_rows if is_folded or ctx.config.finetuning.refit_epochs else task.train
    plain, mirror = (fit_rows, ctx.config.hflip) if is_folded else (task.val, False)
    n_total = n_views * len(rows) + (1 + mirror) * len(plain)
    for use_cache in (True, False):
        views = task.cached_views(frozen, n_views, use_cache=use_cache)
        with ctx.log.progress("caching views", n_total, "views") as bar:
            failure = views.compute(
                rows,
                plain,
                mirror=mirror,
                batch_size=task.eval_batch_size,
                num_workers=ctx.config.compute.num_workers,
                on_progress=bar.update,
            )
        if failure is None:
            return views
        views.drop()  # makes room
        if use_cache:
            ctx.log.note(f"could not cache views: {failure}; using the run's folder")
    raise TimeBudgetError(f"could not store views: {failure}; free some disk space")


def check_stopped(task: FinetuneTask, stopped: str, best_epoch: int) -> None:
    """Log that training ended early; raise ConfigError if nothing was trained before."""
    if not stopped:
        return
    if best_epoch == 0 and not starts_at_probe(task):
        remedy = "lower --lr and --head-lr"
        if stopped.startswith(OUT_OF_TIME):
            remedy = "use --force instead of --resume and a longer --time-budget"
        raise ConfigError(f"training failed: {stopped} before the first epoch ended; {remedy}")
    task.ctx.log.note(f"training stopped early: {stopped}; using the weights of epoch {best_epoch}")


def assemble(task: FinetuneTask, classifier: Classifier, offset: Float64Array) -> tuple[Backbone, LinearHead]:
    """Return the whole network and its natural-prior head."""
    backbone = copy.deepcopy(task.ctx.backbone.backbone)
    classifier.stages.cpu().write_into(backbone)
    backbone.eval()
    return backbone, classifier.head.cpu().export().shifted(offset)


def _check_sizes(schedule: Schedule, backbone: Backbone) -> None:
    """Raise ConfigError where the network does not accept an image size of the schedule."""
    for size in sorted(schedule.sizes() - {schedule.input_size}):
        if reason := input_size_error(backbone, size):
            frac = schedule.config.finetuning.initial_size_frac
            raise ConfigError(
                f"initial_size_frac={frac} starts with images of {describe_size(size)} px, which "
                f"{backbone.name} does not accept ({reason}); use --initial-size-frac 1"
            )


def _note_uncached_pixels(task: FinetuneTask, plan: FinetunePlan) -> None:
    if plan.cached_views is None and (reason := task.pixels.pixels.failure):
        task.ctx.log.note_for_run(f"every epoch decodes all images again: {reason}")


def _ineffective_settings(plan: FinetunePlan, schedule: Schedule) -> Iterator[str]:
    """Yield notes on settings that turn out to have no or less effect with the plan."""
    settings, augmenting = schedule.config.finetuning, schedule.config.augmenting
    if schedule.batches_per_step < (n := settings.grad_accum_steps):
        yield f"--grad-accum-steps {n} is reduced to {schedule.batches_per_step}, the batches of an epoch"
    if (batch_size := settings.train_batch_size or 0) > plan.batch_size:
        yield f"--train-batch-size {batch_size} is reduced to {plan.batch_size}, the training images"
    if plan.unfreeze_stages == 1 and settings.layer_decay not in (None, 1):
        yield f"--layer-decay {settings.layer_decay} has no effect with one trained stage"
    if settings.initial_size_frac < 1 and schedule.sizes() == {schedule.input_size}:
        yield f"--initial-size-frac {settings.initial_size_frac} has no effect: every epoch has the full size"
    is_augmented = bool(augmenting.augment) or schedule.config.hflip
    n_views = plan.cached_views if is_augmented else 1
    batches = schedule.batches(1, np.ones(len(schedule.labels), np.float32))
    n_times = 1 + max(int(batch.times.max()) for batch in batches)
    if n_views is not None and n_times > n_views:
        remedy = "raise --cached-views" if is_augmented else "use --augment"
        yield f"images of rare classes occur up to {n_times} times per epoch with {n_views} views; {remedy}"
