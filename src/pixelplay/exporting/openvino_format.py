"""Write OpenVINO models and run them; the telemetry that comes with the package never runs."""

import os
import sys
from importlib.metadata import version
from typing import Any

import numpy as np

from pixelplay.array_types import UInt8Array
from pixelplay.errors import BundleError, ConfigError, MissingExtraError
from pixelplay.exporting.exported_model import ExportedOutputs, as_outputs
from pixelplay.exporting.metadata import OUTPUTS, Metadata, pack, unpack
from pixelplay.text import one_line

TELEMETRY = "openvino_telemetry"
_SECTION = "pixelplay"  # of the model's runtime information


def import_openvino() -> Any:
    """Import OpenVINO without its telemetry.

    `import openvino` imports its converter, which reports the import to a server unless the package
    openvino_telemetry is missing. A None in `sys.modules` makes it missing, for the whole process.

    Raises:
        MissingExtraError: OpenVINO is not installed.
    """
    if TELEMETRY not in sys.modules:
        sys.modules[TELEMETRY] = None  # type: ignore[assignment]
    try:
        import openvino
    except ImportError as error:
        raise MissingExtraError(
            f"this format needs {error.name}; pip install 'pixelplay[openvino]'"
        ) from None
    return openvino


def convert_to_openvino(proto: Any) -> Any:
    """Convert an `onnx.ModelProto` to an `openvino.Model`.

    Raises:
        ConfigError: it has operators that OpenVINO lacks.
    """
    openvino = import_openvino()
    try:
        model = openvino.Core().read_model(proto.SerializeToString())
    except Exception as error:  # OpenVINO raises RuntimeError and its own classes
        raise ConfigError(
            f"the model cannot be converted to OpenVINO ({one_line(error)}); use "
            "another backbone or --format onnx"
        ) from None
    return model


def write_openvino(model: Any, metadata: Metadata, path: str) -> None:
    """Write PATH, which ends in .xml, with its metadata, and the weights beside it in .bin."""
    for key, text in pack(metadata).items():
        model.set_rt_info(text, [_SECTION, key])
    import_openvino().save_model(model, path, compress_to_fp16=False)


def weights_path(path: str) -> str:
    """Return the file with the weights of an .xml file."""
    return f"{os.path.splitext(path)[0]}.bin"


class OpenVinoModel:
    """An exported OpenVINO model, run in fp32 on the CPU.

    Attributes:
        metadata: as written by `pixelplay export`.
        engine: name and version of what runs the file.

    Raises:
        MissingExtraError: OpenVINO is not installed.
        BundleError: the file is damaged, or was not exported by PixelPlay.
    """

    def __init__(self, path: str) -> None:
        core = import_openvino().Core()
        core.set_property({"ENABLE_MMAP": False})  # else the file could not be replaced while it is open
        try:
            model = core.read_model(path)
        except Exception as error:
            raise BundleError(f"{path} cannot be read as an OpenVINO model ({one_line(error)})") from None
        self.metadata: Metadata = unpack(_read_texts(model), path)
        # by default OpenVINO computes in bf16 where the processor can
        self._compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        self.engine = f"openvino {version('openvino')}"
        self._path = path

    def __call__(self, pixels: UInt8Array, /) -> ExportedOutputs:
        """Classify pixels (B, H, W, 3)."""
        try:
            found = self._compiled(np.ascontiguousarray(pixels))
        except Exception as error:
            raise BundleError(f"OpenVINO cannot run {self._path} ({one_line(error)})") from None
        return as_outputs([found[name] for name in OUTPUTS])


def _read_texts(model: Any) -> dict[str, str]:
    """Return the metadata as text; empty if there are none."""
    if not model.has_rt_info([_SECTION]):
        return {}
    section = model.get_rt_info([_SECTION]).value
    return {key: str(getattr(value, "value", value)) for key, value in section.items()}
