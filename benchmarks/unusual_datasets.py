"""Time on drawn datasets of unusual shape, and on the solar cells.

Near-duplicates: tiles of one texture with small differences, frames of one scene with a moving animal, and
the solar cells, which all look alike. The search must take at most a third of the time of reading.

Shapes: 1,000 classes with 3 images, 4 classes with 10, and 300 images against 3. The first must be done
within three minutes on two idle cores.

Usage: python benchmarks/unusual_datasets.py cells.csv
The solar cells come as the table that demo/solar_cells.py writes.
"""

import resource
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

from commands import run_pixelplay
from pixelplay.config import TrainConfig
from pixelplay.data.sources import open_dataset
from pixelplay.model.backbone import load_backbone
from pixelplay.model.device import resolve_device
from pixelplay.model.features import extract_features, find_near_duplicates
from pixelplay.run_log import RunLog
from records import Record, make_parser

N_TILES, N_FRAMES, SIDE_PX = 1344, 5000, 256
SMALL_PX = 32
Drawing = NDArray[np.float64]


def write_image(pixels: Drawing, path: Path) -> None:
    """Write a drawing (H, W) or (H, W, 3) as an image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert("RGB").save(path, quality=90)


def draw_tiles(folder: Path) -> None:
    """Draw tiles of one texture; half of them have a dark spot."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:SIDE_PX, :SIDE_PX]
    texture = 128 + 20 * np.sin(x / 6) + 15 * np.sin(y / 9)
    texture += gaussian_filter(rng.normal(0, 60, texture.shape), 2)
    for i in range(N_TILES):
        tile = texture + rng.normal(0, 3, texture.shape) + rng.normal(0, 4)
        tile += 0.6 * gaussian_filter(rng.normal(0, 40, texture.shape), 6)
        if i % 2:
            top, left = rng.integers(20, SIDE_PX - 20, 2)
            tile -= 40 * np.exp(-((y - top) ** 2 + (x - left) ** 2) / 50)
        write_image(tile, folder / ("bad" if i % 2 else "good") / f"{i:05}.jpg")


def draw_frames(folder: Path) -> None:
    """Draw frames of one scene; half of them show an animal that moves."""
    rng = np.random.default_rng(0)
    scene = gaussian_filter(rng.normal(128, 200, (SIDE_PX, SIDE_PX, 3)), (4, 4, 0))
    scene = (scene - scene.mean()) / scene.std() * 45 + 128
    y, x = np.mgrid[:SIDE_PX, :SIDE_PX]
    for i in range(N_FRAMES):
        frame = scene * (1 + 0.15 * np.sin(i / 300)) + rng.normal(0, 2, (SIDE_PX, SIDE_PX, 1))
        if i % 2:
            top, left = SIDE_PX / 2 + 80 * np.sin(i / 37), SIDE_PX / 2 + 80 * np.cos(i / 53)
            animal = np.exp(-((((y - top) / 14) ** 2 + ((x - left) / 24) ** 2) ** 2))[..., None]
            frame = frame * (1 - animal) + animal * np.array([90, 60, 40])
        write_image(frame, folder / ("animal" if i % 2 else "empty") / f"{i:05}.jpg")


def draw_classes(folder: Path, counts: Mapping[str, int]) -> None:
    """Draw small images whose colours and waves tell the classes; counts are images per class."""
    rng = np.random.default_rng(0)
    for name, n in counts.items():
        phase, frequency = rng.normal(size=3), rng.uniform(0.1, 0.9, (3, 2))
        colour = rng.uniform(0, 255, 3)
        for i in range(n):
            y, x = (np.mgrid[:SMALL_PX, :SMALL_PX] + rng.uniform(-4, 4))[..., None]
            waves = np.sin(frequency[:, 0] * x + phase) + np.cos(frequency[:, 1] * y + phase)
            image = colour + 40 * waves + rng.normal(0, 12, (SMALL_PX, SMALL_PX, 3))
            write_image(image, folder / name / f"{i}.png")


def time_near_duplicates(record: Record, source: str, name: str) -> None:
    """Time reading and the search for near-duplicates, without a cache."""
    dataset, log = open_dataset(source), RunLog()
    config = TrainConfig(finetune="none", cache_gb=0)
    backbone = load_backbone("lite0", None, offline=True)
    start = time.perf_counter()
    images = extract_features(dataset, backbone, config, resolve_device(config.compute), log)
    read = time.perf_counter()
    pairs = find_near_duplicates(dataset, images, config, log)
    seconds = {"reading, s": read - start, "near-duplicates, s": time.perf_counter() - read}
    ratio = seconds["near-duplicates, s"] / seconds["reading, s"]
    shown = ", ".join(f"{what} {value:.1f}" for what, value in seconds.items())
    print(f"{name}: {len(dataset):,} images, {shown}, ratio {ratio:.2f}, {len(pairs)} pairs", flush=True)
    metrics = {**seconds, "ratio": ratio, "pairs": len(pairs)}
    record.add(name, f"{len(dataset):,} images", "near-duplicate search", metrics)


def time_training(record: Record, source: Path, name: str, settings: str) -> None:
    """Time one training and its memory."""
    with run_pixelplay("train", source, settings.split()) as run:
        content = run.metrics
        accuracy = content["headline"]["value"]
        peak_gb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
        print(f"{name}, {settings}: {content['finetune']}, accuracy {accuracy:.3f}, {run.seconds:.0f} s,",
              f"at most {peak_gb:.1f} GB", flush=True)  # fmt: skip
        metrics = {"accuracy": accuracy, "peak memory so far, GB": peak_gb}
        record.add(
            name, "test", f"{settings}: {content['finetune']}", metrics, seeds=[0], seconds=run.seconds
        )


def main() -> None:
    """Draw each dataset and measure."""
    parser = make_parser(__doc__)
    parser.add_argument("cells")
    args = parser.parse_args()
    record = Record("Speed", "Datasets of unusual shape", args.record)
    draw: dict[str, Callable[[Path], None]] = {
        "tiles of one texture": draw_tiles,
        "frames of one scene": draw_frames,
    }
    shapes = {
        "300 : 3 images": {"many": 300, "few": 3},
        "4 classes × 10 images": {f"class{k}": 10 for k in range(4)},
        "1,000 classes × 3 images": {f"class{k:04}": 3 for k in range(1000)},
    }
    with tempfile.TemporaryDirectory() as scratch:
        time_near_duplicates(record, args.cells, "solar cells")
        for i, (name, write) in enumerate(draw.items()):
            write(Path(scratch) / f"similar{i}")
            time_near_duplicates(record, f"{scratch}/similar{i}", name)
        for i, (name, counts) in enumerate(shapes.items()):
            folder = Path(scratch) / f"shape{i}"
            draw_classes(folder, counts)
            time_training(record, folder, name, "--time-budget 3m")
            if len(counts) > 10:
                time_training(record, folder, name, "--finetune none")
    record.write()


if __name__ == "__main__":
    main()
