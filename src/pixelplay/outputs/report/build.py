"""Make the HTML report of a run from its records, its images and its model."""

import os

from pixelplay.config import ComputeConfig, DataConfig
from pixelplay.errors import ConfigError, DataError, ImageError, PixelPlayError
from pixelplay.inference.explain import Explainer
from pixelplay.model.bundle import find_bundle, read_bundle, read_max_value
from pixelplay.outputs.explanations import overlay
from pixelplay.outputs.report.confusion_matrix import sort_errors
from pixelplay.outputs.report.contents import MAX_ENLARGED, list_images, model_contents, run_contents
from pixelplay.outputs.report.images import LARGE_PX, ReportImages, encode
from pixelplay.outputs.report.page import is_report, render_model, render_run, write_page
from pixelplay.outputs.report.run_records import RunRecords, damaged_records, has_records, read_records
from pixelplay.run_log import RunLog
from pixelplay.training.run_dir import is_record

REPORT = "report.html"
MAX_HEAT_MAPS = 8  # each takes as long as several predictions


def report(
    run: str | os.PathLike[str],
    data: str | os.PathLike[str] | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    force: bool = False,
    compute: ComputeConfig | None = None,
    log: RunLog | None = None,
) -> str:
    """Write the HTML report of a run: metrics, errors, label issues and what to do next.

    Args:
        run: run folder, or a model folder without one; its report shows only what the model stores.
        data: the images, if they have moved.
        out: file to write (default: report.html in the run folder, or next to the model).
        force: replace a file that is not a report.
        compute: device and threads for the heat maps.

    Returns:
        Path of the report.

    Raises:
        BundleError: there is no run or model, or its records are missing or damaged.
        ConfigError: the report cannot be written there.
        DataError: there are no images in `data`.
    """
    compute, log = compute or ComputeConfig(), log or RunLog()
    run, source = os.fspath(run), None if data is None else os.fspath(data)
    if not has_records(run) and has_records(parent := os.path.dirname(os.path.abspath(run))):
        run = parent  # the model of a run
    folder = run if has_records(run) else os.path.abspath(find_bundle(run))
    target = os.path.join(folder, REPORT) if has_records(run) else f"{folder}.{REPORT}"
    target = target if out is None else os.fspath(out)
    check_target(target, force=force)
    if has_records(run):
        write_page(_render_run(read_records(run), source, target, compute, log, force=force), target)
    else:
        log.note(f"{run} has no run records; the report shows only what the model stores")
        write_page(render_model(model_contents(read_bundle(run), folder)), target)
    return target


def check_target(path: str, *, force: bool) -> None:
    """Raise ConfigError unless a report may be written to a path."""
    parent, temporary = os.path.dirname(os.path.abspath(path)), f"{path}.tmp"
    if os.path.isdir(path):
        raise ConfigError(f"{path} is a folder; pass a file, as in --out report.html")
    if os.path.basename(path) != REPORT and is_record(path):
        raise ConfigError(f"{path} is a file of the run; choose another --out")
    for existing in (path, temporary):
        # an interrupted write may leave an empty temporary file
        is_file = os.path.lexists(existing) and (existing == path or os.path.getsize(existing))
        if is_file and not force and not is_report(existing):
            raise ConfigError(
                f"{existing} exists and is not a report; choose another --out, or replace it with --force"
            )
    if not os.path.isdir(parent):
        raise ConfigError(f"{parent} does not exist; create it or choose another --out")


def _render_run(
    records: RunRecords, source: str | None, target: str, compute: ComputeConfig, log: RunLog, *, force: bool
) -> str:
    """Render the page of a run, unless `source` has no images or an existing report would lose its own."""
    if source is not None and not os.path.exists(source):
        raise DataError(f"{source} does not exist; pass the folder, table or archive of the images")
    try:
        reading = dict(records.config["reading"])
        if source is not None and not source.lower().endswith(".zip"):
            reading["images_dir"] = None
        elif records.config.get("images_dir"):
            reading["images_dir"] = records.config["images_dir"]
        images = ReportImages(
            source or records.source, DataConfig(**reading), max_value=read_max_value(records.folder)
        )
        heat_maps = _explain_errors(records, images, compute, log)
        enlarged = [issue.path for issue in records.label_issues[:MAX_ENLARGED]]
        images.make_thumbnails(list_images(records), compute.num_workers, log, enlarged=enlarged)
        if not images.thumbnails and (source is not None or (os.path.exists(target) and not force)):
            kept = f"; {target} is kept" if os.path.exists(target) else ""
            raise DataError(
                f"no image can be shown: {images.missing}{kept}; use --data to say where they are"
            )
        if images.missing is not None:
            log.note(f"the report lacks images: {images.missing}; use --data to say where they are")
        return render_run(run_contents(records, images, heat_maps), images, records.root)
    except (KeyError, TypeError, AttributeError) as error:
        raise damaged_records(records.folder, error) from None


def _explain_errors(
    records: RunRecords, images: ReportImages, compute: ComputeConfig, log: RunLog
) -> dict[str, tuple[str, str]]:
    """Return path → image and heat map of the most confident errors, as data URLs."""
    errors = sort_errors(records.predictions)[:MAX_HEAT_MAPS]
    heat_maps: dict[str, tuple[str, str]] = {}
    if images.missing is not None or not errors:
        return heat_maps
    try:
        explainer = Explainer(read_bundle(records.folder), compute=compute)
        with log.progress("explaining", len(errors), "errors") as bar:
            for row in errors:
                bar.update()
                try:
                    pixels = images.read(row.path, max(2 * LARGE_PX, explainer.input_px))
                except ImageError:
                    continue
                heat = explainer.explain(pixels, row.prediction).heat
                pair = encode(pixels, LARGE_PX), encode(overlay(pixels, heat, max_px=LARGE_PX), LARGE_PX)
                if images.reserve(*pair):
                    heat_maps[row.path] = pair
    except (PixelPlayError, RuntimeError) as error:  # RuntimeError: a GPU without enough memory
        log.note(f"no heat maps in the report: {error}")
    return heat_maps
