"""The typer application that every command is added to."""

from __future__ import annotations

from typing import Annotated

import typer

import dinoexport

EXIT_CODES = (
    "Exit codes: 0 ok, 1 validation failed, 2 usage or recipe, 3 weights, 4 environment, 5 build, 130 interrupted."
)

app = typer.Typer(
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
