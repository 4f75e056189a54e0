"""`pixelplay explain` as a user types it."""

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
from pixelplay.outputs.contact import CELL_PX, GAP_PX, LINE_PX, NO_PICTURE, PER_SHEET, ContactSheets
from pixelplay.outputs.explanations import file_stem
from pixelplay.outputs.overlay import color
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


def write_photograph(path: Path, seed: int = 1, size: tuple[int, int] = (80, 64)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(draw_of_class("dots", seed, size), "PNG"))
    return path


def test_a_folder_gets_overlays_maps_a_table_and_a_contact_sheet(run: Run, tiny_run: Path) -> None:
    for i in range(3):
        write_photograph(Path(f"new/{i}.png"), i)
    status, out, err = run("explain", tiny_run, "new", "--out", "cams")
    assert (status, out) == (0, "wrote cams/explanations.csv\n")
    assert "explaining: 3 images in" in err
    rows = read_rows(Path("cams") / "explanations.csv")
    assert [row["path"] for row in rows] == ["new/0.png", "new/1.png", "new/2.png"]
    header = "path,status,error,label,probability,explained,explained_probability,overlay,map"
    assert list(rows[0]) == header.split(",")
    for i, row in enumerate(rows):
        assert row["status"] == "ok"
        assert row["explained"] == row["label"]
        assert row["overlay"] == f"{i + 1:04}_{i}_{row['label']}.overlay.png"
        heat = np.load(Path("cams") / row["map"], allow_pickle=False)
        assert (heat.shape, heat.dtype) == ((64, 80), np.float32)
        with Image.open(Path("cams") / row["overlay"]) as image:
            assert (image.size, image.mode) == ((80, 64), "RGB")
    named = {row[column] for row in rows for column in ("overlay", "map")}
    assert {p.name for p in Path("cams").iterdir()} == named | {"explanations.csv", "contact.png"}
    assert not Path("cams.partial").exists()


def test_pillows_warnings_do_not_reach_the_user(run: Run, tiny_run: Path) -> None:
    Path("noisy.png").write_bytes(noisy_png())  # pytest makes errors of warnings
    status, _, err = run("explain", tiny_run, "noisy.png", "--out", "cams", "--quiet")
    assert (status, err) == (0, "")


def test_the_named_class_is_explained(run: Run, tiny_run: Path) -> None:
    write_photograph(Path("a.png"))
    assert (
        run("explain", tiny_run, "a.png", "--out", "cams", "--class", "rings", "--method", "gradcam")[0] == 0
    )
    (row,) = read_rows(Path("cams") / "explanations.csv")
    assert row["explained"] == "rings"
    assert row["overlay"] == "0001_a_rings.overlay.png"
    assert 0 <= float(row["explained_probability"]) <= float(row["probability"]) <= 1


def test_runs_that_answer_together_are_explained_together(
    run: Run, tiny_run: Path, drawn_images: Path, tiny_settings: list[str]
) -> None:
    photo = write_photograph(Path("a.png"))
    settings = ["--finetune", "none", "--seed", "5", *tiny_settings, "--quiet"]
    assert run("train", drawn_images, "--out", "other", *settings)[0] == 0
    both = ["--ensemble-with", "other", "--quiet"]
    assert run("predict", tiny_run, photo, "--out", "p.csv", *both, "--precision", "fp32")[0] == 0
    (answer,) = read_rows("p.csv")
    assert run("explain", tiny_run, photo, "--out", "cams", *both)[0] == 0
    (row,) = read_rows(Path("cams") / "explanations.csv")
    assert row["label"] == row["explained"] == answer["label"]
    assert float(row["probability"]) == pytest.approx(float(answer["probability"]), abs=0.02)

    for name in ("bars", "dots"):
        shutil.copytree(drawn_images / name, f"two/{name}")
    assert run("train", "two", "--out", "fewer", *settings)[0] == 0
    status, out, err = run("explain", tiny_run, photo, "--out", "none", "--ensemble-with", "fewer")
    assert (status, out, Path("none").exists()) == (1, "", False)
    assert f"{tiny_run} and fewer cannot answer together, for only one of them knows rings" in err


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_photographs_are_upright_and_keep_their_proportions(
    run: Run, tiny_run: Path, orientation: int
) -> None:
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


def test_an_unreadable_photograph_is_a_row_and_the_others_go_on(run: Run, tiny_run: Path) -> None:
    write_photograph(Path("good.png"))
    Path("bad.png").write_bytes(b"Dear Sir")
    status, _, err = run("explain", tiny_run, "bad.png", "good.png", "gone.png", "--out", "cams")
    assert status == 0
    assert "2 of 3 images could not be read; their rows say why" in err
    rows = read_rows(Path("cams") / "explanations.csv")
    assert [row["status"] for row in rows] == ["unreadable", "ok", "missing"]
    assert rows[0]["error"] == "not an image"
    assert rows[0]["overlay"] == rows[0]["label"] == ""
    assert rows[1]["overlay"].startswith("0002_good_")


def test_where_none_can_be_read_one_line_says_so(run: Run, tiny_run: Path) -> None:
    Path("bad.png").write_bytes(b"Dear Sir")
    status, _, err = run("explain", tiny_run, "bad.png", "--out", "cams", "--quiet")
    assert (status, err) == (
        1,
        "error: none of the 1 images can be read; last: bad.png: not an image\n",
    )
    assert not Path("cams").exists()
    assert not Path("cams.partial").exists()


def test_an_unknown_class_is_one_line_with_the_nearest_names(run: Run, tiny_run: Path) -> None:
    write_photograph(Path("a.png"))
    status, _, err = run("explain", tiny_run, "a.png", "--out", "cams", "--class", "ring")
    assert status == 1
    assert err == (
        "error: class 'ring' is unknown; did you mean 'rings'? the model knows bars, dots, rings\n"
    )
    assert not Path("cams").exists()


def test_nothing_is_overwritten_without_force(run: Run, tiny_run: Path) -> None:
    write_photograph(Path("a.png"))
    write_photograph(Path("b.png"))
    assert run("explain", tiny_run, "a.png", "b.png", "--out", "cams", "--quiet")[0] == 0
    before = {p.name: p.read_bytes() for p in Path("cams").iterdir()}
    status, _, err = run("explain", tiny_run, "a.png", "--out", "cams")
    assert status == 1
    assert err.endswith("cams exists; choose another --out, or replace it with --force\n")
    assert {p.name: p.read_bytes() for p in Path("cams").iterdir()} == before
    assert run("explain", tiny_run, "a.png", "--out", "cams", "--force", "--quiet")[0] == 0
    assert len(read_rows(Path("cams") / "explanations.csv")) == 1
    assert not list(Path("cams").glob("0002*"))
    assert {p.name for p in Path().iterdir()} == {"a.png", "b.png", "cams"}


def test_a_folder_with_other_files_is_never_replaced(run: Run, tiny_run: Path) -> None:
    write_photograph(Path("a.png"))
    assert run("explain", tiny_run, "a.png", "--out", "cams", "--quiet")[0] == 0
    Path("cams/mine.txt").write_text("mine")
    status, _, err = run("explain", tiny_run, "a.png", "--out", "cams", "--force")
    assert status == 1
    assert "cams exists and holds other things than explanations: it is never replaced" in err
    assert Path("cams/mine.txt").read_text() == "mine"


def test_an_interrupted_run_leaves_nothing(run: Run, tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_photograph(Path("a.png"))

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ContactSheets, "add", interrupt)
    assert run("explain", tiny_run, "a.png", "--out", "cams")[0] == 130
    assert {p.name for p in Path().iterdir()} == {"a.png"}


def test_no_images_is_a_usage_error(run: Run, tiny_run: Path) -> None:
    status, _, err = run("explain", tiny_run, "--out", "cams")
    assert (status, err.splitlines()[0]) == (
        2,
        "error: no IMAGES given; name folders, files, tables or zip archives, or - for a list on stdin",
    )
    with pytest.raises(pixelplay.DataError, match="no images named"):
        pixelplay.explain(tiny_run, [], "cams")


def test_hostile_names_become_safe_ones(run: Run, tiny_run: Path) -> None:
    names = ["=cmd|' /C calc'!A0.png", "a\nb.png", "x" * 200 + ".png", "日本語 写真.png", 'q"u.png', "-f.png"]
    for name in names:
        write_photograph(Path("new") / name)
    write_photograph(Path("new/one/same.png"))
    write_photograph(Path("new/two/same.png"))
    assert run("explain", tiny_run, "new", "--out", "cams", "--quiet")[0] == 0
    rows = read_rows(Path("cams") / "explanations.csv")
    assert {row["path"] for row in rows} == {f"new/{name}" for name in names} | {
        "new/one/same.png",
        "new/two/same.png",
    }
    files = [row["overlay"] for row in rows]
    assert len({name.casefold() for name in files}) == len(rows) == 8
    assert all((Path("cams") / name).is_file() and len(name.encode()) < 255 for name in files)


@pytest.mark.parametrize(
    ("path", "label", "expected"),
    [
        ("../../etc/passwd", "a/b", "0003_passwd_a_b"),
        ("..", "..", "0003____"),
        ("C:\\temp\\cat.JPG", "cat", "0003_cat_cat"),
        ('dog\'s "best"\n.png', "x\0y", "0003_dog_s_best__x_y"),
        ("\udcff.png", "\u202egnp", "0003____gnp"),
        ("y" * 300, "z" * 300, f"0003_{'y' * 40}_{'z' * 40}"),
        ("語" * 300, "語" * 300, f"0003_{'語' * 26}_{'語' * 26}"),
    ],
)
def test_file_names_are_safe_whatever_photographs_are_called(path: str, label: str, expected: str) -> None:
    found = file_stem(3, path, label)
    assert found == expected
    assert len(found.encode()) < 200


def test_many_photographs_fill_several_sheets(tmp_path: Path) -> None:
    sheets = ContactSheets(str(tmp_path))
    picture = np.zeros((150, 200, 3), np.uint8)
    for i in range(PER_SHEET + 1):
        sheets.add(picture, [f"folder/{'very ' * 30}long\n名 {i}.png", "dots 0.98"])
    sheets.close()
    sheets.close()
    assert {p.name for p in tmp_path.iterdir()} == {"contact.png", "contact_02.png"}
    with Image.open(tmp_path / "contact.png") as first, Image.open(tmp_path / "contact_02.png") as second:
        assert first.size[0] == 6 * 212 + 12
        assert second.size[0] == 2 * 212 + 12  # one picture; the legend needs two columns
        top = np.asarray(second)[: GAP_PX + LINE_PX]
    hottest, coldest = (np.round(color(np.float32([value]))) for value in (1, 0))
    columns = [int(np.flatnonzero((top == c).all(2).any(0))[0]) for c in (coldest, hottest)]
    assert columns[1] - columns[0] == pytest.approx(CELL_PX / 2, abs=8)  # the legend's bar, from cold to hot


def test_an_unreadable_photograph_has_its_place_on_the_sheet(run: Run, tiny_run: Path) -> None:
    write_photograph(Path("a.png"))
    Path("b.png").write_bytes(b"no image")
    assert run("explain", tiny_run, "a.png", "b.png", "--out", "cams", "--quiet")[0] == 0
    with Image.open("cams/contact.png") as sheet:
        right = np.asarray(sheet)[GAP_PX + LINE_PX + GAP_PX + CELL_PX // 2, -CELL_PX // 2]
    assert tuple(right) == NO_PICTURE


def test_a_list_of_files_comes_from_stdin(run: Run, tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_photograph(Path("a.png"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a.png\n")))
    assert run("explain", tiny_run, "-", "--out", "cams", "--quiet")[0] == 0
    assert [row["path"] for row in read_rows(Path("cams") / "explanations.csv")] == ["a.png"]


def test_what_a_kill_has_left_between_two_renames_comes_back(run: Run, tiny_run: Path) -> None:
    write_photograph(Path("a.png"))
    assert run("explain", tiny_run, "a.png", "--out", "cams", "--quiet")[0] == 0
    before = sorted(path.name for path in Path("cams").iterdir())
    Path("cams").rename("cams.partial-old")
    status, _, err = run("explain", tiny_run, "a.png", "--out", "cams", "--quiet")
    assert (status, "cams exists; choose another --out" in err) == (1, True)
    assert sorted(path.name for path in Path("cams").iterdir()) == before
    assert not Path("cams.partial-old").exists()
