"""Problems of a dataset: unreadable files, duplicates, conflicting labels, leaks, missing classes."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pixelplay.array_types import IntArray
from pixelplay.config import SPLITS
from pixelplay.data.cache import DIGEST_BYTES
from pixelplay.data.dataset import ImageDataset, merge_groups
from pixelplay.data.decode import MAX_VALUE, ImageInfo, decode_image, probe_image
from pixelplay.data.near_duplicates.candidates import max_duplicates
from pixelplay.data.near_duplicates.search import connected_sets
from pixelplay.errors import ImageError
from pixelplay.thread_pool import prefetch_map

FEW_IMAGES = 10  # per class: with fewer, neither a classifier nor its metrics are reliable
AUDIT_PX = 32  # JPEGs are decoded at 1/8 of their size, which still reads every byte
BLOCK = 64  # small files per task: scheduling each one takes longer than reading it
Sets = tuple[tuple[int, ...], ...]  # of images, by position in the dataset


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """Sets of images with the same content.

    Near-duplicates are re-encoded, resized, cropped, mirrored, brightened or watermarked.
    """

    sets: Sets  # exact duplicates
    near: Sets  # near-duplicates; an image can be in several of these sets
    large: Sets  # apparent near-duplicates in sets too large to be real; only reported
    conflicts: Sets  # those of `exact_and_near` with different labels
    leaks: Sets  # those of `exact_and_near` in more than one predefined split

    @property
    def exact_and_near(self) -> Sets:
        """All sets that must stay within one split."""
        return self.sets + self.near


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Result of reading every image once; keys are positions in the dataset."""

    errors: Mapping[int, ImageError]
    duplicates: Duplicates
    infos: Mapping[int, ImageInfo]  # empty if nothing was decoded


def digest_bytes(data: bytes) -> bytes:
    """Compute the digest that identifies a file by content: 16 bytes of BLAKE2b."""
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


def audit_images(
    dataset: ImageDataset,
    *,
    decode: bool = True,
    max_value: float = MAX_VALUE,
    num_workers: int | None = None,
    on_progress: Callable[[int], object] = lambda n: None,
) -> Audit:
    """Read every image; find unreadable files and exact duplicates.

    Args:
        decode: False reads only files that share their size with another, which finds all duplicates but
            only missing and empty files among the unreadable ones.
        max_value: value of white in images with more than 8 bits.
        on_progress: called with the number of images done since the last call.
    """
    digests = [b""] * len(dataset)
    errors: dict[int, ImageError] = {}
    infos: dict[int, ImageInfo] = {}
    wanted = list(range(len(dataset))) if decode else _find_equal_sizes(dataset, errors)
    size = 1 if decode else BLOCK
    blocks = [wanted[k : k + size] for k in range(0, len(wanted), size)]

    def read(block: list[int]) -> list[tuple[bytes, ImageInfo | None] | ImageError]:
        return [_read_file(dataset, i, decode, max_value) for i in block]

    on_progress(len(dataset) - len(wanted))
    for block, results in zip(blocks, prefetch_map(read, blocks, num_workers=num_workers), strict=True):
        on_progress(len(block))
        for i, found in zip(block, results, strict=True):
            if isinstance(found, ImageError):
                errors[i] = found
            else:
                digests[i], info = found
                if info is not None:
                    infos[i] = info
    duplicates = find_duplicates(dataset, digests)
    return Audit(errors=dict(sorted(errors.items())), duplicates=duplicates, infos=infos)


def find_duplicates(
    dataset: ImageDataset, digests: Sequence[bytes], pairs: Sequence[tuple[int, int]] = ()
) -> Duplicates:
    """Group exact and near-duplicates.

    Args:
        digests: (N,) of the files; an empty one equals no other.
        pairs: near-duplicates, as positions of one image per digest.
    """
    by_digest: dict[bytes, list[int]] = {}
    for i, digest in enumerate(digests):
        if digest:
            by_digest.setdefault(digest, []).append(i)
    sets = tuple(tuple(members) for members in by_digest.values() if len(members) > 1)
    found = connected_sets(pairs)
    groups = merge_groups(len(dataset), found)
    is_large = (np.bincount(groups, minlength=1) > max_duplicates(len(dataset)))[groups]  # (N,)
    near, large = (
        tuple(
            tuple(j for i in members for j in by_digest[digests[i]])
            for members in found
            if is_large[members[0]] == wanted
        )
        for wanted in (False, True)
    )
    conflicts, leaks = (
        tuple(members for members in sets + near if len({*values[[*members]].tolist()} - {-1}) > 1)
        for values in (dataset.labels, dataset.splits)
    )
    return Duplicates(sets=sets, near=near, large=large, conflicts=conflicts, leaks=leaks)


def first_occurrences(digests: Sequence[bytes]) -> IntArray:
    """Return the position of the first image of each digest, ascending; empty digests are skipped."""
    firsts = {digest: i for i, digest in reversed(list(enumerate(digests))) if digest}
    return np.array(sorted(firsts.values()), dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class ClassCoverage:
    """Training images of the classes that the test images are expected to have.

    The last two, in [0, 1], are None if the number of test images of each class is unknown.
    """

    absent: tuple[str, ...]  # without a training image
    few: Mapping[str, int]  # with fewer than FEW_IMAGES training images → their number
    max_accuracy: float | None  # largest possible on the test images
    few_share: float | None  # of the test images, in classes of `few`


def find_coverage(dataset: ImageDataset, train_counts: IntArray | None = None) -> ClassCoverage:
    """Find expected classes with no or too few training images.

    The expected classes come from a class list or sample submission, else from a predefined test split.

    Args:
        train_counts: (K,) training images of each class; None: all outside a predefined test split.
    """
    is_test = dataset.in_split("test")
    counts = dataset.class_counts(~is_test) if train_counts is None else train_counts
    n_test = zip(dataset.classes, dataset.class_counts(is_test).tolist(), strict=True)
    expected = dataset.expected or {name: n for name, n in n_test if n}
    n_train = dict(zip(dataset.classes, counts.tolist(), strict=True))
    trained = {name: n_train.get(name, 0) for name in expected}
    few = {name: n for name, n in trained.items() if 0 < n < FEW_IMAGES}
    tested = {name: n for name, n in expected.items() if n is not None}
    n_tested = sum(tested.values())
    is_known = len(tested) == len(expected) and n_tested > 0
    return ClassCoverage(
        absent=tuple(name for name, n in trained.items() if n == 0),
        few=few,
        max_accuracy=sum(n for name, n in tested.items() if trained[name]) / n_tested if is_known else None,
        few_share=sum(tested[name] for name in few) / n_tested if is_known else None,
    )


def summarize_formats(audit: Audit) -> tuple[Counter[str], tuple[int, int] | None, tuple[int, int] | None]:
    """Count formats; find the smallest and largest (width, height) in px by area."""
    formats = Counter(info.format for info in audit.infos.values())
    sizes = sorted({(i.width, i.height) for i in audit.infos.values()}, key=lambda size: size[0] * size[1])
    return formats, (sizes[0] if sizes else None), (sizes[-1] if sizes else None)


def describe_findings(
    dataset: ImageDataset, errors: Iterable[ImageError], duplicates: Duplicates
) -> dict[str, Any]:
    """List unreadable, duplicate and conflicting files for JSON."""
    sets = {
        "duplicates": duplicates.sets,
        "near_duplicates": duplicates.near,
        "similar_images": duplicates.large,
        "conflicts": duplicates.conflicts,
    }
    return {
        "unreadable": [{"path": bad.path, "status": bad.status, "reason": bad.reason} for bad in errors],
        "skipped": dict(dataset.skipped),
        **{name: [describe_set(dataset, members) for members in found] for name, found in sets.items()},
    }


def describe_set(dataset: ImageDataset, members: Sequence[int]) -> list[dict[str, str | None]]:
    """List path, label and predefined split of each image of a set for JSON."""
    return [
        {
            "path": dataset.paths[i],
            "label": dataset.classes[dataset.labels[i]] if dataset.labels[i] >= 0 else None,
            "split": SPLITS[dataset.splits[i]] if dataset.splits[i] >= 0 else None,
        }
        for i in members
    ]


def _read_file(
    dataset: ImageDataset, i: int, decode: bool, max_value: float
) -> tuple[bytes, ImageInfo | None] | ImageError:
    path = dataset.paths[i]
    try:
        data = dataset.storage.read(path)
        if not decode:
            return digest_bytes(data), None
        info = probe_image(data, path=path)
        decode_image(data, path=path, target_px=AUDIT_PX, max_value=max_value)
        return digest_bytes(data), info
    except ImageError as error:
        return error.detached()


def _find_equal_sizes(dataset: ImageDataset, errors: dict[int, ImageError]) -> list[int]:
    """Return the positions of files that share their size with another; others cannot be duplicates."""
    sizes = np.zeros(len(dataset), dtype=np.int64)
    for i, path in enumerate(dataset.paths):
        try:
            sizes[i] = dataset.storage.size(path)
            if sizes[i] == 0:
                errors[i] = ImageError(path, "unreadable", "empty file")
        except ImageError as error:
            errors[i] = error
    _, position, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    return [int(i) for i in np.flatnonzero((counts[position] > 1) & (sizes > 0))]
