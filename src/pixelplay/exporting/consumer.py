"""The script that runs an exported ONNX file without PixelPlay, and its requirements."""

import os
from importlib.resources import files

from pixelplay.atomic import write_bytes
from pixelplay.errors import ConfigError

SCRIPT, REQUIREMENTS = "predict_onnx.py", "predict_onnx-requirements.txt"
REQUIRED = ("onnxruntime>=1.20", "numpy>=1.26", "pillow>=11.3")


def consumer_files(folder: str) -> dict[str, bytes]:
    """Return path → content of the files for a folder."""
    script = files("pixelplay.exporting").joinpath(SCRIPT).read_bytes()
    contents = {SCRIPT: script, REQUIREMENTS: "".join(f"{line}\n" for line in REQUIRED).encode()}
    return {os.path.join(folder, name): content for name, content in contents.items()}


def check_consumer(folder: str, *, force: bool) -> None:
    """Raise ConfigError if a file of the user would be replaced."""
    for path, content in consumer_files(folder).items():
        if os.path.isdir(path) or (os.path.lexists(path) and not force and _read(path) != content):
            raise ConfigError(
                f"{path} exists and differs; choose another folder or use --force to replace it"
            )


def write_consumer(folder: str) -> tuple[str, ...]:
    """Write the files and return their paths."""
    contents = consumer_files(folder)
    for path, content in contents.items():
        write_bytes(content, path)
    return tuple(contents)


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()
