import csv
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from conftest import draw_of_class
from images import encode
from pixelplay.cli.main import main
from pixelplay.exporting import export as export_module
from pixelplay.exporting.difficult_images import draw_difficult_images
from pixelplay.exporting.export import export
from pixelplay.exporting.onnx_format import OnnxModel
from pixelplay.run_log import RunLog

# forbids what a consumer does not have, then runs a script with the remaining arguments
WITHOUT_PIXELPLAY = """
import runpy, sys
for name in ("torch", "pixelplay", "timm", "onnx"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def exported(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only: the tiny run as an ONNX file, with its companions."""
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    report = export(tiny_run, path, log=RunLog(quiet=True))
    assert report.parity.is_equal
    assert report.parity.n_real > 5
    assert report.parity.n_drawn == len(draw_difficult_images())
    return path


def change_head_bias(proto: Any) -> Any:
    """Add 20 to the logit of the first class."""
    (bias,) = [each for each in proto.graph.initializer if each.name.endswith("head.0.bias")]
    values = onnx.numpy_helper.to_array(bias).copy()
    values[0] += 20
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    return proto


def test_measured_parity_is_stored(exported: Path) -> None:
    parity = OnnxModel(str(exported)).metadata["parity"]
    assert parity["is_equal"]
    assert 0 < parity["max_probability_difference"] < 1e-4
    assert parity["engine"].startswith("onnxruntime ")


def test_export_with_another_weight_is_refused_and_leaves_no_file(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    convert: Callable[..., Any] = export_module.convert_to_onnx
    monkeypatch.setattr(export_module, "convert_to_onnx", lambda graph: change_head_bias(convert(graph)))
    assert main(["export", str(tiny_run), "--out", str(tmp_path / "model.onnx"), "--quiet"]) == 1
    message = capsys.readouterr().err
    assert "was not written: not the same predictions" in message
    assert message.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_check_passes_for_the_exported_file(
    exported: Path, tiny_run: Path, drawn_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", str(tiny_run), "--check", str(exported), "--data", str(drawn_images), "--json"]
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["n_real"], result["mismatches"], result["is_equal"]) == (48, [], True)


def test_check_fails_for_a_changed_file(
    exported: Path, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = tmp_path / "changed.onnx"
    onnx.save(change_head_bias(onnx.load(exported)), changed)
    assert main(["export", str(tiny_run), "--check", str(changed)]) == 1
    captured = capsys.readouterr()
    assert "not the same predictions" in captured.out
    assert captured.err.splitlines()[-1].startswith("error: ")


def test_missing_images_of_the_run_are_noted(
    exported: Path, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_run / "model", tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), "--check", str(exported)]) == 0
    captured = capsys.readouterr()
    assert "drawn images only" in captured.err
    assert "(0 real, " in captured.out


def test_existing_files_are_kept_without_force(
    exported: Path, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*names: str) -> None:
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        assert main(["export", str(tiny_run), "--out", str(tmp_path / "model.onnx")]) == 1
        message = capsys.readouterr().err
        assert all(name in message for name in (*names, "--force"))
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    (tmp_path / "model.onnx").write_text("mine")
    refuse("model.onnx")
    (tmp_path / "model.onnx").unlink()
    (tmp_path / "predict_onnx.py").write_text("print('mine')")
    refuse("predict_onnx.py")


def test_check_without_readable_images_fails(
    exported: Path, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    for data, reason in (("broken.png", "could not read any of 1 image"), ("gone", "does not exist")):
        command = ["export", str(tiny_run), "--check", str(exported), "--data", str(tmp_path / data)]
        assert main(command) == 1
        assert reason in capsys.readouterr().err


def test_metadata_of_other_tools_are_ignored(exported: Path, tmp_path: Path, drawn_images: Path) -> None:
    proto = onnx.load(exported)
    proto.metadata_props.add(key="onnx.infer", value="not JSON")
    onnx.save(proto, tmp_path / "model.onnx")
    assert OnnxModel(str(tmp_path / "model.onnx")).metadata["classes"] == ["bars", "dots", "rings"]
    shutil.copy(exported.parent / "predict_onnx.py", tmp_path)
    (row,) = run_consumer(tmp_path / "model.onnx", [str(drawn_images / "bars/000.jpg")])
    assert row["prediction"] in ("bars", "dots", "rings")


@pytest.mark.parametrize("options", [[], ["--out", "a.onnx", "--check", "b.onnx"], ["--out", "model.pt"]])
def test_unclear_output_is_refused(
    options: list[str], tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(tiny_run), *options]) == 1
    assert "--out" in capsys.readouterr().err


def write_consumer_images(folder: Path) -> list[str]:
    """Write readable and damaged images of every kind that the consumer promises to handle."""
    files = {
        f"{i}.{'jpg' if i > 11 else 'png'}": data for i, data in enumerate(draw_difficult_images().values())
    }
    large = draw_of_class("dots", 7, (1300, 900))
    files["large.jpg"] = encode(large, "JPEG", quality=90)
    files["grey_alpha.png"] = encode(large.resize((90, 60)).convert("LA"), "PNG")
    palette = draw_of_class("rings", 8).convert("P")
    files["palette.png"] = encode(palette, "PNG", transparency=palette.getpixel((0, 0)))
    files |= {f"class {i}.jpg": encode(draw_of_class("bars", i, (200, 90)), "JPEG") for i in range(3)}
    files |= {"empty.png": b"", "text.jpg": b"no image", "cut.png": files["large.jpg"][:400]}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return [str(folder / name) for name in files]


def read_csv(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(text.splitlines()))


def run_consumer(model: Path, paths: list[str]) -> list[dict[str, str]]:
    script = str(model.parent / "predict_onnx.py")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PIXELPLAY, script, str(model), *paths],
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    return read_csv(done.stdout)


def check_same_table(model: Path, run: Path, paths: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    rows = run_consumer(model, paths)
    assert main(["predict", str(run), *paths, "--out", "-", "--precision", "fp32", "--quiet"]) == 0
    expected = read_csv(capsys.readouterr().out)
    assert [row["path"] for row in rows] == paths
    assert [row["prediction"] for row in rows] == [row["prediction"] for row in expected]
    assert sum(row["prediction"] == "" for row in rows) == 3
    assert list(rows[0]) == [name for name in expected[0] if name not in ("status", "error", "novelty")]
    numbers = [name for name in rows[0] if name.startswith("prob")]
    for row, other in zip(rows, expected, strict=True):
        found, wanted = (np.array([float(each[name] or -1) for name in numbers]) for each in (row, other))
        np.testing.assert_allclose(found, wanted, atol=1e-4, err_msg=row["path"])


def test_consumer_without_pixelplay_gives_the_table_of_predict(
    exported: Path, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_same_table(exported, tiny_run, write_consumer_images(tmp_path), capsys)


@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_consumer_fits_images_as_predict_does(
    fit: str, exported: Path, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, model = tmp_path / "model", tmp_path / "model.onnx"
    shutil.copytree(tiny_run / "model", run)
    content = json.loads((run / "bundle.json").read_text())
    content["preprocessing"]["fit"] = fit
    (run / "bundle.json").write_text(json.dumps(content))
    proto = onnx.load(exported)
    for each in proto.metadata_props:
        if each.key == "preprocessing":
            each.value = json.dumps(content["preprocessing"])
    onnx.save(proto, model)
    shutil.copy(exported.parent / "predict_onnx.py", tmp_path)
    check_same_table(model, run, write_consumer_images(tmp_path), capsys)


def test_consumer_is_short_and_needs_three_packages(exported: Path) -> None:
    script = (exported.parent / "predict_onnx.py").read_text()
    assert len(script.splitlines()) <= 40
    assert len((exported.parent / "predict_onnx-requirements.txt").read_text().splitlines()) == 3


def test_drawn_images_cover_the_promised_kinds() -> None:
    files = draw_difficult_images()
    assert {"1 x 1 px", "1 x 900 px", "grey", "CMYK", "rotated by EXIF", "black", "white"} <= set(files)
    assert files == draw_difficult_images()
    sizes = {name: Image.open(io.BytesIO(data)).size for name, data in files.items()}
    assert sizes["1 x 900 px"] == (1, 900)
