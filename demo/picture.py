"""Draw the output of a command as an SVG image of a terminal.

Usage: make demo 2>/dev/null | python demo/picture.py docs/demo.svg
"""

import html
import sys

LINE_PX = 19
CHAR_PX = 8.4


def main(path: str) -> None:
    """Read the output from stdin and write the image."""
    lines = [line.rstrip() for line in sys.stdin.read().splitlines()]
    width = int(max(map(len, lines)) * CHAR_PX) + 40
    height = len(lines) * LINE_PX + 40
    texts = "\n".join(
        f'<text x="20" y="{30 + i * LINE_PX}" xml:space="preserve">{html.escape(line)}</text>'
        for i, line in enumerate(lines)
    )
    svg = f"""<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" role="img">
<rect width="100%" height="100%" rx="8" fill="#1d232b"/>
<g font-family="ui-monospace, Menlo, Consolas, monospace" font-size="14" fill="#dfe6ee">
{texts}
</g>
</svg>
"""
    with open(path, "w", encoding="utf-8") as file:
        file.write(svg)


if __name__ == "__main__":
    main(sys.argv[1])
