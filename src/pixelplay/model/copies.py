"""Photographs that are altered copies of each other, found with the help of features."""

import os
from dataclasses import replace

from pixelplay.config import DataConfig, TrainConfig
from pixelplay.data.audit import Audit, find_duplicates
from pixelplay.data.dataset import ImageIndex
from pixelplay.data.scan import scan
from pixelplay.model.backbone import load_backbone
from pixelplay.model.device import find_device
from pixelplay.model.features import look_for_copies, read_photographs
from pixelplay.run_log import Journal

SEES_COPIES = "lite0"  # offline, and quick enough on any machine


def scan_closely(
    source: str | os.PathLike[str],
    data: DataConfig | None = None,
    *,
    classes: str | None = None,
    journal: Journal | None = None,
) -> tuple[ImageIndex, Audit]:
    """Scan, and find re-encoded, resized, cut, mirrored, brightened and watermarked copies too.

    It sees each photograph with the embedded backbone; what that gives is kept in the cache, for the next
    scan and for training.

    Args:
        classes: file of the classes that the test side expects.

    Raises:
        DataError: nothing there, or no labelled photograph.
    """
    journal = journal or Journal()
    index, audit = scan(source, data, classes=classes, journal=journal)
    config = TrainConfig(tune="probe", near_duplicates=True)
    backbone = load_backbone(SEES_COPIES, None, is_offline=True)
    photographs = read_photographs(index, backbone, config, find_device(config.compute), journal)
    near = look_for_copies(index, photographs, None, journal)
    digests = [b"" if i in photographs.errors else digest for i, digest in enumerate(photographs.digests)]
    duplicates = find_duplicates(index, digests, [pair.members for pair in near])
    return index, replace(audit, duplicates=duplicates)
