"""Start `pixelplay serve` in a process of its own, as a user does."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunningServer:
    """A server that listens; its log is in a file."""

    process: subprocess.Popen[str]
    url: str
    log: Path

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])


@contextmanager
def start_server(run: Path | str, log: Path, options: Sequence[str] = ()) -> Iterator[RunningServer]:
    """Start a server on a free port; on leaving, it must stop with status 0 after SIGTERM."""
    command = [sys.executable, "-m", "pixelplay", "serve", str(run), "--port", "0", *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.search(r"http://\S+", line)
            assert found is not None, (line, log.read_text())
            yield RunningServer(process, found[0], log)
            process.terminate()
            assert process.wait(60) == 0, log.read_text()
        finally:
            process.kill()


def serve_once(words: Sequence[str]) -> int:
    """Run a documented `serve RUN [--port N]` on a free port until it listens; return its exit status."""
    command, run, *options = words
    assert command == "serve"
    assert not options or options[0] == "--port"
    with start_server(run, Path("serve.log"), options[2:]) as server:
        pass
    return server.process.returncode
