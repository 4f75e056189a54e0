"""Shared fixtures: drawn images, tiny weights, one finished run; no network and no user cache."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

from images import encode
from pixelplay.config import TrainConfig

TINY = "test_convnext"  # timm's own network for tests, 0.2 M weights, 160 px
SMALL_PX = 64  # side of small inputs; the last stage still sees two pixels on a side
TINY_COUNTS = {"bars": 24, "dots": 15, "rings": 9}


settings.load_profile("ci")  # the same examples in every run, and no deadline on a busy machine
_home = tempfile.TemporaryDirectory(prefix="pixelplay-tests-")


def pytest_configure() -> None:
    """Point every cache to an empty folder, before any module reads these variables at import."""
    for name in [name for name in os.environ if name.startswith("PIXELPLAY")]:
        del os.environ[name]
    os.environ["XDG_CACHE_HOME"] = os.path.join(_home.name, "cache")
    os.environ["HF_HOME"] = os.path.join(_home.name, "huggingface")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start


def pytest_unconfigure() -> None:
    """Remove the cache of the tests."""
    _home.cleanup()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Use one thread: tiny matrices gain nothing from a second core, which parallel tests need."""
    import torch
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(1)
    threadpool_limits(1)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Start a headless Chromium; tests are skipped without one."""
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("needs Debian's chromium")
    with sync_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        started = playwright.chromium.launch(executable_path=chromium, args=arguments)
        yield started
        started.close()


@pytest.fixture
def four_threads() -> Iterator[None]:
    """Give torch four threads, as on a machine with four cores."""
    import torch

    torch.set_num_threads(4)
    yield
    torch.set_num_threads(1)


def draw_of_class(name: str, seed: int, size: tuple[int, int] = (80, 64)) -> Image.Image:
    """Draw "bars", "dots" or "rings"; position, scale and colour depend on the seed.

    Each class has its own tendency in colour and brightness, so that even a network with random weights
    separates most of the images, but not all.
    """
    rng = np.random.default_rng([seed, *name.encode()])
    width, height = size
    y, x = np.mgrid[0:height, 0:width].astype(float)
    period, phase = rng.uniform(8, 14), rng.uniform(0, 2 * np.pi)
    if name == "bars":
        angle = rng.uniform(0, np.pi)
        wave = np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / period + phase)
    elif name == "dots":
        wave = np.sin(2 * np.pi * x / period + phase) * np.sin(2 * np.pi * y / period)
    else:
        middle = rng.uniform(0.3, 0.7, 2) * size
        wave = np.sin(2 * np.pi * np.hypot(x - middle[0], y - middle[1]) / period + phase)
    tint = {"bars": (60, 0, -60), "dots": (-60, 60, 0), "rings": (0, -60, 60)}[name]
    background, foreground = rng.uniform(70, 130, 3), rng.uniform(70, 190, 3) + tint
    mix = (wave[..., None] > 0.2).astype(float)  # (H, W, 1)
    pixels = mix * foreground + (1 - mix) * background + rng.normal(0, 4, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def draw_folder(root: Path, counts: dict[str, int], first_seed: int = 0) -> Path:
    """Write ROOT/<class>/NNN.jpg and .png in turn."""
    for name, n in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            ending, format = (("jpg", "JPEG"), ("png", "PNG"))[i % 2]
            data = encode(draw_of_class(name, first_seed + i), format)
            (root / name / f"{i:03}.{ending}").write_bytes(data)
    return root


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .safetensors file for timm's `test_convnext` with seeded random weights."""
    import timm
    import torch
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = timm.create_model(TINY, pretrained=False, num_classes=0)
        # with timm's initial values almost no signal reaches the last layer
        for name, value in network.named_parameters():
            if value.ndim > 1:
                torch.nn.init.kaiming_normal_(value)
            elif "gamma" in name:
                torch.nn.init.constant_(value, 0.2)
    save_file(network.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def tiny_settings(tiny_weights: Path) -> list[str]:
    """Options for fast training: tiny weights, no search for near-duplicates, no report."""
    return ["--no-report", "--no-near-duplicates", "--backbone", TINY, "--weights", str(tiny_weights)]


@pytest.fixture(scope="session")
def small_settings(tiny_settings: list[str]) -> list[str]:
    """The same options with small inputs: fine-tuning takes half as long as with native ones."""
    return [*tiny_settings, "--input-size", str(SMALL_PX)]


@pytest.fixture(scope="session")
def tiny_probe(tiny_weights: Path) -> TrainConfig:
    """The same settings in Python: a linear probe on tiny weights."""
    return TrainConfig(finetune="none", backbone=TINY, weights=str(tiny_weights), near_duplicates=False)


@pytest.fixture(scope="session")
def drawn_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only: 48 drawn images in the class folders bars (24), dots (15) and rings (9)."""
    return draw_folder(tmp_path_factory.mktemp("drawn") / "photos", TINY_COUNTS)


@pytest.fixture
def drawn_classes(drawn_images: Path, tmp_path: Path) -> Path:
    """A copy of the drawn images, which a test may change."""
    return Path(shutil.copytree(drawn_images, tmp_path / "photos"))


@pytest.fixture(scope="session")
def tiny_run(drawn_images: Path, tiny_probe: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only: a finished run of `train` on the drawn images."""
    from pixelplay.api import train
    from pixelplay.run_log import RunLog

    run = tmp_path_factory.mktemp("runs") / "tiny"
    train(drawn_images, run, tiny_probe, log=RunLog(quiet=True))
    return run
