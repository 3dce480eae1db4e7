"""The verbs that add engines to a bundle: compile, merge."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dinoexport.cli.app import EXIT_CODES, app
from dinoexport.cli.build import Force, RuntimeOption, engine_choices
from dinoexport.cli.places import BundleArgument, destination, folder_of
from dinoexport.cli.terminal import (
    Json,
    Sign,
    Verify,
    fail,
    progress_lines,
    reporting,
    runtime_of,
    say,
    say_json,
    show_report,
    show_ways,
    signer_of,
)

if TYPE_CHECKING:
    from dinoexport.pipeline.compile_bundle import Compiled


@app.command("compile", epilog=EXIT_CODES)
def compile_(
    bundle: BundleArgument,
    target: Annotated[
        str | None, typer.Option(metavar="NAME[,triton:TAG]", help="The card; see `list`. Default: the GPU here.")
    ] = None,
    runtime: RuntimeOption = None,
    profile: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A profile of the bundle's recipe; repeat it for several."),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(metavar="fast|balanced|max", help="How long TensorRT searches for kernels.")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(metavar="DIR|URL", help="Write another bundle with the engines. Default: add them to BUNDLE."),
    ] = None,
    force: Force = False,
    sign: Sign = None,
    verify: Verify = None,
    as_json: Json = False,
) -> None:
    """Build engines from a bundle's own ONNX and validate them with the bundle's reference; needs no torch."""
    with reporting(as_json):
        from dinoexport.pipeline import compile_bundle
        from dinoexport.system import store

        folder = folder_of(bundle)
        if verify is not None:
            from dinoexport.bundle import signing

            signing.verify(folder, verify)
        signer = signer_of(sign)
        if out is None and store.is_url(bundle) and signer is None:
            compile_bundle.refuse_signed(folder, bundle)
        try:
            # A bundle in a store gets its engines there.
            with destination(out or (bundle if store.is_url(bundle) else None)) as into, progress_lines() as progress:
                compiled = compile_bundle.compile_bundle(
                    folder,
                    target=target,
                    runtime=runtime_of(runtime),
                    engine_choices=engine_choices(profile, preset),
                    out=into,
                    signer=signer,
                    force=force,
                    progress=progress,
                )
        except compile_bundle.EnginesRejected as rejected:
            show_report(rejected.report, to_stderr=as_json)
            fail(rejected, as_json, verdict="rejected", report=rejected.report.to_json())
        _show(compiled, as_json)


@app.command(epilog=EXIT_CODES)
def merge(
    first: Annotated[Path, typer.Argument(metavar="A", help="A bundle with an engine.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="The same bundle with an engine for another card.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder of the bundle with both engines.")],
    sign: Sign = None,
    as_json: Json = False,
) -> None:
    """Merge the engines of two bundles into one bundle for several cards; Triton then chooses by the card."""
    with reporting(as_json):
        from dinoexport.pipeline import compile_bundle

        signer = signer_of(sign)
        with progress_lines() as progress:
            merged = compile_bundle.merge(first, second, out=out, signer=signer, progress=progress)
        _show(merged, as_json)


def _show(compiled: Compiled, as_json: bool) -> None:
    report = compiled.engines.report
    facts: dict[str, Any] = {
        "bundle": str(compiled.folder),
        "engines": [engine.model_dump(mode="json") for engine in compiled.manifest.engines],
        "reused": compiled.reused,
        "not_run": compiled.engines.not_run,
        "notes": list(compiled.notes),
    }
    if as_json:
        say_json(facts | {"report": report and report.to_json()})
        return
    if report is not None:
        show_report(report)
    say(f"Bundle: {compiled.folder}" + ("   (the engines were there already)" if compiled.reused else ""))
    show_ways(compiled.manifest, not_run=compiled.engines.not_run)
    for note in compiled.notes:
        say(f"note: {note}")
