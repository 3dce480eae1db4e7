"""The verbs push and pull: a bundle as an OCI artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dinoexport.cli.app import EXIT_CODES, app
from dinoexport.cli.places import BundleArgument, folder_of
from dinoexport.cli.terminal import Json, progress_lines, reporting, say, say_json

PlainHttp = Annotated[bool, typer.Option("--plain-http", help="Use http, as for a registry on this machine.")]


@app.command(epilog=EXIT_CODES)
def push(
    bundle: BundleArgument,
    reference: Annotated[str, typer.Argument(metavar="HOST/NAME:TAG", help="Where it goes in a registry.")],
    plain_http: PlainHttp = False,
    as_json: Json = False,
) -> None:
    """Push a bundle to an OCI registry, its signature with it, and print its digest."""
    with reporting(as_json):
        from dinoexport.bundle import registry

        pushed = registry.push(folder_of(bundle), reference, plain_http=plain_http)
        if as_json:
            say_json({"reference": pushed})
            return
        say(f"Pushed: {pushed}")


@app.command(epilog=EXIT_CODES)
def pull(
    reference: Annotated[
        str, typer.Argument(metavar="HOST/NAME:TAG|@sha256:DIGEST", help="A bundle in a registry; a digest pins it.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The new folder.")],
    plain_http: PlainHttp = False,
    as_json: Json = False,
) -> None:
    """Pull a bundle from an OCI registry; every byte is compared with its digest and its manifest."""
    with reporting(as_json):
        from dinoexport.bundle import registry

        with progress_lines() as progress:
            pulled = registry.pull(reference, out, plain_http=plain_http, progress=progress)
        if as_json:
            say_json({"reference": pulled, "bundle": str(out)})
            return
        say(f"Pulled: {pulled}")
        say(f"Bundle: {out}")
