"""Temperatures and confidence intervals on simulated data with known truth. Needs no images.

Temperatures: labels are drawn from the softmax of random logits, the logits are multiplied by a planted
temperature, and the fit must find it; the calibration error of over-confident logits is measured before
and after. Intervals: predictions are drawn from a known confusion matrix many times, and the coverage of
the intervals is counted.

Expected: temperatures within 5 % with 20,000 images; calibration error at most half; T = 1 for held-out
data without an error. Coverage of accuracy 93 to 97 % (n = 200), of macro-F1 at least 93 % with 30 images
in the rarest class (n = 1,000), and with 5, where every interval is marked unreliable.

Usage: python benchmarks/calibration.py [--repeats 2000]
"""

from collections.abc import Iterator

import numpy as np

from pixelplay.array_types import Float64Array, IntArray
from pixelplay.evaluation.calibration import fit_temperature, temperature_softmax
from pixelplay.evaluation.estimates import estimate_label_metrics
from pixelplay.evaluation.intervals import Bootstrap, Estimate
from pixelplay.evaluation.metrics import ECE_BINS, expected_calibration_error, label_metric
from records import Record, make_parser

N_CLASSES = 6
N_RESAMPLES = 200
# images and recall of each class; the others go to the remaining classes in proportion to their sizes
CASES = {
    "30 of 1,000 in the rarest class": ((30, 100, 270, 600), (0.7, 0.8, 0.9, 0.95)),
    "30 of 1,000 in the rarest class, recall 0.97": ((30, 100, 270, 600), (0.97, 0.8, 0.9, 0.95)),
    "30 in each of three rare classes": ((30, 30, 30, 910), (0.6, 0.75, 0.9, 0.97)),
    "5 in the rarest class": ((5, 125, 270, 600), (0.7, 0.8, 0.9, 0.95)),
}


def draw_logits(n: int, rng: np.random.Generator) -> tuple[Float64Array, IntArray]:
    """Return logits (N, K), and labels (N,) drawn from their softmax."""
    logits = 2 * rng.standard_normal((n, N_CLASSES))
    probs = temperature_softmax(logits, 1.0)
    labels = (probs.cumsum(axis=1) < rng.random((n, 1))).sum(axis=1)
    return logits, np.minimum(labels, N_CLASSES - 1)


def measure_temperatures(record: Record, n: int = 20_000) -> None:
    """Fit planted temperatures, and the temperature of data without an error."""
    data = f"{n:,} random logits"
    for planted in (0.5, 1.0, 2.0, 3.0):
        logits, labels = draw_logits(n, np.random.default_rng(0))
        found, _ = fit_temperature(planted * logits, labels)
        print(f"planted T {planted}: found {found:.4f}, {found / planted - 1:+.2%}")
        record.add(data, "", f"planted temperature {planted}", {"found temperature": found})
    for planted in (1.5, 3.0):
        logits, labels = draw_logits(2 * n, np.random.default_rng(1))
        temperature, _ = fit_temperature(planted * logits[:n], labels[:n])
        predicted = logits[n:].argmax(axis=1)
        before, after = (
            expected_calibration_error(temperature_softmax(planted * logits[n:], t), predicted, labels[n:])
            for t in (1.0, temperature)
        )
        print(f"over-confident by {planted}: ECE {before:.4f}, calibrated {after:.4f} ({ECE_BINS} bins)")
        metrics = {"ECE before": before, "ECE after": after}
        record.add(data, "other half", f"logits multiplied by {planted}", metrics)
    correct = np.eye(N_CLASSES)[np.arange(300) % N_CLASSES] * 5
    found, evidence = fit_temperature(correct, correct.argmax(axis=1))
    print(f"without an error: T = {found}, at the bound of the search: {evidence['at_bound']}")
    record.add("300 logits without an error", "", "planted temperature 1", {"found temperature": found})


def draw_predictions(labels: IntArray, confusion: Float64Array, repeats: int) -> Iterator[IntArray]:
    """Draw predictions (N,) repeatedly from a confusion matrix (K, K) whose rows add up to 1."""
    rng = np.random.default_rng(0)
    bounds = confusion.cumsum(axis=1)[labels]  # (N, K)
    for _ in range(repeats):
        yield np.minimum((bounds < rng.random((len(labels), 1))).sum(axis=1), len(confusion) - 1)


def true_macro_f1(counts: IntArray, confusion: Float64Array) -> float:
    """Return the macro-F1 of so many images that every cell of the confusion matrix is a whole number."""
    scaled = np.round(counts[:, None] * confusion * 1000).astype(np.int64)  # (K, K)
    labels, predicted = np.indices(scaled.shape).reshape(2, -1)
    return label_metric("macro_f1", np.repeat(predicted, scaled.ravel()), np.repeat(labels, scaled.ravel()))


def add_coverage(record: Record, data: str, metric: str, truth: float, estimates: list[Estimate]) -> None:
    """Print and record how often intervals contain the true value."""
    coverage = float(np.mean([estimate.low <= truth <= estimate.high for estimate in estimates]))
    reliable = float(np.mean([estimate.reliable for estimate in estimates]))
    print(
        f"{metric}, {data}, true value {truth:.4f}: coverage {coverage:.3f}, marked reliable {reliable:.2f}"
    )
    values = {"true value": truth, "coverage of 95 % intervals": coverage, "marked reliable": reliable}
    record.add(data, "", metric, values)


def measure_intervals(record: Record, repeats: int) -> None:
    """Count how often the intervals of accuracy and macro-F1 contain the true values."""
    for accuracy in (0.8, 0.85, 0.9, 0.95):
        labels = np.arange(200) % 4
        confusion = np.where(np.eye(4, dtype=np.bool_), accuracy, (1 - accuracy) / 3)
        bootstrap = Bootstrap(n=200, groups=None, n_resamples=2, seed=0)
        estimates = [
            estimate_label_metrics(predicted, labels, 4, bootstrap)[0]["accuracy"]
            for predicted in draw_predictions(labels, confusion, repeats)
        ]
        add_coverage(record, f"200 images, {repeats:,} draws", "accuracy", accuracy, estimates)
    for name, (sizes, recalls) in CASES.items():
        counts, recall = np.array(sizes), np.array(recalls)
        others = np.where(np.eye(len(counts), dtype=np.bool_), 0, counts)
        confusion = np.diag(recall) + (1 - recall)[:, None] * others / others.sum(axis=1, keepdims=True)
        labels = np.repeat(np.arange(len(counts)), counts)
        bootstrap = Bootstrap(n=len(labels), groups=None, n_resamples=N_RESAMPLES, seed=0)
        estimates = [
            estimate_label_metrics(predicted, labels, len(counts), bootstrap)[0]["macro_f1"]
            for predicted in draw_predictions(labels, confusion, repeats)
        ]
        add_coverage(
            record, f"{name}, {repeats:,} draws", "macro-F1", true_macro_f1(counts, confusion), estimates
        )


def main() -> None:
    """Measure temperatures and intervals."""
    parser = make_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=2000, help="draws for each interval [2000]")
    args = parser.parse_args()
    record = Record(
        "Calibration and uncertainty", "Temperatures and intervals on simulated data", args.record
    )
    measure_temperatures(record)
    measure_intervals(record, args.repeats)
    record.write()


if __name__ == "__main__":
    main()
