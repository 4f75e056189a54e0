"""Text for the terminal: short summaries that lead with the headline."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import pixelplay
from conftest import TINY_COUNTS, draw_folder
from pixelplay.config import TrainConfig
from pixelplay.dataset_scan import scan
from pixelplay.outputs.console import (
    MAX_LABEL_ISSUES,
    format_evaluation_report,
    format_label_issues,
    format_run_report,
    format_scan,
    scan_to_json,
)
from pixelplay.outputs.label_issues import LabelIssue, LabelIssueReport


@pytest.fixture(scope="module")
def split_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only: images with predefined splits, of which a test image has a duplicate in training."""
    root = tmp_path_factory.mktemp("console") / "photos"
    draw_folder(root / "train", TINY_COUNTS)
    draw_folder(root / "test", {"bars": 5, "dots": 5, "rings": 5}, first_seed=700)
    shutil.copy(root / "train/bars/002.jpg", root / "test/bars/copy.jpg")
    return root


@pytest.fixture(scope="module")
def other_run(drawn_images: Path, tiny_probe: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only: a run that was trained on two of the three classes."""
    root = tmp_path_factory.mktemp("other")
    for name in ("bars", "dots"):
        shutil.copytree(drawn_images / name, root / "photos" / name)
    pixelplay.train(root / "photos", root / "run", tiny_probe)
    return root / "run"


def section(text: str, title: str) -> list[str]:
    """The items of a section: the text after its title and in the indented lines below."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"{title} "))
    items = [lines[start][len(title) :].strip()]
    for line in lines[start + 1 :]:
        if not line.startswith("     "):
            break
        items.append(line.strip())
    return items


def test_train_summary_leads_with_the_headline_and_fits_on_a_screen(
    split_images: Path, tiny_probe: TrainConfig, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    report = pixelplay.train(split_images, run, tiny_probe)
    text = format_run_report(report, report_path=f"{run}/report.html")
    lines = text.splitlines()
    assert len(lines) <= 24
    assert re.match(r"Test split \(16 images\) +value +95 % CI +majority class 'bars'$", lines[0])
    headline = report.headline
    baseline = report.baseline["accuracy"]["value"]
    values = rf"{headline.value:.3f} +{headline.low:.3f}–{headline.high:.3f}"
    assert re.match(rf"  accuracy \(selection metric\) +{values} .*{baseline:.3f}$", lines[1])
    assert [line.split("  ")[1] for line in lines[2:4]] == ["balanced accuracy", "macro F1"]
    n_trained = sum(TINY_COUNTS.values()) - 1
    assert section(text, "Model")[0] == f"linear probe, trained on {n_trained} images"
    assert section(text, "Model")[1].startswith(
        f"out of fold: accuracy {report.held_out.accuracy.value:.3f} ("
    )
    (warning,) = [line for line in section(text, "Warnings") if "duplicates" in line]
    assert warning.startswith("duplicates of 1 test image removed from training; ")
    assert warning.endswith(" on 15 images")
    assert section(text, "Report") == [f"{run}/report.html"]
    assert section(text, "Next")[0] == f"pixelplay predict {run} NEW_IMAGES --out predictions.csv"
    assert "precision" not in text
    assert re.search(r"class +trained +n +recall .*\nbars +23 +6 ", format_run_report(report, verbose=True))


def test_train_summary_without_a_test_split_warns_of_optimistic_metrics(
    drawn_images: Path, tiny_probe: TrainConfig, tmp_path: Path
) -> None:
    config = replace(tiny_probe, test_frac=0.0, metric="macro_f1")
    text = format_run_report(pixelplay.train(drawn_images, tmp_path / "run", config))
    assert text.startswith("Out of fold (48 images) ")
    assert "\n  macro F1 (selection metric) " in text
    assert section(text, "Warnings")[0].startswith("no test split; ")


def test_crossval_summary_shows_folds_and_deployed_model(
    split_images: Path, tiny_probe: TrainConfig, tmp_path: Path
) -> None:
    config = replace(tiny_probe, n_folds=3)
    report = pixelplay.cross_validate(split_images, tmp_path / "run", config, repeats=2)
    text = format_run_report(report)
    assert text.startswith("3-fold cross-validation, repeated 2 times (47 images) ")
    assert report.by_fold is not None
    low, high = min(report.by_fold.values), max(report.by_fold.values)
    assert section(text, "Folds") == [
        "6 × linear probe",
        f"accuracy {low:.3f}–{high:.3f} (sd {report.by_fold.sd:.3f})",
    ]
    assert section(text, "Deployed")[0] == "mean of the 6 fold models"
    assert section(text, "Deployed")[1].startswith("test split: accuracy ")
    assert any(line.startswith("duplicates of 1 test image ") for line in section(text, "Warnings"))


def test_evaluation_names_the_weakest_classes_with_counts_and_confusion(
    drawn_images: Path, other_run: Path
) -> None:
    report = pixelplay.evaluate(other_run, drawn_images)
    text = format_evaluation_report(report)
    assert re.match(r"All images \(48 images\) +value +95 % CI +known classes only +95 % CI", text)
    rings = report.evaluation.confusion[report.evaluation.classes.index("rings")]
    other = report.evaluation.classes[rings.argmax()]
    weakest = section(text, "Weakest classes")
    assert weakest[0] == f"rings: recall 0.00 (0/9), confused with {other}"
    assert len(weakest) <= 3
    assert any("ignore unknown classes" in line for line in section(text, "Warnings"))
    assert "Confusion matrix" not in text
    verbose = format_evaluation_report(report, verbose=True)
    assert re.search(r"\nclass +n +recall +95 % CI +precision +F1\nbars +24 ", verbose)
    assert re.search(r"Confusion matrix.*\n +bars +dots +rings\n", verbose)


def test_no_confusion_is_named_where_the_first_repeat_has_none(drawn_images: Path, other_run: Path) -> None:
    report = pixelplay.evaluate(other_run, drawn_images)
    confusion = np.diag(report.evaluation.confusion.sum(axis=1))
    evaluation = replace(report.evaluation, confusion=confusion)
    text = format_evaluation_report(replace(report, evaluation=evaluation))
    assert section(text, "Weakest classes")[0] == "rings: recall 0.00 (9/9)"


def test_evaluation_of_training_images_warns_of_optimistic_metrics(
    drawn_images: Path, tiny_run: Path
) -> None:
    report = pixelplay.evaluate(tiny_run, drawn_images)
    text = format_evaluation_report(report)
    assert " not trained on  " in text.splitlines()[0]
    assert f"{report.n_trained_on} of 48 images were trained on" in section(text, "Warnings")[0]
    text = format_evaluation_report(pixelplay.evaluate(tiny_run, drawn_images, against=tiny_run))
    assert f"Comparison ({48 - report.n_trained_on} images unseen by both)" in text


def test_evaluation_against_another_run_shows_difference_and_mcnemar_p(
    tiny_run: Path, other_run: Path, tmp_path: Path
) -> None:
    images = draw_folder(tmp_path / "photos", {"bars": 12, "dots": 12, "rings": 12}, first_seed=600)
    report = pixelplay.evaluate(tiny_run, images, against=other_run)
    assert report.against is not None
    paired = report.against.fairest
    text = format_evaluation_report(report)
    assert "\nComparison (36 images) " in text
    row = next(line for line in text.splitlines() if line.startswith("  accuracy (selection metric) "))
    difference, (first, second) = paired.differences["accuracy"], paired.values["accuracy"]
    assert f" {first:.3f}  {second:.3f}  " in re.sub(" {2,}", "  ", row)
    assert f"{difference.value:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})" in row
    assert row.endswith(f"{tiny_run} is better (McNemar p = {paired.p_value:.2g})")
    swapped = format_evaluation_report(pixelplay.evaluate(other_run, images, against=tiny_run))
    assert f"{tiny_run} is better (McNemar" in swapped
    (line,) = [line for line in swapped.splitlines() if line.startswith("  log loss (lower is better)")]
    assert line.endswith(f"{tiny_run} is better") or line.endswith("not significant")
    same = format_evaluation_report(pixelplay.evaluate(tiny_run, images, against=tiny_run))
    assert same.count("not significant") == 4
    assert "not significant (McNemar p = 1)" in same
    assert f"only {tiny_run} is right on 0 images" in section(same, "Disagreements")[0]


def test_evaluation_threshold_excludes_images_that_were_trained_on(
    drawn_images: Path, other_run: Path, tmp_path: Path
) -> None:
    images = draw_folder(tmp_path / "photos", {"bars": 6, "dots": 6}, first_seed=400)
    apart = pixelplay.evaluate(other_run, images, at_precision=0.5)
    (line,) = section(format_evaluation_report(apart), "Threshold")
    assert line.endswith("(threshold chosen on these images)")
    for name in ("bars", "dots"):
        shutil.copy(drawn_images / name / "000.jpg", images / name / "seen0.jpg")
        shutil.copy(drawn_images / name / "001.png", images / name / "seen1.png")
    mixed = pixelplay.evaluate(other_run, images, at_precision=0.5)
    (line,) = section(format_evaluation_report(mixed), "Threshold")
    assert line.endswith("(threshold chosen on these images, excluding those trained on)")
    assert mixed.unseen is not None
    point = mixed.unseen.operating_point
    assert point is not None
    assert line.startswith(f"'dots' at probability ≥ {point.threshold:.4f}: precision ")
    assert f"recall {point.recall.value:.3f} ({point.recall.low:.3f}–" in line


def test_label_issues_summary_shows_the_first_and_counts_the_rest() -> None:
    issues = [
        LabelIssue(
            path=f"{i}.jpg", split="val", label="cat", suggested="dog", score=0.01,
            prob_label=0.01, prob_suggested=0.99, reason="",
        )
        for i in range(MAX_LABEL_ISSUES + 5)
    ]  # fmt: skip
    report = LabelIssueReport(run_dir="run", label_issues=tuple(issues), n_checked={"val": 80, "test": 20})
    text = format_label_issues(report)
    assert text.startswith("25 of 100 held-out images have a label that looks wrong (25.0 %): ")
    assert "validation split 80, test split 20\n" in text
    assert "pixelplay crossval checks all images" in text
    assert re.search(r"\n19\.jpg +val +cat +0\.01 +dog +0\.99\n… 5 more\n", text)
    assert re.search(r"\npath +split +label +prob_label +suggested +prob_suggested\n", text)
    assert "run/label_issues.csv\n" in text
    assert text.endswith("pixelplay label-issues run --relabel CORRECTIONS --out corrected.csv")


def test_scan_shows_classes_by_split_and_at_most_three_examples(split_images: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(split_images, tmp_path / "photos"))
    for i in range(5):
        (root / f"train/bars/broken{i}.jpg").write_bytes(b"")
    shutil.copy(root / "train/dots/000.jpg", root / "train/bars/doubt.jpg")
    dataset, audit = scan(root)
    text = format_scan(dataset, audit)
    assert text.startswith(f"{root}: 70 images, 3 classes, predefined splits (train 54 · test 16)\n")
    assert "\nclass  train  test\nbars      30     6\n" in text
    assert re.search(r"\nimbalance 2\.6 : 1 · JPEG \d+, PNG \d+ · 80×64 px\n", text)
    assert "  unreadable images: 5\n     train/bars/broken0.jpg: empty file\n" in text
    assert "broken2.jpg: empty file\n     … 2 more (--json lists all)\n" in text
    assert "  sets of exact duplicates: 2\n" in text
    assert "different labels: 1\n     train/bars/doubt.jpg (bars) = train/dots/000.jpg (dots)\n" in text
    assert "across splits: 1\n     test/bars/copy.jpg = train/bars/002.jpg\n" in text
    assert text.endswith("add --near-duplicates.")
    assert "near-duplicates" not in format_scan(dataset, audit, near_duplicates=True).lower()


def test_scan_json_counts_predefined_splits(split_images: Path) -> None:
    found = scan_to_json(*scan(split_images))
    assert found["splits"] == {"train": 48, "test": 16}
    assert "parts" not in found
    assert {image["split"] for image in found["leaks"][0]} == {"train", "test"}
    assert {"near_duplicates", "duplicates", "conflicts", "leaks"} <= set(found)


def test_scan_names_expected_classes_without_enough_images(drawn_images: Path, tmp_path: Path) -> None:
    expected = tmp_path / "expected.csv"
    expected.write_text("class,count\nbars,30\ndots,20\nrings,10\nspirals,40\n")
    text = format_scan(*scan(drawn_images, classes=str(expected)))
    assert "\nclass  images\nbars       24\n" in text
    assert "expected classes without images (1): spirals; accuracy cannot exceed 60.0 %\n" in text
    assert "with fewer than 10 images (1): rings (9); they are 10.0 % of the test images\n" in text


def test_scan_without_problems_says_so(drawn_images: Path) -> None:
    assert format_scan(*scan(drawn_images), near_duplicates=True).endswith("\n\nNo problems found.")
