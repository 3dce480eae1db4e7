"""The verb `embed`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dinoexport.cli.app import EXIT_CODES, app
from dinoexport.cli.escaping import printable
from dinoexport.cli.places import BundleArgument, folder_of
from dinoexport.cli.terminal import (
    Json,
    choice,
    fail,
    progress_lines,
    reporting,
    say,
    say_json,
    say_json_line,
    show_report,
    state_line,
)

if TYPE_CHECKING:
    from dinoexport.embed.layout import Layout
    from dinoexport.embed.plan import Plan
    from dinoexport.embed.run import Embedded, State

# How often a log gets a line; on a terminal the line is redrawn.
_LINE_EVERY_S, _DRAWN_EVERY_S = 10.0, 0.2


@app.command(epilog=EXIT_CODES)
def embed(
    bundle: BundleArgument,
    images: Annotated[
        str,
        typer.Option(metavar="DIR|'GLOB'|URL|FILE.parquet[:COLUMN]", help="What to embed."),
    ],
    out: Annotated[
        str, typer.Option(metavar="DIR|URL", help="Where the Parquet files go; a later call continues there.")
    ],
    size: Annotated[
        str,
        typer.Option(
            metavar="default|nearest|HxW,...",
            help="One size for all images, for each image the nearest size that occurs, or the nearest of these sizes.",
        ),
    ] = "default",
    outputs: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Columns: outputs, or NAME_mean of NAME_tokens. Default: the first output with a vector per image.",
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(metavar="float32|float16", help="The type in which vectors are stored.")
    ] = "float32",
    normalise: Annotated[bool, typer.Option("--normalise", help="Scale each vector to L2 norm 1.")] = False,
    shards: Annotated[
        int | None,
        typer.Option(
            min=1, max=100_000, metavar="N", help="Number of output files. Default: as many as hold 50,000 rows each."
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Number of processes. Default: chosen for this machine, see docs/embed.md."
        ),
    ] = None,
    shard: Annotated[
        str, typer.Option(metavar="I/N", help="Only the shards whose number modulo N is I; I starts at 0.")
    ] = "0/1",
    engine: Annotated[
        str, typer.Option(metavar="local|ray", help="ray: on the cluster that RAY_ADDRESS names.")
    ] = "local",
    max_failed: Annotated[
        str, typer.Option(metavar="SHARE", help="Exit with code 1 if more than this share of the images failed.")
    ] = "1%",
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try failed images of finished shards again.")
    ] = False,
    extend: Annotated[bool, typer.Option("--extend", help="List the images again and add the new ones.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Only embed 0.1 % of the finished rows again and compare.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Embed images into Parquet files, resumably. With --json, progress is printed as JSON lines on stderr."""
    with reporting(as_json):
        from dinoexport.embed import run

        folder = folder_of(bundle)
        if verify:
            _verify(folder, images, out, as_json)
            return
        with _watching(as_json) as watch, progress_lines() as progress:
            found = run.embed(
                folder,
                images,
                out,
                size=size,
                outputs=None if outputs is None else [name.strip() for name in outputs.split(",")],
                dtype=choice("dtype", dtype, ("float32", "float16")),
                normalised=normalise,
                shards=shards,
                workers=workers,
                part=run.part_of(shard),
                engine=choice("engine", engine, ("local", "ray")),
                max_failed=run.share_of(max_failed),
                retry_failed=retry_failed,
                extend=extend,
                planned=lambda plans, layout: _say_plan(plans, layout, as_json),
                watch=watch,
                progress=progress,
            )
        if as_json:
            say_json(_facts(found))
            return
        say(f"Rows:   {found.rows} in {found.shards} shards ({found.done_before} done before), {found.failed} failed")
        say(f"Folder: {found.out}" + ("" if found.complete else "   not complete: other shards are still to be done"))


def _facts(found: Embedded) -> dict[str, Any]:
    return {
        "out": found.out,
        "rows": found.rows,
        "failed": found.failed,
        "shards": found.shards,
        "done_before": found.done_before,
        "complete": found.complete,
        "workers": found.layout and found.layout.workers,
    }


def _say_plan(plans: Sequence[Plan], layout: Layout, as_json: bool) -> None:
    items, size = sum(plan.items for plan in plans), sum(plan.image_bytes for plan in plans)
    settings = plans[0].settings
    facts = {
        "images": items,
        "image_bytes": size,
        "shards": sum(plan.shards for plan in plans),
        "columns": list(settings.outputs),
        "dtype": settings.dtype,
        "preparation": f"{settings.front_end} {settings.preparation or ''}".strip(),
        "batch": settings.batch,
        "workers": layout.workers,
        "threads_each": layout.threads,
        "decoding_threads_each": layout.decoders,
        "because": layout.why,
    }
    if as_json:
        say_json_line({"plan": facts})
        return
    words = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items())
    say(f"Plan:   {words}", to_stderr=True)


@contextmanager
def _watching(as_json: bool) -> Iterator[Callable[[State], None]]:
    """Progress on stderr: a line that is redrawn on a terminal, or one line every ten seconds in a log."""
    import time
    from dataclasses import asdict

    said = 0.0
    with state_line() as (line, drawn):

        def watch(state: State) -> None:
            nonlocal said
            now = time.monotonic()
            every_s = _DRAWN_EVERY_S if drawn and not as_json else _LINE_EVERY_S
            if now - said < every_s and state.shards < state.shards_total:
                return
            said = now
            if as_json:
                say_json_line(asdict(state))
            else:
                line(line_of(state))

        yield watch


def line_of(state: State) -> str:
    """The progress in one line."""
    left = "unknown" if state.left_s is None else duration(state.left_s)
    return (
        f"{state.rows} of about {state.rows_total} rows, {state.shards} of {state.shards_total} shards, "
        f"{state.failed} failed, {state.rate:.1f} rows/s, {left} left"
    )


def duration(seconds: float) -> str:
    """A duration in seconds, minutes or hours."""
    minutes, hours = round(seconds / 60), seconds / 3600
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"


def _verify(bundle: Path, images: str, out: str, as_json: bool) -> None:
    from dinoexport.embed import verify
    from dinoexport.errors import ValidationFailed

    with progress_lines() as progress:
        found = verify.verify(bundle, images, out, progress=progress)
    facts = {"sampled": found.sampled, "changed": list(found.changed), "parts": list(found.damaged)}
    if found.report is not None:
        show_report(found.report, to_stderr=as_json)
    for line in found.lines:
        say(printable(line), to_stderr=as_json)
    if not found.passed:
        failed = ValidationFailed(
            f"{out} does not hold the outputs that the bundle gives for these images.",
            next_step="The lines above say which parts or images; remove those parts and run embed again.",
        )
        fail(failed, as_json, **facts)
    if as_json:
        say_json({**facts, "report": found.report and found.report.to_json()})
