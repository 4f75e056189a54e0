"""Export of corrected labels: training on the table equals training with --relabel."""

import csv
import json
import shutil
from pathlib import Path

import pytest

import pixelplay
from conftest import draw_folder
from pixelplay.cli.main import main
from pixelplay.config import DataConfig, TrainConfig
from pixelplay.data.relabel import read_corrected_labels
from pixelplay.data.sources import open_dataset
from pixelplay.errors import BundleError, ConfigError, DataError
from tables import read_json, read_rows

COUNTS = {"bars": 14, "dots": 12, "rings": 8}


def write(path: Path, *rows: tuple[str, ...]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


@pytest.fixture(scope="module")
def run(tiny_probe: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only: a run on ROOT/photos, and ROOT/corrections.csv."""
    root = tmp_path_factory.mktemp("corrected")
    draw_folder(root / "photos", COUNTS)
    rows = [("bars/000.jpg", "dots"), ("dots/001.png", ""), ("rings/000.jpg", "rings")]
    write(root / "corrections.csv", ("path", "label"), *rows)
    pixelplay.train(root / "photos", root / "run", tiny_probe, test_frac=0)
    return root / "run"


def labels_by_file(source: Path, root: Path) -> dict[str, str]:
    dataset = open_dataset(str(source))
    return {
        str((root / path).resolve()): dataset.classes[k]
        for path, k in zip(dataset.paths, dataset.labels, strict=True)
    }


@pytest.mark.parametrize("name", ["corrected.csv", "photos/corrected.parquet", "elsewhere/corrected.csv"])
def test_training_on_the_corrected_table_equals_training_with_relabel(
    name: str, run: Path, tiny_settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(shutil.copytree(run.parent, tmp_path / "root"))
    config = read_json(root / "run/config.json")
    (root / "run/config.json").write_text(json.dumps({**config, "source": str(root / "photos")}))
    (tmp_path / "elsewhere").mkdir()
    table = (tmp_path if name.startswith("elsewhere") else root) / name
    relabel = ["--relabel", str(root / "corrections.csv")]
    assert main(["label-issues", str(root / "run"), *relabel, "--out", str(table)]) == 0
    assert capsys.readouterr().out == f"33 images → {table} (1 label changed, 1 image left out)\n"

    dataset = open_dataset(str(root / "photos"))
    corrected = read_corrected_labels(str(root / "corrections.csv"), dataset).labels
    expected = {
        str((root / "photos" / path).resolve()): dataset.classes[k]
        for path, k in zip(dataset.paths, corrected, strict=True)
        if k >= 0
    }
    assert labels_by_file(table, table.parent) == expected

    options = ["--finetune", "none", "--test-frac", "0", "--quiet", *tiny_settings]
    assert main(["train", str(root / "photos"), "--out", str(tmp_path / "a"), *relabel, *options]) == 0
    assert main(["train", str(table), "--out", str(tmp_path / "b"), *options]) == 0
    first, second = (read_json(tmp_path / each / "metrics.json")["train_counts"] for each in "ab")
    assert first == second == {"bars": 13, "dots": 12, "rings": 8}


def test_paths_are_relative_only_below_the_table(run: Path, tmp_path: Path) -> None:
    relabel = run.parent / "corrections.csv"
    outside = pixelplay.export_corrected(run, tmp_path / "t.csv", relabel).path
    inside = pixelplay.export_corrected(run, run.parent / "t.csv", relabel, force=True).path
    assert read_rows(Path(outside))[0]["path"] == str(run.parent / "photos/bars/000.jpg")
    assert read_rows(Path(inside))[0] == {"path": "photos/bars/000.jpg", "label": "dots"}


def test_corrections_of_the_run_are_exported_without_relabel(
    run: Path, tiny_probe: TrainConfig, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"run was trained without corrections; .*--relabel"):
        pixelplay.export_corrected(run, tmp_path / "t.csv")
    corrections, photos = run.parent / "corrections.csv", run.parent / "photos"
    pixelplay.train(photos, tmp_path / "again", tiny_probe, test_frac=0, relabel=str(corrections))
    first = pixelplay.export_corrected(tmp_path / "again", tmp_path / "t.csv")
    assert (first.n, first.n_changed, first.n_excluded) == (33, 1, 1)
    later = write(
        tmp_path / "later.csv", ("path", "label"), ("bars/000.jpg", "bars"), ("bars/002.jpg", "rings")
    )
    second = pixelplay.export_corrected(tmp_path / "again", tmp_path / "t.csv", later, force=True)
    assert (second.n, second.n_changed, second.n_excluded) == (33, 1, 1)  # later corrections win
    found = labels_by_file(tmp_path / "t.csv", tmp_path)
    assert found[str((photos / "bars/000.jpg").resolve())] == "bars"
    assert found[str((photos / "bars/002.jpg").resolve())] == "rings"


def test_splits_and_groups_of_the_data_are_kept_and_test_labels_unchanged(
    tiny_probe: TrainConfig, tmp_path: Path
) -> None:
    paths = [
        path.relative_to(tmp_path) for path in sorted(draw_folder(tmp_path / "photos", COUNTS).rglob("*.*"))
    ]
    rows = [
        (path.as_posix(), path.parent.name, ("train", "test", "")[i % 3], f"=camera {i // 2}")
        for i, path in enumerate(paths)
    ]
    table = write(tmp_path / "data.csv", ("path", "label", "split", "camera"), *rows)
    config = DataConfig(split_column="split", group_column="camera")
    pixelplay.train(table, tmp_path / "run", tiny_probe, reading=config, near_duplicates=False)
    fixes = write(tmp_path / "fixes.csv", ("path", "label"), (rows[0][0], "dots"), (rows[1][0], "dots"))
    found = pixelplay.export_corrected(tmp_path / "run", tmp_path / "corrected.csv", fixes)
    assert (found.n, found.n_changed, found.n_test) == (len(rows), 1, 1)
    assert "1 correction of test images not applied" in found.summary()
    before, after = open_dataset(str(table), config), open_dataset(str(tmp_path / "corrected.csv"))
    assert after.paths == before.paths
    assert (after.splits == before.splits).all()
    assert after.groups is not None
    assert before.groups is not None
    assert (after.groups == before.groups).all()
    assert after.labels[1] == before.labels[1]


def test_nothing_is_overwritten_without_force(run: Path, tmp_path: Path) -> None:
    relabel, out = run.parent / "corrections.csv", tmp_path / "t.csv"
    out.write_text("mine")
    with pytest.raises(ConfigError, match=r"already exists.*--force"):
        pixelplay.export_corrected(run, out, relabel)
    assert out.read_text() == "mine"
    pixelplay.export_corrected(run, out, relabel, force=True)
    assert {path.name for path in tmp_path.iterdir()} == {"t.csv"}
    with pytest.raises(ConfigError, match=r"must end in \.csv or \.parquet"):
        pixelplay.export_corrected(run, tmp_path / "t.txt", relabel)


def test_class_names_that_would_not_be_read_back_are_refused(tiny_probe: TrainConfig, tmp_path: Path) -> None:
    fixes = write(tmp_path / "fixes.csv", ("path", "label"), ("bars/000.jpg", "bars"))
    for name, problem in (("NA", r"class 'NA' would be read .* as None"), ("=dots", r"or write \.parquet")):
        photos = draw_folder(tmp_path / f"photos of {name}", {"bars": 8, "dots": 8})
        (photos / "dots").rename(photos / name)
        pixelplay.train(photos, tmp_path / "run", tiny_probe, test_frac=0, force=True)
        with pytest.raises(DataError, match=problem):
            pixelplay.export_corrected(tmp_path / "run", tmp_path / "t.csv", fixes)
        assert not (tmp_path / "t.csv").exists()
    pixelplay.export_corrected(tmp_path / "run", tmp_path / "t.parquet", fixes)
    assert "=dots" in open_dataset(str(tmp_path / "t.parquet")).classes


def test_runs_without_their_images_are_errors(run: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"has no config\.json"):
        pixelplay.export_corrected(tmp_path, tmp_path / "t.csv")
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    config = read_json(copy / "config.json")
    (copy / "config.json").write_text(json.dumps({**config, "source": str(tmp_path / "gone")}))
    relabel = run.parent / "corrections.csv"
    with pytest.raises(DataError, match=r"no longer in .*gone; use --data"):
        pixelplay.export_corrected(copy, tmp_path / "t.csv", relabel)
    assert pixelplay.export_corrected(copy, tmp_path / "t.csv", relabel, run.parent / "photos").n == 33
    (copy / "metrics.json").write_text("{")
    with pytest.raises(BundleError, match="missing or damaged"):
        pixelplay.export_corrected(copy, tmp_path / "u.csv", relabel)


def test_options_of_the_table_need_out(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["label-issues", str(run), "--relabel", "corrections.csv"]) == 1
    assert capsys.readouterr().err == "error: --relabel has no effect without --out\n"


def test_archives_are_refused(run: Path, tiny_probe: TrainConfig, tmp_path: Path) -> None:
    archive = shutil.make_archive(str(tmp_path / "photos"), "zip", run.parent / "photos")
    with pytest.raises(DataError, match=r"photos\.zip; unpack it"):
        pixelplay.export_corrected(run, tmp_path / "t.csv", run.parent / "corrections.csv", archive)
