"""Tables as text: aligned columns for a terminal, or Markdown."""

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], *, left: int = 1, markdown: bool = False) -> str:
    """Rows of cells as lines; the first row holds the heads.

    Args:
        rows: cells as text. On a terminal a row may be longer than the heads: what is past them is
            written at its end as it is, empty text and None left out.
        left: columns that are flush left, from the first one; the others are flush right.
        markdown: bars between the cells and a line below the heads.

    Returns:
        The lines, without a newline at the end.
    """
    width = len(rows[0])
    if markdown:
        sides = ["---"] * left + ["---:"] * (width - left)
        rows = [[markdown_text(cell) for cell in row] for row in rows]
        return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], sides, *rows[1:]])
    widths = [max(len(row[i]) for row in rows) for i in range(width)]
    aligned = [f"{'<' if i < left else '>'}{widths[i]}" for i in range(width)]
    lines = []
    for row in rows:
        cells = map(format, row, aligned)
        lines.append("  ".join([*cells, *filter(None, row[width:])]))
    return "\n".join(lines)


def markdown_text(text: str) -> str:
    """Text with what Markdown would take for the border of a cell escaped."""
    return text.replace("\\", "\\\\").replace("|", "\\|")


def number(value: float | None, decimals: int = 1, missing: str = "-") -> str:
    """A number with so many decimals; ``missing`` in place of None."""
    return missing if value is None else f"{value:.{decimals}f}"
