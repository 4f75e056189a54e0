"""Sub-commands that let a finished model answer about photographs: parse, call, print."""

import os
from typing import Annotated

from tyro.conf import DisallowNone, arg

from pixelplay.config import CautionConfig, Column, ComputeConfig, File, Flag, Folder, Method, Tta, shown
from pixelplay.errors import PixelPlayError
from pixelplay.options import CautionSection, ComputeSection, Images, Run, WithRuns, check_some, expand_stdin
from pixelplay.run_log import Journal
from pixelplay.text import counted, printable


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
    with_runs: WithRuns = (),
    tta: DisallowNone[Annotated[Tta | None, shown()]] = None,
    caution: CautionSection = CautionConfig(),  # noqa: B008 - frozen
    compute: ComputeSection = ComputeConfig(),  # noqa: B008 - frozen
    strict: Flag = False,
    force: Flag = False,
    quiet: Flag = False,
    json_progress: Flag = False,
) -> None:
    """Classify photographs into a table, one row for each.

    Args:
        run: Folder of a run, or of its model.
        images: Folders, files, tables or zip archives; - reads a list of files from stdin.
        out: Table to write, .csv or .parquet.
        submission: Sample submission whose header, ids and order the output takes exactly.
        probability_of: Class whose probability the sample's one column wants (default: labels go there).
        path_column: Column of a table that names the photograph.
        images_dir: Folder that the names in a table are looked up in (default: the table's own).
        with_runs: Other runs that answer with this one, by the mean of their probabilities; novelty is RUN's.
        tta: Views that are answered for together: none, flip, multicrop (default: as the model was learned).
        strict: Exit with status 1 if any photograph could not be read.
        force: Replace an existing table.
        quiet: Say nothing on stderr but errors.
        json_progress: Say progress and notes as JSON on stderr, an object a line, for programs.
    """
    check_some(images)
    from pixelplay import workflow

    tally = workflow.predict(
        run,
        list(expand_stdin(images)),
        out,
        submission=submission,
        probability_of=probability_of,
        path_column=path_column,
        images_dir=images_dir,
        is_forced=force,
        with_runs=with_runs,
        tta=tta,
        caution=caution,
        compute=compute,
        journal=Journal(quiet=quiet, is_json=json_progress),
    )
    print(f"wrote {printable(out)}: {printable(tally.describe())}")
    if tally.n_bad and strict:
        raise PixelPlayError(
            f"{counted(tally.n_bad, 'photograph')} could not be read, and --strict is set; "
            f"first: {tally.errors[0]}"
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
    method: DisallowNone[Annotated[Method | None, shown()]] = None,
    path_column: Column = None,
    images_dir: Folder = None,
    with_runs: WithRuns = (),
    compute: ComputeSection = ComputeConfig(),  # noqa: B008 - frozen
    force: Flag = False,
    quiet: Flag = False,
    json_progress: Flag = False,
) -> None:
    """Show where in photographs a classifier sees a class.

    Args:
        run: Folder of a run, or of its model.
        images: Folders, files, tables or zip archives; - reads a list of files from stdin.
        out: Folder to write: overlays, raw maps, contact sheets and explanations.csv.
        label: Class to explain (default: of each photograph the one that the model decides for).
        method: gradcam, gradcam++, layercam (default: layercam, the most faithful measured).
        path_column: Column of a table that names the photograph.
        images_dir: Folder that the names in a table are looked up in (default: the table's own).
        with_runs: Other runs that are explained with this one, as they answer together.
        force: Replace a folder of explanations.
        quiet: Say nothing on stderr but errors.
        json_progress: Say progress and notes as JSON on stderr, an object a line, for programs.
    """
    check_some(images)
    from pixelplay import workflow

    sources = list(expand_stdin(images))
    workflow.explain(
        run,
        sources,
        out,
        label=label,
        method=method,
        path_column=path_column,
        images_dir=images_dir,
        is_forced=force,
        with_runs=with_runs,
        compute=compute,
        journal=Journal(quiet=quiet, is_json=json_progress),
    )
    print(f"wrote {printable(os.path.join(out, 'explanations.csv'))}")
