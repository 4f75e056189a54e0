"""Run one command; an error becomes one line on stderr and an exit status."""

import errno
import functools
import io
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NoReturn

import tyro
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes

from pixelplay import __version__
from pixelplay.cli.commands import COMMANDS
from pixelplay.cli.help import command_options, format_help, format_overview
from pixelplay.cli.options import SETTINGS, find_recipe, find_repeated, settings_registry, words_typed
from pixelplay.cli.usage import find_usage_error, one_line_errors
from pixelplay.config import RECIPES, field_types
from pixelplay.errors import PixelPlayError
from pixelplay.text import printable, suggest

REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "; free some space or use another disk"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "; choose a place you may write to"),
    errno.EMFILE: "; raise the limit with ulimit -n",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        Exit status: 0 done, 1 error, 2 wrong usage, 130 interrupted.
    """
    _replace_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):  # escape characters that the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    words = sys.argv[1:] if argv is None else list(argv)
    token = words_typed.set(words)
    try:
        _run_command(words)
        sys.stdout.flush()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except PixelPlayError as error:
        return _fail(_name_flags(str(error)), words)
    except BrokenPipeError:  # the reader, such as head, has closed the pipe
        _discard_stdout()
        return 0
    except OSError as error:
        _discard_stdout()
        return _fail(_describe(error), words)
    except KeyboardInterrupt:
        print(f"interrupted{_what_was_kept(words)}", file=sys.stderr)
        return 130
    finally:
        words_typed.reset(token)
    return 0


def _replace_closed_streams() -> None:
    """Send output to nowhere where stdout or stderr is closed.

    Without stderr, notes would be printed to stdout; and the next file opened would get the descriptor of a
    closed stream, to which libraries write.
    """
    if sys.stdin is None:
        os.open(os.devnull, os.O_RDONLY)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


def _run_command(words: list[str]) -> None:
    if words == ["--version"]:
        print(f"pixelplay {__version__}")
        return
    if not words or words[0] in ("-h", "--help", "--help-all"):
        print(format_overview(COMMANDS), file=sys.stdout if words else sys.stderr)
        raise SystemExit(0 if words else 2)
    name, *rest = words
    if name not in COMMANDS:
        _refuse(f"unknown command {name!r}{suggest(name, list(COMMANDS))}; see pixelplay --help")
    if {"-h", "--help", "--help-all"} & {*rest}:
        config = RECIPES[find_recipe(rest)]()
        print(format_help(name, COMMANDS[name], config, full="--help-all" in rest))
        return
    if (flag := find_repeated(rest)) is not None:
        _refuse(f"{flag} is repeated; use it once, followed by all its values if it takes several")
    hint = f"; see pixelplay {name} --help"
    if problem := find_usage_error(rest, command_options(COMMANDS[name], RECIPES[find_recipe(rest)]())):
        _refuse(problem + hint)
    with one_line_errors(lambda problem: _refuse(problem + hint)):
        run = tyro.cli(
            _partial(COMMANDS[name]),
            prog=f"pixelplay {name}",
            args=rest,
            config=(FlagCreatePairsOff, OmitArgPrefixes),
            registry=settings_registry(find_recipe(rest)),
        )
    run()


def _partial(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """Return a function of the same signature that binds its arguments; tyro calls what it parses for."""

    @functools.wraps(command)
    def bind(*args: Any, **settings: Any) -> Callable[[], None]:
        return functools.partial(command, *args, **settings)

    return bind


def _what_was_kept(words: Sequence[str]) -> str:
    """Say how to continue an interrupted training, or that there is nothing to continue from."""
    if words[:1] not in (["train"], ["crossval"]):
        return ""
    parts = [part for word in words for part in (word.split("=", 1) if word.startswith("--out=") else [word])]
    out = next((value for flag, value in pairwise(parts) if flag == "--out"), None)
    if out is None or not os.path.isdir(f"{os.path.realpath(out)}.partial"):
        return " before training had started; the next run reuses what is in the cache"
    return f"; {'replace --force by' if '--force' in words else 'add'} --resume to continue"


def _refuse(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def _fail(message: str, words: Sequence[str]) -> int:
    line = printable(" ".join(message.split()))
    print(json.dumps({"error": line}) if "--json-progress" in words else f"error: {line}", file=sys.stderr)
    return 1


def _name_flags(message: str) -> str:
    """Replace settings by their flags: "time_budget='5x'" becomes "--time-budget '5x'"."""
    settings = {name for each in (*SETTINGS, *COMMANDS.values()) for name in field_types(each)}

    def flag(found: re.Match[str]) -> str:
        name, equals = found[1] or found[3], found[2] or ""
        return f"--{name.replace('_', '-')}{equals and ' '}" if name in settings else found[0]

    # a name without a value needs a space before and an underscore: it may be the start of a path, or a word
    return re.sub(r"(?<!\S)([a-z_]+)(=)|(?<=\s)([a-z]+_[a-z_]+)(?=[\s,;]|$)", flag, message)


def _describe(error: OSError) -> str:
    """Describe a system error in one line: file, reason, remedy."""
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}{REMEDIES.get(error.errno or 0, '')}"


def _discard_stdout() -> None:
    """Redirect a broken stdout to nowhere, so that Python does not report it again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
