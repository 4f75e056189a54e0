"""Many small pictures → sheets that are looked over at once."""

import contextlib
import math
import os

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pixelplay.arrays import UInt8Array
from pixelplay.outputs.overlay import color
from pixelplay.text import printable

PER_SHEET, N_COLUMNS = 60, 6
CELL_PX, GAP_PX, LINE_PX = 200, 12, 17  # LINE_PX: of a caption
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
INK, PAPER, NO_PICTURE = (40, 40, 40), (255, 255, 255), (225, 225, 225)
FONT_PX = 13
# Pillow's own font has plain Latin letters only; one of these shows other names too
FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "Arial.ttf", "arial.ttf")
LEGEND = "none", "most evidence in the image"


class ContactSheets:
    """Writes contact.png, contact_02.png, … into a folder, a sheet as soon as it is full.

    Only the pictures of one sheet are kept in memory.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._cells: list[tuple[UInt8Array, list[str]]] = []
        self._n_sheets = 0

    def add(self, picture: UInt8Array | None, lines: list[str]) -> None:
        """Add a picture (H, W, 3) of at most CELL_PX, or an empty place, and lines below it."""
        if picture is None:
            picture = np.full((CELL_PX, CELL_PX, 3), NO_PICTURE, np.uint8)
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


def _draw_sheet(cells: list[tuple[UInt8Array, list[str]]]) -> Image.Image:
    n_columns = min(N_COLUMNS, len(cells))
    n_lines = max(len(lines) for _, lines in cells)
    across, down = CELL_PX + GAP_PX, CELL_PX + n_lines * LINE_PX + GAP_PX
    head = GAP_PX + LINE_PX
    width_px = max(n_columns, 2) * across + GAP_PX  # the legend needs two columns
    sheet = Image.new("RGB", (width_px, head + math.ceil(len(cells) / n_columns) * down + GAP_PX), PAPER)
    draw, font = ImageDraw.Draw(sheet), _font()
    _draw_legend(sheet, draw, font)
    for i, (picture, lines) in enumerate(cells):
        left, top = GAP_PX + i % n_columns * across, head + GAP_PX + i // n_columns * down
        height, width = picture.shape[:2]
        sheet.paste(Image.fromarray(picture), (left + (CELL_PX - width) // 2, top + CELL_PX - height))
        for j, line in enumerate(lines):
            draw.text((left, top + CELL_PX + 2 + j * LINE_PX), _shorten(line, draw, font), INK, font)
    return sheet


def _font() -> Font:
    for name in FONTS:
        with contextlib.suppress(OSError):
            return ImageFont.truetype(name, FONT_PX)
    return ImageFont.load_default(FONT_PX)


def _draw_legend(sheet: Image.Image, draw: ImageDraw.ImageDraw, font: Font) -> None:
    """What the colours mean, at the top: a bar from the coldest to the hottest between two words."""
    bar_px = CELL_PX // 2
    bar = np.tile(color(np.linspace(0, 1, bar_px, dtype=np.float32))[None], (LINE_PX - 5, 1, 1))
    draw.text((GAP_PX, GAP_PX), LEGEND[0], INK, font)
    left = GAP_PX + math.ceil(draw.textlength(f"{LEGEND[0]} ", font))
    sheet.paste(Image.fromarray(bar.round().astype(np.uint8)), (left, GAP_PX + 2))
    draw.text((left + bar_px + 6, GAP_PX), LEGEND[1], INK, font)


def _shorten(line: str, draw: ImageDraw.ImageDraw, font: Font) -> str:
    """A line that fits below its picture; of a long one the end, which tells names apart."""
    line = printable(line)[-60:]  # more never fit
    while draw.textlength(line, font) > CELL_PX:
        line = f"…{line[2:]}"
    return line
