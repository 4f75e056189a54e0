"""Solar cells, 5-fold: four grades for macro-F1, and functional against defective.

Everything is chosen inside each training part: C, T and tau by folds of their own. The frozen
features of an image are the same in every fold, so they are computed once. Slices of one block of
silicon, and other altered copies, share a fold.

Published on functional against defective, another split: SVM 82.4 %, fine-tuned VGG-19 88.4 %
(Deitsch et al. 2019). Expected here: macro-F1 about 0.60, functional against defective about 0.88.

Usage: python benchmarks/solar_cells.py TABLE.csv [--backbone lite0] [--seeds 0 1 2]
(the table is the demo's: python demo/solar_cells.py TABLE.csv)
"""

import argparse

import numpy as np

from pixelplay.config import TrainConfig
from pixelplay.data.audit import find_duplicates
from pixelplay.data.sampling import class_priors
from pixelplay.data.sources import scan_source
from pixelplay.data.splits import assign_folds, join_groups
from pixelplay.evaluation.decision_rule import fit_decision_rule
from pixelplay.evaluation.metrics import label_metric
from pixelplay.model.backbone import load_backbone
from pixelplay.model.device import find_device
from pixelplay.model.features import extract_features, find_near_duplicates
from pixelplay.run_log import RunLog
from pixelplay.training.linear_probe import fit_probe

N_FOLDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("table")
    parser.add_argument("--backbone", default="lite0")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    dataset = scan_source(args.table)
    loaded = load_backbone(args.backbone, None, offline=True)
    config, log = TrainConfig(finetune="none"), RunLog(quiet=True)
    images = extract_features(dataset, loaded, config, find_device(config.compute), log)
    labels = dataset.labels
    near = [pair.members for pair in find_near_duplicates(dataset, images, None, log)]
    groups = join_groups(dataset, find_duplicates(dataset, images.digests, near))
    scores, binary = [], []
    for seed in args.seeds:
        probs = np.empty((len(labels), len(dataset.classes)))
        pred = np.empty(len(labels), np.int64)
        outer = assign_folds(labels, groups, N_FOLDS, seed)
        for fold in range(N_FOLDS):
            train, test = outer != fold, outer == fold
            inner = assign_folds(labels[train], groups[train], N_FOLDS, seed)
            probe = fit_probe(images.values[train], labels[train], inner)
            rule = fit_decision_rule(
                probe.oof_logits,
                labels[train],
                groups[train],
                class_priors(np.bincount(labels[train])),
                metric="macro_f1",
                seed=seed,
            )
            probs[test], pred[test] = rule.apply(probe.head.logits(images.values[test]))
            chosen = f"C {probe.C}, T {rule.temperature:.2f}, tau {rule.tau:.2f}"
            print(f"seed {seed} fold {fold}: {chosen}")
        scores.append(label_metric("macro_f1", pred, labels))
        is_defective = probs[:, 2:].sum(1) >= 0.5
        binary.append(float((is_defective == (labels >= 2)).mean()))
        print(
            f"seed {seed}: macro-F1 {scores[-1]:.4f}, functional against defective {binary[-1]:.4f}",
            flush=True,
        )
    for name, values in (("macro-F1", scores), ("functional against defective", binary)):
        print(f"{name}: {np.mean(values):.4f} ± {np.std(values, ddof=1):.4f} ({len(values)} seeds)")


if __name__ == "__main__":
    main()
