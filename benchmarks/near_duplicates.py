"""Planted near-duplicates: recall, precision and time of the search, compared with simple baselines.

Of some images of each dataset altered versions are written: re-encoded at quality 50, resized to 60 %,
cropped to 90 % at one corner, mirrored, with a watermark, brightened. Recall is counted for each kind.
Precision is counted on the pairs found among the original images, where nothing was planted: correct are
the pairs listed in the file of --confirmed or, without one, those that PixelPlay's search finds. Last, the
search for candidates is timed alone, on synthetic fingerprints and features.

Baselines, each at a range of thresholds: difference hash and perceptual hash of 64 bits, also of the
mirrored image and of crops at the corners; cosine similarity of the features that the linear probe uses;
and both.

Expected: recall at least 0.95 for each kind; the three pairs of TrashNet whose files are equal, with other
labels; hardly a wrong pair on TrashNet or on the solar cells, which all look alike; 100,000 images in
minutes; no baseline within two points of both recall and precision.

Usage: python benchmarks/near_duplicates.py FOLDER [FOLDER …] [--n 100] [--sheets OUT] [--synthetic 100000]
           [--baselines] [--confirmed benchmarks/near_duplicates_trashnet.csv]
The solar cells come as the table that demo/solar_cells.py writes.
"""

import csv
import io
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy.fft import dctn

from pixelplay.array_types import BoolArray, Float32Array, IntArray, UInt8Array
from pixelplay.config import DataConfig, TrainConfig
from pixelplay.data.audit import find_duplicates, first_occurrences
from pixelplay.data.decode import decode_image
from pixelplay.data.near_duplicates.candidates import find_candidates
from pixelplay.data.near_duplicates.search import NearDuplicatePair
from pixelplay.data.near_duplicates.thumbnails import THUMBNAIL_PX
from pixelplay.data.sources import open_dataset
from pixelplay.model.backbone import load_backbone
from pixelplay.model.device import resolve_device
from pixelplay.model.features import ImageFeatures, extract_features, find_near_duplicates
from pixelplay.run_log import RunLog
from records import Record, make_parser

SHEET_PAIRS, SHEET_PX = 20, 200
HASH_BITS = 64
TOLERANCE = 0.02  # of recall and of precision, within which a baseline is as good
CROP_PX = round(0.1 * THUMBNAIL_PX)  # cut off for the hash of a crop


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    """Encode as JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def cut(image: Image.Image, corner: int) -> Image.Image:
    """Crop 90 % of each side at one of the four corners."""
    width, height = image.size
    left, top = (corner % 2) * round(0.1 * width), (corner // 2) * round(0.1 * height)
    return image.crop((left, top, left + round(0.9 * width), top + round(0.9 * height)))


def watermark(image: Image.Image) -> Image.Image:
    """Write a half-transparent text across the middle."""
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
    "cropped to 90 % at a corner": lambda image, i: jpeg(cut(image, i % 4)),
    "mirrored": lambda image, i: jpeg(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
    "watermarked": lambda image, i: jpeg(watermark(image)),
    "brightened by 30 %": lambda image, i: jpeg(image.point(lambda value: min(255, round(1.3 * value)))),
}


@dataclass(frozen=True, kw_only=True)
class Planted:
    """Origins of the images of a prepared folder.

    Attributes:
        kind: name of an altered image → how it was altered.
        origin: name of any image → name of the original image that it shows.
        source: name of an original image → its path in the dataset.
    """

    kind: dict[str, str]
    origin: dict[str, str]
    source: dict[str, str]


def prepare(source: str, folder: Path, n: int, seed: int) -> Planted:
    """Write all images, and n of them altered in each way."""
    dataset = open_dataset(source, DataConfig())
    rng = np.random.default_rng(seed)
    names = [f"originals/{i:06}{Path(path).suffix}" for i, path in enumerate(dataset.paths)]
    kinds: dict[str, str] = {}
    origin = {name: name for name in names}
    (folder / "originals").mkdir(parents=True)
    (folder / "altered").mkdir()
    for name, path in zip(names, dataset.paths, strict=True):
        (folder / name).write_bytes(dataset.storage.read(path))
    for k, (kind, alter) in enumerate(ALTER.items()):
        for i in rng.choice(len(dataset), min(n, len(dataset)), replace=False):
            path = dataset.paths[i]
            image = Image.fromarray(decode_image(dataset.storage.read(path), path=path))
            name = f"altered/{k}_{i:06}.jpg"
            (folder / name).write_bytes(alter(image, int(i)))
            kinds[name], origin[name] = kind, names[i]
    return Planted(kind=kinds, origin=origin, source=dict(zip(names, dataset.paths, strict=True)))


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """Near-duplicates that PixelPlay's search finds in a prepared folder.

    Attributes:
        paths: (N,) names of the images.
        images: their features, thumbnails and digests.
        pairs: near-duplicates.
        seconds: time to extract features and to compare.
    """

    paths: tuple[str, ...]
    images: ImageFeatures
    pairs: list[NearDuplicatePair]
    equal_files: list[tuple[int, ...]]
    seconds: dict[str, float]


def search(folder: Path) -> SearchResult:
    """Search a folder for near-duplicates as PixelPlay does."""
    dataset, log = open_dataset(str(folder)), RunLog(quiet=True)
    config = TrainConfig(finetune="none", cache_gb=0, near_duplicates=True)
    backbone = load_backbone("lite0", None, offline=True)
    start = time.perf_counter()
    images = extract_features(dataset, backbone, config, resolve_device(config.compute), log)
    extracted = time.perf_counter()
    pairs = find_near_duplicates(dataset, images, config, log)
    return SearchResult(
        paths=dataset.paths,
        images=images,
        pairs=pairs,
        equal_files=list(find_duplicates(dataset, images.digests).sets),
        seconds={"extract": extracted - start, "compare": time.perf_counter() - extracted},
    )


def difference_hash(thumbnails: UInt8Array) -> Float32Array:
    """Hash thumbnails (N, S, S) by whether each of 8 × 8 areas is brighter than its left neighbour.

    Returns:
        (N, 64) bits as −1 and 1.
    """
    small = np.stack(
        [
            np.asarray(Image.fromarray(thumbnail).resize((9, 8), Image.Resampling.BOX))
            for thumbnail in thumbnails
        ]
    )
    return _bits(small[:, :, 1:] > small[:, :, :-1])


def perceptual_hash(thumbnails: UInt8Array) -> Float32Array:
    """Hash thumbnails (N, S, S) by the signs of the 64 lowest frequencies minus their median.

    Returns:
        (N, 64) bits as −1 and 1.
    """
    small = np.stack(
        [
            np.asarray(Image.fromarray(thumbnail).resize((32, 32), Image.Resampling.BOX))
            for thumbnail in thumbnails
        ]
    )
    low = dctn(small.astype(np.float32), axes=(1, 2))[:, :8, :8]
    return _bits(low > np.median(low, axis=(1, 2), keepdims=True))


def _bits(is_set: BoolArray) -> Float32Array:
    return np.where(is_set, 1, -1).reshape(len(is_set), HASH_BITS).astype(np.float32)


def hash_similarity(
    make_hash: Callable[[UInt8Array], Float32Array],
    thumbnails: UInt8Array,
    altered: Sequence[UInt8Array] = (),
) -> Float32Array:
    """Return negative Hamming distances (N, N), the smallest over an image and its altered versions."""
    hashes = make_hash(thumbnails)
    agreement = hashes @ hashes.T
    for version in altered:
        one_way = make_hash(version) @ hashes.T
        agreement = np.maximum(agreement, np.maximum(one_way, one_way.T))
    return np.asarray((agreement - HASH_BITS) / 2, dtype=np.float32)


def cosine_similarity(features: Float32Array) -> Float32Array:
    """Return the cosines (N, N) of features (N, D)."""
    rows = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-9)
    return np.asarray(rows @ rows.T, dtype=np.float32)


def baseline_similarities(
    thumbnails: UInt8Array, features: Float32Array
) -> dict[str, tuple[Float32Array, Iterable[float]]]:
    """Return the similarities (N, N) of each baseline and the thresholds to try."""
    mirrored = thumbnails[:, :, ::-1]
    side = slice(CROP_PX, None), slice(None, -CROP_PX)
    crops = [thumbnails[:, y, x] for y, x in product(side, repeat=2)]
    standardised = (features - features.mean(0)) / np.maximum(features.std(0), 1e-6)
    cosine = cosine_similarity(standardised)
    by_hash = hash_similarity(perceptual_hash, thumbnails, [mirrored])
    by_crops = hash_similarity(perceptual_hash, thumbnails, [mirrored, *crops])
    bits, cosines = range(0, -21, -1), np.arange(0.99, 0.4, -0.01)
    found: dict[str, tuple[Float32Array, Iterable[float]]] = {
        "difference hash": (hash_similarity(difference_hash, thumbnails), bits),
        "difference hash, mirrored too": (hash_similarity(difference_hash, thumbnails, [mirrored]), bits),
        "perceptual hash": (hash_similarity(perceptual_hash, thumbnails), bits),
        "perceptual hash, mirrored too": (by_hash, bits),
        "perceptual hash, mirrored and crops too": (by_crops, bits),
        "cosine similarity": (cosine_similarity(features), cosines),
        "cosine similarity, standardised": (cosine, cosines),
    }
    for distance in (6, 10, 14):
        for name, similarity in (("mirrored", by_hash), ("mirrored and crops", by_crops)):
            both = np.where(similarity >= -distance, cosine, -1)
            found[f"cosine and perceptual hash ({name}) within {distance} bits"] = both, cosines
    return found


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The truth about N distinct images.

    Attributes:
        planted: kind → (n, 2) positions of altered images and their originals.
        is_original: (N,) whether an image was not altered.
        is_correct: (N, N) pairs that are near-duplicates.
    """

    planted: dict[str, IntArray]
    is_original: BoolArray
    is_correct: BoolArray


@dataclass(frozen=True, kw_only=True)
class Score:
    """Recall of each kind of planted near-duplicate, and correct and all pairs of original images."""

    recall: dict[str, float]
    n_correct: int
    n_listed: int

    @property
    def overall(self) -> float:
        """Return the mean recall of the kinds."""
        return float(np.mean(list(self.recall.values())))

    @property
    def precision(self) -> float:
        """Return the share of correct pairs; 1 where none is listed."""
        return self.n_correct / self.n_listed if self.n_listed else 1.0

    @property
    def f1(self) -> float:
        """Return the harmonic mean of overall recall and precision."""
        return 2 * self.overall * self.precision / max(self.overall + self.precision, 1e-9)

    def add_to(self, record: Record, source: str, name: str) -> None:
        """Print and record the score of one method."""
        metrics = {**self.recall, "recall": self.overall, "precision": self.precision}
        shown = ", ".join(f"{metric} {value:.3f}" for metric, value in metrics.items())
        print(f"{name}: {shown}, correct pairs {self.n_correct} of {self.n_listed}", flush=True)
        counts = {"correct pairs": self.n_correct, "listed pairs": self.n_listed}
        record.add(source, "distinct images", name, {**metrics, **counts})


def score(is_found: BoolArray, reference: Reference) -> Score:
    """Compare the pairs found (N, N) with the truth."""
    recall = {kind: float(is_found[*pairs.T].mean()) for kind, pairs in reference.planted.items()}
    i, j = np.nonzero(np.triu(is_found & reference.is_original & reference.is_original[:, None], 1))
    return Score(recall=recall, n_correct=int(reference.is_correct[i, j].sum()), n_listed=len(i))


def pair_mask(pairs: Iterable[tuple[int, int]], n: int) -> BoolArray:
    """Mark pairs in a symmetric (N, N) mask."""
    mask = np.zeros((n, n), bool)
    for i, j in pairs:
        mask[i, j] = mask[j, i] = True
    return mask


def make_reference(
    names: Sequence[str], planted: Planted, confirmed: Path | None, found: BoolArray
) -> Reference:
    """Collect the truth about named images; without --confirmed the pairs found count as correct."""
    position = {name: i for i, name in enumerate(names)}
    kinds = {
        kind: np.array(
            [
                (position[name], position[planted.origin[name]])
                for name, what in planted.kind.items()
                if what == kind and name in position and planted.origin[name] in position
            ]
        )
        for kind in ALTER
    }
    is_correct = found
    if confirmed is not None:
        by_path = {planted.source[name]: i for name, i in position.items() if name in planted.source}
        with confirmed.open(encoding="utf-8", newline="") as file:
            rows = [(row["first"], row["second"]) for row in csv.DictReader(file)]
        is_correct = pair_mask(
            ((by_path[a], by_path[b]) for a, b in rows if a in by_path and b in by_path), len(names)
        )
    is_original = np.array([name in planted.source for name in names])
    return Reference(planted=kinds, is_original=is_original, is_correct=is_correct)


def compare_baselines(
    record: Record, source: str, searched: SearchResult, planted: Planted, confirmed: Path | None
) -> None:
    """Print and record recall and precision of PixelPlay's search and of each baseline."""
    rows = first_occurrences(searched.images.digests)  # equal files are found by their digests
    rows = rows[~np.isin(rows, list(searched.images.errors))]
    names = [searched.paths[i] for i in rows]
    position = {int(row): i for i, row in enumerate(rows)}
    found = pair_mask(((position[p.first], position[p.second]) for p in searched.pairs), len(rows))
    reference = make_reference(names, planted, confirmed, found)
    own = score(found, reference)
    own.add_to(record, source, "PixelPlay, with --confirmed" if confirmed else "PixelPlay")
    assert searched.images.thumbnails is not None
    similarities = baseline_similarities(searched.images.thumbnails[rows], searched.images.values[rows])
    for name, (similarity, thresholds) in similarities.items():
        scores = {threshold: score(similarity >= threshold - 1e-4, reference) for threshold in thresholds}
        for what, threshold in pick_thresholds(scores, own).items():
            scores[threshold].add_to(record, source, f"{name}, {what}: {threshold:.2f}")


def pick_thresholds(scores: dict[float, Score], own: Score) -> dict[str, float]:
    """Pick the best threshold, and the best within two points of PixelPlay's precision or recall."""
    picked = {"best": max(scores, key=lambda t: scores[t].f1)}
    if precise := [t for t in scores if scores[t].precision >= own.precision - TOLERANCE]:
        picked["as precise"] = max(precise, key=lambda t: scores[t].overall)
    if sensitive := [t for t in scores if scores[t].overall >= own.overall - TOLERANCE]:
        picked["as sensitive"] = max(sensitive, key=lambda t: scores[t].precision)
    return picked


def write_sheets(
    pairs: list[NearDuplicatePair], read: Callable[[int], UInt8Array], out: Path, name: str, seed: int
) -> None:
    """Draw up to 100 pairs side by side with their agreement."""
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
                thumbnail = Image.fromarray(read(i)).resize((SHEET_PX, SHEET_PX))
                sheet.paste(thumbnail, (left + side * SHEET_PX, top + 14))
        sheet.save(out / f"{name}_{start // SHEET_PAIRS}.png")


def time_candidates(record: Record, n: int, n_features: int = 1024) -> None:
    """Time the search for candidates on random thumbnails and features, 1 % of them planted."""
    rng = np.random.default_rng(0)
    thumbnails = rng.integers(0, 256, (n, THUMBNAIL_PX, THUMBNAIL_PX), np.uint8)
    features = rng.standard_normal((n, n_features), dtype=np.float32)
    m = n // 100
    thumbnails[-m:] = np.clip(thumbnails[:m] + rng.normal(0, 4, thumbnails[:m].shape), 0, 255)
    features[-m:] = features[:m] + 0.3 * rng.standard_normal((m, n_features), dtype=np.float32)
    planted = {(i, n - m + i) for i in range(m)}
    for name, used_features in (("thumbnails", None), (f"thumbnails and {n_features} features", features)):
        start = time.perf_counter()
        found = {
            (int(i), int(j)) for i, j in find_candidates(thumbnails, used_features, RunLog(quiet=True)).pairs
        }
        seconds, recall = time.perf_counter() - start, len(planted & found) / m
        print(f"candidates by {name}: {seconds:.0f} s, recall {recall:.3f}", flush=True)
        record.add(f"{n:,} random images", "", f"candidates by {name}", {"recall": recall}, seconds=seconds)


def main() -> None:
    """Plant near-duplicates in every dataset, search and compare."""
    parser = make_parser(__doc__)
    parser.add_argument("data", nargs="*")
    parser.add_argument("--n", type=int, default=100, help="altered images of each kind [100]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sheets", type=Path, metavar="FOLDER", help="write contact sheets of the pairs")
    parser.add_argument("--baselines", action="store_true", help="compare with hashes and cosine similarity")
    parser.add_argument(
        "--confirmed", type=Path, help="CSV (first, second) of the near-duplicates confirmed by eye"
    )
    parser.add_argument(
        "--synthetic",
        type=int,
        default=100_000,
        help="random images for the time of the candidates; 0: skip [100,000]",
    )
    args = parser.parse_args()
    record = Record("Label issues and near-duplicates", "Planted near-duplicates", args.record)
    for source in args.data:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            planted = prepare(source, folder, args.n, args.seed)
            searched = search(folder)
            paths, seconds = searched.paths, searched.seconds
            found = {frozenset(paths[i] for i in pair.members) for pair in searched.pairs}
            print(f"\n{source}: {len(paths):,} images, features {seconds['extract']:.0f} s,",
                  f"search {seconds['compare']:.0f} s;",
                  f"sets of equal files: {len(searched.equal_files)}")  # fmt: skip
            recalls = {}
            for kind in ALTER:
                names = [name for name, what in planted.kind.items() if what == kind]
                n_found = sum(frozenset((name, planted.origin[name])) in found for name in names)
                recalls[kind] = n_found / len(names)
                print(f"{kind}: recall {recalls[kind]:.3f} of {len(names)}")
            origin = planted.origin
            own = [p for p in searched.pairs if origin[paths[p.first]] != origin[paths[p.second]]]
            print(f"pairs of original images: {len(own)}", flush=True)
            metrics = {**recalls, "pairs of originals": len(own)}
            record.add(source, f"{args.n} of each kind", "PixelPlay", metrics, seconds=sum(seconds.values()))
            if args.baselines:
                compare_baselines(record, source, searched, planted, args.confirmed)
            if args.sheets:

                def read(i: int, folder: Path = folder, paths: tuple[str, ...] = paths) -> UInt8Array:
                    return decode_image((folder / paths[i]).read_bytes(), path=paths[i])

                write_sheets(own, read, args.sheets, Path(source).stem, args.seed)
    if args.synthetic:
        time_candidates(record, args.synthetic)
    record.write()


if __name__ == "__main__":
    main()
