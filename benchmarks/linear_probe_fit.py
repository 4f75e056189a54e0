"""Linear probe fit with its search for C, relative to scikit-learn's logistic regression.

Fits on the predefined train and val splits. Expected on TrashNet, two cores: the whole search takes less than
10 s; the probabilities of the final head differ by less than 1e-3 from those of scikit-learn at the same
C.

Usage: python benchmarks/linear_probe_fit.py DATA
"""

import time

import numpy as np
from sklearn.linear_model import LogisticRegression

from pixelplay.data.splits import assign_folds
from pixelplay.evaluation.calibration import temperature_softmax
from pixelplay.model.classifier import feature_scale
from pixelplay.training.linear_probe import fit_probe
from probe_data import load_probe_data
from records import Record, make_parser


def main() -> None:
    """Fit both and compare their probabilities."""
    parser = make_parser(__doc__)
    parser.add_argument("data")
    args = parser.parse_args()
    data = load_probe_data(args.data)
    features, labels = data.features, data.dataset.labels
    folds = assign_folds(labels, np.arange(len(labels)), 5, seed=0)
    search_s = []
    for _ in range(3):
        start = time.perf_counter()
        probe = fit_probe(features, labels, folds)
        search_s.append(time.perf_counter() - start)
    mean, scale = feature_scale(features)
    scaled = ((features - mean) / scale).astype(np.float64)
    start = time.perf_counter()
    model = LogisticRegression(C=probe.C, max_iter=5000, tol=1e-7).fit(scaled, labels)
    reference_s = time.perf_counter() - start
    difference = np.abs(
        model.predict_proba(scaled) - temperature_softmax(probe.head.logits(features), 1)
    ).max()
    print(f"{features.shape}: search and fit {np.median(search_s):.1f} s (median of 3), C {probe.C}")
    print(f"scikit-learn, one fit at that C: {reference_s:.1f} s; largest difference {difference:.1e}")
    record = Record(
        "Speed",
        "Linear probe fit",
        args.record,
        notes=["Times are those of the fit, without reading images."],
    )
    split = f"train + val, {features.shape[0]:,} × {features.shape[1]:,} features"
    metrics = {"largest difference from scikit-learn's probabilities": difference}
    record.add(args.data, split, "PixelPlay, search for C and fit", metrics, seconds=search_s)
    record.add(args.data, split, "scikit-learn, one fit at the same C", {}, seconds=reference_s)
    record.write()


if __name__ == "__main__":
    main()
