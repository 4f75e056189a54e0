"""Tests of pixelplay.data.augment."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from images import draw
from pixelplay.config import AUGMENTATIONS, AugmentConfig
from pixelplay.data.augment import augment_view
from pixelplay.data.transforms import FILTERS, Preprocessing, eval_transform
from pixelplay.thread_pool import prefetch_map

Pixels = NDArray[np.uint8]
NAMES = st.sets(st.sampled_from(AUGMENTATIONS)).map(lambda names: tuple(sorted(names)))
SEEDS = range(200)


def settings(size: int, interpolation: str = "bicubic") -> Preprocessing:
    return Preprocessing(
        input_size=(size, size), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation=interpolation
    )


def view_of(
    pixels: Pixels, *names: str, seed: int = 0, size: int = 64, hflip: bool = False, **values: float
) -> Pixels:
    config = AugmentConfig(augment=names, **values)  # type: ignore[arg-type]
    return augment_view(pixels, config, settings(size), np.random.default_rng(seed), hflip=hflip)


def image(width: int = 60, height: int = 45, seed: int = 1) -> Pixels:
    pixels = np.array(draw(seed, (width, height)))
    pixels.flags.writeable = False
    return pixels


def coordinates(width: int, height: int) -> Pixels:
    """Draw an image whose red is the column and whose green is the row, each at most 256."""
    pixels = np.full((height, width, 3), 200, np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width), np.arange(height)[:, None]
    pixels.flags.writeable = False
    return pixels


def fit_axes(view: Pixels, is_content: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Regress red and green, the columns, on x, y and 1, the rows: (3, 2)."""
    y, x = np.nonzero(is_content)
    ground = np.stack([x + 0.5, y + 0.5, np.ones(len(x))], axis=1)
    return np.linalg.lstsq(ground, view[y, x, :2].astype(float))[0]


def find_box(view: Pixels, photo: Pixels) -> tuple[float, float, float, float]:
    """Find left, top, width and height of a cropped view of `coordinates`, as fractions of the image."""
    size, inner = len(view), np.zeros(view.shape[:2], bool)
    inner[4:-4, 4:-4] = True  # the filter is one-sided at the edges
    axes = fit_axes(view, inner)
    width, height = axes[0, 0] * size, axes[1, 1] * size
    left, top = axes[2] + 0.5  # the centre of pixel 0 is at 0.5
    return left / photo.shape[1], top / photo.shape[0], width / photo.shape[1], height / photo.shape[0]


def is_mirrored(view: Pixels) -> bool:
    """Check whether a view of `coordinates` is mirrored."""
    axes = fit_axes(view, np.ones(view.shape[:2], bool))[:2]
    return float(np.linalg.det(axes)) < -0.05


def test_without_augmentation_the_view_equals_preprocessing() -> None:
    for interpolation in FILTERS:
        preprocessing = settings(32, interpolation)
        config, rng = AugmentConfig(augment=()), np.random.default_rng(0)
        view = augment_view(image(), config, preprocessing, rng, hflip=False)
        np.testing.assert_array_equal(view, eval_transform(image(), preprocessing))


@given(NAMES, st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.booleans(), st.integers(0, 99))
def test_any_image_becomes_a_uint8_square(
    names: tuple[str, ...], width: int, height: int, size: int, hflip: bool, seed: int
) -> None:
    view = view_of(image(width, height), *names, size=size, hflip=hflip, seed=seed, rotation_deg=180)
    assert (view.shape, view.dtype) == ((size, size, 3), np.uint8)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (3, 700)])
def test_extreme_shapes_become_a_uint8_square(shape: tuple[int, int]) -> None:
    for seed in range(30):
        view = view_of(image(*shape), *AUGMENTATIONS, crop_scale=0.01, hflip=True, seed=seed, erasing_prob=1)
        assert (view.shape, view.dtype) == ((64, 64, 3), np.uint8)


def test_size_replaces_the_input_size() -> None:
    rng = np.random.default_rng(0)
    view = augment_view(image(), AugmentConfig(), settings(64), rng, hflip=True, size=(24, 24))
    assert view.shape == (24, 24, 3)


@given(NAMES, st.integers(0, 99))
def test_same_generator_gives_the_same_view(names: tuple[str, ...], seed: int) -> None:
    views = [view_of(image(), *names, seed=seed, size=32, hflip=True) for _ in range(2)]
    np.testing.assert_array_equal(*views)


def test_augment_is_thread_safe() -> None:
    def load(seed: int) -> bytes:
        return view_of(image(), *AUGMENTATIONS, seed=seed, hflip=True).tobytes()

    assert list(prefetch_map(load, range(100), num_workers=4)) == [load(seed) for seed in range(100)]


@pytest.mark.parametrize("name", ["crop", "rotation", "erasing"])
def test_other_generator_gives_another_view(name: str) -> None:
    views = {view_of(image(), name, seed=seed, erasing_prob=1).tobytes() for seed in range(20)}
    assert len(views) == 20


@given(NAMES, st.integers(0, 99))
def test_augment_does_not_modify_its_input(names: tuple[str, ...], seed: int) -> None:
    pixels, before = image(32, 32), image(32, 32).copy()
    view_of(pixels, *names, seed=seed, size=32, hflip=True, erasing_prob=1)
    np.testing.assert_array_equal(pixels, before)


@pytest.mark.parametrize("shape", [(256, 256), (128, 256), (256, 90)])
def test_crop_area_aspect_and_position_follow_their_distributions(shape: tuple[int, int]) -> None:
    photo = coordinates(*shape)
    views = [view_of(photo, "crop", crop_scale=0.35, seed=seed) for seed in SEEDS]
    left, top, width, height = np.array([find_box(view, photo) for view in views]).T
    assert min(left.min(), top.min()) >= -0.01
    assert max((left + width).max(), (top + height).max()) <= 1.01
    area, aspect = width * height, width / height
    assert area.min() >= 0.34
    assert area.max() <= 1.02
    assert aspect.min() >= 0.74
    assert aspect.max() <= 1.35
    # area uniform, aspect and position symmetric
    assert area.mean() == pytest.approx((0.35 + 1) / 2, abs=0.05)
    assert np.log(aspect).mean() == pytest.approx(0, abs=0.04)
    assert (left + width / 2).mean() == pytest.approx(0.5, abs=0.03)
    assert (top + height / 2).mean() == pytest.approx(0.5, abs=0.03)


def test_crop_scale_one_keeps_the_whole_image() -> None:
    whole = view_of(image())
    for seed in range(20):
        np.testing.assert_array_equal(view_of(image(), "crop", crop_scale=1.0, seed=seed), whole)


def test_hflip_mirrors_half_of_the_views() -> None:
    photo = coordinates(64, 64)
    straight = view_of(photo)
    n_mirrored = 0
    for seed in range(400):
        view = view_of(photo, seed=seed, hflip=True)
        is_flipped = not np.array_equal(view, straight)
        assert not is_flipped or np.array_equal(view, straight[:, ::-1])
        n_mirrored += is_flipped
    assert abs(n_mirrored - 200) <= 4 * math.sqrt(400) / 2  # four standard deviations of the binomial


def mirrored_share(*names: str, hflip: bool, n: int = 400) -> float:
    photo = coordinates(96, 96)
    preprocessing = settings(96)
    config, rng = AugmentConfig(augment=names), np.random.default_rng(0)
    views = [augment_view(photo, config, preprocessing, rng, hflip=hflip) for _ in range(n)]
    return float(np.mean([is_mirrored(view) for view in views]))


@pytest.mark.parametrize("names", [("crop",), ("crop", "mixup", "cutmix")])
def test_without_hflip_no_view_is_mirrored(names: tuple[str, ...]) -> None:
    assert mirrored_share(*names, hflip=False) == 0
    assert mirrored_share(*names, hflip=True, n=100) > 0.3  # mirrored views are recognised


def test_rotation_turns_the_centre_without_mirroring() -> None:
    photo = coordinates(96, 96)
    inner = np.zeros((96, 96), bool)
    inner[32:64, 32:64] = True  # the corners are filled by reflection
    angles = []
    for seed in SEEDS:
        axes = fit_axes(view_of(photo, "rotation", rotation_deg=20, size=96, seed=seed), inner)
        np.testing.assert_allclose(axes[:2] @ axes[:2].T, np.eye(2), atol=0.02)
        assert np.linalg.det(axes[:2]) == pytest.approx(1, abs=0.02)
        angles.append(math.degrees(math.atan2(axes[1, 0], axes[0, 0])))
    assert -20.5 <= min(angles) < -18
    assert 18 < max(angles) <= 20.5


@pytest.mark.parametrize("size", [63, 64])
def test_rotation_is_about_the_centre(size: int) -> None:
    pixels = np.asarray(image(size, size))
    symmetric = np.maximum(pixels, pixels[::-1, ::-1])  # invariant under half a turn about the centre
    for seed in range(20):
        view = view_of(symmetric, "rotation", rotation_deg=180, size=size, seed=seed)
        assert np.abs(view.astype(int) - view[::-1, ::-1]).max() <= 1


@given(st.integers(1, 70), st.floats(0, 180), st.integers(0, 10_000))
def test_rotation_leaves_no_dark_corner(size: int, degrees: float, seed: int) -> None:
    plain = np.full((size, size, 3), 211, np.uint8)
    view = view_of(plain, "rotation", rotation_deg=degrees, size=size, seed=seed)
    np.testing.assert_array_equal(view, plain)


def test_rotation_by_zero_changes_nothing() -> None:
    np.testing.assert_array_equal(view_of(image(), "rotation", rotation_deg=0), view_of(image()))


def test_erasing_covers_2_to_33_percent_with_noise() -> None:
    plain = np.full((128, 128, 3), 90, np.uint8)
    areas, aspects, noise = [], [], []
    for seed in SEEDS:
        view = view_of(plain, "erasing", erasing_prob=1, size=128, seed=seed)
        rows, columns = np.nonzero((view != plain).any(axis=2))
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert len(rows) >= 0.999 * height * width  # one rectangle, all of it noise
        areas.append(height * width / 128**2)
        aspects.append(width / height)
        noise.append(view[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].reshape(-1, 3))
    assert 0.02 - 0.005 <= min(areas) < 0.04
    assert 0.31 < max(areas) <= 0.33 + 0.01
    assert 0.28 <= min(aspects) < 0.4
    assert 2.5 < max(aspects) <= 3.6
    counts = np.bincount(np.concatenate(noise).ravel(), minlength=256)
    assert counts.min() > 0.97 * counts.mean()
    assert counts.max() < 1.03 * counts.mean()


def test_erasing_prob_is_the_fraction_of_erased_views() -> None:
    plain = np.full((16, 16, 3), 90, np.uint8)
    views = [view_of(plain, "erasing", erasing_prob=0.25, size=16, seed=seed) for seed in range(400)]
    n_erased = sum(not np.array_equal(view, plain) for view in views)
    assert abs(n_erased - 100) <= 4 * math.sqrt(400 * 0.25 * 0.75)


def test_mixup_and_cutmix_do_not_change_single_images() -> None:
    np.testing.assert_array_equal(view_of(image(), "mixup", "cutmix"), view_of(image()))
