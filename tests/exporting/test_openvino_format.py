import os
import subprocess
import sys
from pathlib import Path

import pytest

from pixelplay.cli.main import main
from pixelplay.errors import BundleError
from pixelplay.exporting.openvino_format import OpenVinoModel

# stands for the package that reports the use of OpenVINO to a server
FAKE_TELEMETRY = """
import os
open(os.environ["REPORTED"], "a").write("imported")
class Telemetry:
    def __init__(self, *args, **options): pass
    def __getattr__(self, name): return lambda *args, **options: None
"""
EXPORT_AND_CHECK = """
import sys
from pixelplay.cli.main import main
run, out = sys.argv[1:]
assert main(["export", run, "--format", "openvino", "--out", out, "--quiet"]) == 0
assert main(["export", run, "--check", out, "--quiet"]) == 0
"""


def test_openvino_export_passes_without_telemetry(tiny_run: Path, tmp_path: Path) -> None:
    package = tmp_path / "packages/openvino_telemetry"
    (package / "backend").mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE_TELEMETRY)
    (package / "backend/__init__.py").write_text("")
    (package / "backend/backend_ga4.py").write_text("")
    paths = [str(package.parent), *sys.path]  # the first openvino_telemetry that Python finds is ours
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "REPORTED": str(tmp_path / "reported")}
    (tmp_path / "out").mkdir()
    out = tmp_path / "out/model.xml"
    done = subprocess.run(
        [sys.executable, "-c", EXPORT_AND_CHECK, str(tiny_run), str(out)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "reported").exists()
    assert sorted(path.name for path in out.parent.iterdir()) == ["model.bin", "model.xml"]
    metadata = OpenVinoModel(str(out)).metadata
    assert metadata["classes"] == ["bars", "dots", "rings"]
    assert metadata["parity"]["engine"].startswith("openvino ")


def test_openvino_needs_the_xml_file(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tiny_run), "--format", "openvino", "--out", "model.onnx"]) == 1
    assert ".xml with --format openvino" in capsys.readouterr().err


def test_damaged_openvino_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.xml").write_text("<net/>")
    with pytest.raises(BundleError, match="cannot be read as an OpenVINO model"):
        OpenVinoModel(str(tmp_path / "model.xml"))
