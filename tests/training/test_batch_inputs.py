"""Tests of training inputs: batches are reproducible, and cached views are computed once."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from images import draw, encode
from networks import shared_backbone
from pixelplay.config import AugmentConfig
from pixelplay.data.audit import digest_bytes
from pixelplay.data.augment import augment_view
from pixelplay.data.dataset import make_dataset
from pixelplay.data.pixel_cache import PixelCache
from pixelplay.data.transforms import Preprocessing, eval_transform
from pixelplay.model.backbone import Backbone, FeatureKind
from pixelplay.model.device import Device
from pixelplay.model.features import Normalizer
from pixelplay.model.split_backbone import FrozenStages, split_backbone
from pixelplay.training.batch_inputs import AugmentedPixels, Batch, CachedViews, Inputs, stream

N, SIZE, MANY = 9, 32, 10**9
PREPROCESSING = Preprocessing(input_size=(SIZE, SIZE), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
AUGMENTING = AugmentConfig(augment=("crop", "rotation", "erasing"))
ROWS = np.arange(N)
FILES = {f"{i}.png": encode(draw(i), "PNG") for i in range(N)}


@dataclass
class MemoryStorage:
    """Files in memory, with a count of reads."""

    n_reads: dict[str, int] = field(default_factory=dict)

    def read(self, path: str) -> bytes:
        self.n_reads[path] = self.n_reads.get(path, 0) + 1
        return FILES[path]

    def size(self, path: str) -> int:
        return len(FILES[path])

    def shown(self, path: str) -> str:
        return path


def make_pixels(
    storage: MemoryStorage | None = None, *, is_bf16: bool = False, cache: Path | None = None
) -> AugmentedPixels:
    """Create augmented pixels; without a cache every access decodes, so reads count computations."""
    dataset = make_dataset("memory", storage or MemoryStorage(), list(FILES), [None] * N, [None] * N)
    digests = tuple(digest_bytes(data) for data in FILES.values())
    return AugmentedPixels(
        pixels=PixelCache(
            dataset, digests, PREPROCESSING, cache_dir=str(cache or ""), max_bytes=MANY if cache else 0
        ),
        preprocessing=PREPROCESSING,
        augmenting=AUGMENTING,
        hflip=True,
        device=Device(name="cpu", precision="bf16" if is_bf16 else "fp32"),
        seed=5,
    )


def freeze(backbone: Backbone, n_trainable: int = 1) -> FrozenStages:
    """Return the stages before the last `n_trainable` ones."""
    frozen, _ = split_backbone(backbone, n_trainable, (SIZE, SIZE))
    assert frozen is not None
    return frozen


@lru_cache
def split(
    name: str = "test_convnext", n_trainable: int = 1, features: FeatureKind = "stages"
) -> FrozenStages:
    return freeze(shared_backbone(name, features), n_trainable)


def make_views(
    cache: Path,
    frozen: FrozenStages,
    pixels: AugmentedPixels,
    *,
    cached_views: int = 3,
    weights_id: str = "w",
    network: str = "net",
) -> CachedViews:
    digests = [digest_bytes(data) for data in FILES.values()]
    return CachedViews(
        frozen,
        pixels,
        digests,
        network=(network, "stages"),
        cached_views=cached_views,
        weights_id=weights_id,
        cache_dir=str(cache),
        max_bytes=MANY,
    )


def make_batch(rows: NDArray[np.int64], times: NDArray[np.int64]) -> Batch:
    """Create a batch with equal weights; `times` each row was drawn before in the epoch."""
    return Batch(rows, times, np.ones(len(rows), np.float32))


def first_batch(rows: NDArray[np.int64]) -> Batch:
    """Create a batch of images drawn for the first time in the epoch."""
    return make_batch(rows, np.zeros_like(rows))


def compute(views: CachedViews, train: NDArray[np.int64] = ROWS, plain: NDArray[np.int64] = ROWS) -> None:
    views.compute(train, plain, batch_size=4, num_workers=2)


@torch.inference_mode()
def run_frozen(frozen: FrozenStages, pixels: NDArray[np.uint8]) -> Inputs:
    maps, stats = frozen(Normalizer(PREPROCESSING, "cpu")(torch.from_numpy(pixels.copy())[None]))
    return maps[0], stats[0]


def expected_view(source: AugmentedPixels, frozen: FrozenStages, row: int, view: int) -> Inputs:
    """Compute one view of one image on its own."""
    digest = digest_bytes(list(FILES.values())[row])
    rng = np.random.default_rng([source.seed, view, int.from_bytes(digest, "big")])
    pixels = augment_view(source.pixels[row], source.augmenting, PREPROCESSING, rng, hflip=source.hflip)
    return run_frozen(frozen, pixels)


def assert_near(found: Inputs, expected: Inputs) -> None:
    """Check equality to 1e-4 of the largest value: rounding depends on the batch size."""
    for own, other in zip(found, expected, strict=True):
        scale = float(other.abs().max()) if other.numel() else 1.0
        torch.testing.assert_close(own / scale, other / scale, atol=1e-4, rtol=0)


def is_near(found: Inputs, expected: Inputs) -> bool:
    return bool(torch.allclose(found[0], expected[0], atol=1e-4 * float(expected[0].abs().max())))


def assert_equal(found: Inputs, expected: Inputs) -> None:
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, atol=0, rtol=0)


def rows_of(inputs: Inputs) -> list[tuple[Tensor, Tensor]]:
    return list(zip(*inputs, strict=True))


# --- views


@pytest.mark.parametrize("features", ["stages", "pooled"])
@pytest.mark.parametrize(("name", "n_trainable"), [("test_convnext", 1), ("test_efficientnet", 2)])
def test_cached_views_are_feature_maps_of_augmented_pixels_each_once_in_v_epochs(
    name: str, n_trainable: int, features: FeatureKind, tmp_path: Path
) -> None:
    frozen, pixels = split(name, n_trainable, features), make_pixels()
    views = make_views(tmp_path, frozen, pixels)
    compute(views)
    epochs = [rows_of(views.train_batch(first_batch(ROWS), epoch, (SIZE, SIZE))()) for epoch in range(1, 4)]
    for row in ROWS:
        expected = [expected_view(pixels, frozen, int(row), view) for view in range(3)]
        found = [[is_near(epoch[row], view) for view in expected].index(True) for epoch in epochs]
        assert sorted(found) == [0, 1, 2]
        for epoch, view in zip(epochs, found, strict=True):
            assert_near(epoch[row], expected[view])


@pytest.mark.parametrize("features", ["stages", "pooled"])
def test_plain_view_is_feature_map_of_evaluation_pixels(features: FeatureKind, tmp_path: Path) -> None:
    frozen, pixels = split("test_efficientnet", 2, features), make_pixels()
    views = make_views(tmp_path, frozen, pixels)
    compute(views)
    found = rows_of(views.plain_batch(ROWS)())
    for row in ROWS:
        assert_near(found[row], run_frozen(frozen, eval_transform(pixels.pixels[row], PREPROCESSING)))


def test_trainable_stages_of_plain_views_give_backbone_features(tmp_path: Path) -> None:
    frozen, trainable = split_backbone(shared_backbone("test_resnet", "stages"), 2, (SIZE, SIZE))
    assert frozen is not None
    pixels = make_pixels()
    views = make_views(tmp_path, frozen, pixels)
    compute(views)
    images, _ = pixels.plain_batch(ROWS)()
    with torch.inference_mode():
        found = trainable.eval()(*views.plain_batch(ROWS)())
        expected = shared_backbone("test_resnet", "stages")(images)
    assert_near((found, found), (expected, expected))


def test_view_batches_are_reproducible(tmp_path: Path) -> None:
    frozen = split()
    views = make_views(tmp_path / "a", frozen, make_pixels())
    compute(views)
    again = make_views(tmp_path / "b", frozen, make_pixels())
    compute(again)
    for epoch in (1, 2):
        expected = views.train_batch(first_batch(ROWS), epoch, (SIZE, SIZE))()
        assert_equal(views.train_batch(first_batch(ROWS), epoch, (SIZE, SIZE))(), expected)
        assert_equal(again.train_batch(first_batch(ROWS), epoch, (SIZE, SIZE))(), expected)


def test_view_does_not_depend_on_its_batch(tmp_path: Path) -> None:
    frozen = split()
    views, in_steps = (make_views(tmp_path / name, frozen, make_pixels()) for name in "ab")
    compute(views)
    for rows in (np.array([7]), np.array([3, 8, 1, 0, 2]), ROWS):
        compute(in_steps, rows, rows)
    for epoch in (1, 2, 3):
        assert_equal(
            in_steps.train_batch(first_batch(ROWS), epoch, (SIZE, SIZE))(),
            views.train_batch(first_batch(ROWS), epoch, (SIZE, SIZE))(),
        )
    assert_equal(in_steps.plain_batch(ROWS)(), views.plain_batch(ROWS)())


def test_view_batch_keeps_order_of_rows(tmp_path: Path) -> None:
    views = make_views(tmp_path, split(), make_pixels())
    compute(views)
    mixed = np.array([5, 2, 7, 0])
    for batch in (
        lambda rows: views.train_batch(first_batch(rows), 2, (SIZE, SIZE))(),
        lambda rows: views.plain_batch(rows)(),
    ):
        together = rows_of(batch(mixed))
        for found, row in zip(together, mixed, strict=True):
            assert_equal(found, rows_of(batch(np.array([row])))[0])


def test_image_drawn_twice_in_a_batch_has_two_views(tmp_path: Path) -> None:
    views = make_views(tmp_path, split(), make_pixels())
    compute(views)
    found = rows_of(
        views.train_batch(make_batch(np.array([4, 1, 4, 4]), np.array([0, 0, 1, 2])), 1, (SIZE, SIZE))()
    )
    assert not torch.equal(found[0][0], found[2][0])
    assert not torch.equal(found[0][0], found[3][0])
    assert not torch.equal(found[2][0], found[3][0])
    later = rows_of(views.train_batch(first_batch(np.array([4])), 2, (SIZE, SIZE))())
    assert_equal(found[2], later[0])  # its next view is that of the next epoch


def test_single_cached_view_is_used_in_every_epoch(tmp_path: Path) -> None:
    views = make_views(tmp_path, split(), make_pixels(), cached_views=1)
    compute(views)
    assert_equal(
        views.train_batch(first_batch(ROWS), 1, SIZE)(),
        views.train_batch(first_batch(ROWS), 2, (SIZE, SIZE))(),
    )
    found = rows_of(views.train_batch(make_batch(np.array([4, 4]), np.array([0, 1])), 1, (SIZE, SIZE))())
    assert_equal(found[0], found[1])


@pytest.mark.parametrize("features", ["stages", "pooled"])
@pytest.mark.parametrize("n_rows", [1, 3])
def test_cached_feature_maps_are_bf16_and_statistics_fp32(
    n_rows: int, features: FeatureKind, tmp_path: Path
) -> None:
    frozen, pixels = split("test_efficientnet", 2, features), make_pixels(is_bf16=True)
    views = make_views(tmp_path, frozen, pixels, cached_views=1)
    compute(views)
    maps, stats = views.train_batch(first_batch(ROWS[:n_rows]), 1, (SIZE, SIZE))()
    assert maps.dtype == torch.bfloat16
    assert maps.shape == (n_rows, *frozen.map_shape)
    assert stats.dtype == torch.float32
    assert stats.shape == (n_rows, frozen.n_stats)
    for found, row in zip(rows_of((maps.float(), stats)), ROWS, strict=False):
        for own, other in zip(found, expected_view(pixels, frozen, int(row), 0), strict=True):
            scale = float(other.abs().max()) if other.numel() else 1.0
            torch.testing.assert_close(own / scale, other / scale, atol=0.05, rtol=0)


def split_with_odd_maps(features: FeatureKind) -> FrozenStages:
    """Split a backbone whose maps have an odd number of values, so bf16 bytes do not fill words of 4."""

    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Conv2d(3, 5, 8, stride=6)  # 32 px become 5
            self.second = torch.nn.Conv2d(5, 3, 1)
            self.pretrained_cfg = {"input_size": (3, SIZE, SIZE)}
            self.feature_info = [{"module": "first"}, {"module": "second"}]

        def forward_intermediates(self, images: Tensor, indices: list[int], **options: object) -> object:
            first = self.first(images)
            maps = [first, self.second(first) if not options else None]
            chosen = [maps[i] for i in indices]
            return chosen if options else (maps[-1], chosen)

        def forward_head(self, maps: Tensor, pre_logits: bool) -> Tensor:
            return maps.mean((2, 3))

    torch.manual_seed(0)
    frozen = freeze(Backbone("odd", Odd(), features))
    assert int(np.prod(frozen.map_shape)) % 2 == 1
    return frozen


@pytest.mark.parametrize("n_rows", [1, 2])
@pytest.mark.parametrize("features", ["stages", "pooled"])
def test_cached_feature_maps_of_odd_size_are_restored_in_bf16(
    features: FeatureKind, n_rows: int, tmp_path: Path
) -> None:
    frozen, pixels = split_with_odd_maps(features), make_pixels(is_bf16=True)
    views = make_views(tmp_path, frozen, pixels, cached_views=1)
    compute(views)
    maps, stats = views.train_batch(first_batch(ROWS[:n_rows]), 1, (SIZE, SIZE))()
    assert maps.shape == (n_rows, *frozen.map_shape)
    for found, row in zip(rows_of((maps.float(), stats)), ROWS, strict=False):
        for own, other in zip(found, expected_view(pixels, frozen, int(row), 0), strict=True):
            torch.testing.assert_close(own, other, atol=0.05, rtol=0.05)


def test_bytes_per_view_equals_size_on_disk(tmp_path: Path) -> None:
    for is_bf16 in (False, True):
        frozen, pixels = split("test_efficientnet", 2), make_pixels(is_bf16=is_bf16)
        cache = tmp_path / str(is_bf16)
        compute(make_views(cache, frozen, pixels, cached_views=2))
        arrays = [np.load(path) for path in cache.glob("views-*/*.values.npy")]
        assert {array[0].nbytes for array in arrays} == {CachedViews.bytes_per_view(frozen, pixels.device)}
        assert sum(len(array) for array in arrays) == 3 * N


# --- cache


def n_reads(storage: MemoryStorage) -> int:
    return sum(storage.n_reads.values())


def test_cached_views_are_computed_once(tmp_path: Path) -> None:
    storage, frozen = MemoryStorage(), split()
    views = make_views(tmp_path, frozen, make_pixels(storage))
    compute(views)
    assert storage.n_reads == dict.fromkeys(FILES, 1 + 3)  # the plain view and each augmented one
    expected = views.train_batch(first_batch(ROWS), 1, (SIZE, SIZE))()
    compute(views)
    again = make_views(tmp_path, frozen, make_pixels(storage))
    compute(again)
    assert n_reads(storage) == 4 * N
    assert_equal(again.train_batch(first_batch(ROWS), 1, (SIZE, SIZE))(), expected)


def test_interrupted_computation_of_views_continues(tmp_path: Path) -> None:
    storage, frozen = MemoryStorage(), split()
    compute(make_views(tmp_path, frozen, make_pixels()), ROWS[:4], ROWS[:6])
    seen: list[int] = []
    views = make_views(tmp_path, frozen, make_pixels(storage))
    views.compute(ROWS, ROWS, batch_size=4, num_workers=2, on_progress=seen.append)
    assert storage.n_reads == {f"{i}.png": 3 if i < 6 else 4 for i in range(4, N)}
    assert sum(seen) == 4 * N


def test_more_views_are_added_to_cached_ones(tmp_path: Path) -> None:
    storage, frozen = MemoryStorage(), split()
    compute(make_views(tmp_path, frozen, make_pixels(), cached_views=2))
    compute(make_views(tmp_path, frozen, make_pixels(storage), cached_views=3))
    assert storage.n_reads == dict.fromkeys(FILES, 1)


def test_only_training_rows_have_augmented_views_and_only_plain_rows_plain_ones(tmp_path: Path) -> None:
    storage = MemoryStorage()
    compute(make_views(tmp_path, split(), make_pixels(storage)), ROWS[:2], ROWS[7:])
    assert storage.n_reads == {"0.png": 3, "1.png": 3, "7.png": 1, "8.png": 1}


CHANGES: dict[str, Callable[[AugmentedPixels], AugmentedPixels]] = {
    "seed": lambda source: replace(source, seed=6),
    "augmentation": lambda source: replace(source, augmenting=AugmentConfig(augment=("crop",))),
    "strength": lambda source: replace(source, augmenting=replace(AUGMENTING, crop_scale=0.5)),
    "hflip": lambda source: replace(source, hflip=False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_augmentation_recomputes_augmented_views_only(change: str, tmp_path: Path) -> None:
    storage, frozen = MemoryStorage(), split()
    views = make_views(tmp_path, frozen, make_pixels())
    compute(views)
    changed = make_views(tmp_path, frozen, CHANGES[change](make_pixels(storage)))
    compute(changed)
    assert storage.n_reads == dict.fromkeys(FILES, 3)
    first, second = (
        source.train_batch(first_batch(ROWS), 1, (SIZE, SIZE))()[0] for source in (views, changed)
    )
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    "change", ["unfreeze_stages", "features", "name", "weights", "interpolation", "dtype"]
)
def test_changed_network_recomputes_all_views(change: str, tmp_path: Path) -> None:
    compute(make_views(tmp_path, split(), make_pixels()))
    storage = MemoryStorage()
    pixels = make_pixels(storage, is_bf16=change == "dtype")
    if change == "interpolation":
        pixels = replace(pixels, preprocessing=replace(PREPROCESSING, interpolation="bilinear"))
    frozen = split(
        n_trainable=2 if change == "unfreeze_stages" else 1,
        features="pooled" if change == "features" else "stages",
    )
    weights_id = "other" if change == "weights" else "w"
    name = "twin" if change == "name" else "net"
    compute(make_views(tmp_path, frozen, pixels, weights_id=weights_id, network=name))
    assert storage.n_reads == dict.fromkeys(FILES, 4)


def equally_shaped_splits() -> list[FrozenStages]:
    """Split one network at two places with feature maps of the same shape and no statistics."""

    class Straight(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = torch.nn.Conv2d(3, 4, 8, stride=8)
            self.blocks = torch.nn.ModuleList(torch.nn.Conv2d(4, 4, 1) for _ in range(2))
            self.pretrained_cfg = {"input_size": (3, SIZE, SIZE)}
            self.feature_info = [{"module": name} for name in ("stem", "blocks.0", "blocks.1")]

        def forward_intermediates(self, images: Tensor, indices: list[int], **options: object) -> object:
            maps = [self.stem(images)]
            for block in self.blocks:
                maps.append(block(maps[-1]))
            chosen = [maps[i] for i in indices]
            return chosen if options else (maps[-1], chosen)

        def forward_head(self, maps: Tensor, pre_logits: bool) -> Tensor:
            return maps.mean((2, 3))

    torch.manual_seed(0)
    backbone = Backbone("straight", Straight(), "pooled")
    return [freeze(backbone, n_trainable) for n_trainable in (1, 2)]


def test_splits_with_equal_shapes_do_not_share_cached_views(tmp_path: Path) -> None:
    late, early = equally_shaped_splits()
    assert (late.map_shape, late.n_stats) == (early.map_shape, early.n_stats)
    compute(make_views(tmp_path, late, make_pixels()))
    storage = MemoryStorage()
    compute(make_views(tmp_path, early, make_pixels(storage)))
    assert storage.n_reads == dict.fromkeys(FILES, 4)


def test_changed_decode_version_recomputes_all_views(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compute(make_views(tmp_path, split(), make_pixels()))
    monkeypatch.setattr("pixelplay.training.batch_inputs.DECODE_VERSION", 10**6)
    storage = MemoryStorage()
    compute(make_views(tmp_path, split(), make_pixels(storage)))
    assert storage.n_reads == dict.fromkeys(FILES, 4)


def test_views_that_cannot_be_stored_give_a_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    views = make_views(tmp_path / "file", split(), make_pixels())
    failure = views.compute(ROWS, ROWS, batch_size=4, num_workers=2)
    assert failure is not None
    assert failure.endswith(": Not a directory")
    assert (
        make_views(tmp_path, split(), make_pixels()).compute(ROWS, ROWS, batch_size=4, num_workers=2) is None
    )


def test_measuring_views_stores_nothing(tmp_path: Path) -> None:
    storage = MemoryStorage()
    make_views(tmp_path, split(), make_pixels(storage)).measure_s(ROWS[:5], 2, 2, n_warmup=1)
    assert n_reads(storage) == 5
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("n_warmup", "is_counted"), [(0, True), (1, False), (2, False), (3, True), (99, True)]
)
def test_time_per_view_excludes_warmup_batches(n_warmup: int, is_counted: bool, tmp_path: Path) -> None:
    class SlowAtFirst(MemoryStorage):
        def read(self, path: str) -> bytes:
            if not self.n_reads:
                time.sleep(0.4)
            return super().read(path)

    views = make_views(tmp_path, split(), make_pixels(SlowAtFirst()))
    seconds = views.measure_s(ROWS[:5], 2, 1, n_warmup=n_warmup)  # batches of 2, 2 and 1
    assert (seconds >= 0.4 / 5) == is_counted


# --- pixels


def test_augmented_pixels_are_normalised() -> None:
    source = make_pixels()
    images, stats = source.train_batch(first_batch(ROWS[:3]), 2, (24, 24))()
    assert images.shape == (3, 3, 24, 24)
    assert stats.shape == (3, 0)
    for place, row in enumerate(ROWS[:3]):
        rng = np.random.default_rng([source.seed, 2, int(row), 0])
        view = augment_view(source.pixels[row], AUGMENTING, PREPROCESSING, rng, hflip=True, size=(24, 24))
        expected = (view / 255 - np.array(PREPROCESSING.mean)) / np.array(PREPROCESSING.std)
        np.testing.assert_allclose(images[place].permute(1, 2, 0).numpy(), expected, atol=1e-5)


def test_plain_pixels_equal_evaluation_pixels() -> None:
    source = make_pixels()
    images, stats = source.plain_batch(ROWS)()
    expected = np.stack([eval_transform(source.pixels[row], PREPROCESSING) for row in ROWS])
    torch.testing.assert_close(
        images, Normalizer(PREPROCESSING, "cpu")(torch.from_numpy(expected)), atol=0, rtol=0
    )
    assert stats.shape == (N, 0)


def test_augmented_pixels_depend_only_on_seed_epoch_row_and_times_drawn() -> None:
    source, again = make_pixels(), make_pixels()
    rows, others = np.array([3, 1, 4]), np.array([8, 1, 0, 5])
    found = source.train_batch(first_batch(rows), 1, (SIZE, SIZE))()[0]
    torch.testing.assert_close(
        again.train_batch(first_batch(rows), 1, (SIZE, SIZE))()[0], found, atol=0, rtol=0
    )
    # row 1 in another batch
    torch.testing.assert_close(
        source.train_batch(first_batch(others), 1, (SIZE, SIZE))()[0][1], found[1], atol=0, rtol=0
    )
    assert not torch.equal(source.train_batch(first_batch(rows), 2, (SIZE, SIZE))()[0][1], found[1])
    assert not torch.equal(
        replace(source, seed=6).train_batch(first_batch(rows), 1, (SIZE, SIZE))()[0][1], found[1]
    )
    again_drawn = make_batch(rows, np.array([0, 1, 0]))
    assert not torch.equal(source.train_batch(again_drawn, 1, (SIZE, SIZE))()[0][1], found[1])


@pytest.mark.parametrize("change", [{"mixup_alpha": 0.9}, {"mix_prob": 0.1}, {"augment": "with mixup"}])
def test_mixup_settings_do_not_change_cached_views(change: dict[str, Any], tmp_path: Path) -> None:
    storage, frozen = MemoryStorage(), split()
    if "augment" in change:
        change = {"augment": (*AUGMENTING.augment, "mixup", "cutmix")}
    compute(make_views(tmp_path, frozen, make_pixels()))
    changed = replace(make_pixels(storage), augmenting=replace(AUGMENTING, **change))
    compute(make_views(tmp_path, frozen, changed))
    assert storage.n_reads == {}


def test_cached_pixels_are_decoded_once_for_all_epochs(tmp_path: Path) -> None:
    storage = MemoryStorage()
    source = make_pixels(storage, cache=tmp_path)
    first = source.train_batch(first_batch(ROWS), 1, (SIZE, SIZE))()[0]
    source.flush()
    for epoch in (2, 3):
        source.train_batch(first_batch(ROWS), epoch, (SIZE, SIZE))()
    assert storage.n_reads == dict.fromkeys(FILES, 1)
    torch.testing.assert_close(
        source.train_batch(first_batch(ROWS), 1, (SIZE, SIZE))()[0], first, atol=0, rtol=0
    )


def test_image_drawn_twice_in_a_batch_is_augmented_twice() -> None:
    images = make_pixels().train_batch(make_batch(np.array([4, 4]), np.array([0, 1])), 1, (SIZE, SIZE))()[0]
    assert not torch.equal(images[0], images[1])


def test_stream_keeps_every_worker_busy() -> None:
    barrier = Barrier(12)

    def load(rows: NDArray[np.int64]) -> Callable[[], Inputs]:
        barrier.wait(timeout=10)  # breaks unless twelve are loaded at once
        return lambda: (torch.zeros(len(rows), 1, 1, 1), torch.zeros(len(rows), 1))

    assert len(list(stream([ROWS[:1]] * 24, load, 12))) == 24


@pytest.mark.parametrize("num_workers", [1, 4])
@pytest.mark.parametrize("kind", ["views", "pixels"])
def test_stream_keeps_order_for_any_number_of_workers(kind: str, num_workers: int, tmp_path: Path) -> None:
    source: CachedViews | AugmentedPixels = make_pixels()
    if kind == "views":
        source = make_views(tmp_path, split(), make_pixels())
        compute(source)
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, N, n) for n in (3, 1, 4, 2) * 6]
    streamed = list(
        stream(batches, lambda rows: source.train_batch(first_batch(rows), 1, (SIZE, SIZE)), num_workers)
    )
    assert len(streamed) == len(batches)
    for (rows, found), batch in zip(streamed, batches, strict=True):
        assert rows is batch
        assert_equal(found, source.train_batch(first_batch(batch), 1, (SIZE, SIZE))())


def test_stream_raises_errors_of_worker_threads() -> None:
    def load(rows: NDArray[np.int64]) -> Callable[[], Inputs]:
        if rows[0] == 2:
            raise ValueError("image 2")
        return make_pixels().plain_batch(rows)

    batches = [np.array([i]) for i in range(4)]
    with pytest.raises(ValueError, match="image 2"):
        list(stream(batches, load, 2))
