"""A forked process can load a model, although its parent already has."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import multiprocessing as mp
import sys
import torch
torch.set_num_threads(4)
import pixelplay
run, image = sys.argv[1:]
def child(queue):
    queue.put(pixelplay.Predictor(run).predict([image]).prediction)
if __name__ == "__main__":
    expected = pixelplay.Predictor(run).predict([image]).prediction
    context = mp.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    assert queue.get(timeout=60) == expected
    process.join()
    with context.Pool(2) as pool:
        assert pool.map(len, [[1], [1, 2]]) == [1, 2]
    print("done")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks are the default on Linux only")
def test_forked_process_predicts_like_its_parent(tiny_run: Path, drawn_images: Path, tmp_path: Path) -> None:
    script = tmp_path / "fork.py"
    script.write_text(SCRIPT)
    image = sorted((drawn_images / "bars").iterdir())[0]
    done = subprocess.run(
        [sys.executable, script, tiny_run, image], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
