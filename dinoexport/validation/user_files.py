"""Validate on a user's files, however many: in chunks, with the results of each file kept until the verdict.

An interrupted run continues where it stopped. The results of an item are stored under the hash of its inputs, in a
folder named by the hash of everything else that they depend on. The folder is deleted when there is a verdict.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from dinoexport.bundle import archive
from dinoexport.bundle.reference_file import Reference
from dinoexport.config.limits import Limits
from dinoexport.errors import DinoexportError, OutsideProfile, UsageError, require
from dinoexport.family import CaseSource, Uses
from dinoexport.spec import Array, Arrays, Candidate, Case, Expectation, Progress, silent
from dinoexport.system.cache import cache_folder
from dinoexport.validation import downstream
from dinoexport.validation.downstream import Agreement, ItemFeatures
from dinoexport.validation.judge import Report, Row

_FACTS = "facts.json"


@dataclass(frozen=True, kw_only=True)
class CaseResult:
    """The results of one case: rows of the report, and features. covered: false outside an engine's profiles."""

    rows: tuple[Row, ...]
    item: ItemFeatures
    covered: bool


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A candidate whose outputs are remembered by the identity of their inputs, which must live as long."""

    candidate: Candidate
    answers: dict[int, Arrays] = field(default_factory=dict)

    def __call__(self, inputs: Arrays) -> dict[str, Array]:
        """The candidate's outputs."""
        answer = self.candidate(inputs)
        self.answers[id(inputs)] = answer
        return answer

    def to(self, inputs: Arrays) -> Arrays:
        """Its outputs for `inputs`; empty if it gave none."""
        return self.answers.get(id(inputs), {})


@dataclass(frozen=True, kw_only=True)
class Keep:
    """A folder with the results of each item, by the hash of its inputs. Files in it appear by rename."""

    folder: Path

    @classmethod
    def named(cls, *identity: str) -> Keep:
        """The one for `identity`, in the user's cache."""
        key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        return cls(folder=cache_folder() / "validated" / key[:32])

    @property
    def usable(self) -> bool:
        """Whether results can be stored here."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return False
        return os.access(self.folder, os.W_OK)

    def read(self, digest: str, case: Case) -> CaseResult | None:
        """The stored results for these inputs, under any name; None if there are none, or they are damaged."""
        try:
            arrays = archive.read(self._path(digest))
            facts = _STORED.validate_json(arrays.pop(_FACTS).tobytes())
        except Exception:  # zipfile, zlib, NumPy and pydantic raise a dozen kinds of exceptions for damaged files
            return None
        return CaseResult(
            rows=tuple(replace(row, case=case.name, why=case.why) for row in facts.rows),
            covered=facts.covered,
            item=ItemFeatures(
                name=case.name,
                label=case.label,
                reference=_under("reference/", arrays),
                candidate=_under("candidate/", arrays),
                matched=facts.matched,
            ),
        )

    def write(self, digest: str, found: CaseResult) -> None:
        """Stores results. If that fails, for example on a full disk, the next run computes them again."""
        import numpy as np

        stored = _Stored(rows=found.rows, covered=found.covered, matched=found.item.matched)
        arrays: dict[str, Any] = {
            _FACTS: np.frombuffer(json.dumps(asdict(stored)).encode(), np.uint8),
            **{f"reference/{name}": array for name, array in found.item.reference.items()},
            **{f"candidate/{name}": array for name, array in found.item.candidate.items()},
        }
        path = self._path(digest)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with partial.open("wb") as file:
                    np.savez(file, **arrays)
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)

    def clear(self) -> None:
        """Removes everything, because there is a verdict."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, digest: str) -> Path:
        return self.folder / digest[:2] / f"{digest}.npz"


@dataclass(frozen=True, kw_only=True)
class _Stored:
    rows: tuple[Row, ...]
    covered: bool
    matched: float | None


_STORED = TypeAdapter(_Stored)


@dataclass(frozen=True, kw_only=True)
class Aggregate:
    """The verdict on all of a user's cases. agreement: None without uses in the family. said: notes about the run."""

    report: Report
    agreement: Agreement | None
    said: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The results besides the report, ready for json.dumps."""
        return {"said": list(self.said), "agreement": self.agreement and self.agreement.to_json()}


def usable(
    model: CaseSource, folder: Path, skipped: list[str], progress: Progress, *, only: Collection[str] | None = None
) -> Iterator[Case]:
    """The user's cases, or only those named in `only`; adds a line to `skipped` for each file that cannot be used."""
    for found in model.cases_from(folder, progress=progress, only=only):
        if isinstance(found, str):
            skipped.append(found)
        else:
            yield found


def readable(model: CaseSource, folder: Path, skipped: list[str], progress: Progress) -> Iterator[Case]:
    """The same; an immediate UsageError if the folder does not exist or has no usable file."""
    if not folder.is_dir():
        raise UsageError(f"There is no folder {folder}.", next_step="Give a folder of images as --images.")
    cases = usable(model, folder, skipped, progress)
    first = next(cases, None)
    if first is None:
        listed = "".join(f"\n  {line}" for line in skipped)
        raise UsageError(f"{folder} holds no image that can be read.{listed}", next_step="Give another folder.")
    return chain((first,), cases)


def judge_own(
    uses: Uses | None,
    cases: Iterable[Case],
    candidate: Candidate,
    limits: Limits,
    *,
    ask: Callable[[Sequence[Case]], Reference],
    exact: Callable[[Sequence[Arrays]], Sequence[Arrays]],
    judged: Callable[[Candidate, Reference], Report],
    names: tuple[str, str],
    identity: Sequence[str],
    at_once: int,
    progress: Progress = silent,
) -> Aggregate:
    """Evaluates every case, `at_once` of them at a time, then the downstream results of all together.

    ask, exact: PyTorch's outputs for cases, and for inputs alone. judged: the report on a candidate against such
    outputs. names: of the candidate and of PyTorch. identity: besides them and the limits, everything that the results
    depend on.
    """
    if uses:
        require("export", *downstream.PACKAGES)  # before the hours this may take, not after
    recorded = Recorded(candidate=candidate)

    def found_of(chunk: Sequence[Case]) -> list[CaseResult]:
        reference = ask(chunk)
        report = judged(recorded, reference)
        views = [uses.second_view(case.inputs) for case in chunk] if uses else []
        viewed = iter(zip(views, exact(views) if views else (), strict=True))
        of_chunk = [
            CaseResult(
                rows=tuple(row for row in report.rows if row.case == expectation.case.name),
                item=_item(uses, expectation, next(viewed, None), recorded),
                covered=expectation.case.name not in report.not_covered,
            )
            for expectation in reference.expectations
        ]
        recorded.answers.clear()
        return of_chunk

    keep = Keep.named(*names, *identity, limits.model_dump_json())
    said = [] if keep.usable else [f"{keep.folder} cannot be written: an interrupted run must start again"]
    rows: list[Row] = []
    items: list[ItemFeatures] = []
    not_covered: list[str] = []
    known = 0
    for found, before in _found(cases, found_of, keep, at_once=at_once):
        rows += found.rows
        items.append(found.item)
        not_covered += [] if found.covered else [found.item.name]
        known += before
    if known:
        said.append(f"{known} of {len(items)} results come from an interrupted run")
    aggregate = downstream.agreement(uses, items, limits, progress=progress) if uses else None
    report = Report(
        candidate=names[0],
        reference=names[1],
        rows=(*rows, *(aggregate.rows if aggregate else ())),
        not_covered=tuple(not_covered),
    )
    keep.clear()
    return Aggregate(report=report, agreement=aggregate, said=tuple(said))


def _found(
    cases: Iterable[Case], ask: Callable[[Sequence[Case]], Sequence[CaseResult]], keep: Keep, *, at_once: int
) -> Iterator[tuple[CaseResult, bool]]:
    """The results of each case, and whether an earlier run had stored them; `ask` gets at most `at_once` cases."""
    rest = iter(cases)
    while chunk := tuple(islice(rest, at_once)):
        digests = [_digest(case.inputs) for case in chunk]
        kept = [keep.read(digest, case) for digest, case in zip(digests, chunk, strict=True)]
        wanted = [case for case, known in zip(chunk, kept, strict=True) if known is None]
        asked = iter(ask(wanted) if wanted else ())
        for digest, known in zip(digests, kept, strict=True):
            if known is not None:
                yield known, True
                continue
            new = next(asked)
            keep.write(digest, new)
            yield new, False


def _item(
    uses: Uses | None, expectation: Expectation, viewed: tuple[Arrays, Arrays] | None, candidate: Recorded
) -> ItemFeatures:
    """The features of a case. viewed: the inputs of its second view and PyTorch's outputs for them."""
    import numpy as np

    case, expected = expectation.case, expectation.outputs
    nothing = ItemFeatures(name=case.name, label=case.label, reference={}, candidate={}, matched=None)
    if uses is None or viewed is None:
        return nothing
    answer = candidate.to(case.inputs)
    exact = uses.features(expected)
    same_shapes = answer.keys() == expected.keys() and all(answer[n].shape == expected[n].shape for n in expected)
    ours = uses.features(answer) if same_shapes else {}
    if not ours or not all(np.isfinite(vector).all() for vector in ours.values()):
        return replace(nothing, reference=exact)
    view, expected_of_view = viewed
    matched: float | None
    try:
        equal = uses.matches(answer, candidate.candidate(view)) == uses.matches(expected, expected_of_view)
        matched = float(equal.mean())
    except OutsideProfile:
        matched = None
    except DinoexportError:
        matched = 0.0
    return replace(nothing, reference=exact, candidate=ours, matched=matched)


def _under(prefix: str, arrays: Arrays) -> dict[str, Array]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _digest(inputs: Arrays) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(inputs.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
