"""Would more photographs help? The same probe learned from fewer, measured on the same photographs."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixelplay.evaluation.comparison import newcombe
from pixelplay.evaluation.decision import Decision
from pixelplay.evaluation.intervals import wilson
from pixelplay.training.learn import Learned
from pixelplay.training.material import Material
from pixelplay.training.probe import fit_on_some

SHARES = (0.25, 0.5)  # of each class; all of it is measured anyway
MIN_LEARNED = 8  # photographs of a class: a quarter of fewer is hardly any

IntArray = NDArray[np.int64]


def measure_curve(
    material: Material, learned: Learned, decision: Decision, seed: int
) -> Mapping[str, Any] | None:
    """Learn from a quarter and from half of each class, out of fold, as all of it was.

    Strength and decision stay as they are, so the gain is of photographs alone.

    Returns:
        What metrics.json has: figures at each share, and for all and for each class what the second half
        has gained, photograph by photograph; None where the classifier is no plain probe.
    """
    rows = learned.held_out
    if learned.depth != "probe" or learned.folds is None or "value" not in learned.chosen.get("C", {}):
        return None
    labels, folds, C = material.labels[rows], learned.folds, float(learned.chosen["C"]["value"])
    preds = {
        share: decision.apply(
            fit_on_some(material.features[rows], labels, folds, C, choose_share(labels, share, seed))
        )[1]
        for share in SHARES
    }
    preds[1.0] = decision.apply(learned.logits)[1]
    measured = folds >= 0
    right = {share: (pred == labels)[measured] for share, pred in preds.items()}
    counts, own = np.bincount(labels, minlength=material.n_known), labels[measured]
    by_class = {
        name: _compare(right, own == k, int(counts[k]))
        for k, name in enumerate(material.known_classes)
        if counts[k] >= MIN_LEARNED and (own == k).any()
    }
    everything = np.ones(len(own), bool)
    return {"measured_on": "oof", "all": _compare(right, everything, len(labels)), "by_class": by_class}


def choose_share(labels: IntArray, share: float, seed: int) -> NDArray[np.bool_]:
    """Mark (N,) a share of each class at random, rounded up; a smaller share is part of a larger."""
    order = np.random.default_rng(seed).permutation(len(labels))
    chosen = np.zeros(len(labels), bool)
    for k in np.unique(labels):
        own = order[labels[order] == k]
        chosen[own[: int(np.ceil(share * len(own)))]] = True
    return chosen


def _compare(right: Mapping[float, NDArray[np.bool_]], rows: NDArray[np.bool_], n: int) -> dict[str, Any]:
    """Share of right answers at each share learned from, and the paired gain of the second half."""
    points = [
        {"n_learned": int(np.ceil(share * n)), **wilson(int(is_right[rows].sum()), int(rows.sum())).to_json()}
        for share, is_right in right.items()
    ]
    return {"points": points, "gain": newcombe(right[1.0][rows], right[0.5][rows]).to_json()}
