"""The typer application that every command is added to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

import dinoexport
from dinoexport.cli.escaping import paragraph

EXIT_CODES = (
    "Exit codes: 0 ok, 1 validation failed, 2 usage or recipe, 3 weights, 4 environment, 5 build, 130 interrupted."
)


@contextmanager
def _escaped() -> Iterator[None]:
    """Escapes words of the command line in typer's messages: typer itself does not escape marks of text direction."""
    try:
        yield
    except TyperException as refused:
        if hasattr(refused, "message"):
            refused.message = paragraph(str(refused.message))
        raise


class _Verbs(TyperGroup):
    """All commands. A wrong word is refused while a command line is parsed, which is before `reporting` begins."""

    def make_context(self, *args: Any, **named: Any) -> Any:
        with _escaped():
            return super().make_context(*args, **named)

    def invoke(self, *args: Any, **named: Any) -> Any:
        with _escaped():
            return super().invoke(*args, **named)


app = typer.Typer(
    cls=_Verbs,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help answers in two thirds of the time
    pretty_exceptions_enable=False,
    epilog=EXIT_CODES,
    help="Export a checkpoint to ONNX and TensorRT, and prove that the outputs are still PyTorch's.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(dinoexport.__version__)
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass
