"""Cells of a table that a spreadsheet does not run as formulas, and the way back."""

_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def safe_path(path: str) -> str:
    """A path that is no formula and still opens the same file."""
    return f"./{path}" if path.startswith(_FORMULA_STARTS) else path


def safe_label(label: str) -> str:
    """A text cell that is no formula."""
    return f"'{label}" if label.lstrip("'").startswith(_FORMULA_STARTS) else label


def plain_path(cell: str) -> str:
    """The path behind a safe one."""
    return cell[2:] if cell.startswith("./") and cell[2:].startswith(_FORMULA_STARTS) else cell


def plain_label(cell: str) -> str:
    """The text behind a safe one."""
    return cell[1:] if cell.startswith("'") and cell.lstrip("'").startswith(_FORMULA_STARTS) else cell
