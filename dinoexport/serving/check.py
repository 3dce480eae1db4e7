"""Check a live endpoint: send a bundle's reference inputs to the server and validate its outputs like any runtime's.

Triton reports a model as ready after its process has died, so a probe must send an input and check the output.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

from dinoexport import bundle, family
from dinoexport.bundle import reference_file
from dinoexport.config.recipe import Recipe, parse
from dinoexport.errors import UsageError
from dinoexport.serving import address, text_check
from dinoexport.serving.client import open_graphs, text_served
from dinoexport.serving.text_client import TextClient
from dinoexport.serving.triton.repository_state import deployed_as
from dinoexport.serving.triton.signature import Served
from dinoexport.spec import Array, Arrays, Progress, silent
from dinoexport.system import changes, untrusted
from dinoexport.validation import evaluate
from dinoexport.validation.judge import Report


@dataclass(frozen=True, kw_only=True)
class Checked:
    """The verdict on a served model. latency_ms: case -> milliseconds for its answer, the network included."""

    model: str
    report: Report
    latency_ms: dict[str, float]


def check(
    url: str,
    folder: Path,
    *,
    model: str | None = None,
    quick: bool = False,
    timeout_s: float = 60.0,
    headers: Path | None = None,
    ca: Path | None = None,
    progress: Progress = silent,
) -> Checked:
    """Validates the model served at `url` with the reference in `folder`: a bundle, or a repository it was deployed to.

    quick: only the smallest case. Raises ServerError if there is no answer; wrong outputs are in the report.
    """
    if text_served(url, model=model, timeout_s=timeout_s, headers=headers, ca=ca):
        client = TextClient(url, model=model, timeout_s=timeout_s, headers=headers, ca=ca)
        return _checked_text(client, str(address.parse(url)), folder, quick=quick, progress=progress)
    clients = open_graphs(url, model=model, timeout_s=timeout_s, headers=headers, ca=ca)
    served = next(iter(clients.values())).served
    with changes.reading(folder, progress=progress):
        reference = reference_file.read(_reference_of(folder, served))
    if quick:
        reference = reference.smallest()
    recipe = parse(Recipe, served.recipe, where="the recipe of the served model")
    drive = family.find(served.family).model(recipe).drive
    latency_ms: list[float] = []

    def answer(inputs: Arrays) -> dict[str, Array]:
        started = time.perf_counter()
        try:
            return drive(clients, inputs)
        finally:
            latency_ms.append(1000 * (time.perf_counter() - started))

    report = evaluate.judged(
        answer, reference, f"{served.name} {served.version} at {address.parse(url)}", progress=progress
    )
    cases = [case.name for case in (*(e.case for e in reference.expectations), *reference.refusals)]
    return Checked(model=served.name, report=report, latency_ms=dict(zip(cases, latency_ms, strict=True)))


def _checked_text(client: TextClient, url: str, folder: Path, *, quick: bool, progress: Progress) -> Checked:
    """The same for a model that generates text: compares its continuations with those in the reference."""
    served = client.served
    role = family.find(served.family).model(parse(Recipe, served.recipe, where="the recipe of the served model")).text
    assert role is not None, "it serves text"
    with changes.reading(folder, progress=progress):
        path = _reference_of(folder, served)
        reference = reference_file.read(path)
    asked = tuple(e for e in reference.expectations if role.rollout(e.case.inputs) is not None)
    if not asked:
        raise UsageError(
            f"{path} holds no continuation to check a text model with.",
            next_step="Give the validation a case with steps, and build the bundle again.",
        )
    reference = replace(reference, expectations=asked, refusals=())
    if quick:
        reference = reference.smallest()
    started = time.perf_counter()
    name = f"{served.name} {served.version} at {url}"
    report = text_check.judged(client, role, reference, path.parent / served.tokenizer, name, progress=progress)
    each_ms = 1000 * (time.perf_counter() - started) / len(reference.expectations)
    return Checked(model=served.name, report=report, latency_ms={e.case.name: each_ms for e in reference.expectations})


def _reference_of(folder: Path, served: Served) -> Path:
    """The reference in a bundle, or in a repository the one of the version that the server reports."""
    if untrusted.is_regular(folder / bundle.MANIFEST):
        if bundle.read_manifest(folder).variant != served.variant:
            raise UsageError(
                f"{folder} is a {bundle.read_manifest(folder).variant}; the server has a {served.variant}.",
                next_step="Give the bundle that was deployed.",
            )
        return folder / bundle.REFERENCE
    places = [path / str(served.version) / bundle.REFERENCE for path in deployed_as(folder, served.name)]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise UsageError(
            f"{folder} is neither a bundle nor the repository that {served.name} {served.version} was deployed to.",
            next_step="Give the bundle that was deployed, or the repository.",
        )
    return found
