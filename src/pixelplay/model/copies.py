"""Photographs that are altered copies of each other, found with the help of features."""

import os
from dataclasses import replace

import numpy as np

from pixelplay.arrays import UInt8Array
from pixelplay.config import DataConfig, TrainConfig
from pixelplay.data.audit import Audit, find_duplicates, first_of_each
from pixelplay.data.dataset import ImageIndex
from pixelplay.data.decode import decode_image
from pixelplay.data.near_duplicates.search import CLOSE_PX, CopyPair, find_copies
from pixelplay.data.scan import scan
from pixelplay.model.backbone import load_backbone
from pixelplay.model.features import find_device
from pixelplay.model.reading import PhotographFeatures, read_photographs
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


def look_for_copies(
    index: ImageIndex,
    photographs: PhotographFeatures,
    num_workers: int | None,
    journal: Journal,
    *,
    hflip: bool = True,
) -> list[CopyPair]:
    """Find near copies among photographs of which thumbs were made.

    Args:
        hflip: a mirror image means the same, and so is a copy.

    Returns:
        Pairs of positions in the index, of one photograph of each digest.
    """
    assert photographs.thumbs is not None
    rows = first_of_each(photographs.digests)
    rows = rows[~np.isin(rows, list(photographs.errors))]

    def read(k: int) -> UInt8Array:
        path = index.paths[rows[k]]
        return decode_image(index.store.read(path), path=path, target_px=CLOSE_PX)

    thumbs, features = photographs.thumbs[rows], photographs.values[rows]
    found = find_copies(thumbs, read, features, has_mirrored=hflip, num_workers=num_workers, journal=journal)
    return [replace(pair, first=int(rows[pair.first]), second=int(rows[pair.second])) for pair in found]
