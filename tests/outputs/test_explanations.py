"""File names and overlays of explanations."""

import numpy as np
import pytest

from pixelplay.outputs.explanations import ANCHORS, DESATURATION, MAX_OPACITY, color, file_stem, overlay


def lightness(colors: object) -> np.ndarray:
    """Compute CIE L* of sRGB colors (…, 3) in [0, 255]."""
    values = np.asarray(colors, float) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    y = linear @ [0.2126, 0.7152, 0.0722]
    return np.asarray(116 * np.cbrt(y) - 16)


def test_heat_colors_get_lighter_in_even_steps() -> None:
    steps = np.diff(lightness(ANCHORS))
    assert steps.min() > 0.85 * steps.mean()
    assert steps.max() < 1.15 * steps.mean()
    fine = lightness(color(np.linspace(0, 1, 256, dtype=np.float32)))
    assert (np.diff(fine) > 0).all()


def test_overlay_without_heat_is_the_desaturated_image() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    found = overlay(pixels, np.zeros((10, 15), np.float32), max_px=100)
    np.testing.assert_allclose(np.ptp(found, axis=2), (1 - DESATURATION) * np.ptp(pixels, axis=2), atol=2)
    grey = np.random.default_rng(0).integers(0, 256, (40, 60, 1), dtype=np.uint8).repeat(3, axis=2)
    np.testing.assert_array_equal(overlay(grey, np.zeros((10, 15), np.float32), max_px=100), grey)


def test_overlay_is_lightest_at_the_hottest_place() -> None:
    pixels = np.zeros((40, 60, 3), np.uint8)
    heat = np.zeros((40, 60), np.float32)
    heat[10, 20], heat[30, 50] = 5, 2.5
    found = overlay(pixels, heat, max_px=60).astype(int)
    np.testing.assert_allclose(found[10, 20], MAX_OPACITY * np.array(ANCHORS[-1]), atol=1)
    np.testing.assert_allclose(found[30, 50], MAX_OPACITY / 2 * np.array(ANCHORS[3]), atol=1)
    found[10, 20] = found[30, 50] = 0
    assert not found.any()


@pytest.mark.parametrize(
    ("size", "max_px", "expected"),
    [((30, 90), 45, (15, 45)), ((90, 30), 45, (45, 15)), ((30, 20), 200, (30, 20)), ((1, 900), 9, (1, 9))],
)
def test_overlay_keeps_proportions_and_does_not_enlarge(
    size: tuple[int, int], max_px: int, expected: tuple[int, int]
) -> None:
    found = overlay(np.zeros((*size, 3), np.uint8), np.ones((7, 7), np.float32), max_px=max_px)
    assert found.shape == (*expected, 3)
    assert found.dtype == np.uint8


@pytest.mark.parametrize(
    ("path", "label", "expected"),
    [
        ("../../etc/passwd", "a/b", "0003_passwd_a_b"),
        ("..", "..", "0003____"),
        ("C:\\temp\\cat.JPG", "cat", "0003_cat_cat"),
        ('dog\'s "best"\n.png', "x\0y", "0003_dog_s_best__x_y"),
        ("\udcff.png", "\u202egnp", "0003____gnp"),
        ("y" * 300, "z" * 300, f"0003_{'y' * 40}_{'z' * 40}"),
        ("語" * 300, "語" * 300, f"0003_{'語' * 26}_{'語' * 26}"),
    ],
)
def test_file_stem_is_safe_for_any_name(path: str, label: str, expected: str) -> None:
    found = file_stem(3, path, label)
    assert found == expected
    assert len(found.encode()) < 200
