"""Tests of MixUp and CutMix."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pixelplay.config import AugmentConfig
from pixelplay.training.mixup import mix_batch

METHODS = [("mixup",), ("cutmix",), ("crop", "mixup", "cutmix")]


def mix(
    inputs: Tensor,
    targets: Tensor,
    *names: str,
    extras: Tensor | None = None,
    seed: int = 0,
    alpha: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    config = AugmentConfig(augment=names, mixup_alpha=alpha, cutmix_alpha=alpha)
    extras = inputs.new_empty(len(inputs), 0) if extras is None else extras
    return mix_batch(inputs, extras, targets, config, np.random.default_rng(seed))


def plain_batch(n: int, height: int = 8, width: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Return images, extras and one-hot targets where image b has value b everywhere and class b."""
    values = torch.arange(n, dtype=torch.float64)
    inputs = values[:, None, None, None].expand(n, 3, height, width).contiguous()
    return inputs, values[:, None].expand(n, 4).contiguous(), torch.eye(n, dtype=torch.float64)


def patch_of(mixed: Tensor, inputs: Tensor) -> Tensor:
    """Return a mask (H, W) of the pixels that changed in any image."""
    return (mixed != inputs).any(dim=1).any(dim=0)


def partner_of(mixed_targets: Tensor) -> Tensor:
    """Return (B,) the other class in each target, which is the partner; the image itself if there is none."""
    others = mixed_targets - mixed_targets.diag().diag()
    return torch.where(others.any(dim=1), others.argmax(dim=1), torch.arange(len(others)))


@pytest.mark.parametrize("names", [(), ("crop", "erasing")])
def test_batch_is_unchanged_without_mixup_and_cutmix(names: tuple[str, ...]) -> None:
    inputs, extras, targets = plain_batch(4)
    mixed = mix(inputs, targets, *names, extras=extras)
    assert mixed[0] is inputs
    assert mixed[1] is extras
    assert mixed[2] is targets


@given(
    st.sampled_from(METHODS),
    st.integers(1, 9),
    st.integers(1, 20),
    st.integers(1, 20),
    st.floats(0.01, 100),
    st.integers(0, 9999),
)
def test_mixup_and_cutmix_use_one_ratio_for_images_extras_and_labels(
    names: tuple[str, ...], n: int, height: int, width: int, alpha: float, seed: int
) -> None:
    inputs, extras, targets = plain_batch(n, height, width)
    mixed, mixed_extras, mixed_targets = mix(inputs, targets, *names, extras=extras, alpha=alpha, seed=seed)
    assert (mixed.shape, mixed_extras.shape, mixed_targets.shape) == (
        inputs.shape,
        extras.shape,
        targets.shape,
    )
    assert mixed_targets.min() >= 0
    torch.testing.assert_close(mixed_targets.sum(dim=1), torch.ones(n, dtype=torch.float64))
    value = mixed_targets @ torch.arange(n, dtype=torch.float64)
    torch.testing.assert_close(mixed.mean(dim=(1, 2, 3)), value)
    torch.testing.assert_close(mixed_extras, value[:, None].expand(n, 4))


@pytest.mark.parametrize("names", METHODS)
def test_mixup_and_cutmix_use_one_ratio_per_batch(names: tuple[str, ...]) -> None:
    for seed in range(20):
        inputs, _, targets = plain_batch(16)
        own = mix(inputs, targets, *names, seed=seed)[2].diag()
        mixed_with_another = own[own < 1]
        torch.testing.assert_close(mixed_with_another, mixed_with_another[:1].expand_as(mixed_with_another))


def test_mixup_blends_every_pixel_with_the_same_ratio() -> None:
    inputs, _, targets = plain_batch(5)
    mixed, _, mixed_targets = mix(inputs, targets, "mixup", seed=3)
    ratio = mixed_targets.diag().min()
    partner = partner_of(mixed_targets)
    assert 0 < ratio < 1
    torch.testing.assert_close(mixed, ratio * inputs + (1 - ratio) * inputs[partner])


def test_cutmix_pastes_one_rectangle_of_the_partner() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.rand(6, 3, 12, 10, generator=generator), torch.eye(6)
    for seed in range(30):
        mixed, _, mixed_targets = mix(inputs, targets, "cutmix", seed=seed)
        patch = patch_of(mixed, inputs)
        if not patch.any():
            continue
        rows, columns = patch.nonzero().T
        assert patch[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()
        pasted = torch.where(patch, inputs[partner_of(mixed_targets)], inputs)
        torch.testing.assert_close(mixed, pasted, rtol=0, atol=0)
        torch.testing.assert_close(1 - mixed_targets.diag().min(), patch.float().mean())


def test_cutmix_patches_have_the_aspect_ratio_of_the_image_and_reach_its_edges() -> None:
    inputs, _, targets = plain_batch(8, 40, 80)
    touched, heights, widths = torch.zeros(40, 80), [], []
    for seed in range(100):
        patch = patch_of(mix(inputs, targets, "cutmix", seed=seed, alpha=100)[0], inputs)
        touched += patch
        heights.append(int(patch.any(dim=1).sum()))
        widths.append(int(patch.any(dim=0).sum()))
    # λ is close to ½, so a patch spans √½ of each side, or down to half of that where an edge clips it
    assert max(heights) / 40 == pytest.approx(math.sqrt(0.5), abs=0.08)
    assert max(widths) / 80 == pytest.approx(math.sqrt(0.5), abs=0.08)
    assert min(heights) / 40 == pytest.approx(math.sqrt(0.5) / 2, abs=0.08)
    assert touched.min() > 0


@pytest.mark.parametrize("alpha", [0.2, 1.0, 8.0])
def test_mixup_ratios_follow_the_beta_distribution(alpha: float) -> None:
    inputs, _, targets = plain_batch(8, 1, 1)
    own = np.array(
        [mix(inputs, targets, "mixup", seed=seed, alpha=alpha)[2].diag().min() for seed in range(400)]
    )
    variance = 1 / (4 * (2 * alpha + 1))
    assert own.mean() == pytest.approx(0.5, abs=4 * math.sqrt(variance / 400))
    assert own.var() == pytest.approx(variance, rel=0.2)


def test_mixup_and_cutmix_are_drawn_equally_often() -> None:
    inputs, _, targets = plain_batch(8)
    n_cutmix = 0
    for seed in range(200):
        mixed = mix(inputs, targets, "mixup", "cutmix", seed=seed, alpha=8)[0]
        n_cutmix += bool((mixed == mixed.round()).all())  # MixUp makes fractions
    assert abs(n_cutmix - 100) <= 4 * math.sqrt(200) / 2


@pytest.mark.parametrize("names", METHODS)
def test_mixup_and_cutmix_do_not_modify_arguments(names: tuple[str, ...]) -> None:
    for seed in range(10):
        inputs, extras, targets = plain_batch(6)
        mix(inputs, targets, *names, extras=extras, seed=seed)
        torch.testing.assert_close((inputs, extras, targets), plain_batch(6), rtol=0, atol=0)


@pytest.mark.parametrize("names", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_mixup_and_cutmix_keep_dtype_and_memory_format(
    names: tuple[str, ...], dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    inputs = (torch.rand(4, 3, 6, 5) * 200).to(dtype).to(memory_format=memory_format)
    for seed in range(6):
        mixed, extras, targets = mix(
            inputs, torch.eye(4), *names, extras=torch.ones(4, 2).to(dtype), seed=seed
        )
        assert extras is not None
        assert (mixed.dtype, extras.dtype, targets.dtype) == (dtype, dtype, torch.float32)
        assert mixed.stride() == inputs.stride()


def test_mixup_rounds_integer_pixels() -> None:
    inputs, _, targets = plain_batch(5)
    mixed = mix((50 * inputs).to(torch.uint8), targets, "mixup", seed=3)[0]
    exact = mix(50 * inputs, targets, "mixup", seed=3)[0]
    torch.testing.assert_close(mixed.double(), exact, rtol=0, atol=0.5)


def test_mixup_and_cutmix_are_reproducible() -> None:
    inputs, extras, targets = plain_batch(6)
    for names in METHODS:
        first, second = (mix(inputs, targets, *names, extras=extras, seed=7) for _ in range(2))
        torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("names", METHODS)
def test_mixup_and_cutmix_gradients_reach_both_partners(names: tuple[str, ...]) -> None:
    inputs, _, targets = plain_batch(6)
    inputs.requires_grad_()
    mix(inputs, targets, *names)[0].sum().backward()
    # each pixel contributes a total weight of 1, to its own image and to its partner's
    torch.testing.assert_close(inputs.grad, torch.ones_like(inputs))
