"""Faithfulness of explanations: deletion and insertion curves of every kind of map, and of baselines.

Two datasets, each explained on images that its linear probe was not fitted on; TrashNet's test split is
not used: TrashNet's val split, whose objects are in the centre, which favours the centre prior; and
planted objects, TrashNet's images shrunk to 40 % of each side and pasted off the centre of plain, coarse,
striped or cloudy backgrounds.

Deletion: pixels are blurred in order of heat, hottest first; the result is the area under the probability
of the predicted class, lower is better. Insertion: they are restored in the blurred image, higher is
better (Petsiuk et al., "RISE", BMVC 2018, arXiv:1806.07421). Random maps are as smooth as those of the
last stage. Intervals are bootstrapped over images, paired. "heat inside" is the share of heat inside the
planted object, which covers 16 % of the image, "hottest inside" how often the hottest pixel is there.
"random weights" is the rank correlation of the default's maps with those of the same network when the
weights of the head are shuffled, then also those of the last stages (Adebayo et al., "Sanity Checks for
Saliency Maps", NeurIPS 2018, arXiv:1810.03292): near 0 where maps depend on the weights.

Expected (60 images each): the default, LayerCAM over five stages, has deletion 0.37 and insertion 0.78 on
TrashNet's val split, 0.18 and 0.57 on planted objects, better than both baselines by at least 0.1 with
intervals clear of zero; its hottest pixel is inside the planted object in 98 of 100 images; correlations
with random weights are below 0.2.

Usage: python benchmarks/faithfulness.py TRASHNET [--images 60]
"""

import copy
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image, ImageFilter
from scipy.stats import spearmanr

from make_results import format_metric
from pixelplay.api import train
from pixelplay.array_types import BoolArray, Float32Array, Float64Array, UInt8Array
from pixelplay.config import CamName, ComputeConfig, TrainConfig
from pixelplay.data.decode import decode_image
from pixelplay.data.transforms import eval_transform
from pixelplay.evaluation.calibration import temperature_softmax
from pixelplay.inference.explain import DEFAULT_METHOD, DEFAULT_STAGES, Explainer
from pixelplay.model.bundle import ModelBundle, read_bundle
from pixelplay.model.device import resolve_device
from pixelplay.model.features import FeatureExtractor
from pixelplay.run_log import RunLog
from records import Record, difference, make_parser

SIZE = (512, 384)  # px
SCALE = 0.4  # of the planted object, of each side
MIN_OFFSET = 0.2  # of the planted object from the centre, of each side
N_STEPS = 8
N_PER_CLASS = 110  # planted training images of each class
STAGES = (1, 3, 5)
DEFAULT = f"{DEFAULT_METHOD}, {DEFAULT_STAGES}"
BASELINES = ("random", "centre prior")
Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class Example:
    """An image to explain.

    Attributes:
        pixels: (S, S, 3) after preprocessing.
        inside: (S, S) where the planted object is.
    """

    pixels: UInt8Array
    inside: BoolArray | None


def draw_background(rng: np.random.Generator) -> UInt8Array:
    """Draw a background that is unrelated to the class: plain, coarse blocks, stripes or clouds."""
    width, height = SIZE
    kind, colours = rng.integers(4), rng.uniform(0, 255, (2, 3))
    if kind == 0:
        pixels = colours[0] + rng.normal(0, 3, (height, width, 3))
    elif kind == 1:
        n = int(rng.integers(2, 40))
        blocks = rng.integers(0, 256, (n * height // width + 1, n, 3)).astype(np.uint8)
        pixels = np.asarray(Image.fromarray(blocks).resize(SIZE, Image.Resampling.BICUBIC)).astype(float)
    elif kind == 2:
        y, x = np.mgrid[0:height, 0:width]
        angle = rng.uniform(0, np.pi)
        wave = np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / rng.uniform(8, 60))
        mix = (wave[..., None] + 1) / 2
        pixels = mix * colours[0] + (1 - mix) * colours[1]
    else:
        frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
        spectrum = 1 / np.maximum(frequency, 1 / width) ** rng.uniform(0.7, 1.5)
        clouds = np.fft.ifft2(np.fft.fft2(rng.standard_normal((3, height, width))) * spectrum).real
        clouds /= clouds.std(axis=(1, 2), keepdims=True)
        pixels = colours[0] * 0.6 + 50 + rng.uniform(20, 60) * clouds.transpose(1, 2, 0)
    return np.asarray(pixels.clip(0, 255).astype(np.uint8))


def plant(path: Path, rng: np.random.Generator) -> tuple[UInt8Array, Box]:
    """Shrink an image and paste it off the centre of a background; return the pixels and its box."""
    size = round(SIZE[0] * SCALE), round(SIZE[1] * SCALE)
    offset = np.zeros(2)
    while np.abs(offset).max() < MIN_OFFSET:
        corner = [int(rng.integers(0, whole - own + 1)) for whole, own in zip(SIZE, size, strict=True)]
        offset = np.array([(corner[i] + size[i] / 2) / SIZE[i] - 0.5 for i in (0, 1)])
    pixels = draw_background(rng)
    left, top = corner
    with Image.open(path) as image:
        small = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    pixels[top : top + size[1], left : left + size[0]] = np.asarray(small)
    return pixels, (left, top, left + size[0], top + size[1])


def plant_folder(source: Path, out: Path, seed: int) -> None:
    """Write class folders of planted images."""
    rng = np.random.default_rng(seed)
    for folder in sorted(source.iterdir()):
        (out / folder.name).mkdir(parents=True)
        for i, path in enumerate(sorted(folder.iterdir())[:N_PER_CLASS]):
            Image.fromarray(plant(path, rng)[0]).save(out / folder.name / f"{i:03}.jpg", quality=92)


def choose_images(source: Path, n: int, seed: int) -> list[Path]:
    """Choose n images of class folders, balanced by class where there are enough."""
    rng = np.random.default_rng(seed)
    folders = [rng.permutation(sorted(folder.iterdir())) for folder in sorted(source.iterdir())]
    return [paths[i] for i in range(n) for paths in folders if i < len(paths)][:n]


def preprocess(pixels: UInt8Array, box: Box | None, bundle: ModelBundle) -> Example:
    """Preprocess an image and its mask as the network's input."""
    inside = None
    if box is not None:
        mask = Image.new("L", (pixels.shape[1], pixels.shape[0]))
        mask.paste(255, box)
        height, width = bundle.preprocessing.input_size
        inside = np.asarray(mask.resize((width, height))) > 127
    return Example(eval_transform(pixels, bundle.preprocessing), inside)


class CurveScorer:
    """Compute deletion and insertion curves of one model."""

    def __init__(self, bundle: ModelBundle) -> None:
        device = resolve_device(ComputeConfig())
        self._bundle = bundle
        self._extract = FeatureExtractor(
            bundle.backbone,
            bundle.preprocessing,
            hflip=bundle.hflip,
            device=device.name,
            precision=device.precision,
            batch_size=N_STEPS + 1,
        )

    def probs(self, pixels: UInt8Array) -> Float64Array:
        """Predict probabilities (B, K) of pixels (B, S, S, 3)."""
        return temperature_softmax(self._bundle.head.logits(self._extract(pixels)), self._bundle.temperature)

    def areas(
        self, image: UInt8Array, blurred: UInt8Array, heat: Float32Array, k: int
    ) -> tuple[float, float]:
        """Return the areas under the deletion and the insertion curve of class k."""
        ranks = np.argsort(np.argsort(-heat.ravel(), kind="stable")).reshape(heat.shape)  # 0: hottest
        shares = np.linspace(0, 1, N_STEPS + 1)
        chosen = (ranks < shares[:, None, None] * heat.size)[..., None]  # (steps, S, S, 1)
        deleted = self.probs(np.where(chosen, blurred, image))[:, k]
        inserted = self.probs(np.where(chosen, image, blurred))[:, k]
        return float(np.trapezoid(deleted, shares)), float(np.trapezoid(inserted, shares))


def random_map(rng: np.random.Generator, size: int) -> Float32Array:
    """Draw noise as smooth as the last stage's map."""
    noise = Image.fromarray(rng.random((7, 7)).astype(np.float32))
    return np.asarray(noise.resize((size, size), Image.Resampling.BILINEAR))


def centre_map(size: int) -> Float32Array:
    """Return a Gaussian at the centre with a standard deviation of a quarter of the side."""
    y, x = (np.mgrid[0:size, 0:size] + 0.5) / size - 0.5
    return np.asarray(np.exp(-(x**2 + y**2) / (2 * 0.25**2)), np.float32)


def make_explainers(bundle: ModelBundle) -> dict[str, Explainer]:
    """Build an explainer for each method and number of last stages."""
    return {
        f"{method}, {n}": Explainer(bundle, method=method, n_stages=n)
        for method in get_args(CamName)
        for n in STAGES
    }


def measure(images: Sequence[Example], bundle: ModelBundle) -> dict[str, Float64Array]:
    """Return deletion, insertion, heat inside, hottest inside and ms (N, 5) of every kind of map."""
    scorer, explainers = CurveScorer(bundle), make_explainers(bundle)
    rng, size = np.random.default_rng(0), bundle.preprocessing.input_size[0]
    found: dict[str, list[list[float]]] = {}
    for each in images:
        blurred = Image.fromarray(each.pixels).filter(ImageFilter.GaussianBlur(size / 16))
        maps, ms = {"random": random_map(rng, size), "centre prior": centre_map(size)}, {}
        for name, explainer in explainers.items():
            start = time.perf_counter()
            explanation = explainer.explain(each.pixels)
            ms[name], maps[name] = 1000 * (time.perf_counter() - start), explanation.heat
        k = bundle.classes.index(explanation.prediction)
        for name, heat in maps.items():
            areas = scorer.areas(each.pixels, np.asarray(blurred), heat, k)
            found.setdefault(name, []).append([*areas, *_inside(heat, each.inside), ms.get(name, np.nan)])
    return {name: np.array(rows) for name, rows in found.items()}


def _inside(heat: Float32Array, inside: BoolArray | None) -> tuple[float, float]:
    if inside is None:
        return np.nan, np.nan
    return float(heat[inside].sum() / max(heat.sum(), 1e-12)), float(inside.ravel()[heat.argmax()])


def correlate_with_random(images: Sequence[Example], bundle: ModelBundle) -> tuple[float, float]:
    """Correlate the default's maps with those after shuffling the head, then also the last stages."""
    rng = np.random.default_rng(0)
    weight = rng.permuted(bundle.head.weight, axis=1)
    headless = replace(bundle, head=replace(bundle.head, weight=weight))
    backbone = copy.deepcopy(bundle.backbone)
    for values in list(backbone.network.parameters())[-60:]:
        values.data = values.data.flatten()[torch.from_numpy(rng.permutation(values.numel()))].view_as(values)
    networks = [headless, replace(headless, backbone=backbone)]
    plain, others = Explainer(bundle), [Explainer(network) for network in networks]
    found = []
    for each in images:
        true = plain.explain(each.pixels)
        maps = [other.explain(each.pixels, true.prediction).heat for other in others]
        found.append([spearmanr(true.heat.ravel(), heat.ravel())[0] for heat in maps])
    return tuple(np.nanmean(found, axis=0))


def interval(differences: Float64Array) -> dict[str, Any]:
    """Return the mean and its bootstrapped 95 % interval."""
    rng = np.random.default_rng(0)
    means = differences[rng.integers(0, len(differences), (2000, len(differences)))].mean(axis=1)
    return difference(float(differences.mean()), *np.quantile(means, [0.025, 0.975]))


def add_maps(record: Record, name: str, split: str, found: dict[str, Float64Array]) -> None:
    """Print and record the metrics of every kind of map, and the default's differences from others."""
    names = ("deletion ↓", "insertion ↑", "heat inside ↑", "hottest inside ↑")
    for method, rows in found.items():
        values = dict(zip(names, rows.mean(axis=0).tolist(), strict=False))
        values["ms/map"] = float(np.median(rows[:, 4]))
        values = {metric: value for metric, value in values.items() if np.isfinite(value)}
        print(f"{name}, {method}: {', '.join(f'{metric} {value:.3f}' for metric, value in values.items())}")
        record.add(name, split, method, values)
    for other in (*BASELINES, "gradcam, 1"):
        deletion, insertion = (interval(values) for values in (found[DEFAULT] - found[other]).T[:2])
        method = f"{DEFAULT} − {other}"
        shown = f"deletion {format_metric(deletion)}, insertion {format_metric(insertion)}"
        print(f"{name}, {method}: {shown}")
        record.add(name, split, method, {names[0]: deletion, names[1]: insertion})


def fit_bundle(data: Path, run: Path) -> ModelBundle:
    """Fit a linear probe on all images of a folder."""
    config = TrainConfig(finetune="none", test_frac=0, near_duplicates=False, offline=True)
    train(data, run, config, force=True, log=RunLog(quiet=True))
    return read_bundle(str(run))


def make_sets(trashnet: Path, folder: Path, n: int) -> Iterator[tuple[str, ModelBundle, list[Example]]]:
    """Yield name, model and held-out images of each dataset."""
    paths = choose_images(trashnet / "val", n, seed=1)
    bundle = fit_bundle(trashnet / "train", folder / "trashnet")
    yield (
        "TrashNet val",
        bundle,
        [preprocess(decode_image(path.read_bytes(), path=str(path)), None, bundle) for path in paths],
    )
    plant_folder(trashnet / "train", folder / "photos", seed=0)
    bundle, rng = fit_bundle(folder / "photos", folder / "planted"), np.random.default_rng(1)
    yield "planted", bundle, [preprocess(*plant(path, rng), bundle) for path in paths]


def main() -> None:
    """Measure every map on both datasets."""
    parser = make_parser(__doc__)
    parser.add_argument("trashnet", type=Path)
    parser.add_argument("--images", type=int, default=60, help="of each dataset [60]")
    args = parser.parse_args()
    record = Record("Explanations", "Faithfulness of explanation maps", args.record)
    with tempfile.TemporaryDirectory() as folder:
        for name, bundle, images in make_sets(args.trashnet, Path(folder), args.images):
            split = f"{len(images)} held-out images"
            add_maps(record, name, split, measure(images, bundle))
            head, stages = correlate_with_random(images, bundle)
            print(f"{name}, random weights: head {head:+.2f}, last stages too {stages:+.2f}", flush=True)
            for weights, value in (("head", head), ("head and last stages", stages)):
                metrics = {"rank correlation with random weights": float(value)}
                record.add(name, split, f"{DEFAULT}, random {weights}", metrics)
    record.write()


if __name__ == "__main__":
    main()
