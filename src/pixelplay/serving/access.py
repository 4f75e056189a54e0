"""Who may use the service: tokens, host names and origins."""

import hmac
import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from pixelplay.errors import ConfigError
from pixelplay.serving.problems import Problem
from pixelplay.serving.settings import ServerConfig

TOKEN_VARIABLE = "PIXELPLAY_TOKEN"
MIN_TOKEN_CHARS = 16
PROTECTED = ("/v1/", "/metrics")  # prefixes of paths that need the token


def read_token(config: ServerConfig) -> str | None:
    """Return the token of the option, the file or the environment variable; None without any.

    Raises:
        ConfigError: an unreadable file, or a token that is too short or not printable ASCII.
    """
    token, token_file = config.token, config.token_file
    if token_file is not None:
        try:
            with open(token_file, encoding="utf-8") as file:
                token = file.read().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the token_file {token_file}: {error}") from None
    if token is None:
        token = os.environ.get(TOKEN_VARIABLE) or None
    if token is not None and (len(token) < MIN_TOKEN_CHARS or not (token.isascii() and token.isprintable())):
        raise ConfigError(
            f"the token has {len(token)} characters; use at least {MIN_TOKEN_CHARS}, printable ASCII only"
        )
    return token


def is_loopback(host: str) -> bool:
    """Return whether only this machine can connect to a host name or address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


@dataclass(frozen=True, kw_only=True)
class AccessPolicy:
    """Decides which requests are answered.

    Attributes:
        token: required for the paths in PROTECTED; None for none.
        only_loopback_names: answer only requests for a loopback name, so that a web page whose host name
            is changed to resolve to this machine cannot use the service.
        cors_origins: web pages of other origins that may use the service.
    """

    token: str | None
    only_loopback_names: bool
    cors_origins: tuple[str, ...] = ()

    def check(self, path: str, headers: Mapping[str, str]) -> None:
        """Raise Problem 401, 403 or 421 for a request that is not allowed."""
        host = headers.get("host", "")
        if self.only_loopback_names and not is_loopback(_host_name(host)):
            raise Problem(421, "this server answers only requests for localhost; start it with a token")
        origin = headers.get("origin") if self.token is None else None
        if origin is not None and origin not in self.cors_origins and urlsplit(origin).netloc != host:
            raise Problem(403, "requests from web pages of other origins are not allowed")
        if self.token is not None and path.startswith(PROTECTED):
            self.check_token(headers)

    def check_token(self, headers: Mapping[str, str]) -> None:
        """Raise Problem 401 without the right token, 403 if the server has none."""
        if self.token is None:
            raise Problem(403, "the server was started without a token")
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # in constant time, so that the answer does not show how much of a guess is right
        is_right = hmac.compare_digest(given.strip().encode(), self.token.encode())
        if scheme.lower() != "bearer" or not is_right:
            reason = "the token is missing or wrong; send the header Authorization: Bearer TOKEN"
            raise Problem(401, reason, headers={"WWW-Authenticate": "Bearer"})


def make_policy(config: ServerConfig) -> AccessPolicy:
    """Build the policy of a server.

    Raises:
        ConfigError: no usable token, another host than loopback without one, or an origin that is not one.
    """
    token, insecure = read_token(config), config.insecure_no_token
    if token is not None and insecure:
        raise ConfigError("insecure_no_token cannot be used with a token")
    if token is None and not insecure and not is_loopback(config.host):
        raise ConfigError(
            f"host={config.host!r} can be reached from other machines and needs a token; set --token-file or "
            f"{TOKEN_VARIABLE}, or use --insecure-no-token to let everybody in"
        )
    for origin in config.cors_origins:
        parts = urlsplit(origin)
        if parts.scheme not in ("http", "https") or origin != f"{parts.scheme}://{parts.netloc}":
            raise ConfigError(f"cors_origins={origin!r} is not an origin such as https://example.org")
    return AccessPolicy(
        token=token,
        only_loopback_names=token is None and not insecure,
        cors_origins=config.cors_origins,
    )


def _host_name(host: str) -> str:
    """Return the name in a Host header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
