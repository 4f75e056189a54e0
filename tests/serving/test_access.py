"""Tokens, hosts and origins are checked before anything is loaded."""

from pathlib import Path

import pytest

from pixelplay.errors import ConfigError
from pixelplay.serving.access import is_loopback, make_policy, read_token
from pixelplay.serving.settings import LimitsConfig, ServerConfig

TOKEN = "a-token-of-some-length"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost", "LOCALHOST"])
def test_loopback_needs_no_token(host: str) -> None:
    assert is_loopback(host)
    assert make_policy(ServerConfig(host=host)).only_loopback_names


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "example.org", "localhost.example.org", ""])
def test_other_hosts_need_a_token(host: str) -> None:
    with pytest.raises(ConfigError, match="insecure-no-token"):
        make_policy(ServerConfig(host=host))
    assert make_policy(ServerConfig(host=host, token=TOKEN)).token == TOKEN
    assert make_policy(ServerConfig(host=host, insecure_no_token=True)).token is None


def test_token_comes_from_option_file_or_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text(f"{TOKEN}-file\n")
    monkeypatch.setenv("PIXELPLAY_TOKEN", f"{TOKEN}-env")
    assert read_token(ServerConfig()) == f"{TOKEN}-env"
    assert read_token(ServerConfig(token_file=str(tmp_path / "token"))) == f"{TOKEN}-file"
    assert read_token(ServerConfig(token=TOKEN)) == TOKEN


@pytest.mark.parametrize("token", ["short", "", "ü" * 20, "with\nline-break-inside"])
def test_weak_or_unsendable_tokens_are_refused(token: str) -> None:
    with pytest.raises(ConfigError, match="16"):
        make_policy(ServerConfig(token=token))


def test_contradictory_access_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="token_file"):
        ServerConfig(token=TOKEN, token_file="token")
    with pytest.raises(ConfigError, match="missing"):
        make_policy(ServerConfig(token_file=str(tmp_path / "missing")))
    with pytest.raises(ConfigError, match="insecure_no_token"):
        make_policy(ServerConfig(token=TOKEN, insecure_no_token=True))
    for origin in ("*", "example.org", "https://example.org/", "file:///x"):
        with pytest.raises(ConfigError, match="origin"):
            make_policy(ServerConfig(cors_origins=(origin,)))
    with pytest.raises(ConfigError, match="port"):
        ServerConfig(port=70_000)
    with pytest.raises(ConfigError, match="max_queue"):
        LimitsConfig(max_queue=0)
