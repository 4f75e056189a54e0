"""Conformal sets of a probe on TrashNet: how often they hold the true class over random splits.

Each split learns from 70 % of train + val, as `pixelplay train --finetune none` does, takes its thresholds
from the out-of-fold scores that travel with the model, and measures on the other 30 %; the test part plays
no part. Raw sets may be empty; those that PixelPlay gives never are.

Expected (20 splits, target 0.9): raw LAC sets hold the true class in 0.90 ± 0.02, shipped ones at least in
0.89 with about one class each, for the probe is right more often than asked; APS sets likewise.

Usage: python benchmarks/conformal.py TRASHNET [--splits 20] [--coverage 0.9]
"""

import argparse

import numpy as np

from pixelplay.config import ComputeConfig, ConformalScore, TrainConfig
from pixelplay.data.audit import find_duplicates
from pixelplay.data.sampling import class_priors
from pixelplay.data.sources import scan_source
from pixelplay.data.splits import assign_folds, hold_out, join_groups
from pixelplay.evaluation.conformal import class_scores, fit_threshold, prediction_sets, score_held_out
from pixelplay.evaluation.decision_rule import fit_decision_rule
from pixelplay.model.backbone import load_backbone
from pixelplay.model.device import find_device
from pixelplay.model.features import extract_features, find_near_duplicates
from pixelplay.run_log import RunLog
from pixelplay.training.linear_probe import fit_probe

CAM_METHODS: tuple[ConformalScore, ...] = ("lac", "aps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data")
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--coverage", type=float, default=0.9)
    args = parser.parse_args()
    dataset = scan_source(args.data)
    dataset = dataset.select((dataset.labels >= 0) & ~dataset.in_split("test"))
    config, device = TrainConfig(finetune="none"), find_device(ComputeConfig())
    loaded = load_backbone("lite0", None, offline=True)
    log = RunLog()
    images = extract_features(dataset, loaded, config, device, log)
    labels, features = dataset.labels, images.values
    near = [pair.members for pair in find_near_duplicates(dataset, images, None, log)]
    groups = join_groups(dataset, find_duplicates(dataset, images.digests, near))
    found: dict[str, list[float]] = {}
    by_class: dict[str, list[list[float]]] = {}
    for seed in range(args.splits):
        is_new = hold_out(labels, groups, 0.3, seed)
        known = ~is_new
        folds = assign_folds(labels[known], groups[known], config.n_folds, seed)
        fit = fit_probe(features[known], labels[known], folds)
        priors = class_priors(np.bincount(labels[known]))
        rule = fit_decision_rule(
            fit.oof_logits, labels[known], groups[known], priors, metric="accuracy", seed=seed
        )
        decided = rule.apply(fit.oof_logits)
        held_out = score_held_out(*decided, labels[known], groups[known], "oof")
        probs, pred = rule.apply(fit.head.logits(features[is_new]))
        truth, rows = labels[is_new], np.arange(int(is_new.sum()))
        found.setdefault("accuracy", []).append(float((pred == truth).mean()))
        for method in CAM_METHODS:
            threshold = fit_threshold(held_out.set_scores(method), args.coverage)
            raw = class_scores(probs, method) <= threshold
            shipped = prediction_sets(probs, threshold, method)
            held = shipped[rows, truth]
            found.setdefault(f"{method}: raw sets hold the true class", []).append(raw[rows, truth].mean())
            found.setdefault(f"{method}: raw sets that are empty", []).append((~raw.any(axis=1)).mean())
            found.setdefault(f"{method}: shipped sets hold the true class", []).append(held.mean())
            found.setdefault(f"{method}: classes in a shipped set", []).append(shipped.sum(axis=1).mean())
            by_class.setdefault(method, []).append(
                [held[truth == k].mean() for k in range(len(dataset.classes))]
            )
    for name, values in found.items():
        print(f"{name}: {np.mean(values):.4f} ± {np.std(values, ddof=1):.4f} ({args.splits} splits)")
    for method, shares in by_class.items():
        means = np.mean(shares, axis=0)
        named = ", ".join(f"{name} {x:.3f}" for name, x in zip(dataset.classes, means, strict=True))
        print(f"{method}: shipped sets hold the true class: {named}")


if __name__ == "__main__":
    main()
