"""The page in a browser: upload, prediction, heat map, CSV, token, accessibility, no outside request."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import draw_of_class
from images import encode
from servers import RunningServer, start_server

TOKEN = "a-token-of-some-length"
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def server(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "token").write_text(TOKEN)
    options = ["--token-file", str(folder / "token"), "--min-confidence", "1", "--max-upload-mb", "0.05"]
    with start_server(tiny_run, folder / "log", options) as started:
        yield started


@pytest.fixture
def page(browser: Any, server: RunningServer) -> Iterator[Any]:
    """The page after the token was entered; script errors, dialogs and outside requests are errors."""
    context = browser.new_context(accept_downloads=True)
    page, problems = context.new_page(), []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: problems.append(dialog.message))
    own = (server.url, "data:", "blob:")
    page.on("request", lambda r: None if r.url.startswith(own) else problems.append(r.url))
    open_page(page, server)
    yield page
    context.close()
    assert problems == []


def open_page(page: Any, server: RunningServer) -> None:
    page.goto(server.url)
    page.locator("#token").fill(TOKEN)
    page.keyboard.press("Enter")
    page.get_by_text("3 classes: bars, dots, rings.").wait_for()


def image_file(name: str, seed: int = 0, kind: str = "bars") -> dict[str, Any]:
    data = encode(draw_of_class(kind, seed), "JPEG")
    return {"name": name, "mimeType": "image/jpeg", "buffer": data}


def test_wrong_token_is_asked_for_again(browser: Any, server: RunningServer) -> None:
    page = browser.new_page()
    page.goto(server.url)
    page.locator("#token").fill("wrong")
    page.get_by_role("button", name="Use token").click()
    page.get_by_text("the token is missing or wrong").wait_for()
    assert page.locator("#token").is_visible()
    page.close()


def test_uploaded_image_gets_a_prediction_and_a_heat_map(page: Any) -> None:
    page.locator("#files").set_input_files([image_file("a.jpg")])
    page.locator("#verdict").get_by_text("bars, ").wait_for()
    assert page.get_by_text("The model is not confident enough to decide.").is_visible()
    assert "more unusual than" in page.locator("#novelty").inner_text()
    assert page.locator("#probabilities tr").count() == 3
    page.locator("#explained").select_option("rings")
    page.locator("#heat").press("Enter")
    page.locator("#heat[aria-pressed=true]").wait_for()
    drawn = page.locator("#view img")
    assert "support rings" in drawn.get_attribute("alt")
    assert drawn.evaluate("image => image.decode().then(() => image.naturalWidth)") == 80
    page.locator("#heat").press("Enter")
    assert drawn.get_attribute("alt") == "a.jpg"


def test_unusual_image_gets_a_caution(page: Any) -> None:
    def lower_threshold(route: Any) -> None:
        answer = route.fetch()
        route.fulfill(response=answer, json={**answer.json(), "novelty_threshold": 0})

    caution = page.get_by_text("may show none of its classes")
    assert not caution.is_visible()
    page.route("**/v1/model", lower_threshold)
    page.reload()  # the token is kept
    page.get_by_text("3 classes: bars, dots, rings.").wait_for()
    page.locator("#files").set_input_files([image_file("a.jpg")])
    caution.wait_for()


def test_table_of_images_is_saved_as_csv_with_safe_cells(page: Any, tmp_path: Path) -> None:
    names = ["=1+1.jpg", 'a "b", c.jpg', *(f"{i}.jpg" for i in range(20))]
    files = [image_file(name, i, ("bars", "dots")[i % 2]) for i, name in enumerate(names)]
    broken = {"name": "broken.jpg", "mimeType": "image/jpeg", "buffer": b"no image"}
    page.locator("#files").set_input_files([*files, broken])  # more than one request can hold
    page.get_by_text("Classified 23 images.").wait_for()
    page.get_by_role("button", name="broken.jpg").click()
    assert page.get_by_text("Could not read broken.jpg: not an image.").is_visible()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download CSV").click()
    download.value.save_as(tmp_path / "predictions.csv")
    with (tmp_path / "predictions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == ["./=1+1.jpg", *names[1:], "broken.jpg"]
    assert rows[0].keys() == {
        "path", "status", "error", "prediction", "probability", "prob_bars", "prob_dots", "prob_rings",
        "abstained", "novelty",
    }  # fmt: skip
    assert rows[-1] | {"error": ""} == dict.fromkeys(rows[0], "") | {
        "path": "broken.jpg",
        "status": "unreadable",
    }
    probs = [float(rows[0][f"prob_{name}"]) for name in ("bars", "dots", "rings")]
    assert sum(probs) == pytest.approx(1, abs=2e-6)
    page.get_by_role("button", name="Remove all images").click()
    assert page.locator("#all").is_hidden()


def test_images_can_be_dropped_and_pasted(page: Any) -> None:
    data = list(image_file("x")["buffer"])
    for event, holder in (("drop", "dataTransfer"), ("paste", "clipboardData")):
        page.evaluate(
            """([data, event, holder]) => {
                const transfer = new DataTransfer();
                transfer.items.add(new File([new Uint8Array(data)], `${event}.jpg`, { type: "image/jpeg" }));
                const Kind = { drop: DragEvent, paste: ClipboardEvent }[event];
                const options = { [holder]: transfer, bubbles: true, cancelable: true };
                document.body.dispatchEvent(new Kind(event, options));
            }""",
            [data, event, holder],
        )
        page.locator("#caption").get_by_text(f"{event}.jpg").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_is_accessible_and_fits_a_phone(browser: Any, server: RunningServer, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    context = browser.new_context(color_scheme=scheme, bypass_csp=True, viewport=PHONE, has_touch=True)
    page = context.new_page()
    page.goto(server.url)
    page.locator("#token").wait_for()
    found = axe.run(page).response["violations"]
    open_page(page, server)
    page.locator("#files").set_input_files([image_file("a.jpg"), image_file("b.jpg", 1)])
    page.get_by_text("Classified 2 images.").wait_for()
    found += axe.run(page).response["violations"]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.goto(f"{server.url}/docs")
    found += axe.run(page).response["violations"]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert [
        f"{v['id']}: {v['nodes'][0]['html'][:120]}" for v in found if v["impact"] in ("serious", "critical")
    ] == []
    context.close()
