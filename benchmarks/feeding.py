"""How much of the network's own speed is left when images come as files.

Feature extraction from JPEG files, decoding included, beside the same backbone on tensors that
are ready, in turn in one process. Expected on two cores: at least 70 % of the tensors' speed.

Usage: python benchmarks/feeding.py FOLDER [--n 512] [--repeats 5]
"""

import argparse
import statistics
import time
from itertools import repeat

import numpy as np

from pixelplay.data.cache import ArrayCache
from pixelplay.data.sources import scan_source
from pixelplay.model.backbone import load_backbone
from pixelplay.model.device import map_on_cores, pick_precision
from pixelplay.model.features import FeatureExtractor, extract_features_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder")
    parser.add_argument("--n", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    dataset = scan_source(args.folder)
    dataset = dataset.select(np.arange(len(dataset)) < args.n)
    loaded = load_backbone("lite0", None, offline=True)
    extractor = FeatureExtractor(
        loaded.backbone,
        loaded.preprocessing,
        hflip=False,
        device="cpu",
        precision=pick_precision("auto", "cpu"),
    )
    no_cache = ArrayCache("", "features", "", max_bytes=0)
    size = loaded.preprocessing.input_size
    ready = np.random.default_rng(0).integers(0, 256, (extractor.batch_size, size, size, 3), dtype=np.uint8)
    extractor(ready)
    from_files, from_tensors = [], []
    for _ in range(args.repeats):
        start = time.perf_counter()
        extract_features_of(dataset, extractor, no_cache)
        from_files.append(len(dataset) / (time.perf_counter() - start))
        start = time.perf_counter()
        batches = repeat(ready, -(-len(dataset) // extractor.batch_size))
        for _ in map_on_cores(extractor, batches, extractor.device):
            pass
        from_tensors.append(len(dataset) / (time.perf_counter() - start))
    ratios = [a / b for a, b in zip(from_files, from_tensors, strict=True)]
    print(f"from files    {statistics.median(from_files):6.1f} img/s")
    print(f"from tensors  {statistics.median(from_tensors):6.1f} img/s")
    span = f"{min(ratios):.2f} to {max(ratios):.2f}"
    print(f"ratio         {statistics.median(ratios):6.2f} ({span}, {args.repeats} repeats)")


if __name__ == "__main__":
    main()
