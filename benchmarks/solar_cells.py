"""Linear probe on solar cells, 5-fold: macro-F1 of four grades, accuracy of functional against defective.

C, temperature and tau are chosen in each training split by inner folds. The frozen features of
an image are the same in every fold, so they are computed once. Near-duplicates, such as cells cut from
one block of silicon, are in one fold.

Expected: macro-F1 about 0.60, functional against defective about 0.88. Published for functional against
defective, on another split: SVM 82.4 %, fine-tuned VGG-19 88.4 % (Deitsch et al., "Automatic
classification of defective photovoltaic module cells in electroluminescence images", Solar Energy 2019).

Usage: python benchmarks/solar_cells.py TABLE.csv [--backbone lite0] [--seeds 0 1 2]
The table is written by `python demo/solar_cells.py TABLE.csv`.
"""

import numpy as np

from pixelplay.data.sampling import class_priors
from pixelplay.data.splits import assign_folds
from pixelplay.evaluation.decision_rule import fit_decision_rule
from pixelplay.evaluation.metrics import label_metric
from pixelplay.training.linear_probe import fit_probe
from probe_data import ProbeData, load_probe_data
from records import Record, make_parser

N_FOLDS = 5
FIRST_DEFECTIVE = 2  # grades 2 and 3 are defective


def cross_validate(data: ProbeData, seed: int) -> tuple[float, float]:
    """Return macro-F1, and accuracy of functional against defective, out of fold."""
    labels, groups = data.dataset.labels, data.groups
    probs = np.empty((len(labels), len(data.dataset.classes)))
    predicted = np.empty(len(labels), np.int64)
    outer = assign_folds(labels, groups, N_FOLDS, seed)
    for fold in range(N_FOLDS):
        train, test = outer != fold, outer == fold
        inner = assign_folds(labels[train], groups[train], N_FOLDS, seed)
        probe = fit_probe(data.features[train], labels[train], inner)
        priors = class_priors(np.bincount(labels[train]))
        rule = fit_decision_rule(
            probe.oof_logits, labels[train], groups[train], priors, metric="macro_f1", seed=seed
        )
        probs[test], predicted[test] = rule.apply(probe.head.logits(data.features[test]))
        chosen = f"C {probe.C}, T {rule.temperature:.2f}, tau {rule.tau:.2f}"
        print(f"seed {seed}, fold {fold}: {chosen}", flush=True)
    defective = probs[:, FIRST_DEFECTIVE:].sum(axis=1) >= 0.5
    return label_metric("macro_f1", predicted, labels), float(
        (defective == (labels >= FIRST_DEFECTIVE)).mean()
    )


def main() -> None:
    """Cross-validate with each seed."""
    parser = make_parser(__doc__)
    parser.add_argument("table")
    parser.add_argument("--backbone", default="lite0")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    data = load_probe_data(args.table, args.backbone)
    results = [cross_validate(data, seed) for seed in args.seeds]
    names = ("macro-F1", "functional against defective")
    metrics = dict(zip(names, map(list, zip(*results, strict=True)), strict=True))
    for name, values in metrics.items():
        print(f"{name}: {', '.join(f'{value:.4f}' for value in values)}; mean {np.mean(values):.4f}")
    record = Record("Accuracy", "Solar cells, linear probe", args.record)
    record.add("solar cells", f"{N_FOLDS}-fold", args.backbone, metrics, seeds=args.seeds)
    record.write()


if __name__ == "__main__":
    main()
