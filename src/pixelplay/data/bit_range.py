"""Find the range of the values in images with more than 8 bits, which files do not state.

A 12-bit camera stores 0 to 4,095 in 16 bits, and many programs store 0 to 255 or 0 to 1 in 32 bits. Read with
the range of the type, such images are nearly black.
"""

from dataclasses import dataclass

import numpy as np

from pixelplay.data.dataset import ImageDataset
from pixelplay.data.decode import MAX_VALUE, is_deep, largest_value, probe_image
from pixelplay.errors import ImageError

BITS = (8, 10, 12, 14, 16)
N_PROBED = 64  # images whose header is read; without a deep one among them there is none


@dataclass(frozen=True, kw_only=True)
class BitRange:
    """The value of white in images with more than 8 bits, and what it was found from."""

    max_value: float
    note: str = ""  # "" where images use the whole range of their type


def find_bit_range(dataset: ImageDataset, bits: int | None) -> BitRange:
    """Find the value of white as the largest value of all images, rounded up to a usual number of bits.

    Args:
        bits: by hand; None to find it.
    """
    if bits is not None:
        return BitRange(max_value=2.0**bits - 1)
    probed = np.linspace(0, len(dataset) - 1, min(N_PROBED, len(dataset))).astype(int)
    if not any(_is_deep(dataset, int(i)) for i in probed):
        return BitRange(max_value=MAX_VALUE)
    largest, n_deep = 0.0, 0
    for path in dataset.paths:
        try:
            data = dataset.storage.read(path)
            if (value := largest_value(data, path=path)) is not None:
                largest, n_deep = max(largest, value), n_deep + 1
        except ImageError:
            continue  # reported when it is read for training
    if 0 < largest <= 1:
        max_value, name = 1.0, "0 to 1"
    else:
        max_value = next((2.0**n - 1 for n in BITS if largest < 2**n), largest)
        name = f"0 to {max_value:,.0f}"
    if max_value == MAX_VALUE or n_deep == 0:
        return BitRange(max_value=MAX_VALUE)
    n = f"{n_deep:,} of {len(dataset):,} images"
    remedy = "use --bit-range if white has another value"
    return BitRange(
        max_value=max_value,
        note=f"{n} have more than 8 bits and values up to {largest:,.6g}: read as {name}; {remedy}",
    )


def _is_deep(dataset: ImageDataset, i: int) -> bool:
    try:
        return is_deep(probe_image(dataset.storage.read(dataset.paths[i]), path=dataset.paths[i]).mode)
    except ImageError:
        return False
