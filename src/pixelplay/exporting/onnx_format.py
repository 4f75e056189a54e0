"""Write ONNX files and run them with ONNX Runtime."""

import logging
import re
import warnings
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from pixelplay.array_types import UInt8Array
from pixelplay.errors import BundleError, ConfigError, MissingExtraError
from pixelplay.exporting.exported_model import ExportedOutputs, as_outputs
from pixelplay.exporting.graph import ClassifierGraph
from pixelplay.exporting.metadata import INPUT, OUTPUTS, Metadata, pack, unpack
from pixelplay.model.weights import quiet_logger
from pixelplay.text import name_some, one_line

OPSET = 20
MAX_BYTES = 2**31  # of a Protocol Buffers message
_MISSING = re.compile(r"No ONNX function found for <?(?:OpOverload\(op=)?'?([\w.:]+)")


def check_onnx_installed(*, runtime: bool = True) -> None:
    """Raise MissingExtraError unless ONNX files can be written, and run."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401

        if runtime:
            import onnxruntime  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(f"export needs {error.name}; pip install 'pixelplay[export]'") from None


def convert_to_onnx(graph: ClassifierGraph) -> Any:
    """Convert a classifier to an `onnx.ModelProto` with a dynamic batch.

    Raises:
        ConfigError: it has operators that ONNX lacks, or more weights than one file can hold.
    """
    check_onnx_installed(runtime=False)
    graph.eval().requires_grad_(False)
    pixels = torch.zeros(2, *graph.preprocessing.input_size, 3, dtype=torch.uint8)
    quiet = warnings.catch_warnings(action="ignore")
    try:
        # with gradients enabled, fused layers take the path of plain operators
        with quiet, quiet_logger("torch.onnx", logging.ERROR), torch.enable_grad():
            program = torch.onnx.export(
                graph,
                (pixels,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=list(OUTPUTS),
                dynamic_shapes={INPUT: {0: torch.export.Dim("batch")}},
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise ConfigError(_describe_failure(error)) from None
    assert program is not None
    proto = program.model_proto
    # where a network depends on the batch size, the exporter silently fixes it
    if not all(
        value.type.tensor_type.shape.dim[0].dim_param for value in (*proto.graph.input, *proto.graph.output)
    ):
        raise ConfigError("the model cannot be exported for any number of images; use another backbone")
    if proto.ByteSize() >= MAX_BYTES:
        raise ConfigError(
            f"the model has {proto.ByteSize() / 1e9:.1f} GB but an ONNX file holds at most 2.1 GB"
        )
    return proto


def write_onnx(proto: Any, metadata: Metadata, path: str) -> None:
    """Write a model with its metadata."""
    del proto.metadata_props[:]
    proto.producer_name, proto.producer_version = "PixelPlay", metadata["pixelplay"]
    for key, text in pack(metadata).items():
        proto.metadata_props.add(key=key, value=text)
    with open(path, "wb") as file:
        file.write(proto.SerializeToString())


class OnnxModel:
    """An exported ONNX file, run by ONNX Runtime on the CPU.

    Attributes:
        metadata: as written by `pixelplay export`.
        engine: name and version of what runs the file.

    Raises:
        MissingExtraError: ONNX Runtime is not installed.
        BundleError: the file is damaged, or was not exported by PixelPlay.
    """

    def __init__(self, path: str) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise MissingExtraError(f"{path} needs onnxruntime; pip install 'pixelplay[export]'") from None
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's classes are not public
            raise BundleError(f"{path} cannot be read as an ONNX model ({one_line(error)})") from None
        self._path = path
        self.metadata: Metadata = unpack(self._session.get_modelmeta().custom_metadata_map, path)
        self.engine = f"onnxruntime {version('onnxruntime')}"

    def __call__(self, pixels: UInt8Array, /) -> ExportedOutputs:
        """Classify pixels (B, H, W, 3)."""
        try:
            return as_outputs(self._session.run(list(OUTPUTS), {INPUT: np.ascontiguousarray(pixels)}))
        except Exception as error:  # ONNX Runtime's classes are not public
            raise BundleError(f"ONNX Runtime cannot run {self._path} ({one_line(error)})") from None


def _describe_failure(error: BaseException) -> str:
    """Name the operators that ONNX lacks, or the reason of another failure."""
    messages: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        messages.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    operators = {name for message in messages for name in _MISSING.findall(message)}
    if operators:
        return (
            f"the model cannot be exported: ONNX lacks {name_some(sorted(operators))}; use another backbone"
        )
    return f"the model cannot be exported to ONNX ({one_line(messages[-1])}); use another backbone"
