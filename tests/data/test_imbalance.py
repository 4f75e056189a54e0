"""What imbalance.py promises: ratios over the classes that are there, priors that sum to one."""

import numpy as np
import pytest

from pixelplay.data.imbalance import class_priors, imbalance_ratio


@pytest.mark.parametrize(
    ("counts", "ratio"), [([14, 1], 14), ([10, 0, 4], 2.5), ([3], 1), ([0, 0], 1), ([], 1)]
)
def test_the_ratio_leaves_out_absent_classes(counts: list[int], ratio: float) -> None:
    assert imbalance_ratio(np.array(counts, dtype=np.int64)) == ratio


def test_priors_are_the_shares_of_the_classes() -> None:
    np.testing.assert_array_equal(class_priors(np.array([6, 0, 2])), [0.75, 0, 0.25])
