"""What a report promises: it tells what the records say, every name is text, and its size has a bound."""

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
from pixelplay.outputs.report import images as pictures_module
from pixelplay.outputs.report.advice import advise
from pixelplay.outputs.report.build import report
from pixelplay.outputs.report.charts import HEIGHT, WIDTH, history_chart, reliability_chart, risk_chart
from pixelplay.outputs.report.confusion_matrix import fill_cells, typical_of, worst_first
from pixelplay.outputs.report.images import Pictures, take_turns
from pixelplay.outputs.report.run_records import Answer, read_records
from pixelplay.run_log import RunLog
from tables import read_rows

HOSTILE = "<script>alert(1)</script>\"'&"


class Reader(HTMLParser):
    """Collects what a browser would see: elements, and the text between them."""

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


def island_of(page: str) -> Any:
    found = re.search(r'<script type="application/json" id="island">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def copy_of(run: Path, folder: Path) -> Path:
    return Path(shutil.copytree(run, folder / "run"))


def make(run: Path, **settings: Any) -> str:
    return Path(report(run, log=RunLog(quiet=True), **settings)).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def all_run(drawn_images: Path, tiny_probe: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose figures come from all images, out of fold: it makes mistakes."""
    run = tmp_path_factory.mktemp("runs") / "all"
    config = replace(tiny_probe, test_frac=0)
    train(drawn_images, run, config, log=RunLog(quiet=True))
    return run


@pytest.fixture(scope="module")
def tiny_page(all_run: Path) -> str:
    return make(all_run)


def test_the_page_says_what_metrics_json_says(all_run: Path, tiny_page: str) -> None:
    metrics = json.loads((all_run / "metrics.json").read_text())
    text = " ".join(Reader(tiny_page).text.split())
    accuracy = metrics["oof"]["accuracy"]
    assert f"Right on {100 * accuracy['value']:.1f} % of {metrics['oof']['n']} images" in text
    assert f"{accuracy['low']:.3f}–{accuracy['high']:.3f}" in text
    assert (
        f"Always answering 'bars' would be right on {100 * metrics['baseline']['accuracy']['value']:.1f} %"
        in text
    )
    for scores in metrics["oof"]["per_class"]:
        assert f"{scores['recall']['value']:.3f}" in text


def test_the_page_needs_nothing_from_outside(tiny_page: str) -> None:
    reader = Reader(tiny_page)
    sources = [image["src"] or "" for image in reader.all("img")]
    assert len(sources) > 3
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert not [tag for tag, _ in reader.elements if tag in ("link", "iframe", "object", "base")]
    assert all("src" not in script for script in reader.all("script"))
    assert all((link["href"] or "").startswith("#") for link in reader.all("a"))
    policy = next(meta for meta in reader.all("meta") if "http-equiv" in meta)
    assert (policy["content"] or "").startswith("default-src 'none'; img-src data:;")


def test_every_cell_of_the_matrix_has_its_photographs(all_run: Path, tiny_page: str) -> None:
    island = island_of(tiny_page)
    confusion = json.loads((all_run / "metrics.json").read_text())["oof"]["confusion"]
    rows = read_rows(all_run / "oof.csv")
    for i, given in enumerate(confusion["classes"]):
        for j, label in enumerate(confusion["classes"]):
            n = confusion["matrix"][i][j]
            if not n:
                assert f"{i},{j}" not in island["cells"]
                continue
            cell = island["cells"][f"{i},{j}"]
            paths = {row["path"] for row in rows if (row["given"], row["label"]) == (given, label)}
            shown = [island["pictures"][k] for k in cell["pictures"]]
            assert cell["n"] == len(paths) == n
            assert {each["path"] for each in shown} <= paths
            assert all(each["src"] for each in shown)


def test_names_are_text_whatever_they_are(tiny_probe: TrainConfig, tmp_path: Path) -> None:
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
    assert HOSTILE.replace("/", "∕") in island_of(page)["classes"]
    assert any(each["path"].endswith(strange) for each in island_of(page)["pictures"])
    assert "49.png" not in page


def test_a_page_tells_no_place_on_this_machine(all_run: Path, tmp_path: Path) -> None:
    run = copy_of(all_run, tmp_path)
    config = json.loads((run / "config.json").read_text())
    elsewhere = f"--cache-dir {run}-cache --weights /srv/secret/w.pth --classes=/srv/secret/names.txt"
    command = f"pixelplay train {config['source']} --out {run} {elsewhere}"
    (run / "config.json").write_text(json.dumps({**config, "command": command}))
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["notes"].append(f"{config['source']}: something was assumed")
    (run / "metrics.json").write_text(json.dumps(metrics))
    page = make(run)
    told = "pixelplay train DATA --out RUN --cache-dir run-cache --weights w.pth --classes=names.txt"
    assert f"<code>{told}</code>" in page
    assert "secret" not in page
    assert "DATA: something was assumed" in page
    assert str(tmp_path) not in page
    assert str(Path(config["source"]).parent) not in page


def test_what_all_absolute_paths_share_is_not_shown(
    drawn_images: Path, tiny_probe: TrainConfig, tmp_path: Path
) -> None:
    paths = sorted(drawn_images.rglob("*.*g"))
    rows = [f"{path},{path.parent.name}" for path in paths]
    (tmp_path / "table.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    config = replace(tiny_probe, test_frac=0)
    train(tmp_path / "table.csv", tmp_path / "run", config, log=RunLog(quiet=True))
    page = make(tmp_path / "run")
    assert str(drawn_images) not in Reader(page.split("<script")[0]).text
    assert all(each["path"].count("/") == 1 for each in island_of(page)["pictures"])
    assert all(each["src"] for each in island_of(page)["pictures"])


def test_no_set_of_copies_makes_the_page_endless(all_run: Path, tmp_path: Path) -> None:
    run = copy_of(all_run, tmp_path)
    metrics = json.loads((run / "metrics.json").read_text())
    member = {"path": "bars/000.jpg", "label": "bars", "split": None}
    metrics["data"]["duplicates"] = [[member] * 5000]
    (run / "metrics.json").write_text(json.dumps(metrics))
    before = len(make(all_run))
    assert len(make(run)) < before + 60_000


def test_a_model_that_cannot_be_explained_costs_only_the_heat_maps(
    all_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("pixelplay.inference.explain.Explainer.explain", refuse)
    log = RunLog(quiet=True)
    page = Path(report(all_run, log=log)).read_text()
    assert any("no heat maps in the report: out of memory" in note for note in log.notes)
    assert "The most confident mistakes" in page


def test_the_model_of_a_run_leads_to_the_run(all_run: Path) -> None:
    assert Path(report(all_run / "model", log=RunLog(quiet=True))) == all_run / "report.html"


def test_photographs_that_have_gone_are_said_and_the_rest_is_shown(tiny_run: Path, tmp_path: Path) -> None:
    run = copy_of(tiny_run, tmp_path)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "source": str(tmp_path / "gone")}))
    log = RunLog(quiet=True)
    page = Path(report(run, log=log)).read_text()
    assert any("pictures are missing" in note and "give --data" in note for note in log.notes)
    assert "Right on" in page
    assert not Reader(page).all("img")
    with pytest.raises(DataError, match="does not exist; give the folder, table or archive"):
        report(run, tmp_path / "gone", log=log)


def test_photographs_that_were_moved_are_found_where_the_user_says(
    all_run: Path, drawn_images: Path, tmp_path: Path
) -> None:
    run = copy_of(all_run, tmp_path)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "source": str(tmp_path / "gone")}))
    assert len(Reader(make(run, data=drawn_images)).all("img")) > 3


def test_a_model_alone_tells_what_it_knows_and_what_is_missing(tiny_run: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_run / "model", tmp_path / "model"))
    assert Path(report(model, log=RunLog(quiet=True))) == tmp_path / "model.report.html"
    text = Reader(make(model)).text
    for words in (
        "Right on",
        "held out in turn",
        "rings",
        TINY,
        "What is missing here",
        "pixelplay evaluate",
    ):
        assert words in text


@pytest.mark.parametrize("name", ["config.json", "predictions.csv"])
def test_missing_records_name_the_command_that_makes_them(tiny_run: Path, tmp_path: Path, name: str) -> None:
    run = copy_of(tiny_run, tmp_path)
    (run / name).unlink()
    with pytest.raises(BundleError, match=f"lacks {name}; pixelplay train or crossval makes it anew"):
        report(run, log=RunLog(quiet=True))


def test_damaged_records_are_said(tiny_run: Path, tmp_path: Path) -> None:
    run = copy_of(tiny_run, tmp_path)
    metrics = json.loads((run / "metrics.json").read_text())
    for content in ("{", json.dumps({**metrics, "data": {}}), json.dumps({**metrics, "chosen": None})):
        (run / "metrics.json").write_text(content)
        with pytest.raises(BundleError, match="are damaged"):
            report(run, log=RunLog(quiet=True))
    with pytest.raises(BundleError, match="does not exist"):
        report(tmp_path / "nowhere", log=RunLog(quiet=True))


def test_only_a_report_is_replaced(tiny_run: Path, tmp_path: Path) -> None:
    run, out = copy_of(tiny_run, tmp_path), tmp_path / "page.html"
    out.write_text("my own notes")
    with pytest.raises(ConfigError, match="exists and is no report"):
        make(run, out=out)
    assert out.read_text() == "my own notes"
    make(run, out=out, force=True)
    make(run, out=out)  # ours: written anew
    assert not list(tmp_path.glob("*.tmp"))
    with pytest.raises(ConfigError, match="is a folder"):
        make(run, out=tmp_path)
    with pytest.raises(ConfigError, match="does not exist; make it"):
        make(run, out=tmp_path / "no/page.html")


def test_pictures_end_where_the_page_is_large_enough(
    drawn_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures_module, "MAX_BYTES", 20_000)
    pictures = Pictures(str(drawn_images))
    paths = [f"bars/{i:03}.{('jpg', 'png')[i % 2]}" for i in range(20)]
    pictures.make(paths, 1, RunLog(quiet=True))
    made = [pictures.small(path) for path in paths]
    kept = [picture for picture in made if picture]
    assert 0 < len(kept) < 20
    assert sum(map(len, kept)) <= 20_000
    assert pictures.small("bars/none.jpg") is None


def test_what_is_to_be_judged_by_eye_is_shown_larger(
    drawn_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures_module, "SMALL_PX", 24)
    monkeypatch.setattr(pictures_module, "LARGE_PX", 56)
    pictures = Pictures(str(drawn_images))
    paths = ["bars/000.jpg", "dots/001.png"]
    pictures.make(paths, 1, RunLog(quiet=True), enlarged=paths[1:])

    def width(address: str | None) -> int:
        assert address is not None
        with Image.open(io.BytesIO(base64.b64decode(address.split(",")[1]))) as image:
            return image.width

    assert [width(pictures.small(path)) for path in paths] == [24, 24]
    assert [width(pictures.large(path)) for path in paths] == [24, 56]
    monkeypatch.setattr(pictures_module, "MAX_BYTES", 0)
    assert pictures.large(paths[1]) is None
    assert pictures.n_excluded == 1


def test_a_full_page_says_what_it_leaves_out_and_shows_mistakes_first(
    all_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures_module, "MAX_BYTES", 60_000)
    page = make(all_run)
    pictures = re.findall(r"data:image/jpeg;base64,[\w+/=]+", page)
    assert pictures
    assert sum(map(len, pictures)) <= 60_000
    assert re.search(r"Pictures in \d+ places: the page would have become too large", page)
    assert Reader(page).all("img")


def test_turns_are_taken() -> None:
    assert take_turns([["a", "b", "c"], ["d"], ["e", "f"]], 2) == ["a", "d", "e", "b", "f"]
    assert take_turns([], 3) == []


# What is told


def answers(*rows: tuple[str, str, float]) -> list[Answer]:
    return [
        Answer(path=f"{i}.jpg", given=given, label=label, probability=p)
        for i, (given, label, p) in enumerate(rows)
    ]


@pytest.mark.parametrize("is_before_refit", [True, False])
def test_who_explains_has_learned_from_what_it_explains_only_if_it_has(
    is_before_refit: bool, all_run: Path, tmp_path: Path
) -> None:
    run = copy_of(all_run, tmp_path)
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["val"], metrics["val_is_before_refit"] = metrics.pop("oof"), is_before_refit
    for name in ("headline", "baseline"):
        metrics[name]["measured_on"] = "val"
    (run / "metrics.json").write_text(json.dumps(metrics))
    (run / "oof.csv").rename(run / "val.csv")
    assert ("which has learned from these images since" in make(run)) == is_before_refit


def test_curves_of_a_tuning_that_was_not_taken_are_called_that_in_folds_too(
    all_run: Path, tmp_path: Path
) -> None:
    run = copy_of(all_run, tmp_path)
    metrics = json.loads((run / "metrics.json").read_text())
    rows = ["repeat,fold,epoch,train_loss,val_loss,val_macro_f1,val_accuracy"]
    rows += [f"0,0,{epoch},{1 / epoch},{2 / epoch},0.5,0.5" for epoch in (1, 2, 3)]
    (run / "history.csv").write_text("\n".join(rows) + "\n")
    for method, is_said in (("none", True), ("partial", False)):
        fold = {"repeat": 0, "fold": 0, "finetune": method}
        (run / "metrics.json").write_text(json.dumps({**metrics, "folds": [fold]}))
        assert ("of fold 0 of a tuning that was not taken," in make(run)) == is_said


def test_mistakes_cells_and_typical_photographs() -> None:
    given = answers(("a", "b", 0.6), ("a", "b", 0.9), ("b", "b", 0.7), ("b", "b", 0.8), ("a", "a", 0.5))
    assert [a.path for a in worst_first(given)] == ["1.jpg", "0.jpg"]
    assert typical_of(given) == {"b": "3.jpg", "a": "4.jpg"}
    assert fill_cells(given) == {
        ("a", "b"): ["1.jpg", "0.jpg"],
        ("b", "b"): ["3.jpg", "2.jpg"],
        ("a", "a"): ["4.jpg"],
    }


def test_advice_is_ordered_by_the_errors_it_is_about(all_run: Path) -> None:
    records = read_records(str(all_run))
    wrong = [a for a in records.answers if not a.is_right]
    assert wrong
    found = advise(records)
    shares = [advice.share for advice in found]
    assert shares == sorted(shares, reverse=True)
    assert all(0 <= share <= 1 for share in shares)
    for advice in found:
        if "Add images of" in advice.what:
            name = advice.what.split("'")[1]
            assert advice.share == sum(a.given == name for a in wrong) / len(wrong)
    assert any(advice.command and "--time-budget" in advice.command for advice in found)


@pytest.mark.parametrize("finetune", ["partial", "auto"])
@pytest.mark.parametrize("auto_takes", ["none", "partial"])
def test_a_depth_that_was_asked_for_and_is_worse_is_said_first(
    finetune: str, auto_takes: str, all_run: Path, tmp_path: Path
) -> None:
    run = copy_of(all_run, tmp_path)
    metrics = json.loads((run / "metrics.json").read_text())
    figures = {"probe_accuracy": 0.7, "tuned_accuracy": 0.71, "probe_score": 0.5, "tuned_score": 0.6}
    metrics["finetune"] = "partial"
    metrics["chosen"]["finetune"] = {"value": "partial", **figures, "auto_takes": auto_takes}
    (run / "metrics.json").write_text(json.dumps(metrics))
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "finetune": finetune}))
    first = advise(read_records(str(run)))[0]
    is_said = (finetune, auto_takes) == ("partial", "none")
    assert first.what.startswith("Take the probe") == is_said
    if is_said:
        assert first.why == "There it had accuracy 0.700 (loss 0.500), what was tuned 0.710 (0.600)."
        assert first.command is not None
        assert first.command.endswith("--finetune auto")


def test_charts_place_values_on_their_axes() -> None:
    bins = [{"n": 5, "confidence": 0.5, "accuracy": 0.25}, {"n": 3, "confidence": 1.0, "accuracy": 1.0}]
    chart = reliability_chart({"before": {"bins": bins}, "after": {"bins": bins}})
    (x, y, words), (right, top, _) = chart.lines[-1].dots
    ticks = dict((text, place) for place, text in chart.x_ticks), dict((t, p) for p, t in chart.y_ticks)
    assert (x, y) == (ticks[0]["50 %"], ticks[1]["25 %"])
    assert (right, top) == (ticks[0]["100 %"], ticks[1]["100 %"])
    assert words == "5 images answered with 50 %: 25 % right"
    risk = risk_chart([{"coverage": 0.5, "risk": 0.0}, {"coverage": 1.0, "risk": 0.1}])
    assert len(risk.lines[0].dots) == 2
    history = [{"val_loss": 1.0 - 0.1 * i, "train_loss": 2.0} for i in range(4)]
    drawn = history_chart(history, {"train_loss": "training", "val_loss": "validation"}, "loss")
    assert drawn is not None
    assert [line.name for line in drawn.lines] == ["training", "validation"]
    places = np.array([point.split(",") for point in drawn.lines[1].points.split()], float)
    assert (np.diff(places[:, 1]) > 0).all()  # smaller values lie lower
    assert ((places >= 0) & (places <= (WIDTH, HEIGHT))).all()
    assert history_chart(history[:1], {"val_loss": "validation"}, "loss") is None


def test_pictures_of_an_archive_with_a_table_and_a_folder_of_it(
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
    assert not [note for note in log.notes if "pictures are missing" in note]
    assert page.count("data:image/jpeg") >= 10
    page = Path(report(tmp_path / "run", tmp_path / "all.zip", log=log)).read_text()
    assert page.count("data:image/jpeg") >= 10
