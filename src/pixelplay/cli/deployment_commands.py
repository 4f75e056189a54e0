"""Commands that use a trained model outside of PixelPlay's own runs: serve."""

from pixelplay.cli.options import LogOptions, Run, Views
from pixelplay.config import ComputeConfig, UncertaintyConfig
from pixelplay.errors import MissingExtraError
from pixelplay.serving.settings import LimitsConfig, ServerConfig

# ruff: noqa: B008 - the settings classes are frozen


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
