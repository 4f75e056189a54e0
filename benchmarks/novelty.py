"""Novelty score: how well it separates classes that were left out of training, in turn, from the others.

A linear probe is fitted on 70 % of the images of the other classes. AUROC separates the images of the classes
left out from the remaining 30 %. Compared with PixelPlay's score are: one minus the largest probability,
energy (Liu et al. 2020), distance to the nearest image (Sun et al. 2022) and relative Mahalanobis distance
(Ren et al. 2021, 512 principal components, covariances shrunk by a tenth). For PixelPlay's score, the images
above two thresholds and the quantiles of both kinds of images are also given. Predefined test splits are not
used.

Expected: PixelPlay's score has the best or nearly the best mean, and at most about 5 % of the images of known
classes exceed 0.95.

Usage: python benchmarks/novelty.py DATA [DATA …] [--groups 4] [--seeds 0 1 2]
For the solar cells use the table that demo/solar_cells.py writes.
"""

import time

import numpy as np
from scipy.stats import rankdata

from pixelplay.array_types import BoolArray, Float64Array, IntArray
from pixelplay.config import TrainConfig
from pixelplay.data.splits import assign_folds
from pixelplay.evaluation.calibration import temperature_softmax
from pixelplay.evaluation.novelty import (
    MAX_REFERENCES,
    NOVELTY_THRESHOLD,
    choose_references,
    fit_novelty,
    nearest_distances,
)
from pixelplay.model.classifier import feature_scale
from pixelplay.training.linear_probe import fit_probe
from probe_data import ProbeData, load_probe_data
from records import Record, make_parser

N_COMPONENTS, SHRINKAGE = 512, 0.1
OWN_SCORE = "PixelPlay"
THRESHOLDS = (NOVELTY_THRESHOLD, 0.99)
QUANTILES = (0.1, 0.5, 0.9)
Metrics = dict[str, float]


def auroc(scores: Float64Array, is_new: BoolArray) -> float:
    """Return the probability that a new image has the higher score; ties count half."""
    ranks, n_new = rankdata(scores), int(is_new.sum())
    return float((ranks[is_new].sum() - n_new * (n_new + 1) / 2) / (n_new * (len(scores) - n_new)))


def relative_mahalanobis(train: Float64Array, labels: IntArray, rows: Float64Array) -> Float64Array:
    """Return the distance to the nearest class minus the distance to all classes together."""
    vectors = np.linalg.svd(train, full_matrices=False)[2][:N_COMPONENTS].T
    a, b = train @ vectors, rows @ vectors

    def precision(centred: Float64Array) -> Float64Array:
        covariance = centred.T @ centred / len(centred)
        target = np.trace(covariance) / len(covariance) * np.eye(len(covariance))
        return np.asarray(np.linalg.inv((1 - SHRINKAGE) * covariance + SHRINKAGE * target))

    def distance(centre: Float64Array, inverse: Float64Array) -> Float64Array:
        return np.asarray((((b - centre) @ inverse) * (b - centre)).sum(axis=1))

    means = np.stack([a[labels == k].mean(axis=0) for k in range(labels.max() + 1)])
    within = precision(a - means[labels])
    nearest = np.min([distance(mean, within) for mean in means], axis=0)
    return np.asarray(nearest - distance(a.mean(axis=0), precision(a - a.mean(axis=0))))


def score(data: ProbeData, fitted: BoolArray, seed: int) -> dict[str, Float64Array]:
    """Fit a probe on some images; return every score of the others."""
    train, rows = data.features[fitted], data.features[~fitted]
    own = np.unique(data.dataset.labels[fitted], return_inverse=True)[1]
    folds = assign_folds(own, data.groups[fitted], TrainConfig().n_folds, seed)
    probe = fit_probe(train, own, folds)
    logits = probe.head.logits(rows)
    chosen, held_out = choose_references(own, MAX_REFERENCES, seed), np.flatnonzero(folds >= 0)
    scale = fit_novelty(
        train[chosen], folds[chosen], train[held_out], folds[held_out], probe.oof_logits[held_out]
    )
    mean, deviation = feature_scale(train)
    a, b = ((x - mean).astype(np.float64) / deviation for x in (train, rows))
    largest = logits.max(axis=1)
    return {
        OWN_SCORE: scale.measure(rows, logits),
        "largest probability": -temperature_softmax(logits, 1.0).max(axis=1),
        "energy": -(largest + np.log(np.exp(logits - largest[:, None]).sum(axis=1))).astype(np.float64),
        "nearest image": nearest_distances(b, a),
        "relative Mahalanobis": relative_mahalanobis(a, own, b),
    }


def describe(scores: Float64Array, is_new: BoolArray, *, is_scaled: bool) -> Metrics:
    """Return AUROC, and for a score on the scale of novelty also rates and quantiles."""
    found = {"AUROC": auroc(scores, is_new)}
    if is_scaled:
        for kind, own in (("left out", scores[is_new]), ("known", scores[~is_new])):
            found |= {f"{kind}: above {least}": float((own > least).mean()) for least in THRESHOLDS}
            found |= {f"{kind}: {q} quantile": float(np.quantile(own, q)) for q in QUANTILES}
    return found


def leave_classes_out(data: ProbeData, seed: int, n_groups: int | None) -> dict[str, Metrics]:
    """Return the metrics of every score, as means over the groups of classes left out in turn."""
    labels, n_classes = data.dataset.labels, len(data.dataset.classes)
    rng = np.random.default_rng(seed)
    group_of = rng.permutation(n_classes) % min(n_groups or n_classes, n_classes)  # (K,)
    draw = rng.random(data.groups.max() + 1)  # duplicates stay together
    found: dict[str, list[Metrics]] = {}
    for group in np.unique(group_of):
        is_new = group_of[labels] == group
        fitted = ~is_new & (draw[data.groups] < 0.7)
        for name, scores in score(data, fitted, seed).items():
            metrics = describe(scores, is_new[~fitted], is_scaled=name == OWN_SCORE)
            found.setdefault(name, []).append(metrics)
    return {
        name: {key: float(np.mean([each[key] for each in turns])) for key in turns[0]}
        for name, turns in found.items()
    }


def main() -> None:
    """Measure every score on every dataset."""
    parser = make_parser(__doc__)
    parser.add_argument("data", nargs="+")
    parser.add_argument("--groups", type=int, help="groups of classes left out in turn (default: each class)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    turns = "a class" if args.groups is None else f"one of {args.groups} groups of classes"
    title = f"Novelty of images of {turns} left out of training"
    record = Record("Calibration and uncertainty", title, args.record)
    of_all: dict[str, list[list[Metrics]]] = {}
    for source in args.data:
        start = time.monotonic()
        data = load_probe_data(source)
        by_seed = [leave_classes_out(data, seed, args.groups) for seed in args.seeds]
        for name, first in by_seed[0].items():
            found = [metrics[name] for metrics in by_seed]
            of_all.setdefault(name, []).append(found)
            values = {key: [metrics[key] for metrics in found] for key in first}
            record.add(source, "train + val", name, values, seeds=args.seeds)
            shown = ", ".join(f"{key} {np.mean(each):.3f}" for key, each in values.items())
            print(f"{source}, {name}: {shown}", flush=True)
        print(f"{time.monotonic() - start:.0f} s", flush=True)
    for name, datasets in of_all.items():
        means = {
            key: [float(np.mean([found[i][key] for found in datasets])) for i in range(len(args.seeds))]
            for key in datasets[0][0]
        }
        record.add(f"mean of {len(datasets)}", "train + val", name, means, seeds=args.seeds)
    record.write()


if __name__ == "__main__":
    main()
