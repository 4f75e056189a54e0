"""Images → material: each is read once, copies are found, and all are sorted into parts."""

from collections.abc import Sequence

import numpy as np

from pixelplay.config import TrainConfig
from pixelplay.data.audit import FEW_IMAGES, find_coverage
from pixelplay.data.dataset import ImageDataset
from pixelplay.data.relabel import read_corrected_labels
from pixelplay.data.sampling import HINT_RATIO, imbalance_ratio
from pixelplay.model.backbone import PretrainedBackbone, load_backbone, pick_backbone_name
from pixelplay.model.features import extract_features, find_near_duplicates
from pixelplay.run_log import RunLog
from pixelplay.text import counted, name_some
from pixelplay.training.resume import check_images
from pixelplay.training.run_context import Workplace
from pixelplay.training.training_data import TrainingData, build_training_data


def prepare(
    dataset: ImageDataset, config: TrainConfig, workplace: Workplace, log: RunLog
) -> tuple[TrainingData, PretrainedBackbone]:
    """Read each image once with the backbone as it came, sort them, and say what is wrong with them.

    Nothing is learned here.

    Raises:
        DataError: too little can be read, corrections name what is not there, or the images are not
            those of the run that is resumed.
        ConfigError: the backbone cannot be used, or is not that of the run that is resumed.
    """
    corrections = None if config.relabel is None else read_corrected_labels(config.relabel, dataset)
    backbone = load_backbone(
        pick_backbone_name(config.backbone, workplace.device.name),
        config.weights,
        offline=config.offline,
        features="stages" if config.finetuning.head == "linear" else "pooled",
        input_size=config.input_size,
    )
    images = extract_features(dataset, backbone, config, workplace.device, log)
    near = []
    if config.near_duplicates:
        near = find_near_duplicates(dataset, images, config.compute.num_workers, log, hflip=config.hflip)
    data = build_training_data(dataset, images, config, corrections, [pair.members for pair in near])
    log_findings(data, config, log)
    check_images(workplace.checkpoints, data, backbone.weights_id)
    return data, backbone


SHOWN_COPIES = 4  # of one set


def log_findings(data: TrainingData, config: TrainConfig, log: RunLog) -> None:
    """Note what is missing, broken, copied, corrected, rare or unequal."""
    dataset = data.all_images
    if data.errors:
        named = name_some([f"{dataset.paths[i]} ({error.reason})" for i, error in data.errors.items()])
        log.note(f"{counted(len(data.errors), 'image')} cannot be used, hence left out: {named}")
    _say_what_is_copied(data, log)
    for note in data.split.notes:
        log.note(note)
    n_changed = int((data.labels != data.given_labels).sum())
    if config.relabel is not None:
        n_left = len(data.excluded)
        log.note(
            f"{config.relabel}: {counted(n_changed, 'label')} to learn from changed, "
            f"{counted(n_left, 'image')} left out; figures are on the labels as given, those on the "
            "corrected ones stand beside in metrics.json"
        )
    counts = data.fit_counts
    _say_what_is_never_held_out(data, log)
    _say_what_is_expected(data, log)
    _say_what_is_gone(data, log)
    ratio = imbalance_ratio(counts)
    if ratio > HINT_RATIO and config.metric == "accuracy":
        log.note(
            f"the largest class has {ratio:.0f} times the images of the smallest; "
            "if rare classes count, train with --metric balanced_accuracy or macro_f1"
        )


def _say_what_is_copied(data: TrainingData, log: RunLog) -> None:
    """Note altered copies, what only looks like them, and copies with different labels."""
    duplicates = data.duplicates
    found = {
        "of altered copies kept on one side of each split": duplicates.near,
        "too large for copies, so not kept together": duplicates.large,
        "of copies with different labels": duplicates.conflicts,
    }
    for what, sets in found.items():
        if sets:
            log.note(f"{counted(len(sets), 'set')} {what}, for example {_alike(data, sets[0])}")


def _say_what_is_never_held_out(data: TrainingData, log: RunLog) -> None:
    """Name classes that must stay in training whole, so that nothing measures them there."""
    rows = data.fit_rows
    pairs = np.unique(np.stack([data.labels[rows], data.split.groups[rows]], axis=1), axis=0)
    n_groups = np.bincount(pairs[:, 0], minlength=data.n_known)  # (K,)
    is_lone = n_groups == 1
    for what, found in (
        ("a single image to learn from", is_lone & (data.fit_counts == 1)),
        ("a single group to learn from", is_lone & (data.fit_counts > 1)),
    ):
        if found.any():
            named = name_some([data.classes[k] for k in np.flatnonzero(found)])
            log.note(f"{what}, so never held out of training: {named}")


def _say_what_is_gone(data: TrainingData, log: RunLog) -> None:
    """Name classes with images outside of a given test part, of which none is learned from."""
    outside = ~data.dataset.in_split("test")
    n_outside = np.bincount(data.given_labels[outside], minlength=len(data.classes))
    copies = np.bincount(data.given_labels[data.split.removed], minlength=len(data.classes))
    gone = [k for k in range(data.n_known, len(data.classes)) if n_outside[k] > copies[k]]
    if gone:
        named = name_some([data.classes[k] for k in gone])
        log.note(f"nothing is left to learn from, so these are never answered: {named}")


def _say_what_is_expected(data: TrainingData, log: RunLog) -> None:
    """Name expected classes with no or few training images, and what that means for the test side."""
    learned = dict(zip(data.known_classes, data.fit_counts, strict=True))
    dataset = data.all_images
    coverage = find_coverage(dataset, np.array([learned.get(name, 0) for name in dataset.classes], np.int64))
    if coverage.absent:
        bound = (
            ""
            if coverage.reachable is None
            else f"; no classifier of the others can pass {coverage.reachable:.1%} accuracy there"
        )
        log.note(
            f"{len(coverage.absent)} expected classes have no training image: "
            f"{name_some(coverage.absent)}{bound}"
        )
    if coverage.few:
        share = "" if coverage.in_few is None else f"; {coverage.in_few:.1%} of the test images are of these"
        named = name_some([f"{name} ({n})" for name, n in coverage.few.items()])
        log.note(f"expected classes with fewer than {FEW_IMAGES} training images: {named}{share}")


def _alike(data: TrainingData, members: Sequence[int]) -> str:
    """Name a set of copies, the first few of a large one."""
    more = f" = … ({len(members)} in all)" if len(members) > SHOWN_COPIES else ""
    return " = ".join(data.dataset.paths[i] for i in members[:SHOWN_COPIES]) + more
