"""Scan a dataset: summarise its contents and list its problems.

It is separate from `api.py` because it needs no network: a plain scan starts without importing PyTorch.
"""

import os
from dataclasses import replace

from pixelplay.config import DataConfig, StrPath, TrainConfig
from pixelplay.data.audit import Audit, Duplicates, audit_images, find_duplicates
from pixelplay.data.bit_range import BitRange, find_bit_range
from pixelplay.data.dataset import ImageDataset
from pixelplay.data.decode import MAX_VALUE
from pixelplay.data.sources import log_dataset_notes, open_dataset
from pixelplay.errors import ConfigError
from pixelplay.run_log import RunLog


def scan(
    data: StrPath,
    reading: DataConfig | None = None,
    *,
    classes: str | None = None,
    names_only: bool = False,
    near_duplicates: bool = False,
    log: RunLog | None = None,
) -> tuple[ImageDataset, Audit]:
    """Summarise labelled images and list problems; nothing is changed.

    Args:
        data: folder of class folders, table or zip archive.
        classes: file with the classes expected in the test data.
        names_only: decode no images, and open only files that may be exact duplicates.
        near_duplicates: also search for resized, cropped, mirrored and otherwise edited duplicates. This
            runs the embedded backbone on every image; the features are cached for scans and training.

    Returns:
        The images, and the problems found.

    Raises:
        DataError: `data` does not exist or has no labelled image.
        ConfigError: `names_only` with `near_duplicates`, which needs pixels.
    """
    if names_only and near_duplicates:
        raise ConfigError("--near-duplicates needs pixels, which --names-only does not read; use one of them")
    log = log or RunLog()
    dataset = log_dataset_notes(open_dataset(os.fspath(data), reading, classes), log)
    bit_range = BitRange(max_value=MAX_VALUE) if names_only else find_bit_range(dataset, None)
    if bit_range.note:
        log.note(bit_range.note)
    with log.progress("reading", len(dataset)) as bar:
        audit = audit_images(
            dataset, decode=not names_only, max_value=bit_range.max_value, on_progress=bar.update
        )
    if near_duplicates:
        audit = replace(audit, duplicates=_find_near_duplicates(dataset, bit_range, log))
    return dataset, audit


def _find_near_duplicates(dataset: ImageDataset, bit_range: BitRange, log: RunLog) -> Duplicates:
    """Find exact and near-duplicates with the features of the embedded backbone."""
    from pixelplay.model.backbone import load_backbone
    from pixelplay.model.device import resolve_device
    from pixelplay.model.features import extract_features, find_near_duplicates

    config = TrainConfig(finetune="none", near_duplicates=True)
    backbone = load_backbone("lite0", None, offline=True)  # needs no download, fast on any machine
    max_value = bit_range.max_value
    backbone = replace(backbone, preprocessing=replace(backbone.preprocessing, max_value=max_value))
    features = extract_features(dataset, backbone, config, resolve_device(config.compute), log)
    pairs = find_near_duplicates(dataset, features, config, log, max_value=max_value)
    digests = [b"" if i in features.errors else digest for i, digest in enumerate(features.digests)]
    return find_duplicates(dataset, digests, [pair.members for pair in pairs])
