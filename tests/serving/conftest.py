"""An application in this process, with the tiny model."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from pixelplay.config import ComputeConfig, UncertaintyConfig
from pixelplay.serving.access import make_policy
from pixelplay.serving.app import create_app
from pixelplay.serving.served_model import ServedModel
from pixelplay.serving.settings import LimitsConfig, ServerConfig

TOKEN = "a-token-of-some-length"
MakeClient = Callable[..., TestClient]


@pytest.fixture
def make_client(tiny_run: Path) -> Iterator[MakeClient]:
    """Build a client of a new application; the settings are those of the limits, or `server`."""
    with ExitStack() as stack:

        def make(
            server: ServerConfig = ServerConfig(),  # noqa: B008 - frozen
            uncertainty: UncertaintyConfig = UncertaintyConfig(),  # noqa: B008
            **limits: Any,
        ) -> TestClient:
            settings = LimitsConfig(**limits)
            load = partial(
                ServedModel, str(tiny_run), ComputeConfig(), uncertainty, max_pixels=settings.max_pixels
            )
            app = create_app(
                lambda on_batch: load(on_batch=on_batch), make_policy(server), settings, log_requests=False
            )
            return stack.enter_context(TestClient(app, base_url="http://127.0.0.1"))

        yield make


@pytest.fixture(scope="module")
def client(tiny_run: Path) -> Iterator[TestClient]:
    """A client of an application with default settings."""
    load = partial(
        ServedModel, str(tiny_run), ComputeConfig(), UncertaintyConfig(), max_pixels=LimitsConfig().max_pixels
    )
    policy = make_policy(ServerConfig())
    app = create_app(lambda on_batch: load(on_batch=on_batch), policy, LimitsConfig(), log_requests=False)
    with TestClient(app, base_url="http://127.0.0.1") as opened:
        yield opened
