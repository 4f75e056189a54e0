"""Notes about the data before training."""

import os
from pathlib import Path

from pixelplay.training.prepare import _name_group


def test_group_of_near_duplicates_names_three_images() -> None:
    assert _name_group(["bars/1.png", "bars/2.png"]) == "bars/1.png = bars/2.png"
    assert _name_group([f"bars/{i}.png" for i in range(5)]) == (
        "bars/0.png = bars/1.png = bars/2.png = 2 more"
    )


def test_group_of_near_duplicates_shortens_absolute_paths(tmp_path: Path) -> None:
    paths = [str(tmp_path / "images" / name) for name in ("1.png", "2.png")]
    assert _name_group(paths) == " = ".join(os.path.join("images", name) for name in ("1.png", "2.png"))
