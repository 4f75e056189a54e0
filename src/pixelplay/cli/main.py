"""The command line: finds the command, and turns what goes wrong into one line and a status."""

import errno
import io
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import tyro
from tyro.conf import FlagCreatePairsOff

from pixelplay import __version__
from pixelplay.cli.commands import COMMANDS
from pixelplay.cli.options import find_recipe, find_repeated, registry_of_settings
from pixelplay.errors import PixelPlayError
from pixelplay.run_log import typed
from pixelplay.text import printable, suggest

DESCRIPTION = """Turn a folder of labelled images into an image classifier one can trust.
  pixelplay scan photos
  pixelplay train photos --out run
  pixelplay predict run new_photos --out predictions.csv

pixelplay COMMAND --help explains a command, pixelplay --version says which version this is."""
REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "; free some space, or write to another disk"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "; choose a place that you may write to"),
    errno.EMFILE: "; raise the limit with ulimit -n",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 our error, 2 usage, 130 interrupted."""
    _write_any_name(sys.stdout)
    words = sys.argv[1:] if argv is None else list(argv)
    token = typed.set(words)
    try:
        _run_command(words)
        sys.stdout.flush()
    except SystemExit as end:  # help was shown, or the usage was wrong
        return end.code if isinstance(end.code, int) else 0
    except PixelPlayError as error:
        return _fail(str(error), is_json="--json-progress" in words)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        _let_go_of_stdout()
        return 0
    except OSError as error:
        _let_go_of_stdout()
        return _fail(_explain(error), is_json="--json-progress" in words)
    except KeyboardInterrupt:
        is_training = {"train", "crossval"} & set(words[:1])
        way_on = "; a training that has begun goes on with --resume" if is_training else ""
        print(f"interrupted{way_on}", file=sys.stderr)
        return 130
    finally:
        typed.reset(token)
    return 0


def _run_command(argv: list[str]) -> None:
    if argv == ["--version"]:
        print(f"pixelplay {__version__}")
        return
    if argv and argv[0].isalpha() and argv[0] not in COMMANDS:
        hint = suggest(argv[0], list(COMMANDS))
        print(f"error: no command {argv[0]!r}{hint}; pixelplay --help lists all", file=sys.stderr)
        raise SystemExit(2)
    if (flag := find_repeated(argv)) is not None:
        print(
            f"error: {flag} is given more than once; give it once, with all its values behind it if it "
            "takes several",
            file=sys.stderr,
        )
        raise SystemExit(2)
    tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        prog="pixelplay",
        description=DESCRIPTION,
        args=argv,
        config=(FlagCreatePairsOff,),
        registry=registry_of_settings(find_recipe(argv)),
    )


def _fail(message: str, *, is_json: bool = False) -> int:
    line = printable(" ".join(message.split()))
    print(json.dumps({"error": line}) if is_json else f"error: {line}", file=sys.stderr)
    return 1


def _explain(error: OSError) -> str:
    """One line: which file, what happened, what to do."""
    where = f"{error.filename}: " if error.filename else ""
    remedy = REMEDIES.get(error.errno or 0, "")
    return f"{where}{error.strerror or error}{remedy}"


def _write_any_name(stream: Any) -> None:
    """Let names that are no valid text, and signs that a terminal lacks, be shown as escapes."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")


def _let_go_of_stdout() -> None:
    """Drop what stdout cannot take, lest Python complains about it at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
