"""Routes: rows equal those of `predict`; every error is a problem detail and leaves the server healthy."""

import csv
import io
import json
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from conftest import draw_of_class
from images import encode
from pixelplay.api import predict
from pixelplay.config import UncertaintyConfig
from pixelplay.evaluation.novelty import NOVELTY_THRESHOLD
from pixelplay.run_log import RunLog
from pixelplay.serving.settings import ServerConfig

TOKEN = "a-token-of-some-length"
Files = list[tuple[str, tuple[str, bytes]]]


def upload(*named: tuple[str, bytes], field: str = "images") -> Files:
    return [(field, each) for each in named]


def picture(seed: int = 0, name: str = "bars") -> bytes:
    return encode(draw_of_class(name, seed), "JPEG")


def png_bomb(side: int) -> bytes:
    """A PNG whose header promises side × side pixels."""
    data = encode(Image.new("L", (1, 1)), "PNG")
    header = b"IHDR" + side.to_bytes(4, "big") * 2 + data[24:29]
    return data[:12] + header + zlib.crc32(header).to_bytes(4, "big") + data[33:]


def assert_problem(response: Any, status: int, *words: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert body["status"] == status
    assert body["request_id"] == response.headers["x-request-id"]
    assert all(word in body["detail"] for word in words), body
    assert "Traceback" not in response.text
    assert str(Path.home()) not in response.text
    assert "site-packages" not in response.text


def test_http_rows_equal_those_of_predict_in_any_batch(
    client: TestClient, tiny_run: Path, drawn_images: Path, tmp_path: Path
) -> None:
    paths = sorted(drawn_images.rglob("*.*"))
    odd = {
        "empty.jpg": b"",
        "text.png": b"not an image",
        "cut.jpg": picture()[:200],
        "one.png": encode(Image.new("L", (1, 1)), "PNG"),
    }
    for name, data in odd.items():
        (tmp_path / name).write_bytes(data)
    paths += [tmp_path / name for name in odd]
    out = tmp_path / "predictions.csv"
    predict(tiny_run, [str(path) for path in paths], out, log=RunLog(quiet=True))
    with out.open(newline="", encoding="utf-8") as file:
        expected = list(csv.DictReader(file))
    groups = [paths[start : start + n] for n in (1, 3, 7) for start in range(0, len(paths), n)]

    def ask(group: list[Path]) -> list[dict[str, Any]]:
        answer = client.post("/v1/predict", files=upload(*((p.name, p.read_bytes()) for p in group)))
        assert answer.status_code == 200
        return list(answer.json()["predictions"])

    with ThreadPoolExecutor(8) as threads:  # so that batches mix the images of several requests
        answers = list(threads.map(ask, groups))
    rows = [row for answer in answers for row in answer]
    assert [row["name"] for row in rows] == [path.name for path in paths] * 3
    for row, want in zip(rows, expected * 3, strict=True):
        assert (row["status"], row["error"], row["prediction"] or "") == (
            want["status"],
            want["error"],
            want["prediction"],
        )
        if row["prediction"] is None:
            assert row["probs"] is row["novelty"] is row["probability"] is None
            continue
        shown = {f"prob_{name}": f"{p:.6f}" for name, p in row["probs"].items()}
        shown |= {"probability": f"{row['probability']:.6f}", "novelty": json.dumps(row["novelty"])}
        assert shown == {name: want[name] for name in shown}


def test_raw_body_is_one_image(client: TestClient) -> None:
    for kind in ("image/jpeg", "application/octet-stream"):
        answer = client.post("/v1/predict", content=picture(), headers={"content-type": kind}).json()
        assert [row["name"] for row in answer["predictions"]] == ["image"]
        assert answer["predictions"][0]["status"] == "ok"
    described = client.get("/v1/model").json()
    assert (described["model"], described["novelty_threshold"]) == (answer["model"], NOVELTY_THRESHOLD)


def test_abstention_and_prediction_sets_are_returned_on_request(make_client: Any) -> None:
    client = make_client(uncertainty=UncertaintyConfig(coverage=0.8, min_confidence=1.0))
    row = client.post("/v1/predict", files=upload(("a.jpg", picture()))).json()["predictions"][0]
    assert row["abstained"] is True
    assert set(row["prediction_set"]) <= {"bars", "dots", "rings"}
    assert client.get("/v1/model").json()["notes"]


@pytest.mark.parametrize(
    ("sent", "name"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\photos\\a.jpg", "a.jpg"),
        ("a\x1b[31m.jpg", "a\\x1b[31m.jpg"),
        ("<img src=x>.jpg", "<img src=x>.jpg"),
        ("x" * 1000, "x" * 255),
        ("", "[0]"),
    ],
)
def test_uploaded_name_is_echoed_without_folders(client: TestClient, sent: str, name: str) -> None:
    boundary, data = "x1", picture()
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="images"; filename="{sent}"\r\n\r\n'
    body = head.encode() + data + f"\r\n--{boundary}--\r\n".encode()
    headers = {"content-type": f"multipart/form-data; boundary={boundary}"}
    row = client.post("/v1/predict", content=body, headers=headers).json()["predictions"][0]
    assert (row["name"], row["status"]) == (name, "ok")


def test_mangled_images_are_rows_with_a_status(make_client: Any) -> None:
    client = make_client(max_megapixels=1)
    bad = {
        "empty": (b"", "unreadable"),
        "text": (b"hello", "unreadable"),
        "truncated": (picture()[:300], "unreadable"),
        "bomb": (png_bomb(60_000), "too_large"),
        "above the limit": (encode(Image.new("L", (1001, 1000)), "PNG"), "too_large"),
        "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unsupported"),
    }
    files = upload(*((name, data) for name, (data, _) in bad.items()), ("good", picture()))
    rows = client.post("/v1/predict", files=files).json()["predictions"]
    assert {row["name"]: row["status"] for row in rows} == {
        **{name: status for name, (_, status) in bad.items()},
        "good": "ok",
    }
    assert all(row["error"] for row in rows[:-1])


def test_wrong_requests_are_problems(client: TestClient) -> None:
    good, form = picture(), {"content-type": "multipart/form-data; boundary=x1"}
    post = client.post
    assert_problem(post("/v1/predict", files=upload(("a", good), field="image")), 400, "'image'", "'images'")
    assert_problem(
        post("/v1/predict", data={"images": "x", "path": "/etc"}, files=upload(("a", good))), 400, "'path'"
    )
    assert_problem(
        post("/v1/predict", content=b"{}", headers={"content-type": "application/json"}), 415, "json"
    )
    assert_problem(post("/v1/predict", content=good), 415, "missing")
    assert_problem(post("/v1/predict", content=b"--x1--\r\n", headers=form), 400, "no images")
    assert_problem(post("/v1/predict", content=b"nonsense", headers=form), 400)
    assert_problem(post("/v1/predict", content=b"", headers=form), 400)
    cut = b'--x1\r\nContent-Disposition: form-data; name="images"\r\n\r\nabc'
    assert_problem(post("/v1/predict", content=cut, headers=form), 400, "boundary")
    assert_problem(
        post("/v1/predict", content=cut, headers={"content-type": "multipart/form-data"}), 400, "boundary"
    )
    assert_problem(client.get("/v1/predict"), 405, "GET")
    assert client.get("/v1/predict").headers["allow"] == "POST"
    assert_problem(client.get("/v2/predict"), 404)
    assert_problem(post("/v1/explain", files=upload(("a", good), ("b", good))), 400, "2 images")
    assert_problem(post("/v1/explain?class=cat", files=upload(("a", good))), 422, "'cat'", "bars")
    assert_problem(post("/v1/explain", files=upload(("a", b"x"))), 422, "unreadable")
    assert_problem(post("/v1/reload"), 403, "token")
    assert post("/v1/predict", files=upload(("a", good))).status_code == 200


def test_requests_above_the_limits_are_refused(make_client: Any) -> None:
    client = make_client(max_upload_mb=0.1, max_images=3, max_queue=2)
    small = encode(Image.new("L", (4, 4)), "PNG")
    large = bytes(100_001)
    headers = {"content-type": "image/jpeg"}
    assert_problem(client.post("/v1/predict", content=large, headers=headers), 413, "0.1 MB")
    chunked = client.post("/v1/predict", content=iter([large[:60_000], large[:60_000]]), headers=headers)
    assert_problem(chunked, 413, "0.1 MB")
    assert_problem(client.post("/v1/predict", files=upload(*[("a", small)] * 4)), 413, "3 images")
    busy = client.post("/v1/predict", files=upload(*[("a", small)] * 3))
    assert_problem(busy, 429, "limit is 2")
    assert int(busy.headers["retry-after"]) >= 1
    assert client.post("/v1/predict", files=upload(*[("a", small)] * 2)).status_code == 200


def test_ten_thousand_parts_are_refused(client: TestClient) -> None:
    assert_problem(client.post("/v1/predict", files=upload(*[("a", b"x")] * 10_000)), 413, "64 images")
    assert client.get("/readyz").status_code == 200


def test_request_that_takes_too_long_is_504_and_leaves_nothing_in_progress(make_client: Any) -> None:
    client = make_client(timeout=0.1)
    noise = np.random.default_rng(0).integers(0, 256, (1200, 1600, 3), np.uint8)
    large = encode(Image.fromarray(noise), "PNG")
    assert_problem(client.post("/v1/predict", files=upload(*[("a", large)] * 5)), 504, "0.1 s")
    assert "pixelplay_images_in_progress 0.0" in client.get("/metrics").text


def test_uploads_are_not_written_to_disk(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a temporary file was opened")

    for name in ("SpooledTemporaryFile", "TemporaryFile", "NamedTemporaryFile", "mkstemp"):
        monkeypatch.setattr(tempfile, name, refuse)
    data = encode(draw_of_class("bars", 0, (1500, 1200)), "BMP")
    assert len(data) > 4_000_000
    answer = client.post("/v1/predict", files=upload(("a", data), ("b", data)))
    assert [row["status"] for row in answer.json()["predictions"]] == ["ok", "ok"]


def test_heat_map_is_a_png_with_the_proportions_of_the_image(client: TestClient) -> None:
    data = encode(draw_of_class("bars", 0, (90, 60)), "JPEG")
    maps = []
    for name in ("bars", "rings"):
        answer = client.post(f"/v1/explain?class={name}", files=upload(("a", data)))
        assert answer.headers["content-type"] == "image/png"
        with Image.open(io.BytesIO(answer.content)) as image:
            assert image.size == (90, 60)
            maps.append(np.asarray(image))
    assert (maps[0] != maps[1]).any()


def test_metrics_count_requests_images_and_batches(make_client: Any) -> None:
    client = make_client()
    client.post("/v1/predict", files=upload(("a", picture()), ("b", b"x")))
    client.get("/one"), client.get("/two")
    text = client.get("/metrics").text
    for line in (
        'pixelplay_requests_total{path="/v1/predict",status="200"} 1.0',
        'pixelplay_requests_total{path="other",status="404"} 2.0',
        'pixelplay_images_total{status="ok"} 1.0',
        'pixelplay_images_total{status="unreadable"} 1.0',
        "pixelplay_images_in_progress 0.0",
    ):
        assert line in text
    assert "pixelplay_batch_images_count" in text


def test_request_id_is_echoed_only_if_it_is_harmless(client: TestClient) -> None:
    assert client.get("/healthz", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    made = client.get("/healthz", headers={"x-request-id": "a b;c"}).headers["x-request-id"]
    assert len(made) == 32


def test_every_answer_has_security_headers(client: TestClient) -> None:
    for path in ("/", "/page.js", "/docs", "/healthz", "/nothing"):
        headers = client.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in headers


def test_pages_name_no_other_host(client: TestClient) -> None:
    import re

    for path in ("/", "/page.css", "/page.js", "/docs"):
        hosts = set(re.findall(r"https?://[^\s\"'<>]+", client.get(path).text))
        assert hosts <= {"http://www.w3.org/2000/svg", "http://127.0.0.1:8000/v1/predict"}


def test_openapi_describes_bodies_and_problems(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    body = paths["/v1/predict"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert body["properties"]["images"]["type"] == "array"
    assert {"200", "400", "413", "415", "429", "504"} <= set(paths["/v1/predict"]["post"]["responses"])
    assert "application/problem+json" in paths["/v1/predict"]["post"]["responses"]["429"]["content"]
    assert "/v1/predict" in client.get("/docs").text


def test_token_is_required_where_the_model_answers(make_client: Any) -> None:
    client = make_client(ServerConfig(token=TOKEN))
    for path in ("/v1/model", "/metrics", "/v1/unknown"):
        assert_problem(client.get(path), 401, "Bearer")
    for given in ("Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer \xe9"):
        answer = client.post(
            "/v1/predict", files=upload(("a", b"x")), headers={b"authorization": given.encode("latin-1")}
        )
        assert_problem(answer, 401, "token")
        assert answer.headers["www-authenticate"] == "Bearer"
    assert all(client.get(path).status_code == 200 for path in ("/", "/healthz", "/readyz", "/page.js"))
    right = {"authorization": f"Bearer {TOKEN}"}
    assert client.get("/v1/model", headers=right).status_code == 200
    assert client.post("/v1/reload", headers=right).json()["model"]


def test_server_without_token_refuses_other_hosts_and_origins(client: TestClient, make_client: Any) -> None:
    assert_problem(client.get("/v1/model", headers={"host": "evil.example"}), 421, "localhost")
    assert_problem(client.get("/v1/model", headers={"origin": "https://evil.example"}), 403, "origins")
    assert client.get("/v1/model", headers={"origin": "http://127.0.0.1"}).status_code == 200
    assert client.get("/v1/model", headers={"host": "localhost:8000"}).status_code == 200
    origin = "https://page.example"
    allowed = make_client(ServerConfig(cors_origins=(origin,)))
    answer = allowed.get("/v1/model", headers={"origin": origin})
    assert answer.headers["access-control-allow-origin"] == origin
    assert_problem(allowed.get("/v1/model", headers={"origin": "https://evil.example"}), 403)


def test_failure_of_the_server_is_logged_but_not_shown(
    make_client: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    client = make_client()
    client.app.state.service.model.close()  # as if the threads had died
    assert_problem(client.get("/readyz"), 503)
    answer = client.post("/v1/predict", files=upload(("a", picture())))
    assert_problem(answer, 500, "log")
    logged = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert logged["id"] == answer.json()["request_id"]
    assert "Traceback" in logged["error"]
