"""The commands validate, inspect, report, diff and bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dinoexport.cli.app import EXIT_CODES, app
from dinoexport.cli.build import HeadWeightsOption, ReferenceOption, Weights
from dinoexport.cli.places import BundleArgument, folder_of
from dinoexport.cli.tables import facts as facts_table
from dinoexport.cli.tables import table
from dinoexport.cli.terminal import (
    Json,
    Sign,
    Verify,
    choice,
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
from dinoexport.spec import Runtime


@app.command(epilog=EXIT_CODES)
def validate(
    bundle: BundleArgument,
    images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Validate on these images instead; needs torch and the weights.")
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="Write a page that shows the images with different results."),
    ] = None,
    weights: Weights = None,
    head_weights: HeadWeightsOption = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(Runtime),
            help="Default: the engine if it can run here, else the graph.",
        ),
    ] = None,
    reference: ReferenceOption = "plain",
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Show where the error grows inside the graph; needs torch and the weights."),
    ] = False,
    verify: Verify = None,
    trust_plan: Annotated[
        bool,
        typer.Option(
            "--trust-plan", help="Run a version-compatible plan, which holds code, without a verified signature."
        ),
    ] = False,
    sign: Sign = None,
    as_json: Json = False,
) -> None:
    """Check every byte of a bundle and validate it on this machine; needs neither torch nor a network."""
    with reporting(as_json):
        from dinoexport.bundle import signing
        from dinoexport.cli import formatting
        from dinoexport.errors import UsageError, ValidationFailed
        from dinoexport.system import store
        from dinoexport.validation import validate_bundle

        signer = signer_of(sign)
        folder, remote = folder_of(bundle), store.is_url(bundle)
        if signer is not None and remote:
            raise UsageError(
                f"{bundle} is a URL, and a bundle cannot be signed there.",
                next_step="Sign it when it is built: build --sign.",
            )
        verified = signing.verify(folder, verify) if verify is not None else None
        signed = signing.signed_by(folder)
        if page is not None:
            from dinoexport.report import mismatches

            mismatches.check(page, images)
        with progress_lines() as progress:
            validated = validate_bundle.validate(
                folder,
                images=images,
                weights=weights,
                head_weights=head_weights,
                runtime=runtime_of(runtime),
                judge_code=choice("reference", reference, ("plain", "hub")),
                explained=explain,
                signer=signer,
                signed=None if verified is None else verified.manifest,
                trust_plan=trust_plan,
                record=not remote,
                progress=progress,
            )
            if page is not None and images is not None:
                mismatches.write(page, validated, images, progress=progress)
        if signer is not None and validated.report.passed:
            signed = signer.fingerprint
        checked_key = verified is not None
        proves, leaves_open = formatting.proven(
            validated.report, own_images=images is not None, not_run=validated.not_run, verified=checked_key
        )
        facts = _validated_facts(validated, page) | {"signed_by": signed, "verified": checked_key}
        if validated.report.passed:
            facts |= {"proves": proves, "does_not_prove": leaves_open}
        if as_json and validated.report.passed:
            say_json({"bundle": str(bundle), "report": validated.report.to_json()} | facts)
            return
        show_report(validated.report, to_stderr=as_json)
        show_ways(validated.manifest, not_run=validated.not_run or validated.not_recorded, to_stderr=as_json)
        for line in formatting.signature_lines(signed, by_us=signer is not None, verified=checked_key):
            say(line, to_stderr=as_json)
        if validated.report.passed:
            say(f"Proves: {proves}.")
            say(f"Not:    {'; '.join(leaves_open)}.")
        _show_more(validated, page, explain=explain, to_stderr=as_json)
        if not validated.report.passed:
            failed = ValidationFailed(
                f"{bundle} does not give PyTorch's outputs on this machine.",
                next_step="The table shows each figure beside its limit.",
            )
            fail(failed, as_json, report=validated.report.to_json(), **facts)


def _validated_facts(validated: Any, page: Path | None) -> dict[str, Any]:
    growth = {} if validated.growth is None else {"growth": validated.growth.to_json()}
    aggregate = {} if validated.aggregate is None else validated.aggregate.to_json() | {"page": page and str(page)}
    return {
        "skipped": list(validated.skipped),
        "not_run": validated.not_run,
        "recorded": validated.recorded,
        "not_recorded": validated.not_recorded,
        **growth,
        **aggregate,
    }


def _show_more(validated: Any, page: Path | None, *, explain: bool, to_stderr: bool) -> None:
    if explain:
        _show_growth(validated, to_stderr=to_stderr)
    if validated.aggregate is not None:
        _show_together(validated, page, to_stderr=to_stderr)


@app.command(epilog=EXIT_CODES)
def inspect(
    path: Annotated[
        str, typer.Argument(metavar="BUNDLE|MODEL.onnx", help="A bundle's folder or its URL, or an ONNX file.")
    ],
    as_json: Json = False,
) -> None:
    """Show what a bundle or an ONNX file contains. Nothing is run."""
    with reporting(as_json):
        from dinoexport.cli import contents

        found = contents.of_path(folder_of(path))
        if as_json:
            say_json(found)
            return
        for title, content in found.items():
            say(table(title, content) if isinstance(content, list) else facts_table(title, content))


@app.command(epilog=EXIT_CODES)
def report(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder.")],
    show: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    as_json: Json = False,
) -> None:
    """Check a bundle's report, print where it is, and open it."""
    with reporting(as_json):
        from dinoexport.cli import contents

        path = contents.page_of(bundle)
        if show:
            import webbrowser

            webbrowser.open(path.absolute().as_uri())
        if as_json:
            say_json({"report": str(path)})
            return
        say(f"Report: {path}")


@app.command(epilog=EXIT_CODES)
def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="A bundle's folder.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="The folder of another bundle.")],
    as_json: Json = False,
) -> None:
    """Compare two bundles: sources, sizes, operations, outputs, and speed on this machine."""
    with reporting(as_json):
        from dinoexport.validation import bundle_diff

        with progress_lines() as progress:
            found = bundle_diff.compare(first, second, progress=progress)
        if as_json:
            say_json(found)
            return
        for title, rows in found.items():
            say(table(title, rows) if rows else f"{title}: nothing")


@app.command(epilog=EXIT_CODES)
def bench(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder.")],
    weights: Weights = None,
    head_weights: HeadWeightsOption = None,
    size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HxW|BxHxW", help="Time this size, in the general form and in a form of its own; repeatable."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure latency, throughput and the share of this machine's peak, and compare them with PyTorch."""
    with reporting(as_json):
        from dinoexport import bench as stopwatch

        with progress_lines() as progress:
            timed = stopwatch.bench(
                bundle, weights=weights, head_weights=head_weights, sizes=size or (), progress=progress
            )
        if as_json:
            say_json(timed.to_json())
            return
        say(table(f"{timed.candidate}; {timed.machine}, {timed.usable_cpus} CPUs", timed.table()))
        say(f"Peak of a large fp32 matrix product here: {timed.peak_gflop_per_s:.0f} GFLOP/s")
        for note in timed.notes:
            say(f"note: {note}")


def _show_together(validated: Any, page: Path | None, *, to_stderr: bool) -> None:
    """Results over all of a user's files, and the files that could not be used."""
    found = validated.aggregate.agreement
    if found is not None and found.measures:
        say(table("Decisions, candidate against PyTorch", found.table), to_stderr=to_stderr)
    lines = [*validated.aggregate.said, *(found.lines if found else ()), *(f"skipped: {s}" for s in validated.skipped)]
    for line in lines:
        say(line, to_stderr=to_stderr)
    if page is not None:
        say(f"Page: {page}", to_stderr=to_stderr)


def _show_growth(validated: Any, *, to_stderr: bool) -> None:
    from dinoexport.cli import formatting

    if validated.growth is not None:
        title = f"Inside the graph, on {validated.growth.case}; expected: {validated.growth.rule}"
        say(table(title, formatting.growth_rows(validated.growth)), to_stderr=to_stderr)
    for line in formatting.explained(validated.report, validated.growth, validated.way):
        say(line, to_stderr=to_stderr)
