"""Fraction of the network's speed that remains when images are read from files.

Extracts features from JPEG files, decoding included, and from tensors in memory, in turn in one process.

Expected on two cores: at least 70 % of the speed on tensors.

Usage: python benchmarks/input_pipeline.py DATA [--n 512] [--repeats 5]
"""

import statistics
import time
from itertools import repeat

import numpy as np

from pixelplay.data.cache import ArrayCache
from pixelplay.data.sources import open_dataset
from pixelplay.model.backbone import load_backbone
from pixelplay.model.device import map_on_cores, resolve_precision
from pixelplay.model.features import FeatureExtractor, extract_cached_features
from records import Record, make_parser


def main() -> None:
    """Time both inputs in turn."""
    parser = make_parser(__doc__)
    parser.add_argument("data")
    parser.add_argument("--n", type=int, default=512, help="images [512]")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    dataset = open_dataset(args.data)
    dataset = dataset.select(np.arange(len(dataset)) < args.n)
    loaded = load_backbone("lite0", None, offline=True)
    extractor = FeatureExtractor(
        loaded.backbone,
        loaded.preprocessing,
        hflip=False,
        device="cpu",
        precision=resolve_precision("auto", "cpu"),
    )
    no_cache = ArrayCache("", "features", "", max_bytes=0)
    size = loaded.preprocessing.input_size
    batch = np.random.default_rng(0).integers(0, 256, (extractor.batch_size, *size, 3), dtype=np.uint8)
    n_batches = -(-len(dataset) // extractor.batch_size)
    extractor(batch)  # the first batch is slower
    from_files, from_tensors = [], []
    for _ in range(args.repeats):
        start = time.perf_counter()
        extract_cached_features(dataset, extractor, no_cache)
        from_files.append(len(dataset) / (time.perf_counter() - start))
        start = time.perf_counter()
        for _ in map_on_cores(extractor, repeat(batch, n_batches), extractor.device):
            pass
        from_tensors.append(len(dataset) / (time.perf_counter() - start))
    ratios = [a / b for a, b in zip(from_files, from_tensors, strict=True)]
    record = Record("Speed", "Feature extraction from files relative to tensors in memory", args.record)
    for name, metrics in {
        "JPEG files": {"img/s": from_files, "relative to tensors": ratios},
        "tensors": {"img/s": from_tensors},
    }.items():
        for metric, values in metrics.items():
            median = statistics.median(values)
            print(f"{name}, {metric}: median {median:.2f} ({min(values):.2f} to {max(values):.2f})")
        record.add(args.data, f"first {len(dataset)}", name, metrics)
    record.write()


if __name__ == "__main__":
    main()
