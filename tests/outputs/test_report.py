"""Tests of the HTML report: contents, escaping, privacy, size, advice and charts."""

import base64
import io
import json
import re
import shutil
import zipfile
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from conftest import TINY, draw_folder, draw_of_class
from images import encode
from pixelplay.api import train
from pixelplay.config import DataConfig, TrainConfig
from pixelplay.errors import BundleError, ConfigError, DataError
from pixelplay.outputs.label_issues import LabelIssue, write_label_issues
from pixelplay.outputs.report import images as report_images
from pixelplay.outputs.report.advice import make_advice
from pixelplay.outputs.report.build import report
from pixelplay.outputs.report.charts import (
    HEIGHT,
    WIDTH,
    history_chart,
    learning_chart,
    reliability_chart,
    risk_chart,
)
from pixelplay.outputs.report.confusion_matrix import (
    find_typical,
    group_by_cell,
    list_confusions,
    make_matrix,
    sort_errors,
)
from pixelplay.outputs.report.contents import _class_rows
from pixelplay.outputs.report.images import ReportImages, interleave
from pixelplay.outputs.report.run_records import PredictionRow, read_records
from pixelplay.run_log import RunLog
from pixelplay.text import percent
from tables import read_rows

HOSTILE = "<script>alert(1)</script>\"'&"


class Reader(HTMLParser):
    """Collects the elements and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]


def script_data_of(page: str) -> Any:
    found = re.search(r'<script type="application/json" id="report-data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def copy_of(run: Path, folder: Path) -> Path:
    return Path(shutil.copytree(run, folder / "run"))


def make(run: Path, **settings: Any) -> str:
    return Path(report(run, log=RunLog(quiet=True), **settings)).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def all_run(drawn_images: Path, tiny_probe: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a test split, so measured out of fold, that makes errors."""
    run = tmp_path_factory.mktemp("runs") / "all"
    config = replace(tiny_probe, test_frac=0)
    train(drawn_images, run, config, log=RunLog(quiet=True))
    return run


@pytest.fixture(scope="module")
def tiny_page(all_run: Path) -> str:
    return make(all_run)


def test_report_shows_the_metrics_of_metrics_json(all_run: Path, tiny_page: str) -> None:
    metrics = json.loads((all_run / "metrics.json").read_text())
    text = " ".join(Reader(tiny_page).text.split())
    accuracy = metrics["oof"]["accuracy"]
    assert f"Accuracy {100 * accuracy['value']:.1f} % on {metrics['oof']['n']} images, out of fold" in text
    assert f"{accuracy['low']:.3f}–{accuracy['high']:.3f}" in text
    baseline = metrics["baseline"]["accuracy"]["value"]
    assert f"most common class, 'bars', would reach {100 * baseline:.1f} %" in text
    for scores in metrics["oof"]["per_class"]:
        assert f"{scores['recall']['value']:.3f}" in text


def test_report_warns_of_uncertain_metrics_below_50_images(all_run: Path, tmp_path: Path) -> None:
    run = copy_of(all_run, tmp_path)
    metrics = json.loads((run / "metrics.json").read_text())
    for n, warns in ((1, True), (49, True), (50, False)):
        metrics["oof"]["n"] = n
        (run / "metrics.json").write_text(json.dumps(metrics))
        assert ("all metrics are uncertain" in make(run, force=True)) == warns


def test_ties_of_confusions_are_broken_by_name(all_run: Path) -> None:
    records = read_records(str(all_run))
    pairs = [("bars", "rings"), ("bars", "dots"), ("rings", "bars"), ("rings", "dots"), ("rings", "dots")]
    for order in (pairs, pairs[::-1]):
        rows = [replace(records.predictions[0], label=label, prediction=other) for label, other in order]
        found = {
            row["class"]: row["confused_with"] for row in _class_rows(replace(records, predictions=rows))
        }
        assert found == {"bars": ("dots", 1), "dots": None, "rings": ("dots", 2)}


def test_report_is_self_contained(tiny_page: str) -> None:
    reader = Reader(tiny_page)
    sources = [image["src"] or "" for image in reader.all("img")]
    assert len(sources) > 3
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert not [tag for tag, _ in reader.elements if tag in ("link", "iframe", "object", "base")]
    assert all("src" not in script for script in reader.all("script"))
    assert all((link["href"] or "").startswith("#") for link in reader.all("a"))
    policy = next(meta for meta in reader.all("meta") if "http-equiv" in meta)
    assert (policy["content"] or "").startswith("default-src 'none'; img-src data:;")


def test_confusion_matrix_cells_list_their_images(all_run: Path, tiny_page: str) -> None:
    data = script_data_of(tiny_page)
    confusion = json.loads((all_run / "metrics.json").read_text())["oof"]["confusion"]
    rows = read_rows(all_run / "oof.csv")
    for i, label in enumerate(confusion["classes"]):
        for j, prediction in enumerate(confusion["classes"]):
            n = confusion["matrix"][i][j]
            if not n:
                assert f"{i},{j}" not in data["cells"]
                continue
            cell = data["cells"][f"{i},{j}"]
            paths = {row["path"] for row in rows if (row["label"], row["prediction"]) == (label, prediction)}
            shown = [data["images"][k] for k in cell["images"]]
            assert cell["n"] == len(paths) == n
            assert {each["path"] for each in shown} <= paths
            assert all(each["src"] for each in shown)


def test_hostile_names_are_escaped(tiny_probe: TrainConfig, tmp_path: Path) -> None:
    counts = {"bars": 12, "dots": 10}
    draw_folder(tmp_path / "photos", counts)
    (tmp_path / "photos/dots").rename(tmp_path / "photos" / HOSTILE.replace("/", "∕"))
    strange = '"><img src=x onerror=alert(2)>\n{{ 7*7 }}.png'
    (tmp_path / "photos/bars" / strange).write_bytes(encode(draw_of_class("bars", 77), "PNG"))
    config = replace(tiny_probe, test_frac=0)
    train(tmp_path / "photos", tmp_path / "run", config, log=RunLog(quiet=True))
    page = make(tmp_path / "run")
    reader = Reader(page)
    assert len(reader.all("script")) == 2
    assert not [attrs for _, attrs in reader.elements if any(name.startswith("on") for name in attrs)]
    assert all((image["src"] or "").startswith("data:") for image in reader.all("img"))
    assert HOSTILE.replace("/", "∕") in reader.text
    assert HOSTILE.replace("/", "∕") in script_data_of(page)["classes"]
    assert any(each["path"].endswith(strange) for each in script_data_of(page)["images"])
    assert "49.png" not in page


def test_report_contains_no_local_paths(all_run: Path, tmp_path: Path) -> None:
    run = copy_of(all_run, tmp_path)
    config = json.loads((run / "config.json").read_text())
    elsewhere = f"--cache-dir {run}-cache --weights /srv/secret/w.pth --classes=/srv/secret/names.txt"
    command = f"pixelplay train {config['source']} --out {run} {elsewhere}"
    (run / "config.json").write_text(json.dumps({**config, "command": command}))
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["notes"].append(f"{config['source']}: a note")
    (run / "metrics.json").write_text(json.dumps(metrics))
    page = make(run)
    shown = "pixelplay train DATA --out RUN --cache-dir run-cache --weights w.pth --classes=names.txt"
    assert f"<code>{shown}</code>" in page
    assert "secret" not in page
    assert "DATA: a note" in page
    assert str(tmp_path) not in page
    assert str(Path(config["source"]).parent) not in page


def test_common_folder_of_absolute_paths_is_not_shown(
    drawn_images: Path, tiny_probe: TrainConfig, tmp_path: Path
) -> None:
    paths = sorted(drawn_images.rglob("*.*g"))
    rows = [f"{path},{path.parent.name}" for path in paths]
    (tmp_path / "table.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    config = replace(tiny_probe, test_frac=0)
    train(tmp_path / "table.csv", tmp_path / "run", config, log=RunLog(quiet=True))
    page = make(tmp_path / "run")
    assert str(drawn_images) not in Reader(page.split("<script")[0]).text
    assert all(each["path"].count("/") == 1 for each in script_data_of(page)["images"])
    assert all(each["src"] for each in script_data_of(page)["images"])


def test_large_duplicate_sets_do_not_bloat_the_report(all_run: Path, tmp_path: Path) -> None:
    run = copy_of(all_run, tmp_path)
    metrics = json.loads((run / "metrics.json").read_text())
    member = {"path": "bars/000.jpg", "label": "bars", "split": None}
    metrics["data"]["duplicates"] = [[member] * 5000]
    (run / "metrics.json").write_text(json.dumps(metrics))
    before = len(make(all_run))
    assert len(make(run)) < before + 60_000


def test_report_without_heat_maps_if_explaining_fails(all_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("pixelplay.inference.explain.Explainer.explain", refuse)
    log = RunLog(quiet=True)
    page = Path(report(all_run, log=log)).read_text()
    assert any("no heat maps in the report: out of memory" in note for note in log.notes)
    assert "Most confident errors" in page


def test_model_folder_of_a_run_reports_the_run(all_run: Path) -> None:
    assert Path(report(all_run / "model", log=RunLog(quiet=True))) == all_run / "report.html"


def test_missing_images_are_noted_and_the_rest_is_shown(tiny_run: Path, tmp_path: Path) -> None:
    run = copy_of(tiny_run, tmp_path)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "source": str(tmp_path / "gone")}))
    log = RunLog(quiet=True)
    page = Path(report(run, log=log)).read_text()
    assert any("lacks images" in note and "--data" in note for note in log.notes)
    assert "Accuracy" in page
    assert not Reader(page).all("img")
    with pytest.raises(DataError, match="does not exist; pass the folder, table or archive"):
        report(run, tmp_path / "gone", log=log)


def test_moved_images_are_found_with_data(all_run: Path, drawn_images: Path, tmp_path: Path) -> None:
    run = copy_of(all_run, tmp_path)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "source": str(tmp_path / "gone")}))
    assert len(Reader(make(run, data=drawn_images)).all("img")) > 3


def test_report_of_a_model_without_run_records(tiny_run: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_run / "model", tmp_path / "model"))
    assert Path(report(model, log=RunLog(quiet=True))) == tmp_path / "model.report.html"
    text = Reader(make(model)).text
    for words in (
        "Accuracy",
        "out-of-fold images",
        "rings",
        TINY,
        "Missing from this report",
        "pixelplay evaluate",
    ):
        assert words in text


@pytest.mark.parametrize("name", ["config.json", "predictions.csv"])
def test_missing_records_are_named(tiny_run: Path, tmp_path: Path, name: str) -> None:
    run = copy_of(tiny_run, tmp_path)
    (run / name).unlink()
    with pytest.raises(BundleError, match=rf"no {name}.*pixelplay train or crossval"):
        report(run, log=RunLog(quiet=True))


def test_damaged_records_raise_bundle_error(tiny_run: Path, tmp_path: Path) -> None:
    run = copy_of(tiny_run, tmp_path)
    metrics = json.loads((run / "metrics.json").read_text())
    for content in ("{", json.dumps({**metrics, "data": {}}), json.dumps({**metrics, "chosen": None})):
        (run / "metrics.json").write_text(content)
        with pytest.raises(BundleError, match="are damaged"):
            report(run, log=RunLog(quiet=True))
    with pytest.raises(BundleError, match="does not exist"):
        report(tmp_path / "nowhere", log=RunLog(quiet=True))


def test_only_reports_are_overwritten_without_force(tiny_run: Path, tmp_path: Path) -> None:
    run, out = copy_of(tiny_run, tmp_path), tmp_path / "page.html"
    out.write_text("my own notes")
    with pytest.raises(ConfigError, match=r"page\.html exists.*--force"):
        make(run, out=out)
    assert out.read_text() == "my own notes"
    make(run, out=out, force=True)
    make(run, out=out)  # a report: replaced
    assert not list(tmp_path.glob("*.tmp"))
    with pytest.raises(ConfigError, match="is a folder"):
        make(run, out=tmp_path)
    with pytest.raises(ConfigError, match="no does not exist"):
        make(run, out=tmp_path / "no/page.html")


def test_thumbnails_stop_at_the_size_limit(drawn_images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_images, "MAX_BYTES", 20_000)
    images = ReportImages(str(drawn_images))
    paths = [f"bars/{i:03}.{('jpg', 'png')[i % 2]}" for i in range(20)]
    images.make_thumbnails(paths, 1, RunLog(quiet=True))
    made = [images.small(path) for path in paths]
    kept = [image for image in made if image]
    assert 0 < len(kept) < 20
    assert sum(map(len, kept)) <= 20_000
    assert images.small("bars/none.jpg") is None


def test_enlarged_images_fall_back_to_thumbnails(drawn_images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_images, "SMALL_PX", 24)
    monkeypatch.setattr(report_images, "LARGE_PX", 56)
    images = ReportImages(str(drawn_images))
    paths = ["bars/000.jpg", "dots/001.png"]
    images.make_thumbnails(paths, 1, RunLog(quiet=True), enlarged=paths[1:])

    def width(address: str | None) -> int:
        assert address is not None
        with Image.open(io.BytesIO(base64.b64decode(address.split(",")[1]))) as image:
            return image.width

    assert [width(images.small(path)) for path in paths] == [24, 24]
    assert [width(images.large(path)) for path in paths] == [24, 56]
    monkeypatch.setattr(report_images, "MAX_BYTES", 0)
    assert images.large(paths[1]) is None
    assert images.n_omitted == 1


def test_full_report_counts_omitted_images(all_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_images, "MAX_BYTES", 60_000)
    page = make(all_run)
    images = re.findall(r"data:image/jpeg;base64,[\w+/=]+", page)
    assert images
    assert sum(map(len, images)) <= 60_000
    assert re.search(r"Images in \d+ places: the file would be too large", page)
    assert Reader(page).all("img")


def test_interleave_takes_turns() -> None:
    assert interleave([["a", "b", "c"], ["d"], ["e", "f"]], 2) == ["a", "d", "e", "b", "f"]
    assert interleave([], 3) == []


# Predictions, advice and charts


def make_rows(*rows: tuple[str, str, float]) -> list[PredictionRow]:
    return [
        PredictionRow(path=f"{i}.jpg", label=label, prediction=prediction, probability=p)
        for i, (label, prediction, p) in enumerate(rows)
    ]


@pytest.mark.parametrize("is_before_refit", [True, False])
def test_heat_maps_of_training_images_are_marked(
    is_before_refit: bool, all_run: Path, tmp_path: Path
) -> None:
    run = copy_of(all_run, tmp_path)
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["val"], metrics["val_is_before_refit"] = metrics.pop("oof"), is_before_refit
    for name in ("headline", "baseline"):
        metrics[name]["measured_on"] = "val"
    (run / "metrics.json").write_text(json.dumps(metrics))
    (run / "oof.csv").rename(run / "val.csv")
    assert ("was trained on these images after they had been predicted" in make(run)) == is_before_refit


def test_history_of_unused_fine_tuning_is_marked(all_run: Path, tmp_path: Path) -> None:
    run = copy_of(all_run, tmp_path)
    metrics = json.loads((run / "metrics.json").read_text())
    rows = ["repeat,fold,epoch,train_loss,val_loss,val_macro_f1,val_accuracy"]
    rows += [f"0,0,{epoch},{1 / epoch},{2 / epoch},0.5,0.5" for epoch in (1, 2, 3)]
    (run / "history.csv").write_text("\n".join(rows) + "\n")
    for method, is_marked in (("none", True), ("partial", False)):
        fold = {"repeat": 0, "fold": 0, "finetune": method}
        (run / "metrics.json").write_text(json.dumps({**metrics, "folds": [fold]}))
        assert ("(fold 0, fine-tuning that was not used)" in make(run)) == is_marked


def test_predictions_are_sorted_and_grouped_by_confidence() -> None:
    rows = make_rows(("a", "b", 0.6), ("a", "b", 0.9), ("b", "b", 0.7), ("b", "b", 0.8), ("a", "a", 0.5))
    assert [row.path for row in sort_errors(rows)] == ["1.jpg", "0.jpg"]
    assert find_typical(rows) == {"b": "3.jpg", "a": "4.jpg"}
    assert group_by_cell(rows) == {
        ("a", "b"): ["1.jpg", "0.jpg"],
        ("b", "b"): ["3.jpg", "2.jpg"],
        ("a", "a"): ["4.jpg"],
    }


def test_confusion_matrix_counts_and_shades() -> None:
    rows = make_rows(("a", "a", 0.9), ("a", "b", 0.8), ("a", "b", 0.7), ("b", "b", 0.6), ("b", "a", 0.5))
    matrix = make_matrix(rows, ["a", "b", "c"])
    assert [[cell["n"] for cell in row] for row in matrix] == [[1, 2, 0], [1, 1, 0], [0, 0, 0]]
    assert tuple(matrix[i][j]["shade"] for i, j in ((0, 1), (1, 1), (2, 2))) == (6, 4, 0)
    assert [(cell["label"], cell["prediction"], cell["n"]) for cell in list_confusions(rows)] == [
        ("a", "b", 2),
        ("b", "a", 1),
    ]


def test_sections_have_their_titles_in_order(tiny_page: str) -> None:
    titles = re.findall(r"<h2[^>]*>([^<]+?) *<", tiny_page)
    assert titles == [
        "Summary",
        "What to do next",
        "Metrics",
        "Per-class results",
        "Confusion matrix",
        "Most confident errors",
        "Label issues",
        "Calibration and confidence",
        "Data",
        "How this model was trained",
        "Log",
        "All settings",
    ]


def add_label_issues(run: Path, n: int) -> list[dict[str, str]]:
    """Write n label issues of the images of bars, each suggested to be dots or rings."""
    names = [name for name in sorted({row["path"] for row in read_rows(run / "oof.csv")}) if "bars/" in name]
    issues = [
        LabelIssue(
            path=names[i % len(names)],
            split="oof",
            label="bars",
            suggested=("dots", "rings")[i % 3 == 0],
            score=i / 1000,
            prob_label=0.04,
            prob_suggested=0.9,
            reason="0.90 for another class",
        )
        for i in range(n)
    ]
    write_label_issues(issues, str(run / "label_issues.csv"))
    return read_rows(run / "label_issues.csv")


@pytest.mark.parametrize(("n", "is_paged"), [(12, False), (13, True)])
def test_label_issues_after_the_first_dozen_are_collapsed(
    n: int, is_paged: bool, all_run: Path, tmp_path: Path
) -> None:
    run = copy_of(all_run, tmp_path)
    add_label_issues(run, n)
    page = make(run)
    first, _, others = page.partition('<details id="other-issues">')
    assert first.count("<li data-issue=") == 12
    assert others.count("<li data-issue=") == n - 12
    assert ("1 less suspicious labels" in page) == is_paged
    assert [item["value"] for item in Reader(page).all("li") if "data-issue" in item] == [
        str(i + 1) for i in range(n)
    ]


def test_advice_on_label_issues_promises_nothing_about_metrics(all_run: Path, tmp_path: Path) -> None:
    run = copy_of(all_run, tmp_path)
    add_label_issues(run, 3)
    advice = next(each for each in make_advice(read_records(str(run))) if each["action"].startswith("Review"))
    assert "Corrections change training labels only" in advice["reason"]
    assert "in held-out images stay in the metrics" in advice["reason"]
    text = " ".join(Reader(make(run)).text.split())
    assert "the most it can fix" not in text
    assert "metrics keep the original labels" in text


def test_small_shares_of_errors_are_not_rounded_to_zero(
    all_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advice = {"action": "Do", "reason": "Because.", "command": None}
    found = [{**advice, "error_share": share} for share in (0.4, 0.004, 0.0)]
    monkeypatch.setattr("pixelplay.outputs.report.contents.make_advice", lambda records: found)
    shares = re.findall(r'<span class="share">\((.*?)\)', make(copy_of(all_run, tmp_path)))
    assert shares == ["40\u00a0% of errors", "&lt;1\u00a0% of errors"]


def test_wrong_predictions_are_not_rounded_to_certainty(all_run: Path, tmp_path: Path) -> None:
    run = copy_of(all_run, tmp_path)
    lines = (run / "oof.csv").read_text().splitlines()
    column = lines[0].split(",").index("probability")
    cells = [line.split(",") for line in lines[1:]]
    rows = [",".join([*row[:column], "0.999000", *row[column + 1 :]]) for row in cells]
    (run / "oof.csv").write_text("\n".join([lines[0], *rows]) + "\n")
    text = Reader(make(run)).text
    assert "(>99\u00a0%)" in text
    assert "(100\u00a0%)" not in text


def test_confusion_matrix_headers_contain_whole_class_names(tiny_probe: TrainConfig, tmp_path: Path) -> None:
    draw_folder(tmp_path / "photos", {"bars": 9, "dots": 9})
    names = ["a_class_whose_name_has_more_than_nine_letters", "x" * 100]
    for old, new in zip(("bars", "dots"), names, strict=True):
        (tmp_path / "photos" / old).rename(tmp_path / "photos" / new)
    train(tmp_path / "photos", tmp_path / "run", replace(tiny_probe, test_frac=0), log=RunLog(quiet=True))
    page = make(tmp_path / "run")
    matrix = page[page.index('<table class="matrix') : page.index('id="cell"')]
    head = matrix[: matrix.index("</thead>")]
    reader = Reader(head)
    assert [th["title"] for th in reader.all("th")] == names
    assert [th.get("aria-label") for th in reader.all("th")] == [None, names[1]]
    assert names[0] in reader.text
    assert f"{'x' * 30}…{'x' * 29}" in reader.text
    assert 'class="matrix"' in matrix


def test_many_class_names_are_rotated_and_long_tables_scroll(all_run: Path, tmp_path: Path) -> None:
    run = copy_of(all_run, tmp_path)
    metrics = json.loads((run / "metrics.json").read_text())
    confusion = metrics["oof"]["confusion"]
    confusion["classes"] += [f"class {i}" for i in range(6)]
    metrics["oof"]["per_class"] = [
        {**metrics["oof"]["per_class"][0], "class": f"class {i}"} for i in range(31)
    ]
    (run / "metrics.json").write_text(json.dumps(metrics))
    page = make(run)
    assert '<table class="matrix rotated">' in page
    assert 'class="wide tall" tabindex="0"' in page
    assert 'class="matrix rotated"' not in make(all_run)
    assert 'class="wide tall"' not in make(all_run)


def test_report_names_the_novelty_threshold_with_its_false_alarms(
    tiny_run: Path, all_run: Path, tmp_path: Path
) -> None:
    run = copy_of(tiny_run, tmp_path)
    alarms = json.loads((run / "metrics.json").read_text())["novelty"]["false_alarm_rate"]
    text = " ".join(Reader(make(run)).text.replace("\u00a0", " ").split())
    assert "If novelty is above 0.95" in text
    shown = f"False alarms: {percent(alarms['value'])} (95 % CI {percent(alarms['low'])} to "
    assert f"{shown}{percent(alarms['high'])}) of {alarms['n']} test images of known classes" in text
    assert "35 % of the images of classes left out of training" in text
    assert "was not measured: there is no test split" in Reader(make(all_run)).text


def test_advice_is_ordered_by_error_share(all_run: Path) -> None:
    records = read_records(str(all_run))
    assert records.errors
    found = make_advice(records)
    shares = [advice["error_share"] for advice in found]
    assert shares == sorted(shares, reverse=True)
    assert all(0 <= share <= 1 for share in shares)
    for advice in found:
        if advice["action"].startswith(("Collect more images of", "Check the errors of")):
            name = advice["action"].split("'")[1]
            n_errors = sum(row.label == name for row in records.errors)
            assert advice["error_share"] == n_errors / len(records.errors)
    assert any("--time-budget" in (advice["command"] or "") for advice in found)


@pytest.mark.parametrize("finetune", ["partial", "auto"])
@pytest.mark.parametrize("auto_selects", ["none", "partial"])
def test_advice_prefers_the_linear_probe_if_fine_tuning_is_worse(
    finetune: str, auto_selects: str, all_run: Path, tmp_path: Path
) -> None:
    run = copy_of(all_run, tmp_path)
    metrics = json.loads((run / "metrics.json").read_text())
    scores = {"probe_accuracy": 0.7, "finetuned_accuracy": 0.71, "probe_loss": 0.5, "finetuned_loss": 0.6}
    metrics["finetune"] = "partial"
    metrics["chosen"]["finetune"] = {"value": "partial", **scores, "auto_selects": auto_selects}
    (run / "metrics.json").write_text(json.dumps(metrics))
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "finetune": finetune}))
    advice = make_advice(read_records(str(run)))
    is_advised = (finetune, auto_selects) == ("partial", "none")
    assert any(each["action"].startswith("Use the linear probe") for each in advice) == is_advised
    if is_advised:
        first = advice[0]
        assert "accuracy 0.700 (loss 0.500)" in first["reason"]
        assert "accuracy 0.710 (loss 0.600)" in first["reason"]
        assert first["command"].endswith("--finetune auto")


def test_reliability_chart_places_bins_on_its_axes() -> None:
    bins = [{"n": 5, "confidence": 0.5, "accuracy": 0.25}, {"n": 3, "confidence": 1.0, "accuracy": 1.0}]
    chart = reliability_chart({"before": {"bins": bins}, "after": {"bins": bins}})
    after = chart.series[-1]
    assert after["points"] == [(0.5, 0.25), (1.0, 1.0)]
    assert after["texts"][0] == "5 images with 50 % confidence: 25 % correct"
    assert {0.5, 1.0} <= set(chart.x_ticks)
    assert 0 < chart.x_px(0) < chart.x_px(0.5) < chart.x_px(1) < WIDTH
    assert 0 < chart.y_px(1) < chart.y_px(0.25) < chart.y_px(0) < HEIGHT
    assert 2 * chart.x_px(0.5) == pytest.approx(chart.x_px(0) + chart.x_px(1))


def test_risk_and_learning_charts_have_a_marker_per_point() -> None:
    risk = risk_chart([{"coverage": 0.5, "risk": 0.0}, {"coverage": 1.0, "risk": 0.1}])
    assert len(risk.series[0]["texts"]) == 2
    points = [{"n_train": n, "low": 0.7, "value": 0.8, "high": 0.9} for n in (25, 50, 100)]
    learning = learning_chart(points)
    assert learning.series[-1]["points"] == [(25, 0.8), (50, 0.8), (100, 0.8)]
    assert learning.x_px(100) == risk.x_px(1)


def test_history_chart_plots_columns_by_epoch() -> None:
    history = [{"val_loss": 1.0 - 0.1 * i, "train_loss": 2.0} for i in range(4)]
    chart = history_chart(history, {"train_loss": "training", "val_loss": "validation"}, "loss")
    assert chart is not None
    assert [line["name"] for line in chart.series] == ["training", "validation"]
    places = np.array([(chart.x_px(x), chart.y_px(y)) for x, y in chart.series[1]["points"]])
    assert (np.diff(places[:, 1]) > 0).all()  # smaller values lie lower
    assert ((places >= 0) & (places <= (WIDTH, HEIGHT))).all()
    assert history_chart(history[:1], {"val_loss": "validation"}, "loss") is None


def test_images_are_read_from_an_archive_with_images_dir(
    drawn_images: Path, tiny_probe: TrainConfig, tmp_path: Path
) -> None:
    paths = sorted(drawn_images.rglob("*.*g"))
    names = [f"{path.parent.name}_{path.name}" for path in paths]
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for path, name in zip(paths, names, strict=True):
            archive.write(path, f"train/{name}")
            archive.write(path, f"test/{name}")  # so that the folder must be known
        rows = [f"{name},{name.split('_')[0]}" for name in names]
        archive.writestr("labels.csv", "\n".join(["path,label", *rows, ""]))
    config = replace(tiny_probe, reading=DataConfig(images_dir="train"))
    train(tmp_path / "all.zip", tmp_path / "run", config)
    log = RunLog(quiet=True)
    page = Path(report(tmp_path / "run", log=log)).read_text()
    assert not [note for note in log.notes if "lacks images" in note]
    assert page.count("data:image/jpeg") >= 10
    page = Path(report(tmp_path / "run", tmp_path / "all.zip", log=log)).read_text()
    assert page.count("data:image/jpeg") >= 10
