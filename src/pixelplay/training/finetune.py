"""From the probe to a tuned network: plan, cut, views, loop, and back into one backbone."""

import copy
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pixelplay.arrays import Float32Array, IntArray
from pixelplay.config import TrainConfig
from pixelplay.errors import ConfigError
from pixelplay.evaluation.decision_rule import held_out_score
from pixelplay.model.backbone import Backbone, input_size_error
from pixelplay.model.classifier import Classifier, LinearHead, TrainableLinearHead
from pixelplay.model.ensemble import average_members, ensemble_member
from pixelplay.model.split_backbone import SplitBackbone, split_backbone
from pixelplay.run_log import RunLog
from pixelplay.text import counted
from pixelplay.training.bench import Bench
from pixelplay.training.checkpoint import copy_of, has_checkpoint, restore
from pixelplay.training.compatibility import TunedMethod
from pixelplay.training.inputs import CachedViews, InputSource
from pixelplay.training.plan import FinetunePlan, write_plan
from pixelplay.training.schedule import Job
from pixelplay.training.time_budget import TimeBudgetError, make_plan
from pixelplay.training.trainer import OUT_OF_TIME, finetune

Answer = tuple[Backbone, LinearHead]  # features, and what is made of them
REFIT_LR_FRAC = 0.25  # of the peak learning rates, once the validation part is learned from too


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """A tuned network that the validation part has chosen, and with what it can be trained further.

    Attributes:
        logits: (n, K) of the validation part, as prediction would make them.
        history: one row for each epoch, the first of the untrained classifier.
        best_epoch: whose weights these are.
        is_with_probe: whether the probe answers beside it.
        plan: what was done.
        own: the tuned network and its own head.
    """

    logits: Float32Array
    history: list[dict[str, float]]
    best_epoch: int
    ensemble_probe: bool
    plan: FinetunePlan
    own: Answer
    bench: Bench
    stages: SplitBackbone
    classifier: Classifier
    job: Job


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What is deployed.

    Attributes:
        backbone: with what was trained in its place, or beside the frozen stages.
        head: features → natural-prior logits.
        history: that of tuning, and the epochs after it.
        learned_from: positions in the material.
        refit_epochs: epochs in which the validation part was learned from; 0 where it was not.
    """

    backbone: Backbone
    head: LinearHead
    history: list[dict[str, float]]
    learned_from: IntArray
    refit_epochs: int


def tune(bench: Bench, method: TunedMethod, log: RunLog) -> Tuned:
    """Train the last stages, or all, starting from the probe's head; the validation part chooses.

    Raises:
        NoPlanError: the time budget or the disk has no room for it; the message says what would fit.
        UncuttableError: the network has no last stages that could be trained on their own.
        ConfigError: training failed.
    """
    config, workplace = bench.config, bench.workplace
    plan = make_plan(bench, method, log)
    os.makedirs(workplace.checkpoints, exist_ok=True)
    write_plan(plan, os.path.join(workplace.folder, "plan.json"))
    log.tell(_describe(plan, len(bench.train)))
    backbone = bench.loaded.backbone
    stages = split_backbone(backbone, plan.unfreeze_stages, bench.loaded.preprocessing.input_size)
    classifier = bench.classifier(stages, compile=plan.compile)
    source: InputSource = bench.pixels
    if plan.cached_views is not None:
        source = _prepare_views(bench, stages, plan.cached_views, log)
    job = bench.job(source, plan)
    if stages.front is None:
        _check_sizes(job, backbone)
    for note in _what_does_not_count(plan, job):
        log.note_for_all(note)
    _say_what_is_decoded_anew(bench, plan, log)
    where = finetune(
        job,
        classifier,
        workplace.checkpoints,
        log,
        resume=has_checkpoint(workplace.checkpoints),
    )
    _say_what_is_decoded_anew(bench, plan, log)  # a disk may be full by now
    if where.stopped and where.best_epoch == 0 and not starts_at_probe(config):
        is_late = where.stopped.startswith(OUT_OF_TIME)
        remedy = (
            "start anew with --force instead of --resume, and a longer --time-budget"
            if is_late
            else "lower --lr and --head-lr"
        )
        raise ConfigError(f"{where.stopped}, before anything was learned; {remedy}")
    if where.stopped:
        log.note(f"training ended early: {where.stopped}; the weights are those of epoch {where.best_epoch}")
    labels = bench.data.labels[bench.val]
    own = _own_answer(bench, stages, classifier, job)
    whole, head = own
    logits = head.logits(bench.read(whole, bench.val))  # (n, K)
    answers = job.answers(logits)
    chosen = min(answers, key=lambda way: held_out_score(answers[way], labels, job.priors, config.metric))
    return Tuned(
        logits=answers[chosen],
        history=where.history,
        best_epoch=where.best_epoch,
        ensemble_probe=chosen,
        plan=plan,
        own=own,
        bench=bench,
        stages=stages,
        classifier=classifier,
        job=job,
    )


def starts_at_probe(config: TrainConfig) -> bool:
    """Whether training starts from the probe's head, and not from chance."""
    return config.finetuning.head_init == "probe" and config.finetuning.head == "linear"


def finish(tuned: Tuned, log: RunLog) -> Finished:
    """Learn from the validation part too, now that it has chosen, and put together what is deployed.

    As a probe is refitted on everything once folds have chosen its strength. Deployed are weights halfway
    between those before and after. Temperature and tau stay those of the classifier before, whose logits
    the validation part had not been learned by.

    Source: Wortsman et al., "Model soups", ICML 2022, arXiv:2203.05482.
    """
    bench, classifier = tuned.bench, tuned.classifier
    own, history, learned_from = tuned.own, tuned.history, bench.train
    epochs = bench.config.finetuning.refit_epochs if tuned.best_epoch else 0
    if epochs:
        folder, before = os.path.join(bench.workplace.checkpoints, "refit"), copy_of(classifier)
        job = _refit_job(bench, tuned.job, tuned.plan, epochs)
        where = finetune(job, classifier, folder, log, resume=has_checkpoint(folder))
        if where.stopped:
            log.note(f"the validation images are not learned from: {where.stopped}")
            epochs = 0
        else:
            epochs, learned_from = where.epochs, bench.fit_rows
            if isinstance(classifier.head, TrainableLinearHead):  # a batch norm's statistics have no middle
                restore(classifier, halfway(before, copy_of(classifier)))
                job = replace(job, offset=(tuned.job.offset + job.offset) / 2)
            own = _own_answer(bench, tuned.stages, classifier, job)
            done = history[-1]
            history = history + [
                {**row, "epoch": done["epoch"] + row["epoch"], "step": done["step"] + row["step"]}
                for row in where.history[1:]
            ]
    backbone, head = own
    if tuned.ensemble_probe:
        probe_head = bench.refit_probe(learned_from) if epochs else bench.probe.probe.head
        backbone, head = _beside(bench, tuned.stages, own, probe_head)
    return Finished(
        backbone=backbone, head=head, history=history, learned_from=learned_from, refit_epochs=epochs
    )


def halfway(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mean of two states of a network, where the second lies."""
    return {name: torch.lerp(before[name].to(value.device), value, 0.5) for name, value in after.items()}


def _prepare_views(bench: Bench, stages: SplitBackbone, cached_views: int, log: RunLog) -> CachedViews:
    """Bring views of all images to be learned from as far as the cut.

    Raises:
        NoPlanError: neither the cache nor the run's folder takes them.
    """
    rows = bench.fit_rows if bench.config.finetuning.refit_epochs else bench.train
    for has_cache in (True, False):
        views = bench.views(stages, cached_views, has_cache=has_cache)
        with log.progress("preparing views", cached_views * len(rows) + len(bench.val), "views") as bar:
            failure = views.compute(
                rows,
                bench.val,
                batch_size=bench.batch_size,
                num_workers=bench.config.compute.num_workers,
                on_progress=bar.update,
            )
        if failure is None:
            return views
        views.drop()  # others need the room
        if has_cache:
            log.note(f"views cannot be kept in the cache: {failure}; they are kept beside the run")
    raise TimeBudgetError(f"views of the images cannot be kept: {failure}; free some space")


def _refit_job(bench: Bench, job: Job, plan: FinetunePlan, epochs: int) -> Job:
    """The same training on train and val together, short and slow; nothing is left to choose by."""
    settings = replace(bench.config.finetuning, initial_size_frac=1.0, patience=None)
    unmixed = replace(bench.config.augmenting, mix_prob=0.0)  # images end as they are
    return replace(
        bench.job(job.source, plan, is_refit=True),
        val=bench.val[:0],
        beside=None,
        epochs=epochs,
        epochs_before=plan.epochs,
        lr_frac=REFIT_LR_FRAC,
        config=replace(bench.config, finetuning=settings, augmenting=unmixed),
    )


def _own_answer(bench: Bench, stages: SplitBackbone, classifier: Classifier, job: Job) -> Answer:
    """The tuned network as a whole, and its head; with crt one that is fitted anew."""
    backbone = copy.deepcopy(bench.loaded.backbone)
    stages.tail.cpu().write_into(backbone)
    backbone.eval()
    if bench.config.imbalance == "crt":
        return backbone, bench.refit_head(backbone, job.train)
    return backbone, classifier.head.cpu().export().shifted(job.offset)


def _beside(bench: Bench, stages: SplitBackbone, own: Answer, probe_head: LinearHead) -> Answer:
    """The tuned stages beside the frozen ones, under a head that averages both logits."""
    frozen = bench.loaded.backbone
    probe, tuned = ensemble_member(frozen, probe_head, None), ensemble_member(*own, stages.tail.n_front)
    return average_members(frozen, [probe, tuned])


def _check_sizes(job: Job, backbone: Backbone) -> None:
    """Raise where a network takes no images of a size that training begins with.

    Raises:
        ConfigError: the size is named.
    """
    for size in sorted({job.size_px(epoch) for epoch in range(job.epochs)} - {job.input_size}):
        if reason := input_size_error(backbone, size):
            raise ConfigError(
                f"{backbone.name} takes no images of {size} px ({reason}), with which "
                f"initial_size_frac={job.config.finetuning.initial_size_frac} begins; use --initial-size-frac 1"
            )


def _say_what_is_decoded_anew(bench: Bench, plan: FinetunePlan, log: RunLog) -> None:
    if plan.cached_views is None and (reason := bench.pixels.pixels.failure):
        log.note_for_all(f"every epoch decodes images anew: {reason}")


def _what_does_not_count(plan: FinetunePlan, job: Job) -> Iterator[str]:
    """Settings that turn out to say nothing, or less than they seem to, now that there is a plan."""
    settings, augmenting = job.config.finetuning, job.config.augmenting
    if job.batches_per_step < settings.grad_accum_steps:
        yield (
            f"--grad-accum-steps {settings.grad_accum_steps} is {job.batches_per_step}: an epoch has no more batches, "
            "and its end always makes a step"
        )
    if (asked := settings.train_batch_size or 0) > plan.batch_size:
        yield f"--train-batch-size {asked} is {plan.batch_size}: no more images are learned from"
    if plan.unfreeze_stages == 1 and settings.layer_decay not in (None, 1):
        yield f"--layer-decay {settings.layer_decay} does not count: one stage is trained"
    if settings.initial_size_frac < 1 and {job.size_px(epoch) for epoch in range(job.epochs)} == {
        job.input_size
    }:
        yield f"--initial-size-frac {settings.initial_size_frac} does not count: every epoch has the full size"
    is_varied = bool(augmenting.augment) or job.config.hflip
    cached_views = plan.cached_views if is_varied else 1
    batches = job.batches(1, np.ones(len(job.labels), np.float32))
    most = 1 + max(int(batch.times.max()) for batch in batches)
    if cached_views is not None and most > cached_views:
        remedy = "--cached-views keeps more" if is_varied else "--augment varies them"
        seen = f"in {counted(cached_views, 'view')} of each"
        yield f"rare images come up to {most} times an epoch, {seen}; {remedy}"


def _describe(plan: FinetunePlan, n_train: int) -> str:
    what = (
        "all layers"
        if plan.unfreeze_stages is None
        else "the last stage"
        if plan.unfreeze_stages == 1
        else f"the last {plan.unfreeze_stages} stages"
    )
    views = "" if plan.cached_views is None else f" on {counted(plan.cached_views, 'view')} of each"
    took = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in plan.seconds.items() if seconds)
    return (
        f"plan: train {what} with {n_train:,} images{views}, {counted(plan.epochs, 'epoch')}"
        f"{f' ({took})' if took else ''}"
    )
