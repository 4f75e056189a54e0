"""From the probe to a tuned network: plan, cut, views, loop, and back into one backbone."""

import copy
import os
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from pixelplay.config import TrainConfig
from pixelplay.errors import ConfigError
from pixelplay.journal import Journal
from pixelplay.model.backbone import Backbone, LoadedBackbone
from pixelplay.model.head import LinearHead
from pixelplay.model.tail import cut_backbone
from pixelplay.training.batches import Source
from pixelplay.training.bench import Bench, Workplace
from pixelplay.training.checkpoint import has_checkpoint
from pixelplay.training.finetune import finetune
from pixelplay.training.job import Job
from pixelplay.training.material import Material
from pixelplay.training.plan import Plan, TunedDepth, write_plan
from pixelplay.training.planning import make_plan
from pixelplay.training.rare import FairProbe


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """A tuned network.

    Attributes:
        backbone: whole, with what was trained in its place.
        head: features → natural-prior logits.
        logits: (n, K) of the validation part, as prediction will make them.
        history: one row for each epoch, the first of the untrained classifier.
        best_epoch: whose weights these are.
        plan: what was done.
    """

    backbone: Backbone
    head: LinearHead
    logits: NDArray[np.float32]
    history: list[dict[str, float]]
    best_epoch: int
    plan: Plan


def tune(
    material: Material,
    loaded: LoadedBackbone,
    depth: TunedDepth,
    probe: FairProbe,
    config: TrainConfig,
    workplace: Workplace,
    journal: Journal,
) -> Tuned:
    """Train the last stages, or all, starting from the probe's head.

    Raises:
        TooShortError: the time budget has no room for it; the message says what would fit.
        ConfigError: the network cannot be cut, or training failed.
    """
    if config.imbalance == "auto":
        config = replace(config, imbalance=probe.imbalance)
    bench = Bench(material, loaded, probe, config, workplace)
    plan = make_plan(bench, depth)
    os.makedirs(workplace.checkpoints, exist_ok=True)
    write_plan(plan, os.path.join(workplace.folder, "plan.json"))
    journal.tell(_describe(plan, len(bench.train)))
    halves = cut_backbone(loaded.backbone, plan.n_stages, loaded.preprocessing.input_size)
    source: Source = bench.pixels
    if plan.n_views is not None:
        source = views = bench.views(halves, plan.n_views)
        n_views = plan.n_views * len(bench.train) + len(bench.val)
        with journal.progress("preparing views", n_views, "views") as bar:
            views.compute(
                bench.train,
                bench.val,
                batch_size=config.compute.batch_size,
                num_workers=config.compute.num_workers,
                on_progress=bar.update,
            )
    classifier, job = bench.classifier(halves), bench.job(source, plan)
    if halves.front is None:
        _check_sizes(job, loaded.backbone)
    where = finetune(
        job,
        classifier,
        workplace.checkpoints,
        journal,
        is_resumed=has_checkpoint(workplace.checkpoints),
    )
    is_random = config.finetune.start != "probe" or config.finetune.head == "mlp"
    if where.stopped and where.best_epoch == 0 and is_random:
        raise ConfigError(f"{where.stopped}, before anything was learned; lower --lr and --head-lr")
    if where.stopped:
        journal.note(
            f"training ended early: {where.stopped}; the weights are those of epoch {where.best_epoch}"
        )
    backbone = copy.deepcopy(loaded.backbone)
    halves.tail.cpu().write_into(backbone)
    head = classifier.head.cpu().export().shifted(bench.offset)
    if config.imbalance == "crt":
        head = bench.refit_head(backbone)
    return Tuned(
        backbone=backbone.eval(),
        head=head,
        logits=head.logits(bench.read(backbone, bench.val)),
        history=where.history,
        best_epoch=where.best_epoch,
        plan=plan,
    )


def _check_sizes(job: Job, backbone: Backbone) -> None:
    """Raise where a network takes no images of a size that training begins with.

    Raises:
        ConfigError: the size is named.
    """
    for size in sorted({job.size_px(epoch) for epoch in range(job.epochs)} - {job.input_size}):
        try:
            with torch.inference_mode():
                backbone.eval()(torch.zeros(1, 3, size, size))
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(
                f"{backbone.name} takes no images of {size} px ({' '.join(str(error).split())[:120]}), with "
                f"which first_size_frac={job.config.finetune.first_size_frac} begins; use --first-size-frac 1"
            ) from None


def _describe(plan: Plan, n_train: int) -> str:
    what = (
        "all layers"
        if plan.n_stages is None
        else "the last stage"
        if plan.n_stages == 1
        else f"the last {plan.n_stages} stages"
    )
    views = "" if plan.n_views is None else f" on {plan.n_views} views of each"
    took = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in plan.seconds.items() if seconds)
    return (
        f"plan: train {what} with {n_train:,} photographs{views}, {plan.epochs} epochs"
        f"{f' ({took})' if took else ''}"
    )
