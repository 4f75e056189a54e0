"""Novelty score: AUROC of a class that was left out of training, for each class in turn.

A linear probe is fitted on 70 % of the other classes. AUROC separates the images of the class left out
from the remaining 30 %. Compared with PixelPlay's score are: one minus the largest probability, energy
(Liu et al. 2020), distance to the nearest image (Sun et al. 2022) and relative Mahalanobis distance (Ren
et al. 2021, 512 principal components, covariances shrunk by a tenth). Predefined test splits are not used.

Expected: PixelPlay's score, which was chosen on TrashNet, has the best or nearly the best mean on each
dataset.

Usage: python benchmarks/novelty.py DATA [DATA …] [--seeds 0 1 2]
For the solar cells use the table that demo/solar_cells.py writes.
"""

import numpy as np
from scipy.stats import rankdata

from pixelplay.array_types import BoolArray, Float64Array, IntArray
from pixelplay.config import TrainConfig
from pixelplay.data.splits import assign_folds
from pixelplay.evaluation.calibration import temperature_softmax
from pixelplay.evaluation.novelty import MAX_REFERENCES, choose_references, fit_novelty, nearest_distances
from pixelplay.model.classifier import feature_scale
from pixelplay.training.linear_probe import fit_probe
from probe_data import ProbeData, load_probe_data
from records import Record, make_parser

N_COMPONENTS, SHRINKAGE = 512, 0.1


def auroc(scores: Float64Array, is_new: BoolArray) -> float:
    """Return the probability that a new image has the higher score; ties count half."""
    ranks, n_new = rankdata(scores), int(is_new.sum())
    return float((ranks[is_new].sum() - n_new * (n_new + 1) / 2) / (n_new * (len(scores) - n_new)))


def relative_mahalanobis(train: Float64Array, labels: IntArray, rows: Float64Array) -> Float64Array:
    """Return the distance to the nearest class minus the distance to all classes together."""
    _, vectors = np.linalg.eigh(train.T @ train / len(train))
    vectors = vectors[:, ::-1][:, :N_COMPONENTS]
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
        "PixelPlay": scale.measure(rows, logits),
        "largest probability": -temperature_softmax(logits, 1.0).max(axis=1),
        "energy": -(largest + np.log(np.exp(logits - largest[:, None]).sum(axis=1))).astype(np.float64),
        "nearest image": nearest_distances(b, a),
        "relative Mahalanobis": relative_mahalanobis(a, own, b),
    }


def leave_classes_out(data: ProbeData, seed: int) -> dict[str, dict[str, float]]:
    """Return the AUROC of every score for every class left out."""
    labels = data.dataset.labels
    found: dict[str, dict[str, float]] = {}
    for k in np.unique(labels):
        is_new = labels == k
        draw = np.random.default_rng(seed).random(data.groups.max() + 1)  # duplicates stay together
        fitted = ~is_new & (draw[data.groups] < 0.7)
        for name, scores in score(data, fitted, seed).items():
            found.setdefault(name, {})[data.dataset.classes[k]] = auroc(scores, is_new[~fitted])
    return found


def main() -> None:
    """Measure every score on every dataset."""
    parser = make_parser(__doc__)
    parser.add_argument("data", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    record = Record("Calibration and uncertainty", "Novelty: AUROC of a class left out", args.record)
    for source in args.data:
        data = load_probe_data(source)
        by_seed = [leave_classes_out(data, seed) for seed in args.seeds]
        for name, by_class in by_seed[0].items():
            values = {"mean of classes": [float(np.mean(list(found[name].values()))) for found in by_seed]}
            classes = {k: float(np.mean([found[name][k] for found in by_seed])) for k in by_class}
            shown = ", ".join(f"{k} {value:.3f}" for k, value in classes.items())
            print(f"{source}, {name}: mean {np.mean(values['mean of classes']):.3f} ({shown})", flush=True)
            record.add(source, "train + val", name, values, seeds=args.seeds)
    record.write()


if __name__ == "__main__":
    main()
