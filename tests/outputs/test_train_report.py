import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conftest import TINY, draw_folder, draw_of_class
from images import damaged_files, encode
from pixelplay.api import train
from pixelplay.config import TrainConfig
from pixelplay.outputs.metrics_json import RunReport
from pixelplay.run_log import RunLog
from tables import read_json, read_rows

METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "log_loss", "brier", "roc_auc", "average_precision")


@pytest.fixture(scope="module")
def odd(tiny_probe: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunReport, Path, RunLog]:
    """A run on predefined splits with every problem that data can have.

    Duplicates across splits, unreadable and conflicting files, a class with one image, one that only
    the test split has, a hidden file.
    """
    root = tmp_path_factory.mktemp("odd") / "data"
    draw_folder(root / "train", {"bars": 18, "dots": 9})
    draw_folder(root / "test", {"bars": 5, "dots": 4, "rings": 3}, first_seed=300)
    (root / "train" / "single").mkdir()
    (root / "train" / "single" / "0.png").write_bytes(encode(draw_of_class("rings", 1), "PNG"))
    shutil.copy(root / "test" / "bars" / "000.jpg", root / "train" / "bars" / "copy.jpg")
    shutil.copy(root / "train" / "bars" / "002.jpg", root / "train" / "dots" / "conflict.jpg")
    (root / "train" / "dots" / "cut.jpg").write_bytes(damaged_files()["cut.jpg"][0])
    (root / "train" / "dots" / ".DS_Store").write_bytes(b"x")
    run, log = root.parent / "run", RunLog(quiet=True)
    config = replace(tiny_probe, metric="macro_f1", seed=3)
    return train(root, run, config, log=log), run, log


def test_every_metric_names_the_splits_that_selected_and_measured_it(
    tiny_run: Path, odd: tuple[RunReport, Path, RunLog]
) -> None:
    for run in (tiny_run, odd[1]):
        metrics = read_json(run / "metrics.json")
        for name in ("headline", "baseline", "test", "oof"):
            assert metrics[name]["chosen_on"].startswith("train+val"), name
            assert metrics[name]["measured_on"] == ("oof" if name == "oof" else "test"), name
            assert metrics[name]["n"] > 0, name
        chosen_on = {name: setting["chosen_on"] for name, setting in metrics["chosen"].items()}
        assert list(chosen_on) == ["C", "features", "imbalance", "temperature", "tau"]
        was_compared = "difference" in metrics["chosen"]["imbalance"]
        assert chosen_on.pop("imbalance") == ("train+val, out of fold" if was_compared else None)
        assert set(chosen_on.values()) == {"train+val, out of fold"}


def test_every_metric_has_its_n_and_interval(tiny_run: Path, odd: tuple[RunReport, Path, RunLog]) -> None:
    for run in (tiny_run, odd[1]):
        metrics = read_json(run / "metrics.json")
        blocks = [metrics[name] for name in ("test", "oof", "test_without_duplicates") if name in metrics]
        estimates = [block[name] for block in blocks for name in METRICS if block[name] is not None]
        estimates += [metrics["headline"], metrics["baseline"]["accuracy"]]
        for estimate in estimates:
            assert {"value", "low", "high", "n", "reliable", "method"} <= set(estimate)
            assert estimate["low"] <= estimate["value"] <= estimate["high"]
        assert all("low" not in block["ece"] for block in blocks)  # no interval on ECE


def test_headline_is_the_declared_metric(
    odd: tuple[RunReport, Path, RunLog],
) -> None:
    report, run, _ = odd
    metrics = read_json(run / "metrics.json")
    assert metrics["headline"]["metric"] == "macro_f1"
    assert metrics["headline"]["value"] == metrics["test"]["macro_f1"]["value"] == report.headline.value
    assert metrics == json.loads(json.dumps(report.to_json()))


def test_headline_is_out_of_fold_without_a_test_split(
    tiny_probe: TrainConfig, drawn_images: Path, tmp_path: Path
) -> None:
    config = replace(tiny_probe, test_frac=0)
    report = train(drawn_images, tmp_path / "run", config, log=RunLog(quiet=True))
    metrics = read_json(tmp_path / "run" / "metrics.json")
    assert report.measured_on == metrics["headline"]["measured_on"] == "oof"
    assert metrics["headline"]["value"] == metrics["oof"]["accuracy"]["value"]
    assert metrics["headline"]["n"] == metrics["baseline"]["n"] == 48
    assert metrics["baseline"]["accuracy"]["value"] == 24 / 48
    assert "test" not in metrics
    assert not (tmp_path / "run" / "predictions.csv").exists()
    assert len(read_rows(tmp_path / "run" / "oof.csv")) == 48


def test_baseline_always_predicts_the_majority_class(
    tiny_run: Path, odd: tuple[RunReport, Path, RunLog]
) -> None:
    for run in (tiny_run, odd[1]):
        metrics = read_json(run / "metrics.json")
        counts: dict[str, int] = metrics["train_counts"]
        majority = max(counts, key=lambda name: counts[name])
        labels = [row["label"] for row in read_rows(run / "predictions.csv")]
        n_present = len(set(labels))
        assert metrics["baseline"]["class"] == majority == "bars"
        assert metrics["baseline"]["accuracy"]["value"] == labels.count("bars") / len(labels)
        assert metrics["baseline"]["balanced_accuracy"] == pytest.approx(1 / n_present)


def test_tables_reproduce_the_metrics_of_metrics_json(
    tiny_run: Path, odd: tuple[RunReport, Path, RunLog]
) -> None:
    for run in (tiny_run, odd[1]):
        metrics = read_json(run / "metrics.json")
        for table, block in (("predictions.csv", metrics["test"]), ("oof.csv", metrics["oof"])):
            scored = [row for row in read_rows(run / table) if row["prediction"]]
            right = [row["label"] == row["prediction"] for row in scored]
            assert block["n"] == len(scored)
            assert block["accuracy"]["value"] == pytest.approx(np.mean(right))


def test_novelty_threshold_has_measured_false_alarms_and_detections(
    tiny_run: Path, odd: tuple[RunReport, Path, RunLog]
) -> None:
    for run, unknown in ((tiny_run, set()), (odd[1], {"rings"})):
        found = read_json(run / "metrics.json")["novelty"]
        rows = read_rows(run / "predictions.csv")
        assert (found["threshold"], found["measured_on"]) == (0.95, "test")
        for name, kept in (
            ("false_alarm_rate", [row for row in rows if row["label"] not in unknown]),
            ("detection_rate", [row for row in rows if row["label"] in unknown]),
        ):
            if not kept:
                assert found[name] is None
                continue
            above = [float(row["novelty"]) > 0.95 for row in kept]
            assert found[name]["n"] == len(kept)
            assert found[name]["value"] == pytest.approx(np.mean(above))
            assert found[name]["low"] <= found[name]["value"] <= found[name]["high"]


def test_novelty_is_not_measured_without_a_test_split(
    drawn_images: Path, tiny_probe: TrainConfig, tmp_path: Path
) -> None:
    train(drawn_images, tmp_path / "run", tiny_probe, test_frac=0)
    found = read_json(tmp_path / "run/metrics.json")["novelty"]
    assert found["measured_on"] is found["false_alarm_rate"] is found["detection_rate"] is None


def test_split_json_lists_the_images_of_each_split(odd: tuple[RunReport, Path, RunLog]) -> None:
    run = odd[1]
    split = read_json(run / "split.json")
    assert list(split) == ["train", "val", "test", "removed", "dropped", "excluded"]
    assert split["removed"] == ["train/bars/copy.jpg"]
    assert {path.split("/")[0] for path in split["train"]} == {"train"}
    assert {path.split("/")[0] for path in split["test"]} == {"test"}
    assert (len(split["train"]), len(split["val"]), len(split["test"])) == (18 + 10 + 1, 0, 12)
    assert [row["path"] for row in read_rows(run / "predictions.csv")] == split["test"]
    # the class of a single image is never held out
    held_out = [path for path in split["train"] if not path.startswith("train/single/")]
    assert [row["path"] for row in read_rows(run / "oof.csv")] == held_out


def test_duplicates_of_test_images_are_removed_and_counted(
    odd: tuple[RunReport, Path, RunLog],
) -> None:
    metrics = read_json(odd[1] / "metrics.json")
    assert metrics["data"]["removed_from_training"] == ["train/bars/copy.jpg"]
    assert metrics["test"]["n"] == 12
    assert metrics["test_without_duplicates"]["n"] == 11
    members = {frozenset(member["path"] for member in found) for found in metrics["data"]["duplicates"]}
    assert frozenset({"test/bars/000.jpg", "train/bars/copy.jpg"}) in members


def test_data_problems_are_recorded_by_file(
    odd: tuple[RunReport, Path, RunLog],
) -> None:
    data = read_json(odd[1] / "metrics.json")["data"]
    assert [(bad["path"], bad["status"]) for bad in data["unreadable"]] == [
        ("train/dots/cut.jpg", "unreadable")
    ]
    assert [{member["path"] for member in found} for found in data["conflicts"]] == [
        {"train/bars/002.jpg", "train/dots/conflict.jpg"}
    ]
    assert sum(data["skipped"].values()) == 1


def test_notes_are_recorded(odd: tuple[RunReport, Path, RunLog]) -> None:
    report, run, log = odd
    notes = read_json(run / "metrics.json")["notes"]
    assert notes == list(report.notes) == log.notes
    for text in (
        "skipped 1 unreadable image: train/dots/cut.jpg",
        "1 training image removed as duplicates of test images: train/bars/copy.jpg",
        "1 group of duplicates with different labels",
        "one training image, never held out: single",
        "rings; accuracy cannot exceed 75.0",
    ):
        assert [note for note in notes if text in note], text


def test_unknown_test_classes_count_as_errors(odd: tuple[RunReport, Path, RunLog]) -> None:
    metrics = read_json(odd[1] / "metrics.json")
    assert metrics["test"]["known_only"]["n"] == 9
    rings = next(scores for scores in metrics["test"]["per_class"] if scores["class"] == "rings")
    assert rings["n"] == 3
    assert rings["recall"]["value"] == 0


def test_single_image_of_a_class_is_trained_on_and_never_held_out(
    odd: tuple[RunReport, Path, RunLog],
) -> None:
    metrics = read_json(odd[1] / "metrics.json")
    rows = read_rows(odd[1] / "oof.csv")
    assert metrics["train_counts"] == {"bars": 18, "dots": 10, "single": 1}
    assert "train/single/0.png" not in [row["path"] for row in rows]
    assert metrics["oof"]["n"] == len(rows)
    assert {row["fold"] for row in rows} == set("01234")


def test_config_json_holds_the_settings(odd: tuple[RunReport, Path, RunLog]) -> None:
    stored = read_json(odd[1] / "config.json")
    assert stored["pixelplay"] == "train"
    assert (stored["metric"], stored["seed"], stored["backbone"]) == ("macro_f1", 3, TINY)


def test_two_images_per_class_make_records_without_nan(tiny_probe: TrainConfig, tmp_path: Path) -> None:
    draw_folder(tmp_path / "photos", {"bars": 2, "dots": 3})
    train(tmp_path / "photos", tmp_path / "run", tiny_probe, log=RunLog(quiet=True))
    metrics = read_json(tmp_path / "run" / "metrics.json")
    assert not metrics["oof"]["macro_f1"]["reliable"]
    assert not [x for x in numbers_in(metrics) if not np.isfinite(x)]


def numbers_in(value: object) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from numbers_in(item)
    elif isinstance(value, int | float):
        yield float(value)


def test_same_seed_gives_the_same_records(
    tiny_run: Path, tiny_probe: TrainConfig, drawn_images: Path, tmp_path: Path
) -> None:
    train(drawn_images, tmp_path / "run", tiny_probe, log=RunLog(quiet=True))
    for path in sorted(tiny_run.rglob("*")):
        if path.is_file() and path.name != "environment.json":  # has the time
            again = tmp_path / "run" / path.relative_to(tiny_run)
            assert again.read_bytes() == path.read_bytes(), path.name
