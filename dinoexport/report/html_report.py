"""`report.html`: the report of a bundle as one page, without network or scripts; light, dark and printed.

Jinja fills the template beside this file and escapes every value. Charts are SVG drawn by the template, so they follow
the reader's colour scheme. The same build gives the same bytes: no date, no random id.
"""

from __future__ import annotations

import shlex
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import floor, isfinite, log10
from pathlib import Path
from typing import Any

from dinoexport.bundle import HeadManifest, Manifest
from dinoexport.bundle.reference_file import Reference
from dinoexport.config.recipe import variants
from dinoexport.errors import require
from dinoexport.family import Reported
from dinoexport.spec import Array, Arrays, Candidate, Expectation, Graph, Picture
from dinoexport.validation.error_analysis import RANGE, Growth
from dinoexport.validation.judge import Bound, Report, Row
from dinoexport.validation.metrics import vector_errors

TEMPLATE = Path(__file__).parent / "templates" / "report.html.jinja"
PACKAGES = ("jinja2",)
_BINS = 40
# Usual measures of depths and labels -> their column.
_MEASURES = {
    "within_1.25": "within 1.25 times",
    "label_agreement": "same label",
    "decided": "decided",
    "mean_iou": "mIoU",
}


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Outputs and errors that the page shows, collected during validation by `keeping`.

    answers: case name -> the candidate's outputs, for cases with pictures. errors: output -> for each case an array of
    the relative error of each vector.
    """

    answers: dict[str, Arrays] = field(default_factory=dict)
    errors: dict[str, list[Array]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """How a fitted classifier did on images it was never fitted on.

    interval: of the share that is right, 95 %. recall: by class. counts: images by class. confusions: images that were
    given another class. notes: about the images, such as skipped files and imbalance.
    """

    images: int
    right: int
    interval: tuple[float, float]
    recall: Mapping[str, float]
    counts: Mapping[str, int]
    confusions: tuple[Picture, ...]
    notes: tuple[str, ...] = ()


def keeping(candidate: Candidate, expectations: Sequence[Expectation], kept: Kept) -> Candidate:
    """The candidate, wrapped to store in `kept` what the page needs of its outputs for `expectations`."""
    asked = {id(expectation.case.inputs): expectation for expectation in expectations}

    def answer(inputs: Arrays) -> dict[str, Array]:
        answers = candidate(inputs)
        if (expectation := asked.get(id(inputs))) is not None:
            if expectation.case.shown:
                kept.answers[expectation.case.name] = answers
            for name, expected in expectation.outputs.items():
                alike = name in answers and answers[name].shape == expected.shape
                if alike and name not in expectation.case.choices and name not in expectation.leads:
                    kept.errors.setdefault(name, []).append(vector_errors(answers[name], expected))
        return answers

    return answer


def render(
    manifest: Manifest,
    model: Reported,
    report: Report,
    growth: Growth | None,
    reference: Reference,
    kept: Mapping[str, Kept],
    held_out: HeldOut | None = None,
) -> str:
    """The page as HTML, with everything in the manifest except its time.

    kept: by candidate; charts show the candidate of `report`, pictures show all. held_out: of a fitted head.
    """
    require("export", *PACKAGES)
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"figure": _figure, "data_uri": _data_uri}
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        title=f"{_model_name(manifest)}, {manifest.precision}, for {manifest.target}",
        facts=_facts(manifest),
        cautions=[*_about_weights(manifest), *sorted({e.caution for e in manifest.engines if e.caution})],
        versions=manifest.versions,
        card=manifest.card,
        repeat=_repeat(manifest),
        tried=manifest.report.get("precision", {}).get("trials", ()),
        report=report,
        held_out=held_out,
        based_on=_based_on(report),
        closest=_closest(report),
        rows=report.rows,
        measures={name: words for name, words in _MEASURES.items() if any(name in row.figures for row in report.rows)},
        range_rows=[row for row in report.rows if row.output == RANGE],
        limits=_limits(report),
        growth=growth,
        growth_bars=[] if growth is None else _growth_bars(growth),
        pictures=_pictures(manifest, model, reference, kept),
        histograms=[_histogram(name, parts) for name, parts in sorted(kept[report.candidate].errors.items())],
        sizes=_sizes(model.graphs, reference),
    )


def _about_weights(manifest: Manifest) -> list[str]:
    if not (which := manifest.synthetic):
        return []
    return [
        f"{which[0].upper()}{which[1:]} are synthetic: what the model answers, and the pictures of it, mean nothing.",
        "The report shows that the model gives PyTorch's outputs for the same weights.",
    ]


def _model_name(manifest: Manifest) -> str:
    """The variant, with the head if the head's weights are not part of it."""
    head = manifest.head
    return f"{manifest.variant} with {head.kind}" if head and head.source else manifest.variant


def _facts(manifest: Manifest) -> dict[str, str]:
    head = manifest.head
    kept_fp32 = manifest.report.get("precision", {}).get("fp32", ())
    return {
        "weights": manifest.checkpoint.source,
        "their SHA-256": manifest.checkpoint.sha256,
        **({"head": head.kind, "head's weights": head.source} if head and head.source else {}),
        **({"head's SHA-256": head.sha256} if head and head.sha256 else {}),
        "licence": manifest.checkpoint.licence,
        "precision": f"{manifest.precision}{', with ' if kept_fp32 else ''}{', '.join(kept_fp32)}"
        f"{' in fp32' if kept_fp32 else ''}",
        **{
            f"engine {engine.file}": f"{engine.runtime} {engine.runtime_version}, {engine.size_bytes / 1e6:.1f} MB; "
            f"compiled; executed: {engine.executed}"
            for engine in manifest.engines
        },
    }


def _repeat(manifest: Manifest) -> list[str]:
    """The commands that build and validate this bundle again."""
    source = manifest.checkpoint.source
    weights = "" if source.startswith("http") else f" --weights {shlex.quote(source)}"
    precision = "auto" if "precision" in manifest.report else manifest.precision
    known = manifest.variant in variants()
    recipe = manifest.variant if known else "RECIPE.toml"
    head = _head_options(manifest.head)
    return [
        f"dinoexport build {recipe}{weights}{head} --target {manifest.target} --precision {precision}",
        *([] if known else ["# the recipe is the object `recipe` in manifest.json"]),
        *_fit(manifest),
        "dinoexport validate BUNDLE",
    ]


def _head_options(head: HeadManifest | None) -> str:
    """What `build` is told about a published head; a fitted one is made afterwards, and others are in the recipe."""
    if head is None or head.file or not head.source:
        return ""
    weights = "" if head.source.startswith("http") else f" --head-weights {shlex.quote(head.source)}"
    return f" --head {head.kind}{weights}"


def _fit(manifest: Manifest) -> list[str]:
    """The command that fits the head on a bundle without one."""
    fitted = manifest.report.get("fit")
    if not fitted:
        return []
    balanced = " --balanced" if fitted.get("balanced") else ""
    return [f"dinoexport fit BUNDLE_WITHOUT_HEAD --images DIR --head {fitted['head']}{balanced} --out BUNDLE"]


def _based_on(report: Report) -> str:
    cases = {row.case for row in report.rows}
    bounds = sum(len(row.bounds) for row in report.rows)
    return f"{len(report.rows)} checks of {len(cases)} cases against {bounds} limits"


def _closest(report: Report) -> tuple[Row, Bound] | None:
    """The upper limit that a figure exceeds most, or comes closest to."""
    shares = [(b.value / b.limit, row, b) for row in report.rows for b in row.bounds if _is_upper(b) and b.limit > 0]
    finite = [entry for entry in shares if isfinite(entry[0])]
    return max(finite, key=lambda entry: entry[0])[1:] if finite else None


def _is_upper(bound: Bound) -> bool:
    return bound.figure in ("relative_l2", "worst_l2", "largest", "largest_difference")


def _limits(report: Report) -> list[tuple[str, str, str]]:
    """(figure, limit, reason) of every limit; a limit that varies between cases is one row with its range."""
    values: dict[tuple[str, str], set[float]] = {}
    for row in report.rows:
        for bound in row.bounds:
            if row.output != RANGE:  # it has a table of its own
                values.setdefault((bound.figure, bound.reason), set()).add(bound.limit)
    return [
        (figure, _figure(min(found)) if len(found) == 1 else f"{_figure(min(found))} to {_figure(max(found))}", reason)
        for (figure, reason), found in values.items()
    ]


@dataclass(frozen=True, kw_only=True)
class _Bar:
    """A bar from 0 to 100 on a logarithmic scale, and the position of the mark for the expected error."""

    length: float
    mark: float


def _growth_bars(growth: Growth) -> list[_Bar]:
    numbers = [number for step in growth.steps for number in (step.relative_l2, step.expected)]
    positive = [number for number in numbers if isfinite(number) and number > 0] or [1.0]
    low, high = floor(log10(min(positive))), log10(max(positive))

    def place(number: float) -> float:
        if not isfinite(number):
            return 100.0
        return 0.0 if number <= 0 else round(100 * (log10(number) - low) / max(high - low, 1e-9), 2)

    return [_Bar(length=place(step.relative_l2), mark=place(step.expected)) for step in growth.steps]


@dataclass(frozen=True, kw_only=True)
class _Histogram:
    """Counts of an output's vectors by relative error; `bins` are (left edge, count, share of the highest bin)."""

    name: str
    vectors: int
    smallest: float
    largest: float
    bins: list[tuple[float, int, float]]
    not_finite: int


def _histogram(name: str, parts: Sequence[Array]) -> _Histogram:
    """Logarithmic; an exact zero counts as the smallest positive error."""
    import numpy as np

    errors = np.concatenate(parts)
    finite = errors[np.isfinite(errors)]
    positive = finite[finite > 0]
    smallest, largest = (float(positive.min()), float(positive.max())) if positive.size else (1.0, 1.0)
    counts, edges = np.histogram(np.log10(np.maximum(finite, smallest)), bins=_BINS)
    return _Histogram(
        name=name,
        vectors=errors.size,
        smallest=smallest,
        largest=largest,
        bins=[
            (10.0**edge, count, count / counts.max())
            for edge, count in zip(edges.tolist(), counts.tolist(), strict=False)
        ]
        if finite.size
        else [],
        not_finite=int(errors.size - finite.size),
    )


def _pictures(
    manifest: Manifest, model: Reported, reference: Reference, kept: Mapping[str, Kept]
) -> list[tuple[str, str, Any]]:
    """(case, why, rows of the family's pictures) of every case with pictures.

    Where PyTorch's own outputs in the candidates' precision are known, they come before the candidates.
    """
    drawn = []
    for expectation in reference.expectations:
        name = expectation.case.name
        answers = {candidate: found.answers[name] for candidate, found in kept.items() if name in found.answers}
        if expectation.own_outputs:
            answers = {f"PyTorch's own {manifest.precision}": expectation.own_outputs} | answers
        if expectation.case.shown and answers:
            rows = model.pictures(expectation.case, expectation.outputs, answers)
            drawn.append((name, expectation.case.why, rows))
    return drawn


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """The two dynamic dimensions with the widest range, and the position of each case between their ends, 0 to 100."""

    x: str
    y: str
    x_range: tuple[int, int]
    y_range: tuple[int, int]
    points: list[tuple[float, float, str]]


def _sizes(graphs: Sequence[Graph], reference: Reference) -> _Sizes | None:
    """Logarithmic in both directions; cases without the first graph's inputs are left out."""
    graph = graphs[0]
    dims = sorted(graph.dims, key=lambda dim: dim.max / max(dim.min, 1))[-2:]
    if len(dims) < 2 or any(dim.min in (0, dim.max) for dim in dims):
        return None
    y, x = sorted(dims, key=lambda dim: dim.name)
    places: dict[tuple[int, int], list[str]] = {}
    for expectation in reference.expectations:
        sizes = {
            dim: size
            for tensor in graph.inputs
            if tensor.name in expectation.case.inputs
            for dim, size in zip(tensor.shape, expectation.case.inputs[tensor.name].shape, strict=True)
        }
        if x.name in sizes and y.name in sizes:
            places.setdefault((sizes[x.name], sizes[y.name]), []).append(expectation.case.name)

    def place(size: int, low: int, high: int) -> float:
        return round(100 * log10(size / low) / log10(high / low), 2)

    points = [
        (
            place(width, x.min, x.max),
            place(height, y.min, y.max),
            f"{', '.join(names)}: {y.name} {height}, {x.name} {width}",
        )
        for (width, height), names in sorted(places.items())
    ]
    return _Sizes(x=x.name, y=y.name, x_range=(x.min, x.max), y_range=(y.min, y.max), points=points) if points else None


def _figure(value: float) -> str:
    """Two significant digits; a value just below one, such as a cosine, is shown as its difference from one."""
    if not isfinite(value):
        return str(value)
    if 0.99 < value < 1:
        return f"1 - {1 - value:.1e}"
    if value and not 0.01 <= abs(value) < 1e6:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2g}"


def _data_uri(data: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{b64encode(data).decode()}"
