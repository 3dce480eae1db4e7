"""Format results as lines and rows; what can be built is in `catalogue`, what a bundle holds in `contents`."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dinoexport import bundle
from dinoexport.runtime import choice
from dinoexport.spec import Runtime, Way
from dinoexport.system import timing

if TYPE_CHECKING:
    from dinoexport.serving.triton.model_repository import Deployed
    from dinoexport.validation.error_analysis import Growth
    from dinoexport.validation.judge import Report, Row

TableRows = list[dict[str, Any]]
# More rows than a build has; a user's images can give a hundred thousand.
_ROWS_MAX = 150


def precision(manifest: bundle.Manifest) -> str:
    """The precision in words; with `--precision auto`, the parts in fp32 and how many combinations were tried."""
    found = manifest.report.get("precision")
    if found is None:
        return manifest.precision.value
    kept, tried = ", ".join(found["fp32"]) or "nothing", len(found["trials"])
    return f"{manifest.precision} with {kept} in fp32: {tried} combinations tried"


def engine_lines(manifest: bundle.Manifest, not_run: str = "") -> list[str]:
    """For each engine: what it is, whether it was run (and why not), and cautions."""
    lines = []
    for e in manifest.engines:
        lines.append(
            f"Engine: {e.file} for SM {', '.join(e.compute_capabilities)}, {e.runtime} {e.runtime_version}, "
            f"{e.precision}, {e.size_bytes / 1e6:.1f} MB. Built; executed: {e.executed}."
        )
        if not_run:
            lines.append(f"        {not_run}")
        if e.fused_attentions is not None and e.fused_attentions < e.attentions:
            lines.append(
                f"        warning: attention is fused in {e.fused_attentions} of {e.attentions} places"
                + ("; TensorRT fuses it in fp16 only." if e.precision == "fp32" else ".")
            )
        if e.caution:
            lines.append(f"        caution: {e.caution}")
    return lines


def proven(report: Report, *, own_images: bool, not_run: str, verified: bool) -> tuple[str, list[str]]:
    """What a passed verdict proves on this machine, and what it does not prove."""
    count = len({row.case for row in report.rows})
    asked = "those of your images that could be read" if own_images else f"the {count} cases the bundle carries"
    left_open = ["other inputs and sizes", "that the weights are the authors' own"]
    left_open += [f"{len(report.not_covered)} cases outside the engine's profiles"] if report.not_covered else []
    left_open += ["a GPU, which did not run it"] if not_run else []
    left_open += [] if verified else ["who made the bundle (--verify KEY)"]
    return f"{report.candidate}, on this machine, gives PyTorch's outputs for {asked}, within the limits", left_open


def signature_lines(signed_by: str | None, *, by_us: bool = False, verified: bool = False) -> list[str]:
    """Who signed a bundle, as far as known."""
    if signed_by is None:
        return []
    known = "just now" if by_us else "verified" if verified else "not verified; --verify KEY does that"
    return [f"Signed: by key {signed_by[:16]}, {known}"]


def cpu_lines(manifest: bundle.Manifest) -> list[str]:
    """How the bundle runs here: runtime, threads, arithmetic, the measurements behind the choice, and their noise."""
    facts = manifest.cpu
    if facts is None:
        return []
    ran = ", ".join(f"{count} products in {kind}" for kind, count in facts.arithmetic.items())
    lines = [
        f"Runs:   {_way(facts.chosen, facts.runtime_version)} ({ran}) on {facts.machine}, {facts.usable_cpus} CPUs"
    ]
    if not facts.measured:
        lines.append("        the only runtime there was to choose from; nothing was timed")
        return lines
    for timed in facts.measured:
        chosen = ", chosen" if timed.way == facts.chosen else ""
        lines.append(f"        {timed.median_ms:9.1f} ms for {facts.load}: {_way(timed.way)}{chosen}")
    lines += [f"        {runtime} was left out: {why}" for runtime, why in facts.refused.items()]
    if facts.times_fp32 is not None:
        lines.append(f"        {facts.times_fp32:.2f} times the time of the fastest fp32 there")
    if facts.others_share > timing.NOISY_SHARE:
        crowded = facts.others_share > choice.CROWDED_SHARE
        lines.append(
            f"        noisy: other processes had {facts.others_share:.0%} of the CPUs while this was measured; "
            + ("only CPU time decided" if crowded else "CPU time and the best of many visits decided too")
        )
    if facts.basis != "measured":
        lines.append(f"        {_BASES[facts.basis]}")
    return lines


_BASES = {
    "known": "ways with equal times: chosen is what was faster here when the machine was quiet",
    "usual": "ways with equal times: chosen is what is usually the faster one",
}


def _way(way: Way, version: str = "") -> str:
    threads = f"{way.threads} thread{'s' * (way.threads != 1)}"
    return f"{way.runtime}{version and f' {version}'}, {threads}, {way.precision}"


def deployed_facts(deployed: Deployed) -> dict[str, Any]:
    """What a repository serves now, ready for json.dumps."""
    plain = {"repository": str(deployed.repository), "models": list(deployed.models), "retired": list(deployed.retired)}
    return {**asdict(deployed), **plain}


def deployed_lines(deployed: Deployed) -> list[str]:
    """What the repository serves now, and how to make a running server load it."""
    before = f" (before: {deployed.previous})" if deployed.previous else ""
    where = "BUNDLE" if isinstance(deployed.repository, str) else shlex.quote(str(deployed.repository))
    return [
        f"Serving: {deployed.name} version {deployed.version}{before}, in {deployed.repository}",
        f"Models:  {', '.join(deployed.models)}",
        *([f"Note:    {deployed.note}"] if deployed.note else []),
        "Next, to make a running server load it:",
        *(f"         curl -X POST HOST:8000/v2/repository/models/{model}/unload" for model in deployed.retired),
        *(f"         curl -X POST HOST:8000/v2/repository/models/{model}/load" for model in deployed.models),
        f"         dinoexport check http://HOST:8000 {where} --model {deployed.name}",
    ]


def latency_rows(latency_ms: Mapping[str, float]) -> TableRows:
    """A row for each case that was sent to the server."""
    return [{"case": case, "latency ms": f"{ms:.1f}"} for case, ms in latency_ms.items()]


def shape_of(shape: list[int | str]) -> str:
    """Sizes and names of dimensions as text."""
    return " x ".join(map(str, shape))


def report_rows(report: Report) -> TableRows:
    """A row for each output of each case: its figures and, where it failed, the limits it missed.

    If there are too many rows to read, only those that failed and those nearest to their limit.
    """
    measured = any(row.figures or row.divergence for row in report.rows)
    if len(report.rows) <= _ROWS_MAX:
        return [_report_row(row, measured=measured) for row in report.rows]
    rest = f"and {len(report.rows) - _ROWS_MAX:,} more; --json has them all"
    nearest = sorted(report.rows, key=_closeness, reverse=True)[:_ROWS_MAX]
    shown = [_report_row(row, measured=measured) for row in nearest]
    return [*shown, {column: rest if column == "case" else "" for column in shown[0]}]


def _closeness(row: Row) -> float:
    """A row's largest error divided by its limit; infinite if it failed."""
    if not row.passed:
        return math.inf
    upper = [b.value / b.limit for b in row.bounds if b.figure in ("relative_l2", "largest_difference") and b.limit > 0]
    shares = ("within_1.25", "label_agreement")
    lower = [(1 - b.value) / (1 - b.limit) for b in row.bounds if b.figure in shares and b.limit < 1]
    return max((*upper, *lower), default=0.0)


def growth_rows(growth: Growth) -> TableRows:
    """A row for each value inside the graph that was compared with PyTorch's."""
    return [
        {
            "value": step.name,
            "relative L2": f"{step.relative_l2:.1e}",
            "expected": f"{step.expected:.1e}",
            "mean norm": f"{step.norm:.4g}",
            "PyTorch's": f"{step.reference_norm:.4g}",
            "largest": f"{step.largest:.4g}",
            "times median": f"{step.times_median:.0f}",
            "fits fp16": f"{step.fp16_headroom:.3g} times",
            "verdict": "ok" if step.holds else "FIRST OVER" if step is growth.leaves else "over",
        }
        for step in growth.steps
    ]


def explained(report: Report, growth: Growth | None, way: Way) -> list[str]:
    """The explanation as text; without `growth`, the reason why inner values were not compared. way: of the graph."""
    from dinoexport.runtime.table import TABLE
    from dinoexport.validation import error_analysis

    if growth is None:
        if way.runtime is not Runtime.ONNXRUNTIME:
            return [
                f"Inner values were not compared: {TABLE[way.runtime].title} ran this bundle and does not show them."
            ]
        return ["Inner values were not compared: no output has an error, or the family names no inner values."]
    return error_analysis.causes(report, growth) or ["The error is as expected everywhere."]


def _report_row(row: Row, *, measured: bool) -> dict[str, Any]:
    """measured: whether the table has a column for the usual measure of labels, depths and distributions."""
    figures = row.distance
    missed = "; ".join(f"{b.figure} {_figure(b.value)}, limit {_figure(b.limit)}" for b in row.bounds if not b.holds)
    limit = _limit_of(row, "relative_l2")
    cosine = "" if figures is None or row.divergence is not None else f"{figures.cosine_worst:.8f}"
    return {
        "case": row.case,
        "output": row.output,
        "shape": shape_of(list(row.shape)),
        "relative L2": "" if figures is None else f"{figures.relative_l2:.1e}",
        "limit": "" if limit is None else f"{limit:.1e}",
        "worst vector": "" if figures is None else f"{figures.worst_l2:.1e}",
        "worst cosine": cosine,
        **({"measure": _measure(row)} if measured else {}),
        "largest abs": _largest(row),
        "verdict": "ok" if row.passed else f"FAILED {row.problem or missed}",
    }


def _limit_of(row: Row, figure: str) -> float | None:
    """The strictest limit of one figure; None if it has none. An upper limit, or a share that has one lower limit."""
    return min((bound.limit for bound in row.bounds if bound.figure == figure), default=None)


def _beside_limit(row: Row, figure: str, value: float, form: str) -> str:
    """The value with the limit of that figure, if it has one; `form` is how both are written."""
    limit = _limit_of(row, figure)
    return format(value, form) + ("" if limit is None else f" (limit {limit:{form}})")


def _largest(row: Row) -> str:
    """The largest difference, for probabilities with its limit; for an fp16 range, the largest magnitude."""
    if largest := [bound.value for bound in row.bounds if bound.figure == "largest"]:
        return f"{largest[0]:.1e}"
    if row.distance is None:
        return ""
    return _beside_limit(row, "largest_difference", row.distance.max_abs, ".1e")


def _measure(row: Row) -> str:
    """The usual measure of distributions, labels or depths, with its limit if it has one."""
    said = []
    if row.divergence is not None:
        said.append(f"KL {_beside_limit(row, 'kl_mean', row.divergence.kl_mean, '.1e')}")
    for figure, words in (("label_agreement", "same label"), ("within_1.25", "within 1.25")):
        if figure in row.figures:
            said.append(f"{words} {_beside_limit(row, figure, row.figures[figure], '.2%')}")
    if "mean_iou" in row.figures:
        said.append(f"mIoU {row.figures['mean_iou']:.4f}")
    return ", ".join(said)


def _figure(value: float) -> str:
    return json.dumps(float(f"{value:.4g}")) if math.isfinite(value) else str(value)
