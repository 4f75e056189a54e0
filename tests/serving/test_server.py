"""The server as a process: signals, slow and vanishing clients, log, errors at the start."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import numpy as np
import pytest
from PIL import Image

from conftest import draw_of_class
from images import encode
from pixelplay.api import train
from pixelplay.cli.main import main
from pixelplay.config import TrainConfig
from pixelplay.run_log import RunLog
from servers import RunningServer, start_server

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no POSIX signals")
TOKEN = "a-token-of-some-length"


def picture() -> bytes:
    return encode(draw_of_class("bars", 0), "JPEG")


def predict(url: str, *contents: bytes, token: str | None = None) -> httpx2.Response:
    files = [("images", (f"{i}.jpg", data)) for i, data in enumerate(contents)]
    headers = {"authorization": f"Bearer {token}"} if token else {}
    return httpx2.post(f"{url}/v1/predict", files=files, headers=headers, timeout=60)


@pytest.fixture(scope="module")
def server(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    log = tmp_path_factory.mktemp("server") / "log"
    with start_server(tiny_run, log, ["--timeout", "1"]) as started:
        yield started


def send_start(server: RunningServer) -> socket.socket:
    """Send the headers and the first bytes of an upload."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    connection.sendall(
        b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\n"
        b"Content-Length: 1000\r\nX-Request-ID: partial\r\n\r\nabc"
    )
    return connection


def test_slow_client_gets_408(server: RunningServer) -> None:
    with send_start(server) as connection:
        answer = connection.recv(10_000)
        while b"\r\n\r\n" not in answer or not answer.rstrip().endswith(b"}"):
            answer += connection.recv(10_000)
    assert b" 408 " in answer.splitlines()[0]
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["status"] == 408
    assert predict(server.url, picture()).status_code == 200


def test_dropped_connection_is_logged_and_leaves_the_server_healthy(server: RunningServer) -> None:
    send_start(server).close()
    deadline = time.monotonic() + 20
    while '"status": 499' not in server.log.read_text():
        assert time.monotonic() < deadline, server.log.read_text()
        time.sleep(0.05)
    assert predict(server.url, picture()).status_code == 200


def test_access_log_has_a_json_line_for_each_request(server: RunningServer) -> None:
    httpx2.get(f"{server.url}/v1/model?secret=1", headers={"x-request-id": "my-id"})
    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    (found,) = [line for line in lines if line.get("id") == "my-id"]
    assert (found["method"], found["path"], found["status"]) == ("GET", "/v1/model", 200)
    assert found["seconds"] >= 0


def test_sigterm_finishes_what_was_accepted(tiny_run: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1000, 1500, 3), np.uint8)
    large = encode(Image.fromarray(noise), "PNG")  # takes long to decode
    answers: list[httpx2.Response] = []
    with start_server(tiny_run, tmp_path / "log", ["--max-upload-mb", "500"]) as server:
        client = threading.Thread(target=lambda: answers.append(predict(server.url, *[large] * 40)))
        client.start()
        deadline = time.monotonic() + 60
        while "pixelplay_images_in_progress 40.0" not in httpx2.get(f"{server.url}/metrics").text:
            assert time.monotonic() < deadline
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        client.join()
    assert answers[0].status_code == 200
    assert [row["status"] for row in answers[0].json()["predictions"]] == ["ok"] * 40


def test_reload_takes_up_a_new_model_without_dropping_a_request(
    tiny_run: Path, drawn_images: Path, tiny_probe: TrainConfig, tmp_path: Path
) -> None:
    train(drawn_images, tmp_path / "other", tiny_probe, seed=1, log=RunLog(quiet=True))
    shutil.copytree(tiny_run / "model", tmp_path / "model")
    (tmp_path / "token").write_text(TOKEN)
    statuses: list[int] = []
    models: list[str] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            answer = predict(server.url, picture(), token=TOKEN)
            statuses.append(answer.status_code)
            models.append(answer.json()["model"])

    def wait_for(n_models: int) -> None:
        deadline = time.monotonic() + 60
        while len(set(models)) < n_models:
            assert time.monotonic() < deadline, server.log.read_text()
            time.sleep(0.05)

    def swap(run: Path) -> None:
        shutil.rmtree(tmp_path / "model")
        shutil.copytree(run / "model", tmp_path / "model")

    options = ["--token-file", str(tmp_path / "token")]
    with start_server(tmp_path / "model", tmp_path / "log", options) as server:
        clients = [threading.Thread(target=ask) for _ in range(3)]
        for client in clients:
            client.start()
        wait_for(1)
        swap(tmp_path / "other")
        server.process.send_signal(signal.SIGHUP)
        wait_for(2)
        (tmp_path / "model/bundle.json").write_text("{}")
        headers = {"authorization": f"Bearer {TOKEN}"}
        refused = httpx2.post(f"{server.url}/v1/reload", headers=headers, timeout=60)
        assert refused.status_code == 409
        swap(tiny_run)
        answer = httpx2.post(f"{server.url}/v1/reload", headers=headers, timeout=60)
        assert answer.json()["model"] == models[0]
        stop.set()
        for client in clients:
            client.join()
    assert set(statuses) == {200}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--host", "0.0.0.0"], "--insecure-no-token"),
        (["--token", "short"], "16"),
        (["--host", "host.invalid", "--token", TOKEN], "host.invalid"),
        (["--timeout", "0"], "--timeout"),
    ],
)
def test_wrong_server_settings_are_one_line(
    tiny_run: Path, options: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(tiny_run), *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert named in error


def test_port_in_use_is_one_line(
    server: RunningServer, tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(tiny_run), "--port", str(server.port)]) == 1
    assert f"{server.port}" in capsys.readouterr().err


def test_missing_extra_is_one_line_that_names_it(tiny_run: Path) -> None:
    program = (
        "import sys; sys.modules['fastapi'] = None; from pixelplay.cli.main import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", program, "serve", str(tiny_run)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: serve needs fastapi; pip install 'pixelplay[serve]'\n"
