"""Run the HTTP service: its socket, signals and shutdown."""

import asyncio
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import uvicorn

from pixelplay.config import ComputeConfig, Tta, UncertaintyConfig
from pixelplay.errors import ConfigError, PixelPlayError
from pixelplay.serving.access import make_policy
from pixelplay.serving.app import Service, create_app
from pixelplay.serving.middleware import write_log
from pixelplay.serving.served_model import ServedModel
from pixelplay.serving.settings import LimitsConfig, ServerConfig

MAX_CONNECTIONS = 1000  # open at the same time; more are refused
SHUTDOWN_S = 5  # beyond the timeout of a request


def serve(
    run: str,
    config: ServerConfig | None = None,
    *,
    tta: Tta | None = None,
    limits: LimitsConfig | None = None,
    uncertainty: UncertaintyConfig | None = None,
    compute: ComputeConfig | None = None,
    log_requests: bool = True,
) -> None:
    """Serve a model over HTTP until SIGTERM or Ctrl-C; SIGHUP loads the model again.

    What was accepted before a signal to stop is finished.

    Args:
        run: folder of a run, or of its model.
        log_requests: write a JSON line to stderr for each request.

    Raises:
        BundleError: no model in `run`.
        ConfigError: a setting, the address or the token cannot be used.
        DataError: too few held-out images for `uncertainty`.
    """
    config, limits = config or ServerConfig(), limits or LimitsConfig()
    policy = make_policy(config)
    with _listen(config.host, config.port) as listener:
        load = partial(
            ServedModel,
            run,
            compute or ComputeConfig(),
            uncertainty or UncertaintyConfig(),
            tta=tta,
            max_pixels=limits.max_pixels,
        )
        app = create_app(lambda on_batch: load(on_batch=on_batch), policy, limits, log_requests=log_requests)
        service: Service = app.state.service
        settings = uvicorn.Config(
            app,
            log_config=None,  # the access log is our own
            access_log=False,
            server_header=False,
            proxy_headers=False,
            ws="none",
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=int(2 * limits.timeout) + SHUTDOWN_S,
        )
        address = _format_address(config.host, listener.getsockname()[1])
        for note in service.model.notes:
            print(f"note: {note}", file=sys.stderr)
        started = f"serving model {service.model.id} at http://{address} (stop with Ctrl-C)"
        _SignalledServer(settings, service, started).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    """Open the socket before the model is loaded, so that a wrong address is refused at once."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=MAX_CONNECTIONS)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot listen on host={host!r} port={port}: {reason}") from None


def _format_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class _SignalledServer(uvicorn.Server):
    """Exits with status 0 after SIGTERM, where uvicorn raises the signal again; SIGHUP loads the model.

    It prints `started` once it listens and handles signals.
    """

    def __init__(self, config: uvicorn.Config, service: Service, started: str) -> None:
        super().__init__(config)
        self._service, self._started = service, started
        self._reloads: set[asyncio.Task[None]] = set()  # the event loop keeps only weak references

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self._started, flush=True)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        previous = {each: signal.signal(each, self.handle_exit) for each in (signal.SIGTERM, signal.SIGINT)}
        if hasattr(signal, "SIGHUP"):
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._start_reload)
        try:
            yield
        finally:
            for each, handler in previous.items():
                signal.signal(each, handler)

    def _start_reload(self) -> None:
        task = asyncio.get_running_loop().create_task(self._reload())
        self._reloads.add(task)
        task.add_done_callback(self._reloads.discard)

    async def _reload(self) -> None:
        try:
            await self._service.reload()
        except (PixelPlayError, OSError) as error:
            write_log("reload failed", error=str(error))
