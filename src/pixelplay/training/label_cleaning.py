"""Training photographs whose labels look wrong: taken out before anything is learned from them."""

from dataclasses import replace

import numpy as np

from pixelplay.arrays import IntArray
from pixelplay.config import TrainConfig
from pixelplay.data.sampling import class_priors
from pixelplay.data.splits import NEVER_HELD_OUT, assign_folds, check_some_held_out
from pixelplay.evaluation.decision_rule import fit_decision
from pixelplay.evaluation.label_issues import find_suspects
from pixelplay.run_log import Journal
from pixelplay.text import counted, name_some
from pixelplay.training.imbalance import fit_fair_probe
from pixelplay.training.training_data import Material

MAX_DROPPED = 0.5  # of a class in a part: where more look wrong, it is hard rather than its labels wrong


def without_suspects(material: Material, config: TrainConfig, journal: Journal) -> Material:
    """Take out of what is learned from what a probe that has not seen it would label otherwise.

    Folds of train and val judge each other. What chooses or measures stays as it is, with the labels it has:
    a figure that leaves out what looks wrong is too good. So suspects of a validation part still choose, but
    are not learned from once it has chosen. What the user has looked at is right.

    Raises:
        DataError: no photograph can be held out to be judged.
    """
    rows = material.learn
    labels, groups = material.labels[rows], material.parts.groups[rows]
    folds = assign_folds(labels, groups, config.n_folds, config.seed)
    check_some_held_out(folds, material.index.source)
    with journal.progress("looking for wrong labels", None, "strengths tried") as bar:
        fair = fit_fair_probe(material.features[rows], labels, groups, folds, config, on_progress=bar.update)
    logits, priors = fair.probe.oof_logits, class_priors(material.learn_counts)
    decision = fit_decision(logits, labels, groups, priors, metric=config.metric, seed=config.seed)
    judged = folds != NEVER_HELD_OUT
    found = find_suspects(decision.apply(logits)[0][judged], labels[judged])
    suspected = rows[judged][found.order[found.is_suspect[found.order]]]
    suspected = suspected[~material.reviewed[suspected]]  # somebody has looked at these
    dropped = _spare(suspected, material)
    if len(dropped):
        named = name_some([material.index.paths[i] for i in dropped])
        n_learned = counted(len(rows), "photograph")
        journal.note(f"{len(dropped)} of {n_learned} not learned from, as their labels look wrong: {named}")
    return _leave_out(material, dropped, has_val_choose=config.tune != "probe")


def _spare(suspected: IntArray, material: Material) -> IntArray:
    """Of each class in train and in val the most suspicious, at most as many as may be dropped, ascending."""
    dropped = []
    for part in (material.parts.split.train, material.parts.split.val):
        own = suspected[np.isin(suspected, part)]
        most = (MAX_DROPPED * material.counts_of(part)).astype(np.int64)  # (K,)
        dropped += [own[material.labels[own] == k][: most[k]] for k in range(material.n_known)]
    return np.sort(np.concatenate(dropped))


def _leave_out(material: Material, dropped: IntArray, *, has_val_choose: bool) -> Material:
    split = material.parts.split
    val = split.val if has_val_choose else np.setdiff1d(split.val, dropped)
    kept = replace(split, train=np.setdiff1d(split.train, dropped), val=val)
    return replace(
        material,
        parts=replace(material.parts, split=kept),
        learn=np.setdiff1d(material.learn, dropped),
        dropped=dropped,
    )
