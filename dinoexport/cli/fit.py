"""The verb fit: a classifier for a user's own classes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dinoexport.cli.app import EXIT_CODES, app
from dinoexport.cli.escaping import printable
from dinoexport.cli.tables import table
from dinoexport.cli.terminal import Json, choice, progress_lines, reporting, say, say_json


@app.command(epilog=EXIT_CODES)
def fit(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle that gives features.")],
    images: Annotated[Path, typer.Option(metavar="DIR", help="Training images; each subfolder is a class.")],
    head: Annotated[
        str, typer.Option(metavar="logreg|linear|knn", help="Which classifier; linear reads patch tokens too.")
    ] = "logreg",
    balanced: Annotated[
        bool, typer.Option("--balanced", help="Give all classes the same weight, however many images each has.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the new bundle goes. Default: BUNDLE-HEAD.")
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Repeat every stage, and replace a bundle that was fitted on other classes."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Fit a classifier on a bundle's features and publish a bundle that outputs its probabilities; needs no torch."""
    with reporting(as_json):
        from dinoexport.pipeline.fit import flow
        from dinoexport.pipeline.fit.classifiers import HEAD_KINDS

        kind = choice("head", head, HEAD_KINDS)
        with progress_lines() as progress:
            made = flow.fit(bundle, images, kind=kind, balanced=balanced, out=out, force=force, progress=progress)
        held = made.held
        if as_json:
            say_json({"bundle": str(made.folder), "held_out": asdict(held), "said": list(made.said)})
            return
        low, high = held.interval
        say(
            f"Held-out accuracy: {held.accuracy:.1%} of {held.images} images "
            f"(95 % interval {low:.1%} to {high:.1%}); the classifier was not fitted on them"
        )
        recall = [
            {"class": label, "recall": f"{share:.0%} of {held.counts[label]}"} for label, share in held.recall.items()
        ]
        say(table("Recall", recall))
        for name, true, given, probability in held.confusions[:10]:
            say(printable(f"{name}: {true} classified as {given} with {probability:.0%}"))
        for line in made.said:
            say(printable(f"note: {line}"))
        say("")
        say(f"Bundle: {made.folder}")
        say(f"Report: {made.folder / 'report.html'}")
