"""Spread of predictions between bf16 and fp32 on test splits.

Expected: small changes of probabilities, no change of accuracy beyond chance.

Usage: python benchmarks/precision.py DATA …
Each dataset is a folder with the class folders in train/ and test/.
"""

import numpy as np

from commands import run_pixelplay
from pixelplay import ComputeConfig, Predictor
from records import Record, make_parser


def main() -> None:
    """Train a linear probe on each dataset and predict its test split in both precisions."""
    parser = make_parser(__doc__)
    parser.add_argument("data", nargs="+")
    args = parser.parse_args()
    record = Record("Robustness", "bf16 and fp32", args.record)
    for source in args.data:
        with run_pixelplay("train", source, ["--finetune", "none", "--no-report"]) as run:
            found = [
                Predictor(run.folder, ComputeConfig(precision=precision)).predict(f"{source}/test")
                for precision in ("bf16", "fp32")
            ]
        difference = np.abs(found[0].probs - found[1].probs).max(axis=1)  # (N,)
        labels = [path.replace("\\", "/").split("/")[-2] for path in found[0].paths]
        right = [np.mean([a == b for a, b in zip(each.prediction, labels, strict=True)]) for each in found]
        metrics = {
            "median difference": float(np.median(difference)),
            "95 % quantile": float(np.quantile(difference, 0.95)),
            "largest difference": float(difference.max()),
            "other predictions": int((found[0].pred != found[1].pred).sum()),
            "accuracy bf16": float(right[0]),
            "accuracy fp32": float(right[1]),
        }
        print(f"{source}: {len(labels)} images, {metrics}", flush=True)
        record.add(source, f"test, {len(labels)} images", "linear probe", metrics)
    record.write()


if __name__ == "__main__":
    main()
