"""Fine-tuning on few images: one network per fold, compared with the probe out of fold, weights averaged.

A validation split of fifty images cannot tell whether fine-tuning helps. Here every image is predicted by
a network that was not trained on it, as for the linear probe, and both are compared image by image. The
deployed network has the mean weights of all networks, which started from the same weights, so it has been
trained on all images without further training.

Source: Wortsman et al., "Model soups", ICML 2022, arXiv:2203.05482.
"""

import copy
import os
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pixelplay.array_types import Float32Array, Float64Array, IntArray
from pixelplay.config import TrainConfig
from pixelplay.data.sampling import class_priors
from pixelplay.data.splits import assign_folds
from pixelplay.evaluation.decision_rule import calibrated_nll, compare_nll
from pixelplay.model.ensemble import average_members, ensemble_member
from pixelplay.training.checkpoint import copy_weights, restore_weights
from pixelplay.training.finetune import assemble, check_stopped, prepare_finetuning
from pixelplay.training.finetune_task import FinetuneTask, can_average_with_probe
from pixelplay.training.imbalance import refit_probe_head
from pixelplay.training.linear_probe import LinearProbe
from pixelplay.training.run_context import RunContext
from pixelplay.training.settings_conflicts import FinetunedMethod
from pixelplay.training.trained_classifier import TrainedClassifier
from pixelplay.training.trainer import Trainer
from pixelplay.training.training_data import TrainingData

N_FOLDS = 3  # each network is trained on two thirds
SHARES = (0.25, 0.5, 0.75, 1.0)  # of the network in the mean of its logits and the probe's
CLEAR = 1.64  # standard errors of the paired difference; one-sided 95 %


def finetune_folds(
    data: TrainingData, probe: LinearProbe, ctx: RunContext, method: FinetunedMethod
) -> tuple[TrainedClassifier | None, dict[str, Any], list[dict[str, float]]]:
    """Train one network per fold and average their weights, if held-out images prefer that to the probe.

    Without --finetune auto the averaged network is returned in any case.

    Args:
        probe: fitted on all images; its settings are used within the folds.

    Returns:
        The classifier, None where the probe is to be used; the evidence; the history of all networks.

    Raises:
        TimeBudgetError: the time budget or the disk has no room for it.
        BackboneSplitError: the network has no last stages that could be trained on their own.
        ConfigError: training failed.
    """
    rows, config, log_priors = data.fit_rows, ctx.config, np.log(class_priors(data.fit_counts))
    labels, groups = data.labels[rows], data.split.groups[rows]
    folds = assign_folds(labels, groups, N_FOLDS, config.seed)  # (N,)
    tasks = [_fold_task(data, probe, ctx, rows[folds == fold]) for fold in range(N_FOLDS)]
    plan, inputs, frozen, trainable = prepare_finetuning(tasks[0], method)
    # the probe's and the networks' logits of images that they were not trained on
    logits = np.full((2, len(rows), data.n_known), np.nan, np.float32)
    networks: list[dict[str, Tensor]] = []
    history: list[dict[str, float]] = []
    offsets, priors = [], np.exp(log_priors)
    for fold, task in enumerate(tasks):
        own = folds == fold
        shift = log_priors - np.log(class_priors(task.counts))  # from the fold's class frequencies to all
        offsets.append(task.offset(task.train) + shift)
        classifier = task.classifier(frozen, copy.deepcopy(trainable))
        trainer = Trainer(
            classifier,
            inputs,
            task.schedule(plan),
            replace(task.validation(), rows=rows[:0], labels=rows[:0], offset=offsets[-1], probe_logits=None),
            task.loss(task.train),
            task.ctx.derive(run_dir=os.path.join(ctx.checkpoint_dir, f"finetune-{fold}")),
            time_limit_s=task.time_limit_s(plan, n_left=N_FOLDS - fold),
            title=f"training network {fold + 1} of {N_FOLDS}",
        )
        state = trainer.fit()
        check_stopped(task, state.stopped, state.best_epoch)
        if not state.best_epoch:
            return None, {}, history  # the weights are those of the probe
        networks.append(copy_weights(classifier))
        history += [{"fold": fold, **row} for row in state.history]
        logits[0, own] = task.probe.head.logits(data.features[rows[own]]) + shift
        mirrors = (False, True) if config.hflip else (False,)
        views = [trainer.predict(rows[own], mirrored=mirrored) for mirrored in mirrors]
        logits[1, own] = np.mean(views, axis=0)
        measured = (folds >= 0) & (folds <= fold)
        of_probe, of_network = logits[:, measured]
        share, mixed = _choose_share(of_probe, of_network, labels[measured], priors, config)
        evidence: dict[str, Any] = compare_nll(
            (of_probe, mixed),
            labels[measured],
            groups[measured],
            priors,
            metric=config.metric,
            seed=config.seed,
        )
        is_better = evidence["nll_gain"] > 0
        if fold == N_FOLDS - 1:
            is_clear = evidence["nll_gain"] > CLEAR * evidence["standard_error"]
            is_better = is_clear and evidence["metric_gain"] >= 0
        evidence |= {"n": len(mixed), "network_share": share}
        evidence["auto_selects"] = method if is_better else "none"
        if config.finetune == "auto" and not is_better:
            return None, evidence, history
    logits[1, measured] = mixed
    stacked = {name: torch.stack([each[name] for each in networks]) for name in networks[0]}
    restore_weights(classifier, {name: values.mean(0) for name, values in stacked.items()})
    backbone, head = assemble(task, classifier, np.mean(offsets, axis=0))
    if share < 1:
        network = ensemble_member(backbone, head, classifier.stages.n_frozen)
        backbone = ctx.backbone.backbone
        members = [ensemble_member(backbone, probe.head, None), network]
        backbone, head = average_members(backbone, members, [1 / (2 - 2 * share), 1 / (2 * share)])
    trained = TrainedClassifier(
        finetune=method,
        backbone=backbone,
        head=head,
        trained_on=rows,
        prior_rows=rows,
        held_out=rows,
        logits=logits[1],
        folds=folds,
        chosen=_describe_choices(method, evidence, probe, task.ctx.config),
        history=history,
        plan=plan,
    )
    return trained, evidence, history


def _describe_choices(
    method: FinetunedMethod, evidence: dict[str, Any], probe: LinearProbe, config: TrainConfig
) -> dict[str, dict[str, Any]]:
    """Return each setting with its value and what selected it."""
    selected, fixed = {"chosen_on": "train+val, out of fold", "n": evidence["n"]}, {"chosen_on": None}
    is_mixed = config.finetuning.ensemble_probe == "auto" and can_average_with_probe(config)
    return {
        "finetune": {"value": method, **(selected if config.finetune == "auto" else fixed), **evidence},
        "network_share": {"value": evidence["network_share"], **(selected if is_mixed else fixed)},
        "features": {**probe.feature_evidence, **selected},
        "imbalance": {
            **probe.evidence,
            "value": config.imbalance,
            **(selected if probe.was_compared else fixed),
        },
    }


def _fold_task(data: TrainingData, probe: LinearProbe, ctx: RunContext, held_out: IntArray) -> FinetuneTask:
    """Set up the training without one fold; it starts from a probe fitted on the same images."""
    train = np.setdiff1d(data.fit_rows, held_out)
    own = replace(data, split=replace(data.split, train=train, val=held_out))
    head = refit_probe_head(probe, data.features[train], data.labels[train])
    return FinetuneTask(own, replace(probe, head=head), ctx, n_networks=N_FOLDS)


def _choose_share(
    probe: Float32Array,
    network: Float32Array,
    labels: IntArray,
    priors: Float64Array,
    config: TrainConfig,
) -> tuple[float, Float32Array]:
    """Choose the share of the network by the NLL of the mean logits (n, K), and return these."""
    shares = {"auto": SHARES, "on": (0.5,), "off": (1.0,)}[config.finetuning.ensemble_probe]
    mixed = {share: np.float32(1 - share) * probe + np.float32(share) * network for share in shares}
    share = min(shares, key=lambda each: calibrated_nll(mixed[each], labels, priors, config.metric))
    return share, mixed[share]
