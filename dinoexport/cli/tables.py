"""Rows and facts as tables for a terminal. Nothing is printed here, and rich is loaded only when a table is made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dinoexport.cli.escaping import printable

if TYPE_CHECKING:
    from rich.table import Table


def table(title: str, rows: list[dict[str, Any]], *, breaks: str | None = None) -> Table:
    """A table of rows; the keys of the first row are the header.

    breaks: the only column whose cells are broken into lines, and headings then are at each space; None: every column
    but the first.
    """
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=Text(printable(title)), title_justify="left")
    for i, column in enumerate(rows[0] if rows else ()):
        whole = i == 0 if breaks is None else column != breaks
        words = [column] if breaks is None else column.split(" ")
        shown.add_column(Text("\n".join(map(printable, words))), no_wrap=whole, overflow="fold")  # nothing is cut
    for row in rows:
        shown.add_row(
            *(Text(printable(cell(value))) for value in row.values())
        )  # Text, so that brackets are not read as markup
    return shown


def cell(value: Any) -> str:
    """A value as it is shown."""
    if value is None:
        return "-"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def facts(title: str, named: dict[str, str]) -> Table:
    """A row for each fact, without a header."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=Text(printable(title)), title_justify="left", show_header=False)
    for key, value in named.items():
        shown.add_row(Text(printable(key)), Text(printable(value)))
    return shown
