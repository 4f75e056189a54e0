"""Commands that deploy a trained model: export, serve."""

from typing import Annotated

from tyro.conf import DisallowNone

from pixelplay.cli.options import EnsembleWith, LogOptions, OutputOptions, Run, Views, print_result
from pixelplay.config import ComputeConfig, ExportFormat, File, Flag, UncertaintyConfig, metavar
from pixelplay.errors import ConfigError, MissingExtraError, PixelPlayError
from pixelplay.serving.settings import LimitsConfig, ServerConfig

# ruff: noqa: B008 - the settings classes are frozen


def export(
    run: Run,
    /,
    *,
    out: File = None,
    format: Annotated[ExportFormat, metavar("FORMAT")] = "onnx",
    check: File = None,
    data: DisallowNone[Annotated[str | None, metavar("IMAGES")]] = None,
    ensemble_with: EnsembleWith = (),
    force: Flag = False,
    output: OutputOptions = OutputOptions(),
) -> None:
    """Export a model as a file that runs without PixelPlay, or verify such a file.

    Args:
        run: Folder of a run, or of its model.
        out: File to write, .onnx or .xml; it appears only if its predictions equal those of PixelPlay.
        format: Format of the file to write: onnx, openvino.
        check: Exported file to verify instead: exit with status 1 if it differs from RUN.
        data: Images to compare on: a folder, table, zip archive or file (default: held-out images of RUN).
        ensemble_with: Other runs; the probabilities are averaged, the novelty is that of RUN.
        force: Replace existing files.
    """
    if (out is None) == (check is None):
        raise ConfigError("export needs either --out FILE to write or --check FILE to verify")
    if check is not None and force:
        raise ConfigError("--force has no effect with --check")
    from pixelplay.exporting.export import check_export
    from pixelplay.exporting.export import export as export_model

    if out is not None:
        done = export_model(
            run,
            out,
            format=format,
            ensemble_with=ensemble_with,
            data=data,
            force=force,
            log=output.make_log(),
        )
        print_result(output, done.to_json, done.describe)
        return
    parity = check_export(run, str(check), ensemble_with=ensemble_with, data=data, log=output.make_log())
    print_result(output, parity.to_json, parity.describe)
    if not parity.is_equal:
        raise PixelPlayError(f"{check} is not equal to {run}")


def serve(
    run: Run,
    /,
    *,
    tta: Views = None,
    server: ServerConfig = ServerConfig(),
    limits: LimitsConfig = LimitsConfig(),
    uncertainty: UncertaintyConfig = UncertaintyConfig(),
    compute: ComputeConfig = ComputeConfig(),
    output: LogOptions = LogOptions(),
) -> None:
    """Serve a model over HTTP, with a web page to try it.

    Args:
        run: Folder of a run, or of its model.
        tta: Test-time augmentation: none, flip (default: as in training).
    """
    try:
        from pixelplay.serving.server import serve as run_server
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"serve needs {error.name}; pip install 'pixelplay[serve]'") from None
    run_server(
        run,
        server,
        tta=tta,
        limits=limits,
        uncertainty=uncertainty,
        compute=compute,
        log_requests=not output.quiet,
    )
