"""Are explanations faithful? Deletion and insertion curves of every kind of map beside baselines.

Two sets, each explained on images that its probe has not learned from; TrashNet's test part plays no
part: TrashNet's val part, whose objects lie in the middle and so flatter the centre prior; and planted
objects, TrashNet's images shrunk to 40 % of each side and pasted off the centre of plain, coarse,
striped or cloudy grounds.

Deletion: pixels are blurred in order of heat, most first, and the area under the probability of the decided
class is taken: lower is better. Insertion: they are put back into the blurred image: higher is better
(Petsiuk et al., "RISE", BMVC 2018, arXiv:1806.07421). Random maps are as smooth as the last stage's.
Intervals are bootstrapped over images, paired. `inside` is the share of heat inside the planted object,
which covers 16 % of the image; `points` how often the hottest pixel is there. `randomised` is the rank
correlation of the default's maps with those of the same network when the head's weights are shuffled, then
those of the last stages too (Adebayo et al., "Sanity Checks for Saliency Maps", NeurIPS 2018,
arXiv:1810.03292): near 0 where maps depend on what was learned.

Expected (60 images each): the default, LayerCAM over five stages, has deletion 0.37 and insertion 0.78
on TrashNet's val part, 0.18 and 0.57 on planted objects, better than both baselines by at least 0.1 with
intervals clear of zero; its hottest pixel is inside the planted object 98 times in 100; correlations with
randomised networks are below 0.2.

Usage: python benchmarks/faithfulness.py TRASHNET [--images 60]
"""

import argparse
import copy
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from scipy.stats import spearmanr

from pixelplay.api import train
from pixelplay.config import CamName, ComputeConfig, TrainConfig
from pixelplay.data.decode import decode_image
from pixelplay.data.transforms import eval_transform
from pixelplay.evaluation.calibration import natural_probs
from pixelplay.inference.explain import DEFAULT_METHOD, DEFAULT_STAGES, Explainer
from pixelplay.model.bundle import ModelBundle, read_bundle
from pixelplay.model.device import find_device
from pixelplay.model.features import FeatureExtractor
from pixelplay.run_log import RunLog

SIZE, SHARE, MIN_OFF = (512, 384), 0.4, 0.2  # px; of each side; off the centre, of each side
N_STEPS = 8
N_PER_CLASS = 110  # planted images to learn from
STAGES = (1, 3, 5)
DEFAULT = f"{DEFAULT_METHOD}, {DEFAULT_STAGES}"
BASELINES = ("random", "centre prior")
Pixels = NDArray[np.uint8]
Map = NDArray[np.float32]
Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class Image:
    pixels: Pixels  # (S, S, 3) as the network sees it
    inside: NDArray[np.bool_] | None  # (S, S) where the planted object is


def draw_ground(rng: np.random.Generator) -> Pixels:
    """A ground that says nothing about the class: plain, coarse blocks, stripes or clouds."""
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
    return pixels.clip(0, 255).astype(np.uint8)


def plant(path: Path, rng: np.random.Generator) -> tuple[Pixels, Box]:
    """Paste an image, shrunk, off the centre of a ground."""
    size = round(SIZE[0] * SHARE), round(SIZE[1] * SHARE)
    off = np.zeros(2)
    while np.abs(off).max() < MIN_OFF:
        corner = [int(rng.integers(0, whole - own + 1)) for whole, own in zip(SIZE, size, strict=True)]
        off = np.array([(corner[i] + size[i] / 2) / SIZE[i] - 0.5 for i in (0, 1)])
    pixels = draw_ground(rng)
    left, top = corner
    with Image.open(path) as image:
        small = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    pixels[top : top + size[1], left : left + size[0]] = np.asarray(small)
    return pixels, (left, top, left + size[0], top + size[1])


def plant_folder(source: Path, out: Path, seed: int) -> None:
    """Make a labelled folder of planted images."""
    rng = np.random.default_rng(seed)
    for folder in sorted(source.iterdir()):
        (out / folder.name).mkdir(parents=True)
        for i, path in enumerate(sorted(folder.iterdir())[:N_PER_CLASS]):
            Image.fromarray(plant(path, rng)[0]).save(out / folder.name / f"{i:03}.jpg", quality=92)


def choose(source: Path, n: int, seed: int) -> list[Path]:
    """Images of a folder of class folders, as many of each class as can be."""
    rng = np.random.default_rng(seed)
    folders = [rng.permutation(sorted(folder.iterdir())) for folder in sorted(source.iterdir())]
    return [paths[i] for i in range(n) for paths in folders if i < len(paths)][:n]


def see(pixels: Pixels, box: Box | None, bundle: ModelBundle) -> Image:
    """An image as the network sees it."""
    inside = None
    if box is not None:
        mask = Image.new("L", (pixels.shape[1], pixels.shape[0]))
        mask.paste(255, box)
        size = bundle.preprocessing.input_size
        inside = np.asarray(mask.resize((size, size))) > 127
    return Image(eval_transform(pixels, bundle.preprocessing), inside)


class Judge:
    """Probabilities of images in the making."""

    def __init__(self, bundle: ModelBundle) -> None:
        device = find_device(ComputeConfig())
        self._bundle = bundle
        self._extract = FeatureExtractor(
            bundle.backbone,
            bundle.preprocessing,
            hflip=bundle.hflip,
            device=device.name,
            precision=device.precision,
            batch_size=N_STEPS + 1,
        )

    def probs(self, pixels: Pixels) -> NDArray[np.float64]:
        """(B, K) of (B, S, S, 3)."""
        return natural_probs(self._bundle.head.logits(self._extract(pixels)), self._bundle.temperature)

    def areas(self, image: Pixels, blurred: Pixels, heat: Map, k: int) -> tuple[float, float]:
        """Areas under the deletion and the insertion curve of class k."""
        ranks = np.argsort(np.argsort(-heat.ravel(), kind="stable")).reshape(heat.shape)  # 0: hottest
        shares = np.linspace(0, 1, N_STEPS + 1)
        chosen = (ranks < shares[:, None, None] * heat.size)[..., None]  # (steps, S, S, 1)
        deleted = self.probs(np.where(chosen, blurred, image))[:, k]
        inserted = self.probs(np.where(chosen, image, blurred))[:, k]
        return float(np.trapezoid(deleted, shares)), float(np.trapezoid(inserted, shares))


def random_map(rng: np.random.Generator, size: int) -> Map:
    """Noise as smooth as the last stage's map."""
    noise = Image.fromarray(rng.random((7, 7)).astype(np.float32))
    return np.asarray(noise.resize((size, size), Image.Resampling.BILINEAR))


def centre_map(size: int) -> Map:
    """A round hill in the middle, a quarter of the side in deviation."""
    y, x = (np.mgrid[0:size, 0:size] + 0.5) / size - 0.5
    return np.exp(-(x**2 + y**2) / (2 * 0.25**2)).astype(np.float32)


def variants(bundle: ModelBundle) -> dict[str, Explainer]:
    """Every method with every number of last stages."""
    return {
        f"{method}, {n}": Explainer(bundle, method=method, n_stages=n)
        for method in get_args(CamName)
        for n in STAGES
    }


def measure(images: Sequence[Image], bundle: ModelBundle) -> dict[str, NDArray[np.float64]]:
    """Deletion, insertion, heat inside, hit and ms (N, 5) of every kind of map."""
    judge, explainers = Judge(bundle), variants(bundle)
    rng, size = np.random.default_rng(0), bundle.preprocessing.input_size
    found: dict[str, list[list[float]]] = {}
    for each in images:
        soft = Image.fromarray(each.pixels).filter(ImageFilter.GaussianBlur(size / 16))
        maps, ms = {"random": random_map(rng, size), "centre prior": centre_map(size)}, {}
        for name, explainer in explainers.items():
            start = time.perf_counter()
            explanation = explainer.explain(each.pixels)
            ms[name], maps[name] = 1000 * (time.perf_counter() - start), explanation.heat
        k = bundle.classes.index(explanation.prediction)
        for name, heat in maps.items():
            areas = judge.areas(each.pixels, np.asarray(soft), heat, k)
            found.setdefault(name, []).append([*areas, *_inside(heat, each.inside), ms.get(name, np.nan)])
    return {name: np.array(rows) for name, rows in found.items()}


def _inside(heat: Map, inside: NDArray[np.bool_] | None) -> tuple[float, float]:
    if inside is None:
        return np.nan, np.nan
    return float(heat[inside].sum() / max(heat.sum(), 1e-12)), float(inside.ravel()[heat.argmax()])


def randomised(images: Sequence[Image], bundle: ModelBundle) -> tuple[float, float]:
    """Mean rank correlation of the default's maps with those of random weights: head; last stage too."""
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


def interval(differences: NDArray[np.float64]) -> str:
    """Mean and bootstrapped 95 % interval."""
    rng = np.random.default_rng(0)
    means = differences[rng.integers(0, len(differences), (2000, len(differences)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return f"{differences.mean():+.3f} ({low:+.3f} to {high:+.3f})"


def show(found: dict[str, NDArray[np.float64]]) -> None:
    """Print the table, and how the default stands beside the others."""
    columns = ("map, last stages", "deletion ↓", "insertion ↑", "inside ↑", "points ↑", "ms")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name, rows in found.items():
        deletion, insertion, inside, points, _ = rows.mean(axis=0)
        ms = np.median(rows[:, 4])
        print(f"| {name} | {deletion:.3f} | {insertion:.3f} | {inside:.3f} | {points:.3f} | {ms:.0f} |")
    for other in (*BASELINES, "gradcam, 1"):
        deletion, insertion = (found[DEFAULT] - found[other]).T[:2]
        shown = f"deletion {interval(deletion)}, insertion {interval(insertion)}"
        print(f"{DEFAULT} minus {other}: {shown}")


def learn(data: Path, run: Path) -> ModelBundle:
    """A probe on all images of a folder."""
    config = TrainConfig(finetune="none", test_frac=0, near_duplicates=False, offline=True)
    train(data, run, config, force=True, log=RunLog(quiet=True))
    return read_bundle(str(run))


def make_sets(trashnet: Path, folder: Path, n: int) -> Iterator[tuple[str, ModelBundle, list[Image]]]:
    """Name, model and held-out images of each set."""
    paths = choose(trashnet / "val", n, seed=1)
    bundle = learn(trashnet / "train", folder / "trashnet")
    yield (
        "TrashNet val",
        bundle,
        [see(decode_image(path.read_bytes(), path=str(path)), None, bundle) for path in paths],
    )
    plant_folder(trashnet / "train", folder / "photos", seed=0)
    bundle, rng = learn(folder / "photos", folder / "planted"), np.random.default_rng(1)
    yield "planted", bundle, [see(*plant(path, rng), bundle) for path in paths]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("trashnet", type=Path)
    parser.add_argument("--images", type=int, default=60)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, bundle, images in make_sets(args.trashnet, Path(folder), args.images):
            print(f"\n{name}, {len(images)} images")
            show(measure(images, bundle))
            head, stages = randomised(images, bundle)
            print(f"randomised: head {head:+.2f}, last stages too {stages:+.2f}", flush=True)


if __name__ == "__main__":
    main()
