"""Tests of the report as users see it: on the command line, in a browser, and back into training."""

import base64
import csv
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import pytest
from PIL import Image

import pixelplay
from conftest import draw_folder
from pixelplay.cli.main import main
from pixelplay.outputs.label_issues import read_label_issues, write_label_issues
from pixelplay.outputs.report import images as report_images


@pytest.fixture(scope="module")
def tiny(tiny_settings: list[str]) -> list[str]:
    return [word for word in tiny_settings if word != "--no-report"] + ["--quiet"]


@pytest.fixture(scope="module")
def shown(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a report that has wrong labels, errors and hostile names."""
    root = tmp_path_factory.mktemp("shown")
    draw_folder(root / "photos", {"bars": 24, "dots": 15, "rings": 12})
    (root / "photos/rings").rename(root / "photos/<img src=x onerror=alert(1)>")
    odd = os.fsdecode(b"wrong\n\xff2") if sys.platform == "linux" else "wrong\n2"  # others refuse such bytes
    for i, name in enumerate(("=wrong,0", 'wrong "1"', odd)):  # the same files under another label
        shutil.copy(root / f"photos/bars/{2 * i:03}.jpg", root / f"photos/dots/{name}.jpg")
    command = ["train", str(root / "photos"), "--out", str(root / "run"), "--finetune", "none", *tiny]
    assert main([*command, "--test-frac", "0"]) == 0
    return root


def test_train_prints_the_path_of_its_report(
    drawn_classes: Path, tiny: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(drawn_classes.parent)
    words = ["train", "photos", "--out", "run", "--finetune", "none", *tiny]
    assert main(words) == 0
    assert re.search(r"^Report +run/report\.html$", capsys.readouterr().out, re.MULTILINE)
    config = json.loads(Path("run/config.json").read_text())
    assert config["command"] == "pixelplay " + " ".join(words)
    shown = re.sub(r"/\S+/", "", config["command"])  # no local paths
    assert f"<code>{shown}</code>" in Path("run/report.html").read_text()
    assert main([*words, "--force", "--no-report"]) == 0
    assert "report" not in capsys.readouterr().out.lower()
    assert not Path("run/report.html").exists()
    assert main([*words, "--force", "--json"]) == 0
    json.loads(capsys.readouterr().out)
    assert main(["report", "run", "--quiet"]) == 0
    assert capsys.readouterr().out == "wrote run/report.html\n"


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (OSError(28, "No space left on device"), 0, "could not write the report: [Errno 28] No space left"),
        (KeyboardInterrupt(), 130, "no report was written; use pixelplay report "),
    ],
)
def test_failed_report_does_not_fail_the_run(
    drawn_images: Path,
    tiny: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    status: int,
    message: str,
) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr("pixelplay.outputs.report.build.write_page", fail)
    loud = [word for word in tiny if word != "--quiet"]
    words = ["train", str(drawn_images), "--out", str(tmp_path / "run"), "--finetune", "none", *loud]
    assert main(words) == status
    assert message in capsys.readouterr().err
    assert (tmp_path / "run/metrics.json").exists()


def test_crossval_and_fine_tuned_runs_have_reports(
    drawn_images: Path, tiny: list[str], tmp_path: Path
) -> None:
    folds = ["crossval", str(drawn_images), "--out", str(tmp_path / "folds"), "--n-folds", "3"]
    assert main([*folds, "--finetune", "none", *tiny]) == 0
    assert "3-fold cross-validation" in (tmp_path / "folds/report.html").read_text()
    finetuned = ["train", str(drawn_images), "--out", str(tmp_path / "finetuned"), "--finetune", "partial"]
    assert main([*finetuned, "--epochs", "2", *tiny]) == 0
    assert "Loss by epoch" in (tmp_path / "finetuned/report.html").read_text()


# In a browser


@pytest.fixture
def page(browser: Any, shown: Path) -> Iterator[Any]:
    """The opened report; console messages, dialogs and network requests are errors."""
    context = browser.new_context(viewport={"width": 1100, "height": 900}, accept_downloads=True)
    page, problems = context.new_page(), []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: problems.append(dialog.message))
    page.on(
        "request",
        lambda r: None if r.url.startswith(("file:", "data:", "blob:")) else problems.append(r.url),
    )
    page.goto((shown / "run/report.html").as_uri())
    yield page
    context.close()
    assert problems == []


def test_per_class_table_sorts(page: Any) -> None:
    heading = page.locator("table.sortable th", has_text="evaluated")
    cells = page.locator("table.sortable tbody tr td:nth-child(3)")
    heading.locator("button").click()
    values = [int(text) for text in cells.all_inner_texts()]
    assert values == sorted(values)
    assert len(set(values)) > 1
    assert heading.get_attribute("aria-sort") == "ascending"
    heading.locator("button").press("Enter")
    assert [int(text) for text in cells.all_inner_texts()] == sorted(values, reverse=True)


def test_confusion_matrix_cell_shows_its_images(page: Any, shown: Path) -> None:
    button = page.locator("table.matrix td.right button").first
    button.click()
    cell = page.locator("#cell")
    n = int(button.inner_text())
    assert cell.is_visible()
    assert cell.locator("li").count() == min(n, 8)
    assert cell.locator("img").first.evaluate("image => image.naturalWidth") > 0
    button.click()
    assert not cell.is_visible()


def test_other_class_needs_a_choice(page: Any) -> None:
    item = page.locator("li[data-issue]").first
    item.locator("input[value=other]").check()
    assert page.locator("#save").is_disabled()
    item.locator("select").select_option("0")
    assert page.locator("#save").is_enabled()


def test_reviews_survive_a_reload_until_undone(page: Any) -> None:
    items, saved = page.locator("li[data-issue]"), page.locator("#saved")
    items.nth(0).locator("input[value=exclude]").check()
    items.nth(1).locator("select").select_option("1")
    page.reload()
    assert items.nth(0).locator("input[value=exclude]").is_checked()
    assert items.nth(1).locator("input[value=other]").is_checked()
    assert items.nth(1).locator("select").input_value() == "1"
    assert saved.inner_text() == "2 reviewed, not saved"
    with page.expect_download():
        page.locator("#save").click()
    page.reload()
    assert saved.inner_text() == "2 reviewed, saved"
    items.nth(0).locator("button.undo").click()
    page.reload()
    assert items.nth(0).locator("input:checked").count() == 0
    assert not items.nth(0).locator("button.undo").is_visible()
    assert saved.inner_text() == "1 reviewed, not saved"


@pytest.mark.parametrize("kept", ['{"choices": [[99, "x]", 3]]}', "[", "7"])
def test_invalid_stored_reviews_are_ignored(page: Any, kept: str) -> None:
    page.locator("li[data-issue]").first.locator("input[value=exclude]").check()
    page.evaluate("kept => localStorage.setItem(Object.keys(localStorage)[0], kept)", kept)
    page.reload()
    assert page.locator("#save").is_disabled()
    page.locator("li[data-issue]").first.locator("input[value=exclude]").check()
    assert page.locator("#save").is_enabled()


def test_all_images_load(page: Any) -> None:
    widths = page.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert len(widths) > 5
    assert min(widths) > 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone_does_not_scroll_sideways(browser: Any, shown: Path, scheme: str) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme=scheme)
    page = context.new_page()
    page.goto((shown / "run/report.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_report_is_accessible(browser: Any, shown: Path, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    context = browser.new_context(color_scheme=scheme, bypass_csp=True)
    page = context.new_page()
    page.goto((shown / "run/report.html").as_uri())
    found = axe.run(page).response["violations"]
    serious = [
        f"{v['id']}: {v['nodes'][0]['html'][:120]}" for v in found if v["impact"] in ("serious", "critical")
    ]
    assert serious == []
    context.close()


@pytest.fixture(scope="module")
def many_issues(shown: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with 30 label issues, 6 of them labelled dots and 6 suggested to be dots."""
    run = Path(shutil.copytree(shown / "run", tmp_path_factory.mktemp("many") / "run"))
    other = read_label_issues(str(run)).label_issues[0]
    issues = [
        replace(
            other,
            path=f"bars/{i:03}.jpg",
            label="dots" if i % 5 == 4 else "bars",
            suggested="dots" if i % 5 == 0 else "bars",
        )
        for i in range(30)
    ]
    write_label_issues(issues, str(run / "label_issues.csv"))
    return Path(pixelplay.report(run))


def test_label_issues_are_paged_and_filtered_by_class(browser: Any, many_issues: Path) -> None:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.goto(many_issues.as_uri())
    shown, pages = page.locator("li[data-issue]:visible"), page.locator("#issue-range")
    assert (shown.count(), pages.inner_text()) == (12, "1–12 of 30")
    assert page.locator("#previous-issues").is_disabled()
    assert page.evaluate("document.documentElement.scrollHeight") < 10_000
    shown.nth(0).locator("input[value=exclude]").check()
    page.locator("#next-issues").click()
    page.locator("#next-issues").click()
    assert (shown.count(), pages.inner_text()) == (6, "25–30 of 30")
    assert page.locator("#next-issues").is_disabled()
    assert shown.first.evaluate("item => item.value") == 25
    page.locator("#issue-class").select_option(label="dots (12)")
    assert (shown.count(), pages.inner_text()) == (12, "1–12 of 12")
    assert all("dots" in text for text in page.locator("li[data-issue]:visible fieldset").all_inner_texts())
    shown.nth(1).locator("input[value=keep]").check()
    assert page.locator("#saved").inner_text() == "2 reviewed, not saved"  # also those that are not shown
    page.emulate_media(media="print")
    assert page.locator("li[data-issue]:visible").count() == 12
    assert not page.locator("#next-issues").is_visible()
    context.close()


def test_all_label_issues_are_reachable_without_scripts(browser: Any, many_issues: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(many_issues.as_uri())
    assert page.locator("li[data-issue]:visible").count() == 12
    assert not page.locator("#issue-class").is_visible()
    page.locator("#other-issues summary").click()
    assert page.locator("li[data-issue]:visible").count() == 30
    context.close()


def test_long_class_names_do_not_widen_a_phone(browser: Any, many_issues: Path) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 740})
    page = context.new_page()
    page.goto(many_issues.as_uri())
    page.evaluate("""for (const select of document.querySelectorAll("select"))
        select.append(new Option("a class name that is longer than a phone is wide ".repeat(2), "x"))""")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    context.close()


def read(path: Path) -> TextIO:
    return path.open(encoding="utf-8", errors="surrogateescape", newline="")


def test_saved_corrections_are_used_by_relabel(
    page: Any, shown: Path, tiny: list[str], tmp_path: Path
) -> None:
    items = page.locator("li[data-issue]")
    assert items.count() >= 6
    save = page.locator("#save")
    assert save.is_disabled()
    items.nth(0).locator("input[value=keep]").check()
    items.nth(1).locator("input[value=suggested]").check()
    items.nth(2).locator("input[value=exclude]").check()
    items.nth(3).locator("select").select_option("1")
    assert items.nth(3).locator("input[value=other]").is_checked()
    with page.expect_download() as download:
        save.click()
    file = tmp_path / "corrections.csv"
    download.value.save_as(file)
    with read(file) as lines, read(shown / "run/label_issues.csv") as listed:
        rows, label_issues = list(csv.reader(lines)), list(csv.DictReader(listed))
    assert any("\n" in row["path"] for row in label_issues[:4])
    expected = [
        [label_issues[0]["path"], label_issues[0]["label"]],
        [label_issues[1]["path"], label_issues[1]["suggested"]],
        [label_issues[2]["path"], ""],
        [label_issues[3]["path"], "bars"],
    ]
    assert rows[0] == ["path", "label"]
    assert rows[1:] == expected
    words = [
        "train",
        str(shown / "photos"),
        "--out",
        str(tmp_path / "corrected"),
        "--finetune",
        "none",
        *tiny,
    ]
    assert main([*words, "--relabel", str(file), "--no-report"]) == 0
    found = json.loads((tmp_path / "corrected/metrics.json").read_text())["data"]["corrections"]
    words = ["report", str(tmp_path / "corrected"), "--out", str(tmp_path / "again.html"), "--quiet"]
    assert main(words) == 0
    page.goto((tmp_path / "again.html").as_uri())
    page.locator("li[data-issue]").first.locator("input[value=exclude]").check()
    with page.expect_download() as download:
        page.locator("#save").click()
    download.value.save_as(file)
    with read(file) as lines:
        second = {row["path"]: row["label"] for row in csv.DictReader(lines)}
    assert {path: second[path] for path, _ in expected[1:3]} == dict(
        expected[1:3]
    )  # earlier corrections stay
    changed = {each["path"]: each["corrected"] or "" for each in found}
    assert changed == {path.removeprefix("./"): label for path, label in expected}
    with read(tmp_path / "corrected/label_issues.csv") as lines:
        remaining = {row["path"] for row in csv.DictReader(lines)}
    assert not remaining & {path for path, _ in expected}  # reviewed labels are not reported again


# Progress


def test_json_progress_reports_each_stage(
    drawn_images: Path, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loud = [word for word in tiny if word != "--quiet"]
    words = ["train", str(drawn_images), "--out", str(tmp_path / "run"), "--finetune", "none", *loud]
    assert main([*words, "--json-progress"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    reading = [each for each in events if each.get("progress") == "reading"]
    assert (reading[0]["n"], reading[-1]["n"], reading[-1]["total"]) == (0, 48, 48)
    assert reading[-1]["left_s"] == 0
    assert {"reading", "linear probe", "drawing"} <= {each.get("progress") for each in events}
    assert all({"progress", "note", "info"} & set(each) for each in events)
    assert main([*words, "--json-progress", "--quiet", "--force"]) == 0
    assert capsys.readouterr().err == ""


def test_label_issues_are_shown_enlarged(
    shown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_images, "SMALL_PX", 24)
    monkeypatch.setattr(report_images, "LARGE_PX", 56)
    page = Path(pixelplay.report(shown / "run", out=tmp_path / "page.html")).read_text(encoding="utf-8")
    for size, width in (("enlarged", 56), ("small", 24)):
        found = re.findall(rf'<img class="{size}" src="data:image/jpeg;base64,([^"]+)"', page)
        assert len(found) > 2
        for data in found:
            with Image.open(io.BytesIO(base64.b64decode(data))) as image:
                assert max(image.size) == width
