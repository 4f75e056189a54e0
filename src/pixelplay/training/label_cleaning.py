"""Training images whose labels look wrong: taken out before anything is learned from them."""

from dataclasses import replace

import numpy as np

from pixelplay.arrays import IntArray
from pixelplay.config import TrainConfig
from pixelplay.data.sampling import class_priors
from pixelplay.data.splits import NEVER_HELD_OUT, assign_folds, check_some_held_out
from pixelplay.evaluation.decision_rule import fit_decision_rule
from pixelplay.evaluation.label_issues import find_label_issues
from pixelplay.run_log import RunLog
from pixelplay.text import counted, name_some
from pixelplay.training.imbalance import fit_probe_for_imbalance
from pixelplay.training.training_data import TrainingData

MAX_DROPPED = 0.5  # of a class in a part: where more look wrong, it is hard rather than its labels wrong


def remove_label_issues(data: TrainingData, config: TrainConfig, log: RunLog) -> TrainingData:
    """Take out of what is learned from what a probe that has not seen it would label otherwise.

    Folds of train and val judge each other. What chooses or measures stays as it is, with the labels it has:
    a figure that leaves out what looks wrong is too good. So suspects of a validation part still choose, but
    are not learned from once it has chosen. What the user has looked at is right.

    Raises:
        DataError: no image can be held out to be judged.
    """
    rows = data.fit_rows
    labels, groups = data.labels[rows], data.split.groups[rows]
    folds = assign_folds(labels, groups, config.n_folds, config.seed)
    check_some_held_out(folds, data.dataset.source)
    with log.progress("looking for wrong labels", None, "strengths tried") as bar:
        fair = fit_probe_for_imbalance(
            data.features[rows], labels, groups, folds, config, on_progress=bar.update
        )
    logits, priors = fair.probe.oof_logits, class_priors(data.fit_counts)
    rule = fit_decision_rule(logits, labels, groups, priors, metric=config.metric, seed=config.seed)
    judged = folds != NEVER_HELD_OUT
    found = find_label_issues(rule.apply(logits)[0][judged], labels[judged])
    suspected = rows[judged][found.order[found.is_issue[found.order]]]
    suspected = suspected[~data.reviewed[suspected]]  # somebody has looked at these
    dropped = _spare(suspected, data)
    if len(dropped):
        named = name_some([data.dataset.paths[i] for i in dropped])
        n_learned = counted(len(rows), "image")
        log.note(f"{len(dropped)} of {n_learned} not learned from, as their labels look wrong: {named}")
    return _leave_out(data, dropped, has_val_choose=config.finetune != "none")


def _spare(suspected: IntArray, data: TrainingData) -> IntArray:
    """Of each class in train and in val the most suspicious, at most as many as may be dropped, ascending."""
    dropped = []
    for split in (data.split.train, data.split.val):
        own = suspected[np.isin(suspected, split)]
        most = (MAX_DROPPED * data.counts_of(split)).astype(np.int64)  # (K,)
        dropped += [own[data.labels[own] == k][: most[k]] for k in range(data.n_known)]
    return np.sort(np.concatenate(dropped))


def _leave_out(data: TrainingData, dropped: IntArray, *, has_val_choose: bool) -> TrainingData:
    split = data.split
    val = split.val if has_val_choose else np.setdiff1d(split.val, dropped)
    kept = replace(split, train=np.setdiff1d(split.train, dropped), val=val)
    return replace(
        data,
        split=kept,
        fit_rows=np.setdiff1d(data.fit_rows, dropped),
        dropped=dropped,
    )
