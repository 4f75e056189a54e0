"""Train on generated images and predict with the installed package: does a built wheel work?

Usage: python tools/smoke_test.py
"""

import csv
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

N_IMAGES = 12  # per class


def main() -> None:
    """Fail unless scan, train and predict work outside a checkout."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        draw_images(work / "images")
        run(work, "--version")
        run(work, "scan", "images")
        run(work, "train", "images", "--out", "run", "--offline", "--backbone", "lite0")
        run(work, "predict", "run", "images", "--out", "predictions.csv")
        with open(work / "predictions.csv", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        if len(rows) != 2 * N_IMAGES or any(row["status"] != "ok" for row in rows):
            raise SystemExit(f"expected {2 * N_IMAGES} rows with status ok, found {rows}")
        if not (work / "run" / "report.html").is_file():
            raise SystemExit("the run has no report.html")
    print("ok")


def draw_images(root: Path) -> None:
    """Write two classes of noise, one reddish and one bluish."""
    rng = np.random.default_rng(0)
    for name, channel in (("red", 0), ("blue", 2)):
        (root / name).mkdir(parents=True)
        for i in range(N_IMAGES):
            pixels = rng.integers(0, 128, (64, 64, 3), dtype=np.uint8)
            pixels[..., channel] += 120
            Image.fromarray(pixels).save(root / name / f"{i:02}.png")


def run(folder: Path, *words: str) -> None:
    """Run one command in a folder; its failure ends the program."""
    print("pixelplay", *words, flush=True)
    subprocess.run([sys.executable, "-m", "pixelplay", *words], cwd=folder, check=True)


if __name__ == "__main__":
    main()
