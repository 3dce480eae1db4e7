"""Verify embedded files: check every part's hash, and embed a sample of rows again to compare."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dinoexport import bundle
from dinoexport.bundle import reference_file
from dinoexport.bundle.reference_file import Reference
from dinoexport.config.limits import Limit, Limits
from dinoexport.embed import plan as plans
from dinoexport.embed.columns import ImageRow, stored
from dinoexport.embed.embedder import Embedder, Job
from dinoexport.embed.plan import Done, Plan
from dinoexport.errors import UsageError, require
from dinoexport.runtime import cpu
from dinoexport.spec import Array, Arrays, Case, Expectation, Progress, silent
from dinoexport.system import store
from dinoexport.system.store import Place
from dinoexport.validation import evaluate, judge

_SHARE = 0.001
_LEAST, _MOST = 16, 1000
# Half the relative distance between neighbouring float16 values: the largest error from storing alone.
_FLOAT16_ROUNDING = 2.0**-11


@dataclass(frozen=True, kw_only=True)
class VerifiedRows:
    """sampled: rows compared. changed: images whose bytes have changed. damaged: parts that are not as written.

    report: on the sample, compared with the stored rows; None if nothing could be compared.
    """

    sampled: int
    changed: tuple[str, ...]
    damaged: tuple[str, ...]
    report: judge.Report | None

    @property
    def passed(self) -> bool:
        """Whether parts are intact and the sample was right; a sample of nothing proves nothing."""
        return not self.damaged and self.report is not None and self.report.passed

    @property
    def lines(self) -> tuple[str, ...]:
        """The result as text."""
        return (
            *(f"damaged: {part}" for part in self.damaged),
            *(f"changed since: {name}" for name in self.changed),
            f"{self.sampled} rows were embedded again" + ("" if self.report else ": nothing to compare"),
        )


def verify(
    folder: Path, images: str, out: str, *, seed: int | None = None, progress: Progress = silent
) -> VerifiedRows:
    """Checks every part's bytes, and a thousandth of the finished rows, chosen at random, by the bundle's limits."""
    require("embed", "pyarrow")
    place = store.open_place(out)
    known = plans.read_all(place)
    if not known:
        raise UsageError(f"{out} holds no run.", next_step="dinoexport embed BUNDLE --images ... --out DIR makes one.")
    with bundle.checked(folder, progress=progress):
        return _verified(folder, images, out, place, known, seed, progress)


def _verified(
    folder: Path, images: str, out: str, place: Place, known: Sequence[Plan], seed: int | None, progress: Progress
) -> VerifiedRows:
    present = {name for name, _ in place.files()}
    parts = [(plan, s) for plan in known for s in range(plan.shards) if plan.part(s) in present]
    generator = random.Random(seed)  # noqa: S311 (a sample, no secret)
    job = Job(bundle=str(folder), out=out, images=images, threads=0, decoders=cpu.usable_cpus())
    embedder = Embedder(job)
    damaged: list[str] = []
    rows: list[ImageRow] = []
    total = sum(plan.items // plan.shards for plan, _ in parts)
    wanted = min(_MOST, max(_LEAST, round(total * _SHARE)))
    chosen = {id(part) for part in generator.sample(parts, min(len(parts), wanted))}
    each = -(-wanted // max(1, len(chosen)))
    for done, part in enumerate(parts, start=1):
        content = _read(place, *part)
        if content is None:
            damaged.append(part[0].part(part[1]))
        elif id(part) in chosen:
            rows += _sample(embedder, content, each, generator)
        progress("reading parts", done, len(parts))
    changed, expectations, again = _compared(embedder, rows, progress)
    report = None
    if expectations:
        settings = known[0].settings
        limits = _widened(reference_file.read(folder / bundle.REFERENCE).limits, settings.dtype)
        reference = Reference(name=f"what is stored in {out}", limits=limits, expectations=expectations, refusals=())
        report = evaluate.judged(lambda inputs: again[str(inputs["name"])], reference, embedder.runtime)
    return VerifiedRows(sampled=len(expectations), changed=tuple(changed), damaged=tuple(damaged), report=report)


def _read(place: Place, plan: Plan, shard: int) -> bytes | None:
    """A part's bytes; None if they are not those that were written."""
    import hashlib

    raw = place.read(plan.part(shard))
    try:
        done = Done.model_validate_json(place.read(plan.done_name(shard)))
    except (FileNotFoundError, ValueError):
        return raw
    return raw if hashlib.sha256(raw).hexdigest() == done.sha256 else None


def _sample(embedder: Embedder, content: bytes, count: int, generator: random.Random) -> Iterator[ImageRow]:
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(io.BytesIO(content))
    good = [i for i, error in enumerate(table.column("error").to_pylist()) if error is None]
    picked = sorted(generator.sample(good, min(count, len(good))))
    for values in table.take(pa.array(picked, pa.int64())).to_pylist():  # without the type, none cannot be taken
        yield embedder.stored_row(values)


def _compared(
    embedder: Embedder, rows: Sequence[ImageRow], progress: Progress
) -> tuple[list[str], tuple[Expectation, ...], dict[str, dict[str, Array]]]:
    """Images that changed, the stored values of the others, and the bundle's outputs for them now."""
    import numpy as np

    changed: list[str] = []
    expectations: list[Expectation] = []
    again: dict[str, dict[str, Array]] = {}
    for done, (row, now) in enumerate(zip(rows, embedder.answers(row.name for row in rows), strict=True), start=1):
        if now.error or now.sha256 != row.sha256:
            changed.append(row.name)
        else:
            inputs: Arrays = {"name": np.array(row.name)}
            case = Case(name=row.name, why="a stored row", inputs=inputs)
            outputs = {name: _as_vectors(array) for name, array in row.values.items()}
            expectations.append(Expectation(case=case, outputs=outputs))
            again[row.name] = {name: _as_vectors(array) for name, array in now.values.items()}
        progress("embedding again", done, len(rows))
    return changed, tuple(expectations), again


def _as_vectors(array: Array) -> Array:
    """In float32 with a batch of one, for the comparison of outputs."""
    return stored(array, dtype="float32", normalised=False, name="a row")[None]


def _widened(limits: Limits, dtype: str) -> Limits:
    """The bundle's limits; for float16, none is below the rounding error of float16."""
    if dtype == "float32":
        return limits
    reason = "storing values as float16 rounds each by up to half a unit of its last place"
    changes = {
        name: Limit(value=max(getattr(limits, name).value, _FLOAT16_ROUNDING), reason=reason)
        for name in ("relative_l2_max", "worst_l2_max")
    }
    floor = 1 - _FLOAT16_ROUNDING**2
    changes |= {
        name: Limit(value=min(limit.value, floor), reason=reason)
        for name in ("cosine_mean_min", "cosine_p01_min", "cosine_worst_min")
        if (limit := getattr(limits, name)) is not None
    }
    return limits.changed(**changes)
