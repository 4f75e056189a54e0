"""Export a model, and verify exported files."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, get_args

from pixelplay.atomic import atomic_files
from pixelplay.config import ExportFormat, StrPath, check_choice
from pixelplay.data.sources import as_list
from pixelplay.errors import ConfigError, PixelPlayError
from pixelplay.exporting.consumer import check_consumer, write_consumer
from pixelplay.exporting.exported_model import ExportedModel
from pixelplay.exporting.graph import REFERENCE_COMPUTE, ClassifierGraph
from pixelplay.exporting.metadata import PARITY, describe_model
from pixelplay.exporting.onnx_format import OnnxModel, check_onnx_installed, convert_to_onnx, write_onnx
from pixelplay.exporting.openvino_format import (
    OpenVinoModel,
    convert_to_openvino,
    import_openvino,
    weights_path,
    write_openvino,
)
from pixelplay.exporting.parity import (
    MAX_RUN_IMAGES,
    NOVELTY_TOLERANCE,
    PROBABILITY_TOLERANCE,
    ParityReport,
    classify_with_both,
    find_real_images,
)
from pixelplay.inference.predictor import EnsemblePredictor, Predictor
from pixelplay.model.bundle import ModelBundle
from pixelplay.run_log import RunLog
from pixelplay.text import printable

SUFFIXES: dict[ExportFormat, str] = {"onnx": ".onnx", "openvino": ".xml"}


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """An exported file.

    Attributes:
        paths: the files of the model; the last one is the one to open.
        parity: the comparison with `Predictor` that it passed.
        companions: script and requirements written beside it.
    """

    paths: tuple[str, ...]
    format: ExportFormat
    parity: ParityReport
    companions: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        lists = {"paths": list(self.paths), "companions": list(self.companions)}
        return asdict(self) | lists | {"n_bytes": self.n_bytes, "parity": self.parity.to_json()}

    @property
    def n_bytes(self) -> int:
        """Size of the model's files."""
        return sum(map(os.path.getsize, self.paths))

    def describe(self) -> str:
        """Describe the file and the comparison, a line each."""
        lines = [f"wrote {self.paths[-1]} ({self.n_bytes / 1e6:,.1f} MB)", self.parity.describe()]
        lines += [f"wrote {path}" for path in self.companions]
        return "\n".join(map(printable, lines))


def export(
    run: StrPath,
    out: StrPath,
    *,
    format: ExportFormat = "onnx",
    ensemble_with: StrPath | Sequence[StrPath] = (),
    data: StrPath | None = None,
    force: bool = False,
    log: RunLog | None = None,
) -> ExportReport:
    """Export a model as one file that gives the same predictions without PixelPlay.

    The file takes pixels (B, H, W, 3) uint8, prepared as its metadata say, and returns `probs` (B, K),
    `prediction` (B,) and `novelty` (B,). It is written only if its predictions equal those of `Predictor` in
    fp32 on held-out images of the run and on drawn ones, and its probabilities within 1e-4.

    Args:
        out: file to write: .onnx, or .xml for OpenVINO, whose weights are written to .bin beside it.
        ensemble_with: other runs to average probabilities with; they must need the same prepared pixels.
        data: images to compare on (default: held-out images of the run, if they still exist).
        force: replace existing files.

    Raises:
        MissingExtraError: packages for this format are missing.
        ConfigError: the file cannot be written, or the model has operators that the format lacks.
        BundleError: no model in `run`.
        PixelPlayError: the exported model differs from the original; no file is left.
    """
    log, path = log or RunLog(), os.fspath(out)
    check_choice("format", format, get_args(ExportFormat))
    folder = os.path.dirname(path) or "."
    targets = (path,) if format == "onnx" else (weights_path(path), path)
    _check_new_export(path, format, targets, force=force)
    check_onnx_installed(runtime=format == "onnx")
    if format == "openvino":
        import_openvino()
    runs = [os.fspath(each) for each in (run, *as_list(ensemble_with))]
    predictor, bundles = _load(runs)
    images = find_real_images(runs[0], None if data is None else os.fspath(data), log)
    graph = ClassifierGraph(bundles, runs)
    log.info(f"converting {len(bundles)} models" if len(bundles) > 1 else "converting the model")
    proto = convert_to_onnx(graph)
    write = (
        partial(write_onnx, proto)
        if format == "onnx"
        else partial(write_openvino, convert_to_openvino(proto))
    )
    metadata = describe_model(graph, bundles, "fp32")
    with atomic_files(folder, [os.path.basename(each) for each in targets]) as temporary:
        written = os.path.join(temporary, os.path.basename(path))
        write(metadata, written)
        limited = None if images is None else images.limited(MAX_RUN_IMAGES)
        parity = classify_with_both(open_exported(written), predictor, limited, log).compare()
        if not parity.is_equal:
            raise PixelPlayError(f"{path} was not written: {_describe_difference(parity)}")
        write(metadata | {PARITY: parity.to_json()}, written)
    companions = write_consumer(folder) if format == "onnx" else ()
    return ExportReport(paths=targets, format=format, parity=parity, companions=companions)


def open_exported(path: str) -> ExportedModel:
    """Open an exported OpenVINO (.xml) or ONNX file; errors are those of its class."""
    return OpenVinoModel(path) if path.lower().endswith(SUFFIXES["openvino"]) else OnnxModel(path)


def check_export(
    run: StrPath,
    file: StrPath,
    *,
    ensemble_with: StrPath | Sequence[StrPath] = (),
    data: StrPath | None = None,
    log: RunLog | None = None,
) -> ParityReport:
    """Compare an exported file with the run it was made from.

    Args:
        file: as written by `export`.
        ensemble_with: the other runs it was exported with.
        data: images to compare on, all of them (default: held-out images of the run).

    Returns:
        Number of images, mismatches and largest differences; `is_equal` tells whether it passes.

    Raises:
        BundleError: no model in `run`, or `file` is not an exported model.
        PixelPlayError: it was exported from another model.
    """
    log, path = log or RunLog(), os.fspath(file)
    if not os.path.isfile(path):
        raise ConfigError(f"{path} does not exist; pass a file that pixelplay export has written")
    runs = [os.fspath(each) for each in (run, *as_list(ensemble_with))]
    model, predictor = open_exported(path), _load(runs)[0]
    images = find_real_images(runs[0], None if data is None else os.fspath(data), log)
    return classify_with_both(model, predictor, images, log).compare()


def _load(runs: Sequence[str]) -> tuple[Predictor | EnsemblePredictor, list[ModelBundle]]:
    """Return the reference in fp32 and its models."""
    if len(runs) == 1:
        predictor = Predictor(runs[0], REFERENCE_COMPUTE)
        return predictor, [predictor.bundle]
    ensemble = EnsemblePredictor(runs, REFERENCE_COMPUTE)
    return ensemble, ensemble.bundles


def _check_new_export(path: str, format: ExportFormat, targets: Sequence[str], *, force: bool) -> None:
    """Raise ConfigError unless the exported files and their companions may be written."""
    folder = os.path.dirname(path) or "."
    if not path.lower().endswith(SUFFIXES[format]):
        raise ConfigError(f"--out {path} must end in {SUFFIXES[format]} with --format {format}")
    if not os.path.isdir(folder):
        raise ConfigError(f"the folder {folder} of --out does not exist; create it first")
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"the folder {folder} of --out is not writable; choose another")
    for target in targets:
        if os.path.isdir(target):
            raise ConfigError(f"{target} is a folder; choose another --out")
        if os.path.lexists(target) and not force:
            raise ConfigError(f"{target} already exists; choose another --out or use --force to replace it")
    if format == "onnx":
        check_consumer(folder, force=force)


def _describe_difference(parity: ParityReport) -> str:
    """Say what differs and what was allowed."""
    return (
        f"{parity.describe()}; allowed are the same predictions, probabilities within "
        f"{PROBABILITY_TOLERANCE:g} and novelty within {NOVELTY_TOLERANCE:g}"
    )
