"""The report of a run: from its records, its images and its model to one file."""

import os

from pixelplay.config import ComputeConfig, DataConfig
from pixelplay.errors import BundleError, ConfigError, DataError, ImageError, PixelPlayError
from pixelplay.inference.explain import Explainer
from pixelplay.model.bundle import find_bundle, read_bundle
from pixelplay.outputs.explanations import overlay
from pixelplay.outputs.report.confusion_matrix import worst_first
from pixelplay.outputs.report.contents import N_ENLARGED, N_MISTAKES, Mistake, make_page, plan_pictures
from pixelplay.outputs.report.images import LARGE_PX, Pictures, encode, find_source
from pixelplay.outputs.report.page import is_ours, make_model_page, render, render_model, write_page
from pixelplay.outputs.report.run_records import Answer, RunRecords, has_records, read_records
from pixelplay.run_log import RunLog
from pixelplay.training.run_dir import is_record

REPORT = "report.html"
N_EXPLAINED = 8  # mistakes with a heat map: each takes as long as several answers


def report(
    run: str | os.PathLike[str],
    data: str | os.PathLike[str] | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    force: bool = False,
    compute: ComputeConfig | None = None,
    log: RunLog | None = None,
) -> str:
    """Show a run in one HTML file: how good, where wrong, where it looked, what to do next.

    Args:
        run: folder of a run, or of its model alone: then what the model itself knows is shown.
        data: the images, if they are no longer where they were.
        out: the file (default: report.html in the run; beside a model alone).
        is_forced: replace a file that is no report.

    Returns:
        Where the report lies.

    Raises:
        BundleError: neither run nor model there, or records that are missing or damaged.
        ConfigError: the file cannot be written.
        DataError: no images in `data`.
    """
    compute, log = compute or ComputeConfig(), log or RunLog()
    run, asked = os.fspath(run), None if data is None else os.fspath(data)
    if not has_records(run) and has_records(parent := os.path.dirname(os.path.abspath(run))):
        run = parent  # the model of a run
    folder = run if has_records(run) else os.path.abspath(find_bundle(run))
    target = os.path.join(folder, REPORT) if has_records(run) else f"{folder}.{REPORT}"
    target = target if out is None else os.fspath(out)
    check_target(target, force=force)
    if not has_records(run):
        log.note(f"{run} is a model without the records of its run: figures of its making are not known")
        write_page(render_model(make_model_page(read_bundle(run), folder)), target)
        return target
    records = read_records(run)
    try:
        settings = dict(records.config["reading"])
        if asked is not None and not asked.lower().endswith(".zip"):
            settings["images_dir"] = None
        elif records.config.get("images_dir"):
            settings["images_dir"] = records.config["images_dir"]
        pictures = Pictures(find_source(asked, records.source), DataConfig(**settings))
        mistakes = _explain(records, pictures, compute, log)
        label_issues = [suspect.path for suspect in records.label_issues[:N_ENLARGED]]
        pictures.make(plan_pictures(records), compute.num_workers, log, enlarged=label_issues)
        if pictures.is_empty and (asked is not None or (os.path.exists(target) and not force)):
            kept = f"; {target} is kept" if os.path.exists(target) else ""
            raise DataError(
                f"no image can be shown, {pictures.missing}{kept}; say with --data where they are"
            )
        if pictures.missing is not None:
            log.note(f"pictures are missing in the report: {pictures.missing}; give --data")
        html = render(make_page(records, pictures, mistakes))
    except (KeyError, TypeError, AttributeError) as error:
        raise BundleError(
            f"the records of {run} are damaged or of another version ({type(error).__name__}: {error}); "
            "pixelplay train or crossval makes them anew"
        ) from None
    write_page(html, target)
    return target


def check_target(path: str, *, force: bool) -> None:
    """Raise where a file stands that is no report of ours.

    Raises:
        ConfigError: it is replaced only when forced, and a folder never.
    """
    parent = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path):
        raise ConfigError(f"{path} is a folder; give a file, as in --out report.html")
    if os.path.basename(path) != REPORT and is_record(path):
        raise ConfigError(f"{path} is a record of the run; choose another --out")
    if os.path.lexists(path) and not force and not is_ours(path):
        raise ConfigError(f"{path} exists and is no report; choose another --out, or replace it with --force")
    temporary = f"{path}.tmp"  # that of a killed report may go
    if os.path.lexists(temporary) and not force and not is_ours(temporary) and os.path.getsize(temporary):
        raise ConfigError(
            f"{temporary} exists and is no report; choose another --out, or replace it with --force"
        )
    if not os.path.isdir(parent):
        raise ConfigError(f"{parent} does not exist; make it, or choose another --out")


def _explain(records: RunRecords, pictures: Pictures, compute: ComputeConfig, log: RunLog) -> list[Mistake]:
    """The most confident mistakes; of the first few, where the model saw its answer."""
    worst = worst_first(records.answers)[:N_MISTAKES]
    mistakes = [Mistake(answer=answer, large=None, heat=None) for answer in worst]
    if pictures.missing is not None or not worst:
        return mistakes
    try:
        explainer = Explainer(read_bundle(records.folder), compute=compute)
        with log.progress("explaining", min(N_EXPLAINED, len(worst)), "mistakes") as bar:
            for i, answer in enumerate(worst[:N_EXPLAINED]):
                mistakes[i] = _explain_one(answer, explainer, pictures)
                bar.update()
    except (PixelPlayError, RuntimeError) as error:  # RuntimeError: a GPU without enough memory
        log.note(f"no heat maps in the report: {error}")
    return mistakes


def _explain_one(answer: Answer, explainer: Explainer, pictures: Pictures) -> Mistake:
    try:
        pixels = pictures.read(answer.path, max(2 * LARGE_PX, explainer.input_size))
    except ImageError:
        return Mistake(answer=answer, large=None, heat=None)
    heat = explainer.explain(pixels, answer.label).heat
    large, hot = (encode(picture, LARGE_PX) for picture in (pixels, overlay(pixels, heat, max_px=LARGE_PX)))
    if not pictures.has_room(large, hot):
        return Mistake(answer=answer, large=None, heat=None)
    return Mistake(answer=answer, large=large, heat=hot)
