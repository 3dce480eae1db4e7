"""The commands deploy, rollback and check."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dinoexport.cli.app import EXIT_CODES, app
from dinoexport.cli.places import BundleArgument, folder_of
from dinoexport.cli.tables import table
from dinoexport.cli.terminal import Json, Verify, choice, fail, progress_lines, reporting, say, say_json, show_report


@app.command(epilog=EXIT_CODES)
def deploy(
    bundle: BundleArgument,
    to: Annotated[
        str,
        typer.Option(metavar="DIR|URL", help="Triton's model repository; created if it does not exist."),
    ],
    name: Annotated[str | None, typer.Option(help="The model's name in Triton. Default: the variant's name.")] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            metavar="tensorrt_plan|onnxruntime|python",
            help="Triton's backend. Default: tensorrt_plan if the bundle has plans, else onnxruntime.",
        ),
    ] = None,
    triton: Annotated[
        str | None,
        typer.Option(
            metavar="TAG[=TENSORRT]", help="The Triton image that will serve; refuses plans that it cannot load."
        ),
    ] = None,
    samples: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Files like those that clients will send; sizes are derived from them."),
    ] = None,
    answers: Annotated[
        list[str] | None,
        typer.Option(
            metavar="names|png|resized",
            help="Also give a head's answers as class names, PNG files, or arrays as large as the photograph.",
        ),
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HxW|BxHxW",
            help="A size that is often requested: --backend python compiles a form for it; repeatable.",
        ),
    ] = None,
    verify: Verify = None,
    as_json: Json = False,
) -> None:
    """Add a bundle to a Triton model repository as the next version, and serve that version."""
    with reporting(as_json):
        from dinoexport.serving.triton import model_repository, served_models, store_repository
        from dinoexport.system import store

        folder = folder_of(bundle)
        chosen = None if backend is None else choice("backend", backend, served_models.BACKENDS)
        with progress_lines() as progress:
            how: dict[str, Any] = {
                "name": name, "backend": chosen, "triton": triton, "samples": samples, "verify": verify,
                "answers": answers or (), "sizes": size or (),
            }  # fmt: skip
            if store.is_url(to):
                deployed = store_repository.deploy(folder, to, progress=progress, **how)
            else:
                deployed = model_repository.deploy(folder, Path(to), progress=progress, **how)
        _show_deployed(deployed, as_json)


@app.command(epilog=EXIT_CODES)
def rollback(
    repository: Annotated[str, typer.Argument(metavar="REPOSITORY", help="Triton's model repository, or its URL.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="The model's name in Triton.")],
    as_json: Json = False,
) -> None:
    """Serve the previous version again. Nothing is removed."""
    with reporting(as_json):
        from dinoexport.serving.triton import model_repository, store_repository
        from dinoexport.system import store

        if store.is_url(repository):
            _show_deployed(store_repository.rollback(repository, name), as_json)
        else:
            _show_deployed(model_repository.rollback(Path(repository), name), as_json)


@app.command(epilog=EXIT_CODES)
def check(
    url: Annotated[str, typer.Argument(metavar="URL", help="http://HOST:8000 or grpc://HOST:8001.")],
    bundle: Annotated[
        str,
        typer.Argument(metavar="BUNDLE|REPOSITORY", help="The bundle that was deployed, or the repository."),
    ],
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model's name. Default: the only model on the server.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Only send the smallest case, as a probe does.")] = False,
    timeout_s: Annotated[float, typer.Option(help="Time limit for each answer, in seconds.")] = 60.0,
    headers: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Lines `Name: value` to send; a token goes in $DINOEXPORT_TOKEN."),
    ] = None,
    ca: Annotated[Path | None, typer.Option(metavar="FILE", help="Certificates to trust, for https and grpcs.")] = None,
    as_json: Json = False,
) -> None:
    """Send a bundle's reference inputs to a running server, and compare its answers with PyTorch's."""
    with reporting(as_json):
        from dinoexport.cli import formatting
        from dinoexport.errors import ValidationFailed
        from dinoexport.serving import address
        from dinoexport.serving import check as probe

        folder = folder_of(bundle)
        with progress_lines() as progress:
            checked = probe.check(
                url,
                folder,
                model=model,
                quick=quick,
                timeout_s=timeout_s,
                headers=headers,
                ca=ca,
                progress=progress,
            )
        facts = {"model": checked.model, "latency_ms": checked.latency_ms, "report": checked.report.to_json()}
        if not checked.report.passed:
            show_report(checked.report, to_stderr=as_json)
            failed = ValidationFailed(
                f"{checked.model} at {address.parse(url)} does not give PyTorch's outputs.",
                next_step="Its process may have died: load the model again, or roll back. The server's log says more.",
            )
            fail(failed, as_json, **facts)
        if as_json:
            say_json(facts)
            return
        show_report(checked.report)
        say(table("Latency", formatting.latency_rows(checked.latency_ms)))


def _show_deployed(deployed: Any, as_json: bool) -> None:
    from dinoexport.cli import formatting

    if as_json:
        say_json(formatting.deployed_facts(deployed))
        return
    for line in formatting.deployed_lines(deployed):
        say(line)
