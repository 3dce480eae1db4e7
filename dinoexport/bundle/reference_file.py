"""Read and write reference.npz: inputs, reference outputs and limits, for validation without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field

from dinoexport.bundle import archive, damaged
from dinoexport.config.limits import Limits
from dinoexport.config.recipe import Frozen
from dinoexport.errors import UsageError
from dinoexport.spec import Array, Case, Expectation, OutputKind
from dinoexport.system.untrusted import Unreadable

VERSION: Final = 1


class _StoredCase(Frozen):
    name: str
    why: str
    refused: bool
    neighbours: bool = False
    shown: bool = False
    own_error: dict[str, float]
    distributions: tuple[str, ...] = ()
    choices: dict[str, str] = Field(default_factory=dict)


class _Index(Frozen):
    """The content of `index.json` in a reference.npz: everything besides the arrays."""

    version: Literal[1] = VERSION
    reference: str
    limits: Limits
    cases: tuple[_StoredCase, ...]
    kinds: dict[str, tuple[OutputKind, str]] = Field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The content of reference.npz. `name` states whose code computed the outputs.

    kinds: output -> the kind of its numbers, and for labels the output that holds their scores; outputs that are not
    listed are vectors.
    """

    name: str
    limits: Limits
    expectations: tuple[Expectation, ...]
    refusals: tuple[Case, ...]
    kinds: Mapping[str, tuple[OutputKind, str]] = field(default_factory=dict)

    def smallest(self) -> Reference:
        """A reference with only the case of the smallest inputs; it is compared as in the whole reference."""
        cheapest = min(self.expectations, key=lambda e: sum(array.size for array in e.case.inputs.values()))
        return replace(self, expectations=(cheapest,), refusals=())


def write(path: Path, reference: Reference) -> None:
    """Writes inputs, reference outputs and limits as one .npz; the same content gives the same bytes."""
    import numpy as np

    arrays: dict[str, Array] = {}
    entries = []
    asked = [*reference.expectations, *(Expectation(case=case, outputs={}) for case in reference.refusals)]
    for i, expectation in enumerate(asked):
        case = expectation.case
        for kind, named in (
            ("in", case.inputs),
            ("out", expectation.outputs),
            ("own", expectation.own_outputs),
            ("lead", expectation.leads),
        ):
            arrays |= {f"{i}/{kind}/{name}": array for name, array in named.items()}
        entries.append(
            _StoredCase(
                name=case.name,
                why=case.why,
                refused=case.expect_refusal,
                neighbours=case.neighbours,
                shown=case.shown,
                own_error=dict(expectation.own_error),
                distributions=case.distributions,
                choices=dict(case.choices),
            )
        )
    index = _Index(reference=reference.name, limits=reference.limits, cases=tuple(entries), kinds=dict(reference.kinds))
    arrays["index.json"] = np.frombuffer(json.dumps(index.model_dump(mode="json"), allow_nan=False).encode(), np.uint8)
    with path.open("wb") as file:
        stored: Any = arrays  # typed for the keyword NumPy 2 added
        np.savez(file, **stored)


def read(path: Path) -> Reference:
    """The reference in `path`; raises ValidationFailed if it is damaged, UsageError if it has another version."""
    try:
        arrays = archive.read(path)
        content = json.loads(arrays.pop("index.json").tobytes())
        if (version := content.get("version")) != VERSION:
            raise UsageError(
                f"{path.name} has version {version!r}; this dinoexport reads {VERSION}.",
                next_step="Use the dinoexport that built the bundle, or build it again.",
            )
        index = _Index.model_validate(content)
    except Unreadable as error:
        raise damaged(f"{path.name} is not readable: {error.problem}") from None
    except UsageError:
        raise
    except Exception as error:  # zipfile, zlib and NumPy raise a dozen kinds of exceptions for damaged files
        raise damaged(f"{path.name} is not readable: {error}") from None
    expectations, refusals = [], []
    for i, entry in enumerate(index.cases):
        inputs, outputs, own, leads = (
            {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
            for prefix in (f"{i}/in/", f"{i}/out/", f"{i}/own/", f"{i}/lead/")
        )
        case = Case(
            name=entry.name,
            why=entry.why,
            inputs=inputs,
            expect_refusal=entry.refused,
            neighbours=entry.neighbours,
            shown=entry.shown,
            distributions=entry.distributions,
            choices=entry.choices,
        )
        if case.expect_refusal:
            refusals.append(case)
        else:
            expectations.append(
                Expectation(case=case, outputs=outputs, own_error=entry.own_error, own_outputs=own, leads=leads)
            )
    return Reference(
        name=index.reference,
        limits=index.limits,
        expectations=tuple(expectations),
        refusals=tuple(refusals),
        kinds=index.kinds,
    )
