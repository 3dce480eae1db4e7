"""Rows and facts as tables for a terminal. Nothing is printed here, and rich is loaded only when a table is made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dinoexport.cli.escaping import printable

if TYPE_CHECKING:
    from rich.table import Table


def table(title: str, rows: list[dict[str, Any]]) -> Table:
    """A table of rows; the keys of the first row are the header."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=Text(printable(title)), title_justify="left")
    for i, column in enumerate(rows[0] if rows else ()):
        shown.add_column(Text(printable(column)), no_wrap=i == 0, overflow="fold")  # nothing is cut
    for row in rows:
        shown.add_row(
            *(Text(printable(_cell(value))) for value in row.values())
        )  # Text, so that brackets are not read as markup
    return shown


def _cell(value: Any) -> str:
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
