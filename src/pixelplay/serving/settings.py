"""Settings of the HTTP service."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import DisallowNone, arg

from pixelplay.config import File, Flag, Range, check_fields, metavar
from pixelplay.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Where the service listens, and who may use it."""

    host: Annotated[str, metavar("HOST")] = "127.0.0.1"
    """Name or address to listen on; one that other machines can reach needs a token."""
    port: Annotated[int, metavar("PORT"), Range(0, 65535)] = 8000
    """Port to listen on; 0 selects a free one."""
    token: DisallowNone[Annotated[str | None, metavar("TOKEN")]] = None
    """Token that clients must send; other users of this machine can see it in the list of processes."""
    token_file: File = None
    """File with the token (default: the environment variable PIXELPLAY_TOKEN)."""
    insecure_no_token: Flag = False
    """Let everybody in who can reach the host."""
    cors_origins: Annotated[tuple[str, ...], arg(metavar="[ORIGIN ...]", help_behavior_hint="")] = ()
    """Origins whose web pages may use the service, such as https://example.org."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.token is not None and self.token_file is not None:
            raise ConfigError("use only one of token and token_file")


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """Limits on requests, images and time."""

    max_upload_mb: Annotated[float, metavar("MB"), Range(0.001, 1024)] = 32
    """Largest body of a request, in megabytes."""
    max_images: Annotated[int, metavar("N"), Range(1, 10_000)] = 64
    """Most images in a request."""
    max_megapixels: Annotated[float, metavar("MP"), Range(0.001, 250)] = 50
    """Largest image; a larger one gets a row with the status too_large."""
    max_queue: Annotated[int, metavar("N"), Range(1, 100_000)] = 256
    """Most images in progress; further requests are answered with 429."""
    timeout: Annotated[float, metavar("SECONDS"), Range(0.1, 3600)] = 30
    """Longest time to receive a request, and to answer it."""

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def max_bytes(self) -> int:
        """Largest body in bytes."""
        return int(self.max_upload_mb * 1e6)

    @property
    def max_pixels(self) -> float:
        """Largest image in pixels."""
        return self.max_megapixels * 1e6
