"""Conformal prediction sets of a linear probe: coverage over random splits.

Each repetition fits on 70 % of the images as `pixelplay train --finetune none` does, takes the thresholds
from the out-of-fold scores that are stored with the model, and measures on the other 30 %. The predefined
test split is not used. Raw sets may be empty; the sets that PixelPlay reports never are.

Expected on TrashNet (20 repetitions, target 0.9): raw LAC sets cover 0.90 ± 0.02, reported sets at least
0.89 with about one class each, because the probe is right more often than the target; APS sets the same.

Usage: python benchmarks/conformal.py TRASHNET [--n-repeats 20] [--coverage 0.9]
"""

from typing import get_args

import numpy as np

from pixelplay.array_types import BoolArray
from pixelplay.config import ConformalScore, TrainConfig
from pixelplay.data.sampling import class_priors
from pixelplay.data.splits import assign_folds, hold_out
from pixelplay.evaluation.conformal import (
    fit_conformal_threshold,
    nonconformity_scores,
    prediction_sets,
    score_held_out,
)
from pixelplay.evaluation.decision_rule import fit_decision_rule
from pixelplay.training.linear_probe import fit_probe
from probe_data import ProbeData, load_probe_data
from records import Record, make_parser

Measured = dict[str, dict[str, float]]  # conformal score → metric → value


def measure_split(data: ProbeData, held_out: BoolArray, coverage: float, seed: int) -> tuple[float, Measured]:
    """Fit on one side of a split; return the accuracy and the metrics of the sets on the other side."""
    labels, groups, fitted = data.dataset.labels, data.groups, ~held_out
    folds = assign_folds(labels[fitted], groups[fitted], TrainConfig().n_folds, seed)
    probe = fit_probe(data.features[fitted], labels[fitted], folds)
    priors = class_priors(np.bincount(labels[fitted]))
    rule = fit_decision_rule(
        probe.oof_logits, labels[fitted], groups[fitted], priors, metric="accuracy", seed=seed
    )
    scores = score_held_out(*rule.apply(probe.oof_logits), labels[fitted], groups[fitted], "oof")
    probs, predicted = rule.apply(probe.head.logits(data.features[held_out]))
    truth = labels[held_out]
    rows = np.arange(len(truth))
    found: Measured = {}
    for method in get_args(ConformalScore):
        threshold = fit_conformal_threshold(scores.conformal_scores(method), coverage)
        raw = nonconformity_scores(probs, method) <= threshold
        reported = prediction_sets(probs, threshold, method)
        covered = reported[rows, truth]
        found[method] = {
            "coverage, raw sets": float(raw[rows, truth].mean()),
            "empty raw sets": float((~raw.any(axis=1)).mean()),
            "coverage": float(covered.mean()),
            "classes per set": float(reported.sum(axis=1).mean()),
        }
        for k, name in enumerate(data.dataset.classes):
            found[method][f"coverage of {name}"] = float(covered[truth == k].mean())
    return float((predicted == truth).mean()), found


def main() -> None:
    """Measure every conformal score over random splits."""
    parser = make_parser(__doc__)
    parser.add_argument("data")
    parser.add_argument("--n-repeats", type=int, default=20, help="random splits [20]")
    parser.add_argument("--coverage", type=float, default=0.9, help="target coverage, 0–1 [0.9]")
    args = parser.parse_args()
    data = load_probe_data(args.data)
    seeds = range(args.n_repeats)
    results = [
        measure_split(data, hold_out(data.dataset.labels, data.groups, 0.3, seed), args.coverage, seed)
        for seed in seeds
    ]
    title = f"Conformal prediction sets, target coverage {args.coverage}"
    record = Record("Calibration and uncertainty", title, args.record)
    for method in results[0][1]:
        values = {name: [found[method][name] for _, found in results] for name in results[0][1][method]}
        values = {"accuracy": [accuracy for accuracy, _ in results], **values}
        for name, numbers in values.items():
            print(f"{method}, {name}: {np.mean(numbers):.4f} ± {np.std(numbers, ddof=1):.4f}")
        record.add(args.data, "train + val, random 70 : 30", method, values, seeds=seeds)
    record.write()


if __name__ == "__main__":
    main()
