"""The verbs. The only module that prints or exits; nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

import dinoexport
from dinoexport.errors import DinoexportError

if TYPE_CHECKING:
    from rich.table import Table

    from dinoexport.judge import Report
    from dinoexport.spec import Progress

INTERRUPTED = 130  # what a shell reports for Ctrl-C
EXIT_CODES = (
    "Exit codes: 0 ok, 1 validation failed, 2 usage or recipe, 3 weights, 4 environment, 5 build, 130 interrupted."
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help answers in two thirds of the time
    pretty_exceptions_enable=False,
    epilog=EXIT_CODES,
    help="Take a model's checkpoint to a served engine, and prove on the way that its outputs are still PyTorch's.",
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
Variant = Annotated[str, typer.Argument(metavar="VARIANT|RECIPE.toml", help="A shipped variant, or your own recipe.")]
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="PATH|synthetic:SEED", help="A local checkpoint, or made-up weights. Default: the published ones."
    ),
]
PrecisionOption = Annotated[
    str | None, typer.Option(metavar="fp32|fp16|bf16|int8", help="Default: the recipe's, else the target's first.")
]
TargetOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME[,triton:TAG]", help="The machine to build for; see `list`. Default: the GPU here, else cpu."
    ),
]
RuntimeOption = Annotated[
    str | None,
    typer.Option(metavar="tensorrt|tensorrt_rtx|onnxruntime", help="Default: the first of the target's that can be."),
]
Out = Annotated[Path | None, typer.Option(metavar="DIR", help="Where the bundle goes. Default: bundles/NAME.")]
Force = Annotated[bool, typer.Option("--force", help="Make every stage again, whatever is there.")]
ReferenceOption = Annotated[
    str, typer.Option(metavar="plain|hub", help="Who judges: our plain formulation, or torch.hub's.")
]


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


@app.command("list", epilog=EXIT_CODES)
def list_(as_json: Json = False) -> None:
    """Show all variants and targets."""
    with _reporting(as_json):
        from dinoexport import listing

        found = listing.everything()
        if as_json:
            _print_json(found)
            return
        _print(_table("Variants", found["variants"]))
        _print(_table("Targets", found["targets"]))


@app.command(epilog=EXIT_CODES)
def build(
    variant: Variant,
    weights: Weights = None,
    precision: PrecisionOption = None,
    target: TargetOption = None,
    runtime: RuntimeOption = None,
    profile: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A profile of the recipe's for the engine; repeat it for several."),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(metavar="fast|balanced|max", help="How long TensorRT searches for kernels.")
    ] = None,
    out: Out = None,
    force: Force = False,
    keep_rejected: Annotated[
        bool, typer.Option("--keep-rejected", help="Publish a bundle that failed too, marked rejected.")
    ] = False,
    reference: ReferenceOption = "plain",
    as_json: Json = False,
) -> None:
    """Build a bundle and judge it against PyTorch; publish it only if it passes."""
    with _reporting(as_json):
        from dinoexport import pipeline

        order = pipeline.order(
            variant,
            weights=weights,
            precision=_precision(precision),
            target=target,
            runtime=_runtime(runtime),
            engine_choices=_engine_choices(profile, preset),
            out=out,
            judge_code=_choice("reference", reference, ("plain", "hub")),
        )
        try:
            with _progress() as progress:
                built = pipeline.build(order, force=force, keep_rejected=keep_rejected, progress=progress)
        except pipeline.Rejected as rejected:
            _show_report(rejected.report, to_stderr=as_json)
            _fail(rejected, as_json, verdict="rejected", report=rejected.report.to_json())
        assert built.report is not None
        if as_json:
            _print_json(_built_facts(built) | {"report": built.report.to_json()})
            return
        _show_report(built.report)
        if built.engines.report:
            _show_report(built.engines.report)
        _say_reused(built)
        _print(f"\nBundle: {built.folder}")
        _print_ways(built.manifest, not_run=built.engines.not_run)
        _print(f"Next:   dinoexport inspect {built.folder}")
        _print(f"        dinoexport validate {built.folder}   (on the machine that will serve it; needs no torch)")


@app.command(epilog=EXIT_CODES)
def export(
    variant: Variant,
    weights: Weights = None,
    precision: PrecisionOption = None,
    target: TargetOption = None,
    out: Out = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Only write the ONNX: a bundle marked unjudged."""
    with _reporting(as_json):
        from dinoexport import pipeline

        order = pipeline.order(variant, weights=weights, precision=_precision(precision), target=target, out=out)
        with _progress() as progress:
            built = pipeline.export_only(order, progress=progress, force=force)
        if as_json:
            _print_json(_built_facts(built))
            return
        _say_reused(built)
        _print(f"Bundle: {built.folder}   UNJUDGED: nothing was measured")
        _print(f"Next:   dinoexport build {variant} makes a judged one")


@app.command(epilog=EXIT_CODES)
def validate(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder.")],
    images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Judge on these images too; needs torch and the weights.")
    ] = None,
    weights: Weights = None,
    runtime: Annotated[
        str | None,
        typer.Option(metavar="tensorrt|tensorrt_rtx|onnxruntime", help="Default: the engine if it can run here."),
    ] = None,
    reference: ReferenceOption = "plain",
    as_json: Json = False,
) -> None:
    """Check every byte of a bundle and judge it on this machine; needs neither torch nor a network."""
    with _reporting(as_json):
        from dinoexport import proof
        from dinoexport.errors import ValidationFailed

        with _progress() as progress:
            validated = proof.validate(
                bundle,
                images=images,
                weights=weights,
                runtime=_runtime(runtime),
                judge_code=_choice("reference", reference, ("plain", "hub")),
                progress=progress,
            )
        facts = {"skipped": list(validated.skipped), "not_run": validated.not_run, "recorded": validated.recorded}
        if as_json and validated.report.passed:
            _print_json({"bundle": str(bundle), "report": validated.report.to_json()} | facts)
            return
        _show_report(validated.report, to_stderr=as_json)
        _print_ways(validated.manifest, not_run=validated.not_run, to_stderr=as_json)
        for line in validated.skipped:
            _print(f"skipped: {line}", to_stderr=as_json)
        if not validated.report.passed:
            failed = ValidationFailed(
                f"{bundle} does not give PyTorch's outputs on this machine.",
                next_step="The table shows each figure beside its limit.",
            )
            _fail(failed, as_json, report=validated.report.to_json(), **facts)


@app.command(epilog=EXIT_CODES)
def inspect(
    path: Annotated[Path, typer.Argument(metavar="BUNDLE|MODEL.onnx", help="A bundle's folder, or an ONNX file.")],
    as_json: Json = False,
) -> None:
    """Say what a bundle or an ONNX file holds. Nothing is run."""
    with _reporting(as_json):
        from dinoexport import listing

        found = listing.of_path(path)
        if as_json:
            _print_json(found)
            return
        for title, content in found.items():
            _print(_table(title, content) if isinstance(content, list) else _facts(title, content))


@app.command(epilog=EXIT_CODES)
def schema(as_json: Json = False) -> None:
    """Print the JSON schema of a recipe."""
    with _reporting(as_json):
        from dinoexport import listing

        _print_json(listing.recipe_schema())


@app.command(epilog=EXIT_CODES)
def doctor(as_json: Json = False) -> None:
    """Say what this machine has, what it can build and run, and how to mend what is wrong."""
    with _reporting(as_json):
        from dataclasses import asdict

        from dinoexport.doctor import findings
        from dinoexport.errors import MissingRequirement

        found = findings()
        wrong = [finding for finding in found if finding.state == "wrong"]
        rows = [asdict(finding) for finding in found]
        if as_json and not wrong:
            _print_json({"findings": rows})
            return
        if not as_json:
            _print(_table("This machine", rows))
        if wrong:
            _fail(
                MissingRequirement(f"{wrong[0].subject}: {wrong[0].found}.", next_step=wrong[0].fix),
                as_json,
                findings=rows,
            )


@app.command(epilog=EXIT_CODES)
def bench(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder.")],
    weights: Weights = None,
    as_json: Json = False,
) -> None:
    """Time a bundle on this machine: latency, throughput, share of the machine's peak, beside PyTorch."""
    with _reporting(as_json):
        from dinoexport import bench as stopwatch

        with _progress() as progress:
            timed = stopwatch.bench(bundle, weights=weights, progress=progress)
        if as_json:
            _print_json(timed.to_json())
            return
        _print(_table(f"{timed.candidate}; {timed.machine}, {timed.usable_cpus} CPUs", timed.table()))
        _print(f"Peak of a large fp32 matrix product here: {timed.peak_gflop_per_s:.0f} GFLOP/s")
        for note in timed.notes:
            _print(f"note: {note}")


@app.command(epilog=EXIT_CODES)
def deploy(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder.")],
    to: Annotated[Path, typer.Option(metavar="REPOSITORY", help="Triton's model repository; made if absent.")],
    name: Annotated[str | None, typer.Option(help="What it is served as. Default: the variant's name.")] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            metavar="tensorrt_plan|onnxruntime|python",
            help="What runs it. Default: the bundle's plans, else Triton's ONNX Runtime.",
        ),
    ] = None,
    triton: Annotated[
        str | None, typer.Option(metavar="TAG[=TENSORRT]", help="The image that serves; refuses plans it cannot load.")
    ] = None,
    samples: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Files like those it will be asked about; front ends learn sizes."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Add a bundle to a Triton model repository as the next version, and serve it."""
    with _reporting(as_json):
        from dinoexport.deploy import models
        from dinoexport.deploy import triton as repository

        chosen = None if backend is None else _choice("backend", backend, models.BACKENDS)
        with _progress() as progress:
            deployed = repository.deploy(
                bundle, to, name=name, backend=chosen, triton=triton, samples=samples, progress=progress
            )
        _show_deployed(deployed, as_json)


@app.command(epilog=EXIT_CODES)
def rollback(
    repository: Annotated[Path, typer.Argument(metavar="REPOSITORY", help="Triton's model repository.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the model is served as.")],
    as_json: Json = False,
) -> None:
    """Serve the version before the one that is served. Nothing is removed."""
    with _reporting(as_json):
        from dinoexport.deploy import triton

        _show_deployed(triton.rollback(repository, name), as_json)


@app.command(epilog=EXIT_CODES)
def check(
    url: Annotated[str, typer.Argument(metavar="URL", help="http://HOST:8000 or grpc://HOST:8001.")],
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE|REPOSITORY", help="What was deployed, or where to.")],
    model: Annotated[str | None, typer.Option(metavar="NAME", help="Default: the only model there is.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Ask the smallest case only: a probe.")] = False,
    timeout_s: Annotated[float, typer.Option(help="Seconds a server is given for each answer.")] = 60.0,
    as_json: Json = False,
) -> None:
    """Judge a live endpoint by what its bundle was judged by."""
    with _reporting(as_json):
        from dinoexport import check as probe
        from dinoexport import listing
        from dinoexport.errors import ValidationFailed

        with _progress() as progress:
            checked = probe.check(url, bundle, model=model, quick=quick, timeout_s=timeout_s, progress=progress)
        facts = {"model": checked.model, "latency_ms": checked.latency_ms, "report": checked.report.to_json()}
        if not checked.report.passed:
            _show_report(checked.report, to_stderr=as_json)
            failed = ValidationFailed(
                f"{checked.model} at {url} does not give PyTorch's outputs.",
                next_step="Its process may have died: load the model again, or roll back. The server's log says more.",
            )
            _fail(failed, as_json, **facts)
        if as_json:
            _print_json(facts)
            return
        _show_report(checked.report)
        _print(_table("Latency", listing.latency_rows(checked.latency_ms)))


def main() -> NoReturn:
    """The console entry point. SIGTERM ends like Ctrl-C, so that it too leaves nothing half written."""
    signal.signal(signal.SIGTERM, _interrupt)
    app()
    sys.exit(0)


def _interrupt(_signal: int, _frame: Any) -> None:
    raise KeyboardInterrupt


@contextmanager
def _reporting(as_json: bool) -> Iterator[None]:
    """Ends in an error's own exit code, with one sentence on stderr or one object on stdout."""
    try:
        yield
    except DinoexportError as error:
        _fail(error, as_json)
    except KeyboardInterrupt:
        typer.echo("\nInterrupted. Nothing half written is left; finished stages are reused.", err=True)
        sys.exit(INTERRUPTED)


def _fail(error: DinoexportError, as_json: bool, **facts: Any) -> NoReturn:
    if as_json:
        _print_json({"error": error.message, "next_step": error.next_step, "exit_code": error.exit_code} | facts)
    typer.echo(f"error: {_printable(error.message)}", err=True)
    if error.next_step:
        typer.echo(f"  next: {_printable(error.next_step)}", err=True)
    sys.exit(error.exit_code)


def _printable(text: str) -> str:
    """The text without control characters: names in a hostile file must not steer the user's terminal."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)


@contextmanager
def _progress() -> Iterator[Progress]:
    """A progress line per piece of work on stderr, drawn only on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:

        def report(doing: str, done: int, total: int) -> None:
            if doing not in tasks:
                tasks[doing] = bars.add_task(doing, total=total or None)
                if not console.is_terminal:
                    typer.echo(f"{doing} ...", err=True)
            bars.update(tasks[doing], completed=done, total=total or None)

        yield report


def _precision(word: str | None) -> Any:
    from dinoexport.spec import Precision

    return None if word is None else Precision(_choice("precision", word, tuple(Precision)))


def _runtime(word: str | None) -> Any:
    from dinoexport.spec import Runtime

    return None if word is None else Runtime(_choice("runtime", word, tuple(Runtime)))


def _engine_choices(profiles: list[str] | None, preset: str | None) -> dict[str, Any]:
    presets = ("fast", "balanced", "max")
    return ({"profiles": tuple(profiles)} if profiles else {}) | (
        {"preset": _choice("preset", preset, presets)} if preset else {}
    )


def _choice(option: str, word: str, known: tuple[str, ...]) -> Any:
    from dinoexport.errors import UsageError
    from dinoexport.spec import closest

    if word not in known:
        raise UsageError(f"--{option} {word!r} is unknown.{closest(word, known)}", next_step=f"Use {', '.join(known)}.")
    return word


def _show_deployed(deployed: Any, as_json: bool) -> None:
    from dinoexport import listing

    if as_json:
        _print_json(listing.deployed_facts(deployed))
        return
    for line in listing.deployed_lines(deployed):
        _print(line)


def _built_facts(built: Any) -> dict[str, Any]:
    return {
        "bundle": str(built.folder),
        "verdict": built.manifest.verdict,
        "reused": list(built.reused),
        "cpu": built.manifest.cpu and built.manifest.cpu.model_dump(mode="json"),
        "engines": [engine.model_dump(mode="json") for engine in built.manifest.engines],
        "not_run": built.engines.not_run,
    }


def _say_reused(built: Any) -> None:
    if built.reused:
        _print(f"Reused: {', '.join(built.reused)} (nothing they depend on changed; --force makes them again)")


def _show_report(report: Report, *, to_stderr: bool = False) -> None:
    """The verdict as a table: a row for each output of each case."""
    from dinoexport import listing

    verdict = "PASSED" if report.passed else "FAILED"
    title = f"{verdict}: {report.candidate}, against {report.reference}"
    _print(_table(title, listing.report_rows(report)), to_stderr=to_stderr)


def _print_ways(manifest: Any, *, not_run: str = "", to_stderr: bool = False) -> None:
    from dinoexport import listing

    for line in (*listing.cpu_lines(manifest), *listing.engine_lines(manifest, not_run)):
        _print(line, to_stderr=to_stderr)


def _print(what: Table | str, *, to_stderr: bool = False) -> None:
    from rich.console import Console

    if isinstance(what, str):
        typer.echo(what, err=to_stderr)
        return
    console = Console(stderr=to_stderr)
    # A pipe has no width; 80 columns would cut the figures off.
    (console if console.is_terminal else Console(stderr=to_stderr, width=140)).print(what)


def _print_json(content: Any) -> None:
    typer.echo(json.dumps(content, indent=1, allow_nan=False))


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left")
    for column in rows[0] if rows else ():
        table.add_column(column)
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row.values()))  # no markup: brackets are brackets
    return table


def _cell(value: Any) -> str:
    if value is None:
        return "not recorded"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def _facts(title: str, facts: dict[str, str]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", show_header=False)
    for key, value in facts.items():
        table.add_row(Text(key), Text(value))
    return table
