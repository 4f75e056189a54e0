"""Prepare training data: decode once, extract features, find duplicates, split, log problems."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from pixelplay.array_types import Float32Array, IntArray
from pixelplay.config import TrainConfig
from pixelplay.data.audit import FEW_IMAGES, find_coverage
from pixelplay.data.bit_range import find_bit_range
from pixelplay.data.cache import ArrayCache
from pixelplay.data.dataset import ImageDataset
from pixelplay.data.relabel import read_corrected_labels
from pixelplay.data.sampling import HINT_RATIO, imbalance_ratio
from pixelplay.model.features import (
    FeatureExtractor,
    extract_cached_features,
    extract_features,
    find_near_duplicates,
)
from pixelplay.run_log import RunLog
from pixelplay.text import EXAMPLES, counted, name_some, percent
from pixelplay.training.resume import check_images
from pixelplay.training.run_context import RunContext
from pixelplay.training.training_data import TrainingData, build_training_data, count_groups


def with_bit_range(dataset: ImageDataset, ctx: RunContext) -> RunContext:
    """Return a context with the range of values in images with more than 8 bits, and note it."""
    found = find_bit_range(dataset, ctx.config.bit_range)
    if found.note:
        ctx.log.note(found.note)
    return ctx.derive(max_value=found.max_value)


def prepare(dataset: ImageDataset, ctx: RunContext) -> TrainingData:
    """Read every image once with the pretrained backbone, split the images and log problems.

    Raises:
        DataError: too few images can be read, corrections name images that do not exist, or a resumed run
            had other images.
        ConfigError: the backbone cannot be used, or a resumed run had another one.
    """
    config, log = ctx.config, ctx.log
    corrections = None if config.relabel is None else read_corrected_labels(config.relabel, dataset)
    features = extract_features(dataset, ctx.backbone, config, ctx.device, log)
    pairs = []
    if config.near_duplicates:
        found = find_near_duplicates(dataset, features, config, log, max_value=ctx.max_value)
        pairs = [pair.members for pair in found]
    groups = ctx.backbone.backbone.feature_groups
    data = build_training_data(dataset, features, config, corrections, pairs, groups)
    log_problems(data, config, log)
    check_images(ctx.checkpoint_dir, data, ctx.backbone.weights_id)
    return data


def read_rows(
    data: TrainingData,
    rows: IntArray,
    extractor: FeatureExtractor,
    config: TrainConfig,
    on_progress: Callable[[int], object] = lambda n: None,
) -> Float32Array:
    """Compute features (n, D) of some images without the cache; ImageError where one is unreadable."""
    is_row = np.zeros(len(data.dataset), dtype=np.bool_)
    is_row[rows] = True
    found = extract_cached_features(
        data.dataset.select(is_row),
        extractor,
        ArrayCache("", "features", "", max_bytes=0),
        num_workers=config.compute.num_workers,
        on_progress=on_progress,
    )
    for error in found.errors.values():
        raise error
    return found.values[np.searchsorted(np.flatnonzero(is_row), rows)]


def _name_group(paths: Sequence[str]) -> str:
    """Name some images of a group of duplicates, absolute paths by their last folder and name only."""
    named = [os.path.join(*Path(path).parts[-2:]) if os.path.isabs(path) else path for path in paths]
    n_more = len(named) - EXAMPLES
    return " = ".join(named[:EXAMPLES]) + (f" = {n_more} more" if n_more > 0 else "")


def log_problems(data: TrainingData, config: TrainConfig, log: RunLog) -> None:
    """Note unreadable, duplicate, relabelled, missing and rare images."""
    if data.errors:
        named = [f"{data.all_images.paths[i]} ({error.reason})" for i, error in data.errors.items()]
        log.note(f"skipped {counted(len(data.errors), 'unreadable image')}: {name_some(named, EXAMPLES)}")
    duplicates = data.duplicates
    divided = [members for members in duplicates.near if members in duplicates.leaks]
    together = [members for members in duplicates.near if members not in duplicates.leaks]
    for text, sets in (
        ("of near-duplicates kept within one split", together),
        ("of near-duplicates in several predefined splits", divided),
        ("of similar images too large to be near-duplicates, not kept in one split", duplicates.large),
        ("of duplicates with different labels", duplicates.conflicts),
    ):
        if sets:
            named = [_name_group(data.paths_of(members)) for members in sets[:EXAMPLES]]
            log.note(f"{counted(len(sets), 'group')} {text}: {name_some(named, EXAMPLES, n=len(sets))}")
    for note in data.split.notes:
        log.note(note)
    if config.relabel is not None:
        n_changed = int((data.labels != data.original_labels).sum())
        n = f"{counted(n_changed, 'training label')} changed, {counted(len(data.excluded), 'image')} excluded"
        log.note(f"{config.relabel}: {n}; metrics use the original labels (metrics.json has both)")
    _log_never_held_out(data, log)
    _log_coverage(data, log)
    ratio = imbalance_ratio(data.fit_counts)
    if ratio > HINT_RATIO and config.metric == "accuracy":
        remedy = "if rare classes matter, use --metric balanced_accuracy or macro_f1"
        log.note(f"class imbalance is {ratio:.0f} : 1; {remedy}")


def _log_never_held_out(data: TrainingData, log: RunLog) -> None:
    """Name classes that stay in training as a whole, so that nothing measures them."""
    rows, counts = data.fit_rows, data.fit_counts
    n_groups = count_groups(data.labels[rows], data.split.groups[rows], data.n_known)  # (K,)
    for text, is_kind in (("image", counts == 1), ("group", counts > 1)):
        if named := [data.classes[k] for k in np.flatnonzero((n_groups == 1) & is_kind)]:
            n = f"{len(named)} of {data.n_known} classes"
            log.note(f"{n} with one training {text}, never held out: {name_some(named, EXAMPLES)}")


def _log_coverage(data: TrainingData, log: RunLog) -> None:
    """Name expected classes with no or few training images, and what that costs on the test split."""
    counts = dict(zip(data.known_classes, data.fit_counts, strict=True))
    dataset = data.all_images
    coverage = find_coverage(dataset, np.array([counts.get(name, 0) for name in dataset.classes], np.int64))
    if coverage.absent:
        best, n = coverage.max_accuracy, counted(len(coverage.absent), "expected class")
        bound = "" if best is None else f"; accuracy cannot exceed {percent(best)}"
        log.note(f"{n} without training images: {name_some(coverage.absent, EXAMPLES)}{bound}")
    if coverage.few:
        share = "" if coverage.few_share is None else f"; {percent(coverage.few_share)} of the test images"
        named = [f"{name} ({n})" for name, n in coverage.few.items()]
        n = counted(len(coverage.few), "expected class")
        log.note(f"{n} with fewer than {FEW_IMAGES} training images: {name_some(named, EXAMPLES)}{share}")
    # classes that have images outside a predefined test split but none left to train on
    outside = ~data.dataset.in_split("test")
    n_outside = np.bincount(data.original_labels[outside], minlength=len(data.classes))
    n_removed = np.bincount(data.original_labels[data.split.removed], minlength=len(data.classes))
    unknown = range(data.n_known, len(data.classes))
    if named := [data.classes[k] for k in unknown if n_outside[k] > n_removed[k]]:
        n = f"{len(named)} of {len(data.classes)} classes"
        log.note(f"{n} with no training image left, never predicted: {name_some(named, EXAMPLES)}")
