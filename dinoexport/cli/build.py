"""The commands list, build, export, schema and doctor."""

from __future__ import annotations

import shlex
from typing import Annotated, Any

import typer

from dinoexport.cli.app import EXIT_CODES, app
from dinoexport.cli.places import destination
from dinoexport.cli.tables import facts as facts_table
from dinoexport.cli.tables import table
from dinoexport.cli.terminal import (
    Json,
    Sign,
    choice,
    columns,
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
from dinoexport.spec import Precision, Runtime

Variant = Annotated[
    str | None,
    typer.Argument(
        metavar="[VARIANT|RECIPE.toml]",
        help="A shipped variant, or the path of your own recipe. Default: derived from --weights and files beside it.",
    ),
]
Prefix = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="The prefix of tensor names that selects one of several models in the file."),
]
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="PATH|synthetic[-stress]:SEED",
        help="A local checkpoint, or synthetic weights. Default: the published weights.",
    ),
]
HeadOption = Annotated[
    str | None,
    typer.Option(metavar="KIND", help="The head: turns tokens into depth, labels or classes; see `list`."),
]
HeadWeightsOption = Annotated[
    str | None,
    typer.Option(metavar="PATH|synthetic:SEED", help="The weights of the head. Default: the published ones."),
]
PrecisionOption = Annotated[
    str | None,
    typer.Option(
        metavar="|".join((*Precision, "auto")),
        help="auto: fp16, with parts in fp32 if the limits require it. Default: the recipe's, else the target's first.",
    ),
]
TargetOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME[,triton:TAG]", help="The machine to build for; see `list`. Default: the GPU here, else cpu."
    ),
]
RuntimeOption = Annotated[
    str | None,
    typer.Option(
        metavar="|".join(Runtime),
        help="Default: the first of the target's runtimes that can be used; on a CPU, the faster one.",
    ),
]
Out = Annotated[
    str | None, typer.Option(metavar="DIR|URL", help="The bundle's folder, or where to send it. Default: bundles/NAME.")
]
Force = Annotated[bool, typer.Option("--force", help="Repeat every stage, and reuse none.")]
ReferenceOption = Annotated[
    str,
    typer.Option(
        metavar="plain|hub", help="Whose code computes PyTorch's outputs: our plain formulation, or torch.hub's."
    ),
]


@app.command("list", epilog=EXIT_CODES)
def list_(as_json: Json = False) -> None:
    """Show all variants and targets."""
    with reporting(as_json):
        from dinoexport.cli import catalogue

        found = catalogue.everything()
        if as_json:
            say_json(found)
            return
        for title, rows in catalogue.variant_tables(found["variants"], columns()):
            say(table(title, rows, breaks="licence"))
        say(table("Heads, for --head", found["heads"]))
        say(table("Targets", found["targets"]))


@app.command(epilog=EXIT_CODES)
def build(
    variant: Variant = None,
    weights: Weights = None,
    head: HeadOption = None,
    head_weights: HeadWeightsOption = None,
    prefix: Prefix = None,
    precision: PrecisionOption = None,
    target: TargetOption = None,
    runtime: RuntimeOption = None,
    profile: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A profile of the recipe for the engine; repeat the option for several."),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(metavar="fast|balanced|max", help="How long TensorRT searches for kernels.")
    ] = None,
    out: Out = None,
    force: Force = False,
    keep_rejected: Annotated[
        bool, typer.Option("--keep-rejected", help="Also publish a bundle that failed, marked rejected.")
    ] = False,
    reference: ReferenceOption = "plain",
    sign: Sign = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what the build would use and need; refuse what is impossible.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Build a bundle, validate it against PyTorch, and publish it only if it passes."""
    with reporting(as_json):
        from dinoexport.cli import formatting
        from dinoexport.pipeline import build as pipeline

        with destination(out) as folder:
            with progress_lines() as progress:
                request = pipeline.build_request(
                    variant,
                    weights=weights,
                    prefix=prefix,
                    head=head,
                    head_weights=head_weights,
                    precision=precision_of(precision),
                    target=target,
                    runtime=runtime_of(runtime),
                    engine_choices=engine_choices(profile, preset),
                    out=folder,
                    judge_code=choice("reference", reference, ("plain", "hub")),
                    progress=progress,
                )
            _say_settled(request.settled, to_stderr=as_json)
            if dry_run:
                _show_plan(request, as_json=as_json)
                return
            signer = signer_of(sign)
            try:
                with progress_lines() as progress:
                    built = pipeline.build(
                        request, force=force, keep_rejected=keep_rejected, signer=signer, progress=progress
                    )
            except pipeline.Rejected as rejected:
                show_report(rejected.report, to_stderr=as_json)
                fail(rejected, as_json, verdict="rejected", report=rejected.report.to_json())
        assert built.report is not None
        if as_json:
            signed_by = signer and signer.fingerprint
            say_json(_built_facts(built, out) | {"report": built.report.to_json(), "signed_by": signed_by})
            return
        show_report(built.report)
        if built.engines.report:
            show_report(built.engines.report)
        _say_reused(built)
        say("")
        if which := built.manifest.synthetic:
            say(f"Note:   {which} are synthetic, so the outputs mean nothing; they were compared with PyTorch's")
        where = out or str(built.folder)
        say(f"Bundle: {where}")
        say(f"Report: {built.folder / 'report.html'}")
        for line in formatting.signature_lines(signer and signer.fingerprint, by_us=True):
            say(line)
        if request.auto:
            say(f"Precision: {formatting.precision(built.manifest)}")
        show_ways(built.manifest, not_run=built.engines.not_run)
        if request.model.text is not None and "text" not in built.manifest.stage_keys:
            say("Text:   there is no tokenizer beside the weights; generate and deploy need one in the bundle")
        say(f"Next:   dinoexport inspect {where}")
        say(f"        dinoexport validate {where}   (on the machine that will serve it; needs no torch)")


@app.command(epilog=EXIT_CODES)
def export(
    variant: Variant = None,
    weights: Weights = None,
    head: HeadOption = None,
    head_weights: HeadWeightsOption = None,
    prefix: Prefix = None,
    precision: PrecisionOption = None,
    target: TargetOption = None,
    out: Out = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Only write the ONNX, in a bundle marked unjudged: nothing is measured."""
    with reporting(as_json):
        from dinoexport.pipeline import build as pipeline

        with destination(out) as folder:
            request = pipeline.build_request(
                variant,
                weights=weights,
                head=head,
                head_weights=head_weights,
                prefix=prefix,
                precision=precision_of(precision),
                target=target,
                out=folder,
            )
            _say_settled(request.settled, to_stderr=as_json)
            with progress_lines() as progress:
                built = pipeline.export_only(request, progress=progress, force=force)
        if as_json:
            say_json(_built_facts(built, out))
            return
        _say_reused(built)
        say(f"Bundle: {out or built.folder}   UNJUDGED: nothing was measured")
        what = "--weights " + shlex.quote(str(weights)) if variant is None else shlex.quote(variant)
        say(f"Next:   dinoexport build {what} makes a validated one")


@app.command(epilog=EXIT_CODES)
def schema(as_json: Json = False) -> None:
    """Print the JSON schema of a recipe."""
    with reporting(as_json):
        from dinoexport.cli import catalogue

        say_json(catalogue.recipe_schema())


@app.command(epilog=EXIT_CODES)
def doctor(as_json: Json = False) -> None:
    """Show what this machine has, what it can build and run, and how to repair what is wrong."""
    with reporting(as_json):
        from dataclasses import asdict

        from dinoexport.doctor import findings
        from dinoexport.errors import MissingRequirement

        found = findings()
        wrong = [finding for finding in found if finding.state == "wrong"]
        rows = [asdict(finding) for finding in found]
        if as_json and not wrong:
            say_json({"findings": rows})
            return
        if not as_json:
            say(table("This machine", rows))
        if wrong:
            fail(
                MissingRequirement(f"{wrong[0].subject}: {wrong[0].found}.", next_step=wrong[0].fix),
                as_json,
                findings=rows,
            )


def _show_plan(request: Any, *, as_json: bool) -> None:
    from dinoexport.pipeline import preflight
    from dinoexport.pipeline.stages.text import check_tokenizer

    preflight.packages(request)
    check_tokenizer(request)
    preflight.weights_fit(request)
    preflight.disk(request)
    plan = preflight.plan(request)
    if as_json:
        say_json({"plan": plan, "recipe": request.recipe.model_dump(mode="json")})
        return
    say(facts_table("Plan; nothing was done", plan))


def precision_of(word: str | None) -> Any:
    """The requested precision, `auto`, or None for the recipe's."""
    if word in (None, "auto"):
        return word
    return Precision(choice("precision", word, (*Precision, "auto")))


def engine_choices(profiles: list[str] | None, preset: str | None) -> dict[str, Any]:
    """What `--profile` and `--preset` change in a recipe's `[engine]`."""
    presets = ("fast", "balanced", "max")
    return ({"profiles": tuple(profiles)} if profiles else {}) | (
        {"preset": choice("preset", preset, presets)} if preset else {}
    )


def _built_facts(built: Any, out: str | None) -> dict[str, Any]:
    return {
        "bundle": out or str(built.folder),
        "verdict": built.manifest.verdict,
        "reused": list(built.reused),
        "assumed": built.manifest.checkpoint.assumed,
        "notes": list(built.manifest.checkpoint.notes),
        "recipe": built.manifest.recipe,
        "cpu": built.manifest.cpu and built.manifest.cpu.model_dump(mode="json"),
        "engines": [engine.model_dump(mode="json") for engine in built.manifest.engines],
        "not_run": built.engines.not_run,
    }


def _say_settled(settled: Any, *, to_stderr: bool) -> None:
    """What the weights are built as: the recipe that was made for them, and what was chosen and assumed."""
    from dinoexport.config.recipe import to_toml

    if settled.made:
        say("Recipe made from the weights:", to_stderr=to_stderr)
        for line in to_toml(settled.recipe).splitlines():
            say(f"  {line}" if line else "", to_stderr=to_stderr)
    for note in settled.notes:
        say(f"Weights: {note}", to_stderr=to_stderr)
    for key, value in settled.assumed.items():
        say(f"ASSUMED: {key} = {value}; nothing beside the weights says so", to_stderr=to_stderr)


def _say_reused(built: Any) -> None:
    if built.reused:
        say(f"Reused: {', '.join(built.reused)} (nothing they depend on changed; --force makes them again)")
