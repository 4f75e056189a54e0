"""Usage errors: one line that names the option, the value, and what was probably meant."""

import contextlib
import difflib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

from pixelplay.cli.help import Option

# what other tools call our options; DATA, RUN and IMAGES are named without a flag
SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "--backbone": ("model", "arch", "architecture", "network", "net", "encoder"),
    "--train-batch-size": ("batch", "bs", "batchsize", "batch-size"),
    "--batch-size": ("batch", "bs", "batchsize"),
    "--device": ("gpu", "cuda", "accelerator"),
    "--epochs": ("epoch", "n-epochs", "num-epochs", "max-epochs"),
    "--force": ("overwrite", "exist-ok", "yes"),
    "--fit": ("resize", "resize-mode", "crop-mode"),
    "--input-size": ("img-size", "image-size", "imgsz", "size", "resolution", "px"),
    "--label-column": ("label-col", "target", "target-column", "class-column"),
    "--lr": ("learning-rate", "lr0", "max-lr"),
    "--n-folds": ("folds", "k", "k-folds", "kfold", "n-splits", "cv"),
    "--num-workers": ("workers", "jobs", "n-jobs", "threads"),
    "--out": ("o", "output", "output-dir", "out-dir", "outdir", "save-dir", "save", "project", "dest"),
    "--path-column": ("path-col", "image-column", "file-column", "filename-column"),
    "--precision": ("amp", "fp16", "half", "dtype"),
    "--seed": ("random-state", "random-seed"),
    "--test-frac": ("test-split", "test-size", "test-fraction", "holdout"),
    "--time-budget": ("budget", "time", "time-limit", "max-time"),
    "--val-frac": ("val-split", "val-size", "validation-split", "val-fraction", "valid-pct"),
    "--weights": ("checkpoint", "pretrained", "ckpt"),
    "DATA": ("data", "data-dir", "dataset", "input", "source", "train-dir", "folder"),
    "RUN": ("run", "model", "checkpoint", "ckpt", "weights"),
    "IMAGES...": ("images", "image", "input", "source", "files", "test", "data"),
}


def find_usage_error(words: Sequence[str], options: Sequence[Option]) -> str | None:
    """Find the first unknown, incomplete or missing option on a command line; None if there is none.

    Args:
        words: of the command line, without program and command.
    """
    usage = {each.usage.split(" ")[0]: each for each in options}
    positionals = [each for each in options if not each.usage.startswith("--")]
    takes_value = {flag for flag, each in usage.items() if " " in each.usage}
    n_positional, before = 0, ""
    for word, following in zip(words, [*words, None][1:], strict=True):
        name, equals, _ = word.partition("=")
        flag = name.replace("_", "-")
        if word == "-" or not re.match(r"--?[A-Za-z]", word):
            n_positional += before not in takes_value
        elif flag not in usage:
            return f"unknown option {name}{_suggest_option(flag, usage)}"
        elif flag in takes_value and not equals and _is_missing(following, usage[flag]):
            return f"{flag} needs a value: {usage[flag].usage}"
        before = "" if equals else flag if flag in usage else before if _is_list(before, usage) else ""
    needed = [each for each in positionals if each.required]
    if n_positional < len(needed):
        return f"{needed[n_positional].usage} is missing: {needed[n_positional].text}"
    typed = {word.partition("=")[0].replace("_", "-") for word in words}
    missing = [
        each for flag, each in usage.items() if each.required and flag.startswith("--") and flag not in typed
    ]
    if missing:
        return f"{missing[0].usage} is missing: {missing[0].text}"
    return None


def _is_missing(following: str | None, option: Option) -> bool:
    """Return whether no value follows an option that takes one; a list may be empty."""
    is_flag = following is not None and re.match(r"--[A-Za-z]", following) is not None
    return (following is None or is_flag) and "..." not in option.usage


def _is_list(flag: str, usage: Mapping[str, Option]) -> bool:
    return flag in usage and "..." in usage[flag].usage


def _suggest_option(flag: str, usage: Mapping[str, Option]) -> str:
    """Suggest the options that another tool calls so, or that are spelled like it."""
    name = flag.lstrip("-").lower()
    meant = [each for each, names in SYNONYMS.items() if name in names and each in usage]
    if meant and not meant[0].startswith("--"):
        return f"; write {meant[0]} without an option"
    if not meant:
        known = [each.removeprefix("--") for each in usage if each.startswith("--")]
        meant = [f"--{each}" for each in difflib.get_close_matches(name, known, n=2)]
    return f"; did you mean {' or '.join(meant)}?" if meant else ""


@contextlib.contextmanager
def one_line_errors(refuse: Callable[[str], None]) -> Iterator[None]:
    """Turn the boxes that tyro prints for wrong values into one line.

    They are laid out for 80 columns: in a terminal of a few columns the layout does not end.

    Args:
        refuse: prints the line and exits.
    """
    columns, printed = os.environ.get("COLUMNS"), io.StringIO()
    os.environ["COLUMNS"] = "80"
    try:
        with contextlib.redirect_stderr(printed):
            yield
    except SystemExit as end:
        if end.code != 2 or not (text := printed.getvalue()).startswith("╭"):
            sys.stderr.write(printed.getvalue())
            raise
        refuse(_summarize_box(text))
    finally:
        os.environ.pop("COLUMNS") if columns is None else os.environ.update(COLUMNS=columns)


def _summarize_box(text: str) -> str:
    """Return the first paragraph of a box in one line."""
    rows = [line.strip("│ ") for line in text.splitlines()[1:]]
    end = next((i for i, row in enumerate(rows) if not row or row.startswith(("──", "╰"))), len(rows))
    line = " ".join(rows[:end])
    if found := re.match(r"Error parsing (\S+): .*'(.*)'\]?\.?", line):
        return f"{found[1]} {found[2]!r} has the wrong form"
    line = line.replace("'None', ", "")
    line = re.sub(
        r"^invalid choice ('.*') for argument '(\S+)'. Expected one of \((.*)\)\.$",
        r"\2 \1 is not one of \3",
        line,
    )
    return line.rstrip(".").replace("Unrecognized options: ", "unexpected argument ")
