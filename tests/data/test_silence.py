"""Tests of pixelplay.data.silence."""

import logging
import warnings

from pixelplay.data.decode import silence_pillow


def test_overlapping_jobs_leave_warnings_and_logger_as_they_were() -> None:
    filters, level = list(warnings.filters), logging.getLogger("PIL").level
    first, second = silence_pillow(), silence_pillow()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert logging.getLogger("PIL").level > logging.CRITICAL
    second.__exit__(None, None, None)
    assert (list(warnings.filters), logging.getLogger("PIL").level) == (filters, level)
