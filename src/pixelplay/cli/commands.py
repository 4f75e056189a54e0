"""One sub-command for each public function: parse, call, print.

Options come from the configuration classes, so help, defaults and the JSON beside a model are
the same. Heavy modules are imported inside the commands: help must answer at once.
"""

import json
import os
import shlex
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

from tyro.conf import DisallowNone, arg

from pixelplay.cli.options import (
    ComputeSection,
    Data,
    DataSection,
    EnsembleWith,
    Images,
    Run,
    TrainSection,
    UncertaintySection,
    check_some,
    expand_stdin,
)
from pixelplay.config import (
    CamName,
    Column,
    ComputeConfig,
    DataConfig,
    File,
    Flag,
    Folder,
    Recipe,
    SplitName,
    TrainConfig,
    Tta,
    UncertaintyConfig,
    shown,
    to_json,
)
from pixelplay.errors import ConfigError, PixelPlayError
from pixelplay.run_log import RunLog
from pixelplay.text import counted, printable

Report = Annotated[bool, arg(help="Make no RUN/report.html when it is done.", help_behavior_hint="")]


def scan(
    data: Data,
    /,
    *,
    reading: DataSection = DataConfig(),  # noqa: B008 - frozen
    classes: File = None,
    names_only: Flag = False,
    near_duplicates: Flag = False,
    json: Flag = False,
    quiet: Flag = False,
    json_progress: Flag = False,
) -> None:
    """Say what is in a folder, table or zip archive, and what is wrong with it.

    Args:
        data: Folder of class folders, table (.csv, .tsv, .parquet) or zip archive.
        classes: File of the classes that the test side expects.
        names_only: Do not decode images; only read names and look for exact duplicates.
        near_duplicates: Find resized, cut, mirrored and otherwise altered copies too.
        json: Print JSON for programs.
        quiet: Say nothing on stderr but errors.
        json_progress: Say progress and notes as JSON on stderr, an object a line, for programs.
    """
    from pixelplay.dataset_scan import scan as scan_dataset
    from pixelplay.outputs.console import format_scan, scan_to_json

    log = RunLog(quiet=quiet, is_json=json_progress)
    dataset, audit = scan_dataset(
        data,
        reading,
        classes=classes,
        names_only=names_only,
        near_duplicates=near_duplicates,
        log=log,
    )
    _print_result(json, lambda: scan_to_json(dataset, audit), lambda: format_scan(dataset, audit))


def train(
    data: Data,
    /,
    *,
    out: Annotated[str, arg(metavar="RUN")],
    config: TrainSection = TrainConfig(),  # noqa: B008 - frozen
    recipe: Annotated[Recipe, shown()] = "pixelplay",
    plan: File = None,
    resume: Flag = False,
    report: Report = True,
    force: Flag = False,
    json: Flag = False,
    quiet: Flag = False,
    json_progress: Flag = False,
) -> None:
    """Learn a classifier from labelled images.

    Args:
        data: Folder of class folders, table (.csv, .tsv, .parquet) or zip archive.
        out: Folder of the run, made by this command.
        recipe: Values of all settings that are not given: ours, or those of the competition entry of 2025.
        plan: plan.json of another run: the same depth, stages, views, epochs and batch size, at any speed.
        resume: Go on where a killed run stopped.
        force: Replace an existing run.
        json: Print JSON for programs.
        quiet: Say nothing on stderr but errors.
        json_progress: Say progress and notes as JSON on stderr, an object a line, for programs.
    """
    log = RunLog(
        quiet=quiet, is_json=json_progress
    )  # before the heavy imports: they count against the time budget
    if resume and _tell_finished(out, data, config, {"pixelplay": "train"}, plan=plan, is_json=json):
        return
    from pixelplay import api as workflow
    from pixelplay.outputs.console import format_run_report

    done = workflow.train(data, out, config, plan=plan, force=force, resume=resume, log=log)
    _print_result(json, done.to_json, lambda: format_run_report(done))
    if report:
        _show_run(out, config.compute, log, is_json=json)


def crossval(
    data: Data,
    /,
    *,
    out: Annotated[str, arg(metavar="RUN")],
    config: TrainSection = TrainConfig(),  # noqa: B008 - frozen
    recipe: Annotated[Recipe, shown()] = "pixelplay",
    repeats: Annotated[int, shown("N")] = 1,
    single: Flag = False,
    resume: Flag = False,
    report: Report = True,
    force: Flag = False,
    json: Flag = False,
    quiet: Flag = False,
    json_progress: Flag = False,
) -> None:
    """Learn one classifier for each fold, and measure every image by one that has not seen it.

    Args:
        data: Folder of class folders, table (.csv, .tsv, .parquet) or zip archive.
        out: Folder of the run, made by this command.
        recipe: Values of all settings that are not given: ours, or those of the competition entry of 2025.
        repeats: Deal the images into folds so often, 1 to 20.
        single: Deploy one classifier that learned from everything, instead of the mean of all folds'.
        resume: Go on where a killed run stopped, fold by fold.
        force: Replace an existing run.
        json: Print JSON for programs.
        quiet: Say nothing on stderr but errors.
        json_progress: Say progress and notes as JSON on stderr, an object a line, for programs.
    """
    log = RunLog(quiet=quiet, is_json=json_progress)
    also = {"pixelplay": "crossval", "repeats": repeats, "deployed": "single" if single else "ensemble"}
    if resume and _tell_finished(out, data, replace(config, test_frac=0.0), also, is_json=json):
        return
    from pixelplay import api as workflow
    from pixelplay.outputs.console import format_run_report

    done = workflow.cross_validate(
        data,
        out,
        config,
        repeats=repeats,
        single=single,
        force=force,
        resume=resume,
        log=log,
    )
    _print_result(json, done.to_json, lambda: format_run_report(done))
    if report:
        _show_run(out, config.compute, log, is_json=json)


def evaluate(
    run: Run,
    data: Data,
    /,
    *,
    reading: DataSection = DataConfig(),  # noqa: B008 - frozen
    compute: ComputeSection = ComputeConfig(),  # noqa: B008 - frozen
    split: DisallowNone[Annotated[SplitName | None, shown()]] = None,
    at_precision: Annotated[float | None, shown("PRECISION")] = None,
    positive: DisallowNone[Annotated[str | None, shown("CLASS")]] = None,
    against: DisallowNone[Annotated[str | None, shown("RUN")]] = None,
    tta: DisallowNone[Annotated[Tta | None, shown()]] = None,
    out: File = None,
    force: Flag = False,
    json: Flag = False,
    quiet: Flag = False,
    json_progress: Flag = False,
) -> None:
    """Measure a trained classifier on labelled images.

    Args:
        run: Folder of a run, or of its model.
        data: Folder of class folders, table or zip archive.
        part: Given part to score (default: test where the data has one, else everything).
        at_precision: For two classes: report the recall at this precision, 0 to 1.
        positive: Class that precision and recall are about (default: the second).
        against: Another run: how far both are apart, image by image, and whether that is real.
        tta: Views that are answered for together: none, flip (default: as the model was learned).
        out: Table to write, .csv or .parquet: each answer of RUN beside the class that was given.
        force: Replace an existing table.
        json: Print JSON for programs.
        quiet: Say nothing on stderr but errors.
        json_progress: Say progress and notes as JSON on stderr, an object a line, for programs.
    """
    if force and out is None:
        raise ConfigError("--force replaces a table, and none is written; add --out")
    from pixelplay import api as workflow
    from pixelplay.outputs.console import format_evaluation_report

    report = workflow.evaluate(
        run,
        data,
        reading,
        split=split,
        at_precision=at_precision,
        positive=positive,
        against=against,
        tta=tta,
        out=out,
        force=force,
        compute=compute,
        log=RunLog(quiet=quiet, is_json=json_progress),
    )
    _print_result(json, report.to_json, lambda: format_evaluation_report(report))


def label_issues(run: Run, /, *, json: Flag = False) -> None:
    """Show the labels that look wrong to a model that had not learned from them.

    Args:
        run: Folder of a run of train or crossval.
        json: Print JSON for programs.
    """
    from pixelplay.outputs.console import format_label_issues
    from pixelplay.outputs.label_issues import read_label_issues

    report = read_label_issues(run)
    _print_result(json, report.to_json, lambda: format_label_issues(report))


def report(
    run: Run,
    /,
    *,
    data: DisallowNone[Annotated[str | None, arg(metavar="DATA", help_behavior_hint="")]] = None,
    out: File = None,
    compute: ComputeSection = ComputeConfig(),  # noqa: B008 - frozen
    force: Flag = False,
    quiet: Flag = False,
    json_progress: Flag = False,
) -> None:
    """Show a run in one HTML file that opens anywhere, offline too.

    Args:
        run: Folder of a run, or of its model alone.
        data: The images, if they are no longer where they were.
        out: File to write (default: RUN/report.html).
        force: Replace a file that is no report.
        quiet: Say nothing on stderr but errors.
        json_progress: Say progress and notes as JSON on stderr, an object a line, for programs.
    """
    from pixelplay.outputs.report import build as make

    log = RunLog(quiet=quiet, is_json=json_progress)
    path = make.report(run, data, out=out, force=force, compute=compute, log=log)
    print(f"wrote {printable(path)}")


def cache(*, cache_dir: Folder = None, clear: Flag = False) -> None:
    """Show or clear the cache: features, decoded pixels and views of images.

    Args:
        cache_dir: Folder of the cache (default: the user's cache folder).
        clear: Delete what the cache holds.
    """
    from pixelplay.data.cache import clear_cache, default_cache_dir, measure_cache

    folder = cache_dir or default_cache_dir()
    use = measure_cache(folder)
    if clear:
        clear_cache(folder)
    done = ", cleared" if clear else ""
    print(f"{folder}: {use.n_bytes / 1e6:,.1f} MB in {counted(use.n_files, 'file')}{done}")


def _print_result(is_json: bool, as_json: Callable[[], Any], as_text: Callable[[], str]) -> None:
    print(json.dumps(as_json(), indent=1, allow_nan=False) if is_json else as_text())


def _tell_finished(
    run: str,
    source: str,
    config: TrainConfig,
    also: dict[str, Any],
    *,
    plan: str | None = None,
    is_json: bool,
) -> bool:
    """Whether there is nothing left to resume, as that very run is done; then say so."""
    from pixelplay.training.run_dir import is_finished

    if plan is not None:
        from pixelplay.training.finetune_plan import apply_plan, has_same_plan, read_plan

        repeated = read_plan(plan)
        config = apply_plan(repeated, config)
        if not has_same_plan(run, repeated):
            return False
    if not is_finished(run, {**to_json(config), "source": os.path.abspath(source), **also}):
        return False
    if is_json:
        with open(os.path.join(run, "metrics.json"), encoding="utf-8") as file:
            print(file.read())
    else:
        print(f"{printable(run)} is finished: nothing is left to resume")
    return True


def _show_run(run: str, compute: ComputeConfig, log: RunLog, *, is_json: bool) -> None:
    """Make the report of a finished run; what goes wrong with it is no failure of the run."""
    from pixelplay.outputs.report import build as make

    try:
        path = make.report(run, compute=compute, log=log)
    except (PixelPlayError, OSError) as error:
        log.tell(f"the run is done, its report is not: {error}")
        return
    except KeyboardInterrupt:
        log.tell(f"the run is done, its report is not; pixelplay report {shlex.quote(run)} makes it")
        raise SystemExit(130) from None
    if is_json:
        log.tell(f"report: {path}")
    else:
        print(f"\nreport: {printable(path)}")


def predict(
    run: Run,
    images: Images,
    /,
    *,
    out: Annotated[str, arg(metavar="FILE")],
    submission: File = None,
    probability_of: DisallowNone[Annotated[str | None, shown("CLASS")]] = None,
    path_column: Column = None,
    images_dir: Folder = None,
    ensemble_with: EnsembleWith = (),
    tta: DisallowNone[Annotated[Tta | None, shown()]] = None,
    uncertainty: UncertaintySection = UncertaintyConfig(),  # noqa: B008 - frozen
    compute: ComputeSection = ComputeConfig(),  # noqa: B008 - frozen
    strict: Flag = False,
    force: Flag = False,
    quiet: Flag = False,
    json_progress: Flag = False,
) -> None:
    """Classify images into a table, one row for each.

    Args:
        run: Folder of a run, or of its model.
        images: Folders, files, tables or zip archives; - reads a list of files from stdin.
        out: Table to write, .csv or .parquet.
        submission: Sample submission whose header, ids and order the output takes exactly.
        probability_of: Class whose probability the sample's one column wants (default: labels go there).
        path_column: Column of a table that names the image.
        images_dir: Folder that the names in a table are looked up in (default: the table's own).
        with_runs: Other runs that answer with this one, by the mean of their probabilities; novelty is RUN's.
        tta: Views that are answered for together: none, flip (default: as the model was learned).
        strict: Exit with status 1 if any image could not be read.
        force: Replace an existing table.
        quiet: Say nothing on stderr but errors.
        json_progress: Say progress and notes as JSON on stderr, an object a line, for programs.
    """
    check_some(images)
    from pixelplay import api as workflow

    summary = workflow.predict(
        run,
        list(expand_stdin(images)),
        out,
        submission=submission,
        probability_of=probability_of,
        path_column=path_column,
        images_dir=images_dir,
        force=force,
        ensemble_with=ensemble_with,
        tta=tta,
        uncertainty=uncertainty,
        compute=compute,
        log=RunLog(quiet=quiet, is_json=json_progress),
    )
    print(summary.describe(out, submission=submission is not None))
    if summary.n_unreadable and strict:
        raise PixelPlayError(
            f"{counted(summary.n_unreadable, 'image')} could not be read, and --strict is set; "
            f"first: {summary.errors[0]}"
        )


def explain(
    run: Run,
    images: Images,
    /,
    *,
    out: Annotated[str, arg(metavar="FOLDER")],
    label: DisallowNone[
        Annotated[str | None, arg(name="class", metavar="CLASS", help_behavior_hint="")]
    ] = None,
    method: DisallowNone[Annotated[CamName | None, shown()]] = None,
    path_column: Column = None,
    images_dir: Folder = None,
    ensemble_with: EnsembleWith = (),
    compute: ComputeSection = ComputeConfig(),  # noqa: B008 - frozen
    force: Flag = False,
    quiet: Flag = False,
    json_progress: Flag = False,
) -> None:
    """Show where in images a classifier sees a class.

    Args:
        run: Folder of a run, or of its model.
        images: Folders, files, tables or zip archives; - reads a list of files from stdin.
        out: Folder to write: overlays, raw maps, contact sheets and explanations.csv.
        label: Class to explain (default: of each image the one that the model decides for).
        method: gradcam, gradcam++, layercam (default: layercam, the most faithful measured).
        path_column: Column of a table that names the image.
        images_dir: Folder that the names in a table are looked up in (default: the table's own).
        with_runs: Other runs that are explained with this one, as they answer together.
        force: Replace a folder of explanations.
        quiet: Say nothing on stderr but errors.
        json_progress: Say progress and notes as JSON on stderr, an object a line, for programs.
    """
    check_some(images)
    from pixelplay import api as workflow

    sources = list(expand_stdin(images))
    workflow.explain(
        run,
        sources,
        out,
        label=label,
        method=method,
        path_column=path_column,
        images_dir=images_dir,
        force=force,
        ensemble_with=ensemble_with,
        compute=compute,
        log=RunLog(quiet=quiet, is_json=json_progress),
    )
    print(f"wrote {printable(os.path.join(out, 'explanations.csv'))}")


COMMANDS: dict[str, Callable[..., None]] = {
    "scan": scan,
    "train": train,
    "crossval": crossval,
    "evaluate": evaluate,
    "label_issues": label_issues,
    "report": report,
    "predict": predict,
    "explain": explain,
    "cache": cache,
}
