"""One function per command: parse, call, print.

Signatures and docstrings define the arguments and their help. Heavy modules are imported inside the
commands, because help must start fast.
"""

import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import DisallowNone, arg

from pixelplay.cli.deployment_commands import export, serve
from pixelplay.cli.options import (
    ClassName,
    Data,
    EnsembleWith,
    Images,
    LogOptions,
    OutputOptions,
    Report,
    Run,
    Views,
    print_result,
    read_sources,
    typed_command,
)
from pixelplay.config import (
    REPEATS,
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
    UncertaintyConfig,
    metavar,
)
from pixelplay.errors import ConfigError, PixelPlayError
from pixelplay.run_log import RunLog
from pixelplay.text import counted, printable

if TYPE_CHECKING:
    from pixelplay.outputs.metrics_json import RunReport

# ruff: noqa: B008 - the settings classes are frozen


def scan(
    data: Data,
    /,
    *,
    classes: File = None,
    names_only: Flag = False,
    near_duplicates: Flag = False,
    reading: DataConfig = DataConfig(),
    output: OutputOptions = OutputOptions(),
) -> None:
    """Summarise a dataset and list its problems.

    Args:
        data: Folder of class folders, table (.csv, .tsv, .parquet) or zip archive.
        classes: File with the classes expected in the test data.
        names_only: Decode no images; only read names and search for exact duplicates.
        near_duplicates: Also search for resized, cropped, mirrored and otherwise edited duplicates.
    """
    from pixelplay.dataset_scan import scan as scan_dataset
    from pixelplay.outputs.console import format_scan, scan_to_json

    dataset, audit = scan_dataset(
        data,
        reading,
        classes=classes,
        names_only=names_only,
        near_duplicates=near_duplicates,
        log=output.make_log(),
    )
    print_result(
        output,
        lambda: scan_to_json(dataset, audit),
        lambda: format_scan(dataset, audit, near_duplicates=near_duplicates),
    )


def train(
    data: Data,
    /,
    *,
    out: Annotated[str, arg(metavar="RUN")],
    recipe: Annotated[Recipe, metavar("RECIPE")] = "pixelplay",
    plan: File = None,
    resume: Flag = False,
    force: Flag = False,
    report: Report = True,
    verbose: Flag = False,
    config: TrainConfig = TrainConfig(),
    output: OutputOptions = OutputOptions(),
) -> None:
    """Train a classifier on labelled images and evaluate it on held-out ones.

    Args:
        data: Folder of class folders, table (.csv, .tsv, .parquet) or zip archive.
        out: Output folder.
        recipe: Defaults of all settings: pixelplay, pixelplay25 (the competition entry of 2025).
        plan: The plan.json of another run: use its method, stages, views, epochs and batch size.
        resume: Continue an interrupted run.
        force: Replace an existing run.
        report: Write RUN/report.html.
        verbose: Also print the results per class.
    """
    started = time.monotonic()  # importing PyTorch is part of the time budget
    log = output.make_log()
    if resume and not force and _is_finished(out, data, config, {"pixelplay": "train"}, output, plan=plan):
        return
    from pixelplay import api

    done = api.train(
        data,
        out,
        config,
        plan=plan,
        force=force,
        resume=resume,
        log=log,
        command=typed_command(),
        started=started,
    )
    _finish(done, config.compute, log, output, report=report, verbose=verbose)


def crossval(
    data: Data,
    /,
    *,
    out: Annotated[str, arg(metavar="RUN")],
    recipe: Annotated[Recipe, metavar("RECIPE")] = "pixelplay",
    repeats: Annotated[int, metavar("N"), REPEATS] = 1,
    single: Flag = False,
    resume: Flag = False,
    force: Flag = False,
    report: Report = True,
    verbose: Flag = False,
    config: TrainConfig = TrainConfig(),
    output: OutputOptions = OutputOptions(),
) -> None:
    """Cross-validate a classifier and save the ensemble of its folds.

    Every image is predicted by a classifier that was not trained on it.

    Args:
        data: Folder of class folders, table (.csv, .tsv, .parquet) or zip archive.
        out: Output folder.
        recipe: Defaults of all settings: pixelplay, pixelplay25 (the competition entry of 2025).
        repeats: Repetitions with other random folds.
        single: Save one classifier trained on all images instead of the ensemble of the folds.
        resume: Continue an interrupted run, fold by fold.
        force: Replace an existing run.
        report: Write RUN/report.html.
        verbose: Also print the results per class.
    """
    started = time.monotonic()  # importing PyTorch is part of the time budget
    log = output.make_log()
    about = {"pixelplay": "crossval", "repeats": repeats, "deployed": "single" if single else "ensemble"}
    if resume and not force and _is_finished(out, data, replace(config, test_frac=0.0), about, output):
        return
    from pixelplay import api

    done = api.cross_validate(
        data,
        out,
        config,
        repeats=repeats,
        single=single,
        force=force,
        resume=resume,
        log=log,
        command=typed_command(),
        started=started,
    )
    _finish(done, config.compute, log, output, report=report, verbose=verbose)


def evaluate(
    run: Run,
    data: Data,
    /,
    *,
    split: DisallowNone[Annotated[SplitName | None, metavar("SPLIT")]] = None,
    at_precision: Annotated[float | None, metavar("PRECISION")] = None,
    positive: ClassName = None,
    against: DisallowNone[Annotated[str | None, metavar("RUN")]] = None,
    tta: Views = None,
    out: File = None,
    force: Flag = False,
    verbose: Flag = False,
    reading: DataConfig = DataConfig(),
    compute: ComputeConfig = ComputeConfig(),
    output: OutputOptions = OutputOptions(),
) -> None:
    """Evaluate a trained classifier on labelled images.

    Args:
        run: Folder of a run, or of its model.
        data: Folder of class folders, table (.csv, .tsv, .parquet) or zip archive.
        split: Split to evaluate: train, val, test (default: test if the data has one, else all images).
        at_precision: With two classes: report the recall at this precision, above 0 and at most 1.
        positive: Class that precision and recall refer to (default: the second).
        against: Another run: report the paired difference and its significance.
        tta: Test-time augmentation: none, flip (default: as in training).
        out: Table to write (.csv, .parquet): each prediction with its label.
        force: Replace an existing table.
        verbose: Also print the results per class and the confusion matrix.
    """
    if force and out is None:
        raise ConfigError("--force has no effect without --out")
    from pixelplay import api
    from pixelplay.outputs.console import format_evaluation_report

    report = api.evaluate(
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
        log=output.make_log(),
    )
    print_result(output, report.to_json, lambda: format_evaluation_report(report, verbose=verbose))


def label_issues(
    run: Run,
    /,
    *,
    out: File = None,
    relabel: File = None,
    data: DisallowNone[Annotated[str | None, metavar("DATA")]] = None,
    force: Flag = False,
    json: Annotated[bool, arg(help_behavior_hint="")] = False,
) -> None:
    """List labels that look wrong, or write a table of all images with corrected labels.

    The labels look wrong to a model that was not trained on them.

    Args:
        run: Folder of a run of train or crossval.
        out: Table to write (.csv, .parquet): all labelled images with corrected labels, to train on.
        relabel: Table of corrected labels for --out (default: those that the run was trained with).
        data: The images, if they have been moved.
        force: Replace an existing table.
        json: Print the result to stdout as JSON.
    """
    output = OutputOptions(json=json)
    if out is not None:
        from pixelplay.outputs.corrected_table import export_corrected

        table = export_corrected(run, out, relabel, data, force=force, log=output.make_log())
        print_result(output, table.to_json, table.summary)
        return
    if unused := [
        f"--{name}" for name, value in (("relabel", relabel), ("data", data), ("force", force)) if value
    ]:
        raise ConfigError(f"{unused[0]} has no effect without --out")
    from pixelplay.outputs.console import format_label_issues
    from pixelplay.outputs.label_issues import read_label_issues

    report = read_label_issues(run)
    print_result(output, report.to_json, lambda: format_label_issues(report))


def report(
    run: Run,
    /,
    *,
    data: DisallowNone[Annotated[str | None, metavar("DATA")]] = None,
    out: File = None,
    force: Flag = False,
    compute: ComputeConfig = ComputeConfig(),
    output: LogOptions = LogOptions(),
) -> None:
    """Write the HTML report of a run: one file that also opens offline.

    Args:
        run: Folder of a run, or of its model.
        data: The images, if they have been moved.
        out: File to write (default: RUN/report.html).
        force: Replace a file that is not a report.
    """
    from pixelplay.outputs.report import build

    path = build.report(run, data, out=out, force=force, compute=compute, log=output.make_log())
    print(f"wrote {printable(path)}")


def predict(
    run: Run,
    images: Images,
    /,
    *,
    out: File = None,
    submission: File = None,
    probability_of: ClassName = None,
    path_column: Column = None,
    images_dir: Folder = None,
    ensemble_with: EnsembleWith = (),
    tta: Views = None,
    strict: Flag = False,
    force: Flag = False,
    uncertainty: UncertaintyConfig = UncertaintyConfig(),
    compute: ComputeConfig = ComputeConfig(),
    output: OutputOptions = OutputOptions(),
) -> None:
    """Classify images: print a line, or write a table with a row, for each image.

    Args:
        run: Folder of a run, or of its model.
        images: Folders, files, tables or zip archives; - reads a list of files from stdin.
        out: Table to write (.csv, .parquet); - writes CSV to stdout (default: print the predictions).
        submission: Sample submission; the output has exactly its header, ids and order.
        probability_of: Class whose probability fills the only column of the sample (default: the prediction).
        path_column: Table column with the image paths (default: found by its usual names).
        images_dir: Folder that the paths of a table are relative to (default: the folder of the table).
        ensemble_with: Other runs; the probabilities are averaged, the novelty is that of RUN.
        tta: Test-time augmentation: none, flip (default: as in training).
        strict: Exit with status 1 if any image is unreadable.
        force: Replace an existing table.
    """
    sources = read_sources(images)
    from pixelplay import api
    from pixelplay.outputs.predictions_table import CsvTable, JsonPredictions, PrintedPredictions

    rows, is_printed = JsonPredictions(), out in (None, "-")
    printer = CsvTable(sys.stdout, ()) if out == "-" else PrintedPredictions(sys.stdout)
    summary = api.predict(
        run,
        sources,
        out if out is not None and not is_printed else rows if output.json else printer,
        submission=submission,
        probability_of=probability_of,
        path_column=path_column,
        images_dir=images_dir,
        force=force,
        ensemble_with=ensemble_with,
        tta=tta,
        uncertainty=uncertainty,
        compute=compute,
        log=output.make_log(),
    )
    if not is_printed:
        has_sample = submission is not None
        print_result(output, summary.to_json, lambda: summary.describe(str(out), submission=has_sample))
    elif output.json:
        print(json.dumps(rows.rows, indent=1, allow_nan=False))
    if summary.n_unreadable and strict:
        raise PixelPlayError(
            f"{counted(summary.n_unreadable, 'image')} could not be read, which --strict does not allow; "
            f"first: {summary.errors[0]}"
        )


def explain(
    run: Run,
    images: Images,
    /,
    *,
    out: Annotated[str, arg(metavar="FOLDER")],
    class_name: DisallowNone[
        Annotated[str | None, arg(name="class", metavar="CLASS", help_behavior_hint="")]
    ] = None,
    method: DisallowNone[Annotated[CamName | None, metavar("METHOD")]] = None,
    path_column: Column = None,
    images_dir: Folder = None,
    ensemble_with: EnsembleWith = (),
    force: Flag = False,
    compute: ComputeConfig = ComputeConfig(),
    output: LogOptions = LogOptions(),
) -> None:
    """Draw heat maps of the image regions that support a class.

    Args:
        run: Folder of a run, or of its model.
        images: Folders, files, tables or zip archives; - reads a list of files from stdin.
        out: Folder to write: overlays, raw maps and explanations.csv.
        class_name: Class to explain (default: the predicted class of each image).
        method: gradcam, gradcam++, layercam (default: layercam, the most faithful in our benchmark).
        path_column: Table column with the image paths (default: found by its usual names).
        images_dir: Folder that the paths of a table are relative to (default: the folder of the table).
        ensemble_with: Other runs to explain together with RUN, as an ensemble.
        force: Replace a folder of explanations.
    """
    sources = read_sources(images)
    from pixelplay import api

    api.explain(
        run,
        sources,
        out,
        class_name=class_name,
        method=method,
        path_column=path_column,
        images_dir=images_dir,
        force=force,
        ensemble_with=ensemble_with,
        compute=compute,
        log=output.make_log(),
    )
    print(f"wrote {printable(os.path.join(out, 'explanations.csv'))}")


def cache(*, cache_dir: Folder = None, clear: Flag = False) -> None:
    """Show or clear the cache of features, decoded pixels and augmented views.

    Args:
        cache_dir: Cache folder (default: the user's cache folder).
        clear: Delete the contents of the cache.
    """
    from pixelplay.data.cache import clear_cache, default_cache_dir, measure_cache

    folder = cache_dir or default_cache_dir()
    use = measure_cache(folder)
    if clear:
        clear_cache(folder)
    done = ", cleared" if clear else ""
    print(f"{folder}: {use.n_bytes / 1e6:,.1f} MB in {counted(use.n_files, 'file')}{done}")


def _is_finished(
    run: str,
    data: str,
    config: TrainConfig,
    about: dict[str, Any],
    output: OutputOptions,
    *,
    plan: str | None = None,
) -> bool:
    """Print the result and return True if this run is already finished with the same settings."""
    from pixelplay.training.run_dir import is_finished

    if plan is not None:
        from pixelplay.training.plan_file import apply_plan, has_same_plan, read_plan

        repeated = read_plan(plan)
        config = apply_plan(repeated, config)
        if not has_same_plan(run, repeated):
            return False
    if not is_finished(run, {**asdict(config), "source": os.path.abspath(data), **about}):
        return False
    if output.json:
        with open(os.path.join(run, "metrics.json"), encoding="utf-8") as file:
            print(file.read())
    else:
        print(f"{printable(run)} is finished; there is nothing to resume")
    return True


def _finish(
    done: "RunReport",
    compute: ComputeConfig,
    log: RunLog,
    output: OutputOptions,
    *,
    report: bool,
    verbose: bool,
) -> None:
    """Write the report of a finished run and print its result; a failed report does not fail the run."""
    from pixelplay.outputs.console import format_run_report
    from pixelplay.outputs.report import build

    path, interrupted = None, False
    try:
        path = build.report(done.run_dir, compute=compute, log=log) if report else None
    except (PixelPlayError, OSError) as error:
        log.info(f"could not write the report: {error}")
    except KeyboardInterrupt:
        interrupted = True
        log.info(f"no report was written; use pixelplay report {shlex.quote(done.run_dir)}")
    if output.json and path is not None:
        log.info(f"report: {path}")
    print_result(output, done.to_json, lambda: format_run_report(done, verbose=verbose, report_path=path))
    if interrupted:
        raise SystemExit(130)


COMMANDS: dict[str, Callable[..., None]] = {
    command.__name__.replace("_", "-"): command
    for command in (
        scan,
        train,
        crossval,
        evaluate,
        label_issues,
        report,
        predict,
        explain,
        export,
        serve,
        cache,
    )
}
