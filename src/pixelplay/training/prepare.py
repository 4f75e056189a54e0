"""Photographs → material: each is read once, copies are found, and all are sorted into parts."""

from collections.abc import Sequence

import numpy as np

from pixelplay.config import TrainConfig
from pixelplay.data.audit import FEW, find_coverage
from pixelplay.data.dataset import ImageIndex
from pixelplay.data.relabel import read_corrections
from pixelplay.data.sampling import HINT_RATIO, imbalance_ratio
from pixelplay.model.backbone import LoadedBackbone, load_backbone, pick_backbone_name
from pixelplay.model.features import look_for_copies, read_photographs
from pixelplay.run_log import Journal
from pixelplay.text import counted, name_some
from pixelplay.training.resume import check_photographs
from pixelplay.training.run_context import Workplace
from pixelplay.training.training_data import Material, sort_out


def prepare_material(
    index: ImageIndex, config: TrainConfig, workplace: Workplace, journal: Journal
) -> tuple[Material, LoadedBackbone]:
    """Read each photograph once with the backbone as it came, sort them, and say what is wrong with them.

    Nothing is learned here.

    Raises:
        DataError: too little can be read, corrections name what is not there, or the photographs are not
            those of the run that is resumed.
        ConfigError: the backbone cannot be used, or is not that of the run that is resumed.
    """
    corrections = None if config.relabel is None else read_corrections(config.relabel, index)
    backbone = load_backbone(
        pick_backbone_name(config.backbone, workplace.device.name),
        config.weights,
        is_offline=config.offline,
        features="stages" if config.finetune.head == "linear" else "pooled",
        input_size=config.input_size,
    )
    photographs = read_photographs(index, backbone, config, workplace.device, journal)
    near = []
    if config.near_duplicates:
        near = look_for_copies(index, photographs, config.compute.num_workers, journal, hflip=config.hflip)
    material = sort_out(index, photographs, config, corrections, [pair.members for pair in near])
    say_what_was_found(material, config, journal)
    check_photographs(workplace.checkpoints, material, backbone.weights_id)
    return material, backbone


SHOWN_COPIES = 4  # of one set


def say_what_was_found(material: Material, config: TrainConfig, journal: Journal) -> None:
    """Note what is missing, broken, copied, corrected, rare or unequal."""
    index = material.scanned
    if material.errors:
        named = name_some([f"{index.paths[i]} ({error.reason})" for i, error in material.errors.items()])
        journal.note(f"{counted(len(material.errors), 'photograph')} cannot be used, hence left out: {named}")
    _say_what_is_copied(material, journal)
    for note in material.parts.notes:
        journal.note(note)
    n_changed = int((material.labels != material.given).sum())
    if config.relabel is not None:
        n_left = len(material.left_out)
        journal.note(
            f"{config.relabel}: {counted(n_changed, 'label')} to learn from changed, "
            f"{counted(n_left, 'photograph')} left out; figures are on the labels as given, those on the "
            "corrected ones stand beside in metrics.json"
        )
    counts = material.learn_counts
    _say_what_is_never_held_out(material, journal)
    _say_what_is_expected(material, journal)
    _say_what_is_gone(material, journal)
    ratio = imbalance_ratio(counts)
    if ratio > HINT_RATIO and config.metric == "accuracy":
        journal.note(
            f"the largest class has {ratio:.0f} times the photographs of the smallest; "
            "if rare classes count, train with --metric balanced_accuracy or macro_f1"
        )


def _say_what_is_copied(material: Material, journal: Journal) -> None:
    """Note altered copies, what only looks like them, and copies with different labels."""
    duplicates = material.duplicates
    found = {
        "of altered copies kept on one side of each split": duplicates.near,
        "too large for copies, so not kept together": duplicates.large,
        "of copies with different labels": duplicates.conflicts,
    }
    for what, sets in found.items():
        if sets:
            journal.note(f"{counted(len(sets), 'set')} {what}, for example {_alike(material, sets[0])}")


def _say_what_is_never_held_out(material: Material, journal: Journal) -> None:
    """Name classes that must stay in training whole, so that nothing measures them there."""
    rows = material.learn
    pairs = np.unique(np.stack([material.labels[rows], material.parts.groups[rows]], axis=1), axis=0)
    n_groups = np.bincount(pairs[:, 0], minlength=material.n_known)  # (K,)
    is_lone = n_groups == 1
    for what, found in (
        ("a single photograph to learn from", is_lone & (material.learn_counts == 1)),
        ("a single group to learn from", is_lone & (material.learn_counts > 1)),
    ):
        if found.any():
            named = name_some([material.classes[k] for k in np.flatnonzero(found)])
            journal.note(f"{what}, so never held out of training: {named}")


def _say_what_is_gone(material: Material, journal: Journal) -> None:
    """Name classes with photographs outside of a given test part, of which none is learned from."""
    outside = ~material.index.in_part("test")
    n_outside = np.bincount(material.given[outside], minlength=len(material.classes))
    copies = np.bincount(material.given[material.parts.removed], minlength=len(material.classes))
    gone = [k for k in range(material.n_known, len(material.classes)) if n_outside[k] > copies[k]]
    if gone:
        named = name_some([material.classes[k] for k in gone])
        journal.note(f"nothing is left to learn from, so these are never answered: {named}")


def _say_what_is_expected(material: Material, journal: Journal) -> None:
    """Name expected classes with no or few training photographs, and what that means for the test side."""
    learned = dict(zip(material.known_classes, material.learn_counts, strict=True))
    index = material.scanned
    coverage = find_coverage(index, np.array([learned.get(name, 0) for name in index.classes], np.int64))
    if coverage.absent:
        bound = (
            ""
            if coverage.reachable is None
            else f"; no classifier of the others can pass {coverage.reachable:.1%} accuracy there"
        )
        journal.note(
            f"{len(coverage.absent)} expected classes have no training photograph: "
            f"{name_some(coverage.absent)}{bound}"
        )
    if coverage.few:
        share = (
            "" if coverage.in_few is None else f"; {coverage.in_few:.1%} of the test photographs are of these"
        )
        named = name_some([f"{name} ({n})" for name, n in coverage.few.items()])
        journal.note(f"expected classes with fewer than {FEW} training photographs: {named}{share}")


def _alike(material: Material, members: Sequence[int]) -> str:
    """Name a set of copies, the first few of a large one."""
    more = f" = … ({len(members)} in all)" if len(members) > SHOWN_COPIES else ""
    return " = ".join(material.index.paths[i] for i in members[:SHOWN_COPIES]) + more
