"""Whether temperatures and intervals are what they claim, on data whose truth is known. No image needed.

Temperatures: logits are drawn, labels are drawn from their softmax, and the logits are then multiplied by a
planted temperature, which is to be found again; over-confident ones are scored before and after. Intervals:
predictions are drawn from a known confusion many times, and the share of the intervals that hold the true
figure is counted.

Expected: temperatures within 5 % at 20,000 images, ECE at most half, T = 1 for held-out data without a
mistake; the interval of accuracy holds in 93 to 97 % (n = 200), that of macro-F1 in at least 93 % with 30
images in the rarest class (n = 1,000), and with 5, where every draw is marked unreliable.

Usage: python benchmarks/honest.py [--repeats 2000]
"""

import argparse
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pixelplay.evaluation.calibration import fit_temperature, natural_probs
from pixelplay.evaluation.estimates import estimate_label_metrics
from pixelplay.evaluation.intervals import Bootstrap, Estimate
from pixelplay.evaluation.metrics import ECE_BINS, expected_calibration_error, label_metric

N_CLASSES = 6
RESAMPLES = 200
# images of each class, and the recall of each; what is not recalled goes to the other classes by their size
CASES = {
    "30 of 1,000 in the rarest class": ((30, 100, 270, 600), (0.7, 0.8, 0.9, 0.95)),
    "the same, the rarest nearly always right": ((30, 100, 270, 600), (0.97, 0.8, 0.9, 0.95)),
    "30 in each of three rare classes": ((30, 30, 30, 910), (0.6, 0.75, 0.9, 0.97)),
    "5 in the rarest class": ((5, 125, 270, 600), (0.7, 0.8, 0.9, 0.95)),
}


def draw_logits(n: int, rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Logits (N, K), and labels (N,) drawn from their softmax."""
    logits = 2 * rng.standard_normal((n, N_CLASSES))
    probs = natural_probs(logits, 1.0)
    labels = (probs.cumsum(axis=1) < rng.random((n, 1))).sum(axis=1)
    return logits, np.minimum(labels, N_CLASSES - 1)


def show_temperatures(n: int = 20_000) -> None:
    print(f"| planted T | found, {n:,} images | off by |\n|---|---|---|")
    for planted in (0.5, 1.0, 2.0, 3.0):
        logits, labels = draw_logits(n, np.random.default_rng(0))
        found = fit_temperature(planted * logits, labels)[0]
        print(f"| {planted} | {found:.4f} | {found / planted - 1:+.2%} |")
    print("\n| over-confident by | ECE before | after, on images that did not fit T |\n|---|---|---|")
    for planted in (1.5, 3.0):
        logits, labels = draw_logits(2 * n, np.random.default_rng(1))
        T = fit_temperature(planted * logits[:n], labels[:n])[0]
        pred = logits[n:].argmax(axis=1)
        before, after = (
            expected_calibration_error(natural_probs(planted * logits[n:], t), pred, labels[n:])
            for t in (1.0, T)
        )
        print(f"| {planted} | {before:.4f} | {after:.4f} ({ECE_BINS} bins) |")
    right = np.eye(N_CLASSES)[np.arange(300) % N_CLASSES] * 5
    T, evidence = fit_temperature(right, right.argmax(axis=1))
    print(f"\nwithout a mistake: T = {T}, at the bound of the search: {evidence['at_bound']}\n")


def draw_predictions(
    labels: NDArray[np.int64], confusion: NDArray[np.float64], repeats: int
) -> Iterator[NDArray[np.int64]]:
    """Predictions (N,) from a confusion (K, K) whose rows add up to 1, one draw after the other."""
    rng = np.random.default_rng(0)
    bounds = confusion.cumsum(axis=1)[labels]  # (N, K)
    for _ in range(repeats):
        yield np.minimum((bounds < rng.random((len(labels), 1))).sum(axis=1), len(confusion) - 1)


def true_macro_f1(counts: NDArray[np.int64], confusion: NDArray[np.float64]) -> float:
    """Macro-F1 of as many images of each class as make all cells of the confusion whole numbers."""
    scaled = np.round(counts[:, None] * confusion * 1000).astype(np.int64)  # (K, K)
    labels, pred = np.indices(scaled.shape).reshape(2, -1)
    return label_metric("macro_f1", np.repeat(pred, scaled.ravel()), np.repeat(labels, scaled.ravel()))


def share_holding(truth: float, estimates: list[Estimate]) -> float:
    return float(np.mean([estimate.low <= truth <= estimate.high for estimate in estimates]))


def share_reliable(estimates: list[Estimate]) -> float:
    return float(np.mean([estimate.reliable for estimate in estimates]))


def show_intervals(repeats: int) -> None:
    print(
        f"| figure | truth | the interval holds in, of {repeats} draws | marked reliable |\n|---|---|---|---|"
    )
    for p in (0.8, 0.85, 0.9, 0.95):
        labels = np.arange(200) % 4
        confusion = np.where(np.eye(4, dtype=np.bool_), p, (1 - p) / 3)
        estimates = [
            estimate_label_metrics(pred, labels, 4, Bootstrap(n=200, groups=None, n_resamples=2, seed=0))[0][
                "accuracy"
            ]
            for pred in draw_predictions(labels, confusion, repeats)
        ]
        print(
            f"| accuracy, n = 200 | {p} | {share_holding(p, estimates):.3f} | {share_reliable(estimates)} |"
        )
    for name, (sizes, recalls) in CASES.items():
        counts, recall = np.array(sizes), np.array(recalls)
        others = np.where(np.eye(len(counts), dtype=np.bool_), 0, counts)
        confusion = np.diag(recall) + (1 - recall)[:, None] * others / others.sum(axis=1, keepdims=True)
        labels = np.repeat(np.arange(len(counts)), counts)
        truth = true_macro_f1(counts, confusion)
        drawn = Bootstrap(n=len(labels), groups=None, n_resamples=RESAMPLES, seed=0)
        estimates = [
            estimate_label_metrics(pred, labels, len(counts), drawn)[0]["macro_f1"]
            for pred in draw_predictions(labels, confusion, repeats)
        ]
        held = share_holding(truth, estimates)
        row = f"| macro-F1, n = {len(labels):,}, {name} | {truth:.4f} | {held:.3f}"
        print(f"{row} | {share_reliable(estimates)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=2000)
    args = parser.parse_args()
    show_temperatures()
    show_intervals(args.repeats)


if __name__ == "__main__":
    main()
