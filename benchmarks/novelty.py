"""Each class left out in turn: does the novelty of its images tell them from those of known classes?

A probe is learned from 70 % of the other classes; AUROC of the rest against all images of the class
left out, of the score that PixelPlay ships beside others: one minus the largest probability, energy (Liu et
al. 2020), distance to the nearest image (Sun et al. 2022), relative Mahalanobis distance (Ren et al.
2021, 512 principal components, covariances shrunk by a tenth). Test parts that the data gives play no part.

Expected: the shipped score has the best or nearly the best mean on each set; it was chosen on TrashNet.

Usage: python benchmarks/novelty.py DATA [DATA …] [--seeds 0 1 2]
The solar cells come as the table that demo/solar_cells.py writes.
"""

import argparse

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from pixelplay.config import ComputeConfig, TrainConfig
from pixelplay.data.audit import find_duplicates
from pixelplay.data.sources import scan_source
from pixelplay.data.splits import assign_folds, join_groups
from pixelplay.evaluation.calibration import natural_probs
from pixelplay.evaluation.novelty import MAX_REFERENCES, choose_references, fit_novelty, nearest_distances
from pixelplay.model.backbone import load_backbone
from pixelplay.model.classifier import feature_scale
from pixelplay.model.device import find_device
from pixelplay.model.features import extract_features, find_near_duplicates
from pixelplay.run_log import RunLog
from pixelplay.training.linear_probe import fit_probe

N_COMPONENTS, SHRINK = 512, 0.1
FloatArray = NDArray[np.float64]


def auroc(scores: FloatArray, is_new: NDArray[np.bool_]) -> float:
    """Probability that a new image has the higher score, ties counted half."""
    ranks, n_new = rankdata(scores), int(is_new.sum())
    return float((ranks[is_new].sum() - n_new * (n_new + 1) / 2) / (n_new * (len(scores) - n_new)))


def relative_mahalanobis(train: FloatArray, labels: NDArray[np.int64], rows: FloatArray) -> FloatArray:
    """Distance to the nearest class less that to all classes together."""
    _, vectors = np.linalg.eigh(train.T @ train / len(train))
    vectors = vectors[:, ::-1][:, :N_COMPONENTS]
    a, b = train @ vectors, rows @ vectors

    def inverse(centred: FloatArray) -> FloatArray:
        covariance = centred.T @ centred / len(centred)
        even = np.trace(covariance) / len(covariance) * np.eye(len(covariance))
        return np.asarray(np.linalg.inv((1 - SHRINK) * covariance + SHRINK * even))

    def distance(centre: FloatArray, precision: FloatArray) -> FloatArray:
        return np.asarray((((b - centre) @ precision) * (b - centre)).sum(axis=1))

    means = np.stack([a[labels == k].mean(axis=0) for k in range(labels.max() + 1)])
    own = inverse(a - means[labels])
    nearest = np.min([distance(mean, own) for mean in means], axis=0)
    return nearest - distance(a.mean(axis=0), inverse(a - a.mean(axis=0)))


def score(
    features: NDArray[np.float32],
    labels: NDArray[np.int64],
    groups: NDArray[np.int64],
    learns: NDArray[np.bool_],
    seed: int,
) -> dict[str, FloatArray]:
    """Every score of the images that were not learned from, a probe having learned from the others."""
    train, rows = features[learns], features[~learns]
    own = np.unique(labels[learns], return_inverse=True)[1]
    folds = assign_folds(own, groups[learns], TrainConfig().n_folds, seed)
    probe = fit_probe(train, own, folds)
    logits = probe.head.logits(rows)
    chosen, held = choose_references(own, MAX_REFERENCES, seed), np.flatnonzero(folds >= 0)
    scale = fit_novelty(train[chosen], folds[chosen], train[held], folds[held], probe.oof_logits[held])
    mean, deviation = feature_scale(train)
    a, b = ((x - mean).astype(np.float64) / deviation for x in (train, rows))
    largest = logits.max(axis=1)
    return {
        "shipped": scale.measure(rows, logits),
        "largest probability": -natural_probs(logits, 1.0).max(axis=1),
        "energy": -(largest + np.log(np.exp(logits - largest[:, None]).sum(axis=1))).astype(np.float64),
        "nearest image": nearest_distances(b, a),
        "relative Mahalanobis": relative_mahalanobis(a, own, b),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    config, device = TrainConfig(finetune="none"), find_device(ComputeConfig())
    loaded = load_backbone("lite0", None, offline=True)
    for source in args.data:
        dataset = scan_source(source)
        dataset = dataset.select((dataset.labels >= 0) & ~dataset.in_split("test"))
        log = RunLog(quiet=True)
        images = extract_features(dataset, loaded, config, device, log)
        near = [pair.members for pair in find_near_duplicates(dataset, images, None, log)]
        groups = join_groups(dataset, find_duplicates(dataset, images.digests, near))
        labels, found = dataset.labels, {}
        for out in np.unique(labels):
            for seed in args.seeds:
                is_new = labels == out
                chance = np.random.default_rng(seed).random(groups.max() + 1)  # copies stay together
                learns = ~is_new & (chance[groups] < 0.7)
                for name, scores in score(images.values, labels, groups, learns, seed).items():
                    found.setdefault(name, {}).setdefault(dataset.classes[out], []).append(
                        auroc(scores, is_new[~learns])
                    )
        classes = [dataset.classes[k] for k in np.unique(labels)]
        print(f"\n{source}, AUROC, mean of {len(args.seeds)} seeds")
        print(f"| score | mean | {' | '.join(classes)} |\n|---|---|{'---|' * len(classes)}")
        for name, by_class in found.items():
            means = [float(np.mean(by_class[each])) for each in classes]
            print(f"| {name} | {np.mean(means):.3f} | {' | '.join(f'{m:.3f}' for m in means)} |", flush=True)


if __name__ == "__main__":
    main()
