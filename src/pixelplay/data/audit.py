"""What is wrong with images: unreadable, duplicate, conflicting, leaking, missing."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixelplay.arrays import IntArray
from pixelplay.config import SPLITS
from pixelplay.data.cache import DIGEST_BYTES
from pixelplay.data.dataset import ImageDataset, merge_groups
from pixelplay.data.decode import ImageInfo, decode_image, probe_image
from pixelplay.data.near_duplicates.candidates import max_duplicates
from pixelplay.data.near_duplicates.search import connected_sets
from pixelplay.errors import ImageError
from pixelplay.thread_pool import prefetch_map

FEW_IMAGES = 10  # images of a class: with fewer, neither a classifier nor its figures can be relied on
GLANCE_PX = 32  # JPEGs are decoded at 1/8 of their size: enough to meet every damaged byte
BLOCK = 64  # small files that one thread reads in a row: handing out each alone takes longer than reading it


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """Sets of positions whose images are the same.

    Attributes:
        sets: byte for byte, every set of two or more.
        near: re-encoded, resized, cut, mirrored, brightened or watermarked copies; an image may be in
            several of these sets.
        large: likewise, sets so large that they rather are a kind of image; nothing follows from them.
        conflicts: those of `sets` and `near` whose members carry different labels.
        leaks: those of them that lie in more than one given part.
    """

    sets: tuple[tuple[int, ...], ...]
    near: tuple[tuple[int, ...], ...]
    large: tuple[tuple[int, ...], ...]
    conflicts: tuple[tuple[int, ...], ...]
    leaks: tuple[tuple[int, ...], ...]

    @property
    def copies(self) -> tuple[tuple[int, ...], ...]:
        """Sets, exact and near, that must not lie on two sides of a split."""
        return self.sets + self.near


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What reading every image once has shown.

    Attributes:
        errors: position → what is wrong with that image.
        duplicates: sets of equal images.
        infos: position → format, size and mode; empty where nothing was decoded.
    """

    errors: Mapping[int, ImageError]
    duplicates: Duplicates
    infos: Mapping[int, ImageInfo]


def digest_bytes(data: bytes) -> bytes:
    """Name an image by its content: 16 bytes of BLAKE2b."""
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


def audit_images(
    dataset: ImageDataset,
    *,
    is_decoded: bool = True,
    num_workers: int | None = None,
    on_progress: Callable[[int], object] = lambda n: None,
) -> Audit:
    """Read every image and say which are broken or alike.

    Args:
        is_decoded: False reads only files that have another of their size, to find duplicates;
            nothing is decoded, so only missing and empty files are found broken.
        on_progress: called with the number of images done since the last call.
    """
    digests: list[bytes] = [b""] * len(dataset)
    errors: dict[int, ImageError] = {}
    infos: dict[int, ImageInfo] = {}
    wanted = list(range(len(dataset))) if is_decoded else _worth_reading(dataset, errors)
    size = 1 if is_decoded else BLOCK
    blocks = [wanted[k : k + size] for k in range(0, len(wanted), size)]

    def look(k: int) -> list[tuple[bytes, ImageInfo | None] | ImageError]:
        return [_explain_file(dataset, i, is_decoded) for i in blocks[k]]

    on_progress(len(dataset) - len(wanted))
    for block, seen in zip(
        blocks, prefetch_map(look, range(len(blocks)), num_workers=num_workers), strict=True
    ):
        on_progress(len(block))
        for i, found in zip(block, seen, strict=True):
            if isinstance(found, ImageError):
                errors[i] = found
                continue
            digests[i], info = found
            if info is not None:
                infos[i] = info
    duplicates = find_duplicates(dataset, digests)
    return Audit(errors=dict(sorted(errors.items())), duplicates=duplicates, infos=infos)


def find_duplicates(
    dataset: ImageDataset, digests: Sequence[bytes], pairs: Sequence[tuple[int, int]] = ()
) -> Duplicates:
    """Group images with equal digests (N,), and copies that were found otherwise.

    Args:
        digests: an empty one equals none.
        pairs: near copies, by the position of one image of each digest.
    """
    by_digest: dict[bytes, list[int]] = {}
    for i, digest in enumerate(digests):
        if digest:
            by_digest.setdefault(digest, []).append(i)
    sets = tuple(tuple(members) for members in by_digest.values() if len(members) > 1)
    near, large = (
        tuple(tuple(j for i in members for j in by_digest[digests[i]]) for members in found)
        for found in _split_by_size(connected_sets(pairs), len(dataset))
    )
    return Duplicates(
        sets=sets,
        near=near,
        large=large,
        conflicts=tuple(s for s in sets + near if _n_distinct(dataset.labels, s) > 1),
        leaks=tuple(s for s in sets + near if _n_distinct(dataset.splits, s) > 1),
    )


def first_occurrences(digests: Sequence[bytes]) -> IntArray:
    """Positions of one image for each digest, ascending; an empty digest has none."""
    firsts = {digest: i for i, digest in reversed(list(enumerate(digests))) if digest}
    return np.array(sorted(firsts.values()), dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class ClassCoverage:
    """What there is to learn from of the classes that the test side expects.

    Attributes:
        absent: classes without an image.
        few: class with fewer than FEW → how many.
        reachable: share of the test images that any classifier of the others can get right; None where
            their counts are unknown.
        in_few: share of them that belong to classes with few; None likewise.
    """

    absent: tuple[str, ...]
    few: Mapping[str, int]
    reachable: float | None
    in_few: float | None


def measure_coverage(
    classes: Sequence[str], counts: IntArray, expected: Mapping[str, int | None]
) -> ClassCoverage:
    """Find the expected classes that have no or too few training images.

    Args:
        classes: (K,) names of the classes.
        counts: (K,) training images of each.
        expected: class → number of test images, None where unknown.
    """
    learned = dict(zip(classes, counts.tolist(), strict=True))
    trained = {name: learned.get(name, 0) for name in expected}
    few = {name: n for name, n in trained.items() if 0 < n < FEW_IMAGES}
    tested = {name: n for name, n in expected.items() if n is not None}
    n_tested = sum(tested.values())
    is_known = len(tested) == len(expected) and n_tested > 0
    return ClassCoverage(
        absent=tuple(name for name, n in trained.items() if n == 0),
        few=few,
        reachable=sum(n for name, n in tested.items() if trained[name]) / n_tested if is_known else None,
        in_few=sum(tested[name] for name in few) / n_tested if is_known else None,
    )


def find_coverage(dataset: ImageDataset, learned: IntArray | None = None) -> ClassCoverage:
    """Find the classes that the test side expects and training has no or too few images of.

    What is expected is what a list or sample submission names, else what a given test part holds.

    Args:
        learned: (K,) images of each class to learn from; None: all outside of the test part.
    """
    is_test = dataset.in_split("test")
    expected = dict(dataset.expected)
    if not expected:
        tested = dataset.class_counts(is_test)
        expected = {name: int(n) for name, n in zip(dataset.classes, tested, strict=True) if n}
    counts = dataset.class_counts(~is_test) if learned is None else learned
    return measure_coverage(dataset.classes, counts, expected)


def summarize_formats(audit: Audit) -> tuple[Counter[str], tuple[int, int] | None, tuple[int, int] | None]:
    """Count formats, and find the smallest and largest (width, height) in px by area."""
    formats = Counter(info.format for info in audit.infos.values())
    sizes = sorted({(i.width, i.height) for i in audit.infos.values()}, key=lambda size: size[0] * size[1])
    return formats, (sizes[0] if sizes else None), (sizes[-1] if sizes else None)


def describe_findings(
    dataset: ImageDataset, errors: Iterable[ImageError], duplicates: Duplicates
) -> dict[str, Any]:
    """Plain values of what is broken, copied or contradictory, with the files of each."""
    sets = {
        "duplicates": duplicates.sets,
        "near_duplicates": duplicates.near,
        "look_alikes": duplicates.large,
        "conflicts": duplicates.conflicts,
    }
    return {
        "unreadable": [
            {"path": error.path, "status": error.status, "reason": error.reason} for error in errors
        ],
        "skipped": dict(dataset.skipped),
        **{name: [describe_set(dataset, members) for members in found] for name, found in sets.items()},
    }


def describe_set(dataset: ImageDataset, members: Sequence[int]) -> list[dict[str, str | None]]:
    """Name path, label and part of each image of a set."""
    return [
        {
            "path": dataset.paths[i],
            "label": dataset.classes[dataset.labels[i]] if dataset.labels[i] >= 0 else None,
            "split": SPLITS[dataset.splits[i]] if dataset.splits[i] >= 0 else None,
        }
        for i in members
    ]


def _explain_file(
    dataset: ImageDataset, i: int, is_decoded: bool
) -> tuple[bytes, ImageInfo | None] | ImageError:
    path = dataset.paths[i]
    try:
        data = dataset.storage.read(path)
        if not is_decoded:
            return digest_bytes(data), None
        info = probe_image(data, path=path)
        decode_image(data, path=path, target_px=GLANCE_PX)
        return digest_bytes(data), info
    except ImageError as error:
        # anew, because the traceback of a raised one keeps the bytes of its image
        return ImageError(path, error.status, error.reason)


def _worth_reading(dataset: ImageDataset, errors: dict[int, ImageError]) -> list[int]:
    """Positions whose file size occurs more than once: only those can be duplicates."""
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


def _split_by_size(
    sets: Sequence[tuple[int, ...]], n: int
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Tell sets of copies from those that hang together with too many others to be any."""
    groups = merge_groups(n, sets)
    sizes = np.bincount(groups, minlength=1)
    limit = max_duplicates(n)
    is_large = [bool(sizes[groups[members[0]]] > limit) for members in sets]
    return (
        [members for members, large in zip(sets, is_large, strict=True) if not large],
        [members for members, large in zip(sets, is_large, strict=True) if large],
    )


def _n_distinct(values: NDArray[Any], members: Sequence[int]) -> int:
    """Count distinct labels or parts in a set, those that are not given aside."""
    return len({int(values[i]) for i in members if values[i] >= 0})
