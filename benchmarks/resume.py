"""Killed and resumed runs give the same model files as an uninterrupted run.

Uses the first images of each class. Every run is a whole command in its own process, killed with SIGKILL
at two random instants and continued with --resume. The files of the models are compared byte by byte.

Expected: all runs are equal, and no temporary files are left next to them.

Usage: python benchmarks/resume.py DATA [--runs 10] [--per-class 20] [--finetune none partial full]
"""

import random
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from commands import pixelplay_command, write_table
from pixelplay.data.sources import open_dataset
from records import Record, make_parser

# a head that starts from the linear probe would be worse than the probe after so few epochs, and discarded
RANDOM_START = ["--head-init", "random", "--ensemble-probe", "off"]
OPTIONS = {"none": [], "partial": RANDOM_START, "full": RANDOM_START}


def read_model(run: Path) -> dict[str, bytes]:
    """Return the files of a model."""
    return {path.name: path.read_bytes() for path in sorted((run / "model").iterdir())}


def kill_and_resume(command: Sequence[str], out: Path, usual_s: float, rng: random.Random) -> int:
    """Run a command that is killed at two random instants, then let it finish; return the number of kills."""
    words = [*command, "--out", str(out), "--resume"]
    n_kills = 0
    for _ in range(2):
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0, usual_s))
        n_kills += process.poll() is None
        process.kill()
        process.wait()
    if not out.exists():
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return n_kills


def main() -> None:
    """Kill and resume several runs of each training method."""
    parser = make_parser(__doc__)
    parser.add_argument("data")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--per-class", type=int, default=20, help="images of each class [20]")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--finetune", nargs="+", choices=list(OPTIONS), default=list(OPTIONS))
    args = parser.parse_args()
    rng, dataset = random.Random(0), open_dataset(args.data)
    record = Record("Robustness", "Killed at two random instants and resumed", args.record)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows = [
            (dataset.paths[i], name)
            for k, name in enumerate(dataset.classes)
            for i in np.flatnonzero(dataset.labels == k)[: args.per_class]
        ]
        write_table(folder / "table.csv", ("path", "label"), rows)
        for method in args.finetune:
            options = ["--images-dir", args.data, "--finetune", method, *OPTIONS[method]]
            options += ["--cache-dir", f"{folder}/cache"]
            options += [] if method == "none" else ["--epochs", str(args.epochs)]
            command = pixelplay_command("train", folder / "table.csv", options)
            undisturbed = folder / f"{method}-undisturbed"
            for _ in range(2):  # the first run fills the cache, the second is timed
                start = time.perf_counter()
                words = [*command, "--out", str(undisturbed), "--force"]
                subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
                usual_s = time.perf_counter() - start
            n_equal, n_kills = 0, 0
            for n in range(args.runs):
                out = folder / f"{method}-{n}"
                n_kills += kill_and_resume(command, out, usual_s, rng)
                left = [path for path in folder.iterdir() if path.name.startswith(f"{out.name}.")]
                n_equal += read_model(out) == read_model(undisturbed) and not left
            print(
                f"{method}: {n_equal} of {args.runs} equal after {n_kills} kills, {usual_s:.0f} s", flush=True
            )
            record.add(
                args.data,
                f"first {args.per_class} of each class",
                f"--finetune {method}",
                {"runs": args.runs, "equal runs": n_equal, "kills": n_kills},
                seconds=usual_s,
            )
    record.write()


if __name__ == "__main__":
    main()
