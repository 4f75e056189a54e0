"""Fixtures for the tests of reading data."""

import codecs
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """An empty folder, and the rights of an ordinary user; root may read everything."""
    codecs.lookup("utf-8-sig")  # loaded now: the user may have no right to read the interpreter's files
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            yield Path(name)
        finally:
            os.seteuid(user)
