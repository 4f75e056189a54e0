"""`pixelplay explain` on the command line."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import pixelplay
from conftest import draw_of_class
from images import encode, noisy_png
from pixelplay.cli.main import main
from pixelplay.inference.explain import Explainer
from tables import read_rows

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in an empty folder: status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*argv: object) -> tuple[int, str, str]:
        capfd.readouterr()
        status = main(list(map(str, argv)))
        return (status, *capfd.readouterr())

    return call


def write_image(path: Path, seed: int = 1, size: tuple[int, int] = (80, 64)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(draw_of_class("dots", seed, size), "PNG"))
    return path


def test_explain_writes_overlays_maps_and_a_table(run: Run, tiny_run: Path) -> None:
    for i in range(3):
        write_image(Path(f"new/{i}.png"), i)
    status, out, err = run("explain", tiny_run, "new", "--out", "cams")
    assert (status, out) == (0, "wrote cams/explanations.csv\n")
    assert "explaining: 3 images in" in err
    rows = read_rows(Path("cams") / "explanations.csv")
    assert [row["path"] for row in rows] == ["new/0.png", "new/1.png", "new/2.png"]
    header = "path,status,error,prediction,probability,explained,explained_probability,overlay,map"
    assert list(rows[0]) == header.split(",")
    for i, row in enumerate(rows):
        assert row["status"] == "ok"
        assert row["explained"] == row["prediction"]
        assert row["overlay"] == f"{i + 1:04}_{i}_{row['prediction']}.overlay.png"
        heat = np.load(Path("cams") / row["map"], allow_pickle=False)
        assert (heat.shape, heat.dtype) == ((64, 80), np.float32)
        with Image.open(Path("cams") / row["overlay"]) as image:
            assert (image.size, image.mode) == ((80, 64), "RGB")
    named = {row[column] for row in rows for column in ("overlay", "map")}
    assert {p.name for p in Path("cams").iterdir()} == named | {"explanations.csv"}
    assert not Path("cams.partial").exists()


def test_explain_hides_pillow_warnings(run: Run, tiny_run: Path) -> None:
    Path("noisy.png").write_bytes(noisy_png())  # pytest makes errors of warnings
    status, _, err = run("explain", tiny_run, "noisy.png", "--out", "cams", "--quiet")
    assert (status, err) == (0, "")


def test_explain_class_option(run: Run, tiny_run: Path) -> None:
    write_image(Path("a.png"))
    assert (
        run("explain", tiny_run, "a.png", "--out", "cams", "--class", "rings", "--method", "gradcam")[0] == 0
    )
    (row,) = read_rows(Path("cams") / "explanations.csv")
    assert row["explained"] == "rings"
    assert row["overlay"] == "0001_a_rings.overlay.png"
    assert 0 <= float(row["explained_probability"]) <= float(row["probability"]) <= 1


def test_explanations_have_the_probabilities_of_predict(run: Run, tiny_run: Path, drawn_images: Path) -> None:
    assert run("predict", tiny_run, drawn_images, "--out", "p.csv", "--quiet")[0] == 0
    assert run("explain", tiny_run, drawn_images, "--out", "cams", "--class", "rings", "--quiet")[0] == 0
    columns = {"path": "path", "prediction": "prediction", "probability": "probability"}
    columns["explained_probability"] = "prob_rings"
    explained, predicted = read_rows(Path("cams") / "explanations.csv"), read_rows("p.csv")
    assert [[row[a] for a in columns] for row in explained] == [
        [row[b] for b in columns.values()] for row in predicted
    ]


def test_explain_with_ensemble(
    run: Run, tiny_run: Path, drawn_images: Path, tiny_settings: list[str]
) -> None:
    photo = write_image(Path("a.png"))
    settings = ["--finetune", "none", "--seed", "5", *tiny_settings, "--quiet"]
    assert run("train", drawn_images, "--out", "other", *settings)[0] == 0
    both = ["--ensemble-with", "other", "--quiet"]
    assert run("predict", tiny_run, photo, "--out", "p.csv", *both)[0] == 0
    (predicted,) = read_rows("p.csv")
    assert run("explain", tiny_run, photo, "--out", "cams", *both)[0] == 0
    (row,) = read_rows(Path("cams") / "explanations.csv")
    assert row["prediction"] == row["explained"] == predicted["prediction"]
    assert row["probability"] == predicted["probability"]

    for name in ("bars", "dots"):
        shutil.copytree(drawn_images / name, f"two/{name}")
    assert run("train", "two", "--out", "fewer", *settings)[0] == 0
    status, out, err = run("explain", tiny_run, photo, "--out", "none", "--ensemble-with", "fewer")
    assert (status, out, Path("none").exists()) == (1, "", False)
    assert f"{tiny_run} and fewer cannot form an ensemble: only one of them knows rings" in err


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_overlays_are_upright_and_keep_proportions(run: Run, tiny_run: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    Path("a.jpg").write_bytes(encode(draw_of_class("dots", 1, (300, 200)), "JPEG", exif=exif))
    assert run("explain", tiny_run, "a.jpg", "--out", "cams", "--quiet")[0] == 0
    (row,) = read_rows(Path("cams") / "explanations.csv")
    size = (200, 300) if orientation == 6 else (300, 200)
    with Image.open(Path("cams") / row["overlay"]) as image:
        assert image.size == size
    shape = np.load(Path("cams") / row["map"]).shape
    assert shape == ((160, 107) if orientation == 6 else (107, 160))


def test_explain_continues_after_an_unreadable_image(run: Run, tiny_run: Path) -> None:
    write_image(Path("good.png"))
    Path("bad.png").write_bytes(b"Dear Sir")
    status, _, err = run("explain", tiny_run, "bad.png", "good.png", "gone.png", "--out", "cams")
    assert status == 0
    assert "could not read 2 of 3 images; see explanations.csv" in err
    rows = read_rows(Path("cams") / "explanations.csv")
    assert [row["status"] for row in rows] == ["unreadable", "ok", "missing"]
    assert rows[0]["error"] == "not an image"
    assert rows[0]["overlay"] == rows[0]["prediction"] == ""
    assert rows[1]["overlay"].startswith("0002_good_")


def test_explain_without_readable_images_is_one_line(run: Run, tiny_run: Path) -> None:
    Path("bad.png").write_bytes(b"Dear Sir")
    status, _, err = run("explain", tiny_run, "bad.png", "--out", "cams", "--quiet")
    assert (status, err) == (
        1,
        "error: could not read any of 1 image; last: bad.png: not an image\n",
    )
    assert not Path("cams").exists()
    assert not Path("cams.partial").exists()


def test_explain_unknown_class_is_one_line(run: Run, tiny_run: Path) -> None:
    write_image(Path("a.png"))
    status, _, err = run("explain", tiny_run, "a.png", "--out", "cams", "--class", "ring")
    assert status == 1
    assert err == ("error: unknown class 'ring'; did you mean 'rings'? the model knows bars, dots, rings\n")
    assert not Path("cams").exists()


def test_explain_overwrites_only_with_force(run: Run, tiny_run: Path) -> None:
    write_image(Path("a.png"))
    write_image(Path("b.png"))
    assert run("explain", tiny_run, "a.png", "b.png", "--out", "cams", "--quiet")[0] == 0
    before = {p.name: p.read_bytes() for p in Path("cams").iterdir()}
    status, _, err = run("explain", tiny_run, "a.png", "--out", "cams")
    assert status == 1
    assert err.endswith("cams already exists; choose another --out or use --force to replace it\n")
    assert {p.name: p.read_bytes() for p in Path("cams").iterdir()} == before
    assert run("explain", tiny_run, "a.png", "--out", "cams", "--force", "--quiet")[0] == 0
    assert len(read_rows(Path("cams") / "explanations.csv")) == 1
    assert not list(Path("cams").glob("0002*"))
    assert {p.name for p in Path().iterdir()} == {"a.png", "b.png", "cams"}


def test_explain_never_replaces_a_folder_with_other_files(run: Run, tiny_run: Path) -> None:
    write_image(Path("a.png"))
    assert run("explain", tiny_run, "a.png", "--out", "cams", "--quiet")[0] == 0
    Path("cams/mine.txt").write_text("mine")
    status, _, err = run("explain", tiny_run, "a.png", "--out", "cams", "--force")
    assert status == 1
    assert "cams exists and contains other files than explanations" in err
    assert Path("cams/mine.txt").read_text() == "mine"


def test_interrupted_explain_leaves_nothing(
    run: Run, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_image(Path("a.png"))

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Explainer, "explain", interrupt)
    assert run("explain", tiny_run, "a.png", "--out", "cams")[0] == 130
    assert {p.name for p in Path().iterdir()} == {"a.png"}


def test_explain_without_images_is_a_usage_error(run: Run, tiny_run: Path) -> None:
    status, _, err = run("explain", tiny_run, "--out", "cams")
    assert status == 2
    assert err.startswith("error: IMAGES... is missing: Folders, files, tables or zip archives")
    with pytest.raises(pixelplay.DataError, match="images"):
        pixelplay.explain(tiny_run, [], "cams")


def test_explain_makes_hostile_names_safe(run: Run, tiny_run: Path) -> None:
    names = ["=cmd|' /C calc'!A0.png", "a\nb.png", "x" * 200 + ".png", "日本語 写真.png", 'q"u.png', "-f.png"]
    for name in names:
        write_image(Path("new") / name)
    write_image(Path("new/one/same.png"))
    write_image(Path("new/two/same.png"))
    assert run("explain", tiny_run, "new", "--out", "cams", "--quiet")[0] == 0
    rows = read_rows(Path("cams") / "explanations.csv")
    assert {row["path"] for row in rows} == {f"new/{name}" for name in names} | {
        "new/one/same.png",
        "new/two/same.png",
    }
    files = [row["overlay"] for row in rows]
    assert len({name.casefold() for name in files}) == len(rows) == 8
    assert all((Path("cams") / name).is_file() and len(name.encode()) < 255 for name in files)


def test_explain_reads_a_list_from_stdin(run: Run, tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image(Path("a.png"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a.png\n")))
    assert run("explain", tiny_run, "-", "--out", "cams", "--quiet")[0] == 0
    assert [row["path"] for row in read_rows(Path("cams") / "explanations.csv")] == ["a.png"]


def test_explain_restores_a_folder_after_a_kill_between_renames(run: Run, tiny_run: Path) -> None:
    write_image(Path("a.png"))
    assert run("explain", tiny_run, "a.png", "--out", "cams", "--quiet")[0] == 0
    before = sorted(path.name for path in Path("cams").iterdir())
    Path("cams").rename("cams.partial-old")
    status, _, err = run("explain", tiny_run, "a.png", "--out", "cams", "--quiet")
    assert (status, "cams already exists; choose another --out" in err) == (1, True)
    assert sorted(path.name for path in Path("cams").iterdir()) == before
    assert not Path("cams.partial-old").exists()
