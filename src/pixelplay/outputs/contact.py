"""Many small pictures → sheets that are looked over at once."""

import math
import os

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pixelplay.errors import printable

PER_SHEET, N_COLUMNS = 60, 6
CELL_PX, GAP_PX, LINE_PX = 200, 12, 17  # LINE_PX: of a caption
INK, PAPER = (40, 40, 40), (255, 255, 255)


class ContactSheets:
    """Writes contact.png, contact_02.png, … into a folder, a sheet as soon as it is full.

    Only the pictures of one sheet are kept in memory.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._cells: list[tuple[NDArray[np.uint8], list[str]]] = []
        self._n_sheets = 0

    def add(self, picture: NDArray[np.uint8], lines: list[str]) -> None:
        """Add a picture (H, W, 3) of at most CELL_PX, and two lines below it."""
        self._cells.append((picture, lines))
        if len(self._cells) == PER_SHEET:
            self.close()

    def close(self) -> None:
        """Write what waits for a full sheet."""
        if not self._cells:
            return
        self._n_sheets += 1
        name = "contact.png" if self._n_sheets == 1 else f"contact_{self._n_sheets:02}.png"
        _draw_sheet(self._cells).save(os.path.join(self._folder, name), format="PNG")
        self._cells = []


def _draw_sheet(cells: list[tuple[NDArray[np.uint8], list[str]]]) -> Image.Image:
    n_columns = min(N_COLUMNS, len(cells))
    across, down = CELL_PX + GAP_PX, CELL_PX + 2 * LINE_PX + GAP_PX
    size = n_columns * across + GAP_PX, math.ceil(len(cells) / n_columns) * down + GAP_PX
    sheet = Image.new("RGB", size, PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for i, (picture, lines) in enumerate(cells):
        left, top = GAP_PX + i % n_columns * across, GAP_PX + i // n_columns * down
        height, width = picture.shape[:2]
        sheet.paste(Image.fromarray(picture), (left + (CELL_PX - width) // 2, top + CELL_PX - height))
        for j, line in enumerate(lines):
            draw.text((left, top + CELL_PX + 2 + j * LINE_PX), _shorten(line, draw, font), INK, font)
    return sheet


def _shorten(line: str, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """A line that fits below its picture; of a long one the end, which tells names apart."""
    line = printable(line)[-60:]  # more never fit
    while draw.textlength(line, font) > CELL_PX:
        line = f"…{line[2:]}"
    return line
