"""Altered copies planted among real images: how many are found, what else is, and how long it takes.

Of some images of each set altered copies are written: re-encoded at quality 50, resized to 60 %, with
10 % cut off at one corner, mirrored, with a watermark, brightened. Recall is counted for each kind. What is
found among the images as they are goes to contact sheets, to be judged by eye. Then the search for
candidates alone, on synthetic fingerprints and features of many images.

Expected: recall at least 0.95 for each kind; the three pairs of TrashNet whose files are equal, with other
labels; hardly a wrong pair on either set, of which the solar cells look all alike; 100,000 images in
minutes.

Usage: python benchmarks/near_duplicates.py FOLDER [FOLDER …] [--n 100] [--sheets OUT] [--synthetic 100000]
The solar cells come as the table that demo/solar_cells.py writes.
"""

import argparse
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pixelplay.config import DataConfig, TrainConfig
from pixelplay.data.audit import find_duplicates
from pixelplay.data.decode import decode_image
from pixelplay.data.near_duplicates.candidates import propose
from pixelplay.data.near_duplicates.search import NearDuplicatePair
from pixelplay.data.near_duplicates.thumbnails import THUMBNAIL_PX
from pixelplay.data.sources import scan_source
from pixelplay.model.backbone import load_backbone
from pixelplay.model.device import find_device
from pixelplay.model.features import extract_features, find_near_duplicates
from pixelplay.run_log import RunLog

SHEET_PAIRS, SHEET_PX = 20, 200


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def cut(image: Image.Image, corner: int) -> Image.Image:
    """Cut a tenth of either side off at one of the four corners."""
    width, height = image.size
    left, top = (corner % 2) * round(0.1 * width), (corner // 2) * round(0.1 * height)
    return image.crop((left, top, left + round(0.9 * width), top + round(0.9 * height)))


def watermark(image: Image.Image) -> Image.Image:
    """Write half-transparent words across the middle."""
    layer = Image.new("RGBA", image.size, (0, 0, 0, 0))
    size = image.width / 9
    draw = ImageDraw.Draw(layer)
    draw.text(
        (0.08 * image.width, 0.42 * image.height), "© SAMPLE 2026", (255, 255, 255, 150), font_size=size
    )
    return Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB")


ALTER: dict[str, Callable[[Image.Image, int], bytes]] = {
    "re-encoded, quality 50": lambda image, i: jpeg(image, 50),
    "resized to 60 %": lambda image, i: jpeg(
        image.resize((round(0.6 * image.width), round(0.6 * image.height)), Image.Resampling.BICUBIC)
    ),
    "10 % cut off at a corner": lambda image, i: jpeg(cut(image, i % 4)),
    "mirrored": lambda image, i: jpeg(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
    "watermarked": lambda image, i: jpeg(watermark(image)),
    "brightened by 30 %": lambda image, i: jpeg(image.point(lambda value: min(255, round(1.3 * value)))),
}


def prepare(source: str, folder: Path, n: int, seed: int) -> dict[str, tuple[str, str]]:
    """Write all images, and copies of n of them in each way; copy → its kind and its origin."""
    dataset = scan_source(source, DataConfig())
    rng = np.random.default_rng(seed)
    planted: dict[str, tuple[str, str]] = {}
    names = [f"{i:06}{Path(path).suffix}" for i, path in enumerate(dataset.paths)]
    (folder / "as_they_are").mkdir(parents=True)
    (folder / "altered").mkdir()
    for name, path in zip(names, dataset.paths, strict=True):
        (folder / "as_they_are" / name).write_bytes(dataset.storage.read(path))
    for k, (kind, alter) in enumerate(ALTER.items()):
        for i in rng.choice(len(dataset), min(n, len(dataset)), replace=False):
            image = Image.fromarray(
                decode_image(dataset.storage.read(dataset.paths[i]), path=dataset.paths[i])
            )
            name = f"altered/{k}_{i:06}.jpg"
            (folder / name).write_bytes(alter(image, int(i)))
            planted[name] = kind, f"as_they_are/{names[i]}"
    return planted


def search(
    folder: Path,
) -> tuple[list[NearDuplicatePair], tuple[str, ...], list[tuple[int, ...]], dict[str, float]]:
    """What PixelPlay finds in a folder: pairs, names, sets of equal files, and seconds of either step."""
    dataset, config, log = (
        scan_source(str(folder)),
        TrainConfig(finetune="none", cache_gb=0, near_duplicates=True),
        RunLog(quiet=True),
    )
    backbone = load_backbone("lite0", None, offline=True)
    start = time.perf_counter()
    images = extract_features(dataset, backbone, config, find_device(config.compute), log)
    seen = time.perf_counter()
    pairs = find_near_duplicates(dataset, images, None, log)
    seconds = {"seen": seen - start, "compared": time.perf_counter() - seen}
    equal = list(find_duplicates(dataset, images.digests).sets)
    return pairs, dataset.paths, equal, seconds


def write_sheets(
    pairs: list[NearDuplicatePair], read: Callable[[int], NDArray[np.uint8]], out: Path, name: str, seed: int
) -> None:
    """Draw up to 100 pairs, side by side, their agreement above them."""
    chosen = np.random.default_rng(seed).permutation(len(pairs))[:100]
    out.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(chosen), SHEET_PAIRS):
        sheet = Image.new("RGB", (4 * (2 * SHEET_PX + 12), 5 * (SHEET_PX + 18)), "white")
        draw = ImageDraw.Draw(sheet)
        for k, number in enumerate(chosen[start : start + SHEET_PAIRS]):
            pair = pairs[number]
            left, top = (k % 4) * (2 * SHEET_PX + 12), (k // 4) * (SHEET_PX + 18)
            mirrored = " mirrored" if pair.is_mirrored else ""
            draw.text((left, top), f"{pair.first} = {pair.second}  {pair.agreement:.2f}{mirrored}", "black")
            for side, i in enumerate(pair.members):
                picture = Image.fromarray(read(i)).resize((SHEET_PX, SHEET_PX))
                sheet.paste(picture, (left + side * SHEET_PX, top + 14))
        sheet.save(out / f"{name}_{start // SHEET_PAIRS}.png")


def time_candidates(n: int, n_features: int = 1024) -> None:
    """Time the search for candidates on random fingerprints and features, a hundredth of them planted."""
    rng = np.random.default_rng(0)
    thumbnails = rng.integers(0, 256, (n, THUMBNAIL_PX, THUMBNAIL_PX), np.uint8)
    features = rng.standard_normal((n, n_features), dtype=np.float32)
    m = n // 100
    thumbnails[-m:] = np.clip(thumbnails[:m] + rng.normal(0, 4, thumbnails[:m].shape), 0, 255)
    features[-m:] = features[:m] + 0.3 * rng.standard_normal((m, n_features), dtype=np.float32)
    wanted = {(i, n - m + i) for i in range(m)}
    print(f"\n| candidates among {n:,} synthetic images | seconds | planted pairs found |\n|---|---|---|")
    for name, given in (("by fingerprint", None), (f"by {n_features} features too", features)):
        start = time.perf_counter()
        found = {(int(i), int(j)) for i, j in propose(thumbnails, given, RunLog(quiet=True)).pairs}
        print(f"| {name} | {time.perf_counter() - start:.0f} | {len(wanted & found)} of {m} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data", nargs="*")
    parser.add_argument("--n", type=int, default=100, help="copies of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sheets", type=Path)
    parser.add_argument("--synthetic", type=int, default=100_000, help="0: none")
    args = parser.parse_args()
    for source in args.data:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            planted = prepare(source, folder, args.n, args.seed)
            pairs, paths, equal, seconds = search(folder)
            found = {frozenset(paths[i] for i in pair.members) for pair in pairs}
            print(f"\n{source}: {len(paths):,} images seen in {seconds['seen']:.0f} s, "
                  f"compared in {seconds['compared']:.0f} s; sets of equal files: {len(equal)}")  # fmt: skip
            print("| copies | found | of |\n|---|---|---|")
            for kind in ALTER:
                copies = [name for name, (what, _) in planted.items() if what == kind]
                n_found = sum(frozenset((name, planted[name][1])) in found for name in copies)
                print(f"| {kind} | {n_found / len(copies):.3f} | {len(copies)} |")
            origin = {name: name for name in paths} | {name: of for name, (_, of) in planted.items()}
            own = [p for p in pairs if origin[paths[p.first]] != origin[paths[p.second]]]
            print(f"pairs of different images: {len(own)}", flush=True)
            if args.sheets:

                def read(i: int, folder: Path = folder, paths: tuple[str, ...] = paths) -> NDArray[np.uint8]:
                    return decode_image((folder / paths[i]).read_bytes(), path=paths[i])

                write_sheets(own, read, args.sheets, Path(source).stem, args.seed)
    if args.synthetic:
        time_candidates(args.synthetic)


if __name__ == "__main__":
    main()
