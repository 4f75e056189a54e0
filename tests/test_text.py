"""Texts for messages: shares as percentages."""

import pytest

from pixelplay.text import percent


@pytest.mark.parametrize(
    ("share", "decimals", "text"),
    [
        (0.926, 1, "92.6 %"),
        (0.0, 0, "0 %"),
        (1.0, 1, "100.0 %"),
        (0.004, 0, "<1 %"),
        (0.0004, 1, "<0.1 %"),
        (0.996, 0, ">99 %"),
        (0.9997, 1, ">99.9 %"),
        (0.006, 0, "1 %"),
        (0.994, 0, "99 %"),
    ],
)
def test_percent_rounds_only_zero_to_zero_and_only_one_to_hundred(
    share: float, decimals: int, text: str
) -> None:
    assert percent(share, decimals) == text
