"""Label cleaning: drop training images whose labels look wrong before anything is fitted."""

from dataclasses import replace

import numpy as np

from pixelplay.array_types import IntArray
from pixelplay.data.sampling import class_priors
from pixelplay.data.splits import NEVER_HELD_OUT
from pixelplay.evaluation.decision_rule import fit_decision_rule
from pixelplay.evaluation.label_issues import find_label_issues
from pixelplay.text import EXAMPLES, counted, name_some
from pixelplay.training.imbalance import fit_probe_on_rows
from pixelplay.training.run_context import RunContext
from pixelplay.training.training_data import TrainingData

MAX_DROPPED = 0.5  # fraction of a class in a split: beyond it the class is hard rather than mislabelled


def remove_label_issues(data: TrainingData, ctx: RunContext) -> TrainingData:
    """Drop images of train and val that an out-of-fold linear probe would label otherwise.

    Images that select or measure stay, with their labels: metrics without the doubtful ones would be
    optimistic. So label issues in a validation split still select, but are not trained on in the refit.
    Labels that the user has reviewed are kept.
    """
    rows, config = data.fit_rows, ctx.config
    labels, groups = data.labels[rows], data.split.groups[rows]
    probe, folds = fit_probe_on_rows(data, rows, ctx, title="finding label issues")
    priors = class_priors(data.fit_counts)
    rule = fit_decision_rule(probe.oof_logits, labels, groups, priors, metric=config.metric, seed=config.seed)
    is_held_out = folds != NEVER_HELD_OUT
    scores, _, is_issue = find_label_issues(rule.apply(probe.oof_logits)[0][is_held_out], labels[is_held_out])
    order = np.argsort(scores, kind="stable")
    issues = rows[is_held_out][order[is_issue[order]]]
    dropped = _limit(issues[~data.reviewed[issues]], data)
    if len(dropped):
        n = counted(len(dropped), "image")
        ctx.log.note(
            f"dropped {n} of {len(rows):,} with label issues: {name_some(data.paths_of(dropped), EXAMPLES)}"
        )
    kept_val = data.split.val if config.finetune != "none" else np.setdiff1d(data.split.val, dropped)
    split = replace(data.split, train=np.setdiff1d(data.split.train, dropped), val=kept_val)
    return replace(data, split=split, fit_rows=np.setdiff1d(rows, dropped), dropped=dropped)


def _limit(issues: IntArray, data: TrainingData) -> IntArray:
    """Keep the worst issues of each class in train and in val, up to MAX_DROPPED; ascending positions."""
    dropped = []
    for split in (data.split.train, data.split.val):
        own = issues[np.isin(issues, split)]
        limits = (MAX_DROPPED * data.counts_of(split)).astype(np.int64)  # (K,)
        dropped += [own[data.labels[own] == k][: limits[k]] for k in range(data.n_known)]
    return np.sort(np.concatenate(dropped))
