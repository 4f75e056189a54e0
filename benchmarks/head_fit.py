"""Head fit with its search for C, beside scikit-learn's logistic regression at the chosen C.

Learns from a data set's given train + val parts. Expected on TrashNet, two cores: the whole search
within 10 s, probabilities of the final head within 1e-3 of scikit-learn's on the same images.

Usage: python benchmarks/head_fit.py FOLDER
"""

import argparse
import time

import numpy as np
from sklearn.linear_model import LogisticRegression

from pixelplay.data.cache import ArrayCache, default_cache_dir
from pixelplay.data.sources import scan_source
from pixelplay.data.splits import assign_folds
from pixelplay.evaluation.calibration import natural_probs
from pixelplay.model.backbone import load_backbone
from pixelplay.model.classifier import feature_scale
from pixelplay.model.device import pick_precision
from pixelplay.model.features import FeatureExtractor, extract_features_of
from pixelplay.training.linear_probe import fit_probe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder")
    dataset = scan_source(parser.parse_args().folder)
    dataset = dataset.select(~dataset.in_split("test"))
    loaded = load_backbone("lite0", None, offline=True)
    precision = pick_precision("auto", "cpu")
    extractor = FeatureExtractor(
        loaded.backbone,
        loaded.preprocessing,
        hflip=True,
        device="cpu",
        precision=precision,
    )
    cache = ArrayCache(
        default_cache_dir(), "features", extractor.cache_key(loaded.weights_id), max_bytes=10**9
    )
    features, labels = extract_features_of(dataset, extractor, cache).values, dataset.labels
    folds = assign_folds(labels, np.arange(len(labels)), 5, seed=0)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        probe = fit_probe(features, labels, folds)
        seconds.append(time.perf_counter() - start)
    print(f"{features.shape}: search and fit {np.median(seconds):.1f} s (median of 3), C {probe.C}")
    mean, scale = feature_scale(features)
    scaled = (features - mean) / scale
    start = time.perf_counter()
    model = LogisticRegression(C=probe.C, max_iter=5000, tol=1e-7).fit(scaled.astype(np.float64), labels)
    took = time.perf_counter() - start
    difference = model.predict_proba(scaled.astype(np.float64)) - natural_probs(
        probe.head.logits(features), 1
    )
    print(f"scikit-learn, one fit at that C: {took:.1f} s; largest difference {np.abs(difference).max():.1e}")


if __name__ == "__main__":
    main()
