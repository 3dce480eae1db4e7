"""Which cases a combination of precisions is tried on, and what is kept of each trial; the trials are made up."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from dinoexport.pipeline import mixed_precision


@dataclass(frozen=True)
class Reference:
    """As much of one as is asked for."""

    expectations: tuple[Any, ...]


CASES = tuple(SimpleNamespace(case=SimpleNamespace(name=name)) for name in "abc")


@pytest.mark.parametrize(
    ("needed", "found"), [({"mlp"}, ("mlp",)), ({"mlp", "scores"}, ("scores", "mlp")), (set(), ()), (None, None)]
)
def test_only_cases_that_failed_are_tried_again(
    needed: set[str] | None, found: tuple[str, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first combination runs all cases, of which b fails; no combination is tried twice."""
    asked: list[tuple[tuple[str, ...], str]] = []

    def problems(parts: tuple[str, ...], _checkpoint: Any, reference: Reference, *_: Any) -> dict[str, str]:
        asked.append((parts, "".join(e.case.name for e in reference.expectations)))
        return {} if needed is not None and needed <= set(parts) else {"b": "b/tokens"}

    monkeypatch.setattr(mixed_precision, "_problems", problems)
    monkeypatch.setattr(mixed_precision, "promoted", lambda _recipe, _model, parts: (None, parts))
    told: list[tuple[int, int]] = []
    model: Any = SimpleNamespace(promotable=("norms", "scores", "mlp"))
    nothing: Any = None
    reference: Any = Reference(CASES)
    result = mixed_precision.search(
        nothing, model, nothing, reference, nothing, progress=lambda _, done, total: told.append((done, total))
    )
    assert result.fp32 == found
    assert asked[0] == ((), "abc") and all(names == "b" for _, names in asked[1:])
    assert len({parts for parts, _ in asked}) == len(asked) == len(result.trials) == len(told)
    assert told == [(count, 0) for count in range(1, len(asked) + 1)]
    for (parts, _), trial in zip(asked, result.trials, strict=True):
        assert trial.fp32 == parts and trial.failed_by == ("" if trial.passed else "b/tokens")
        assert trial.passed == (needed is not None and needed <= set(parts))


def test_a_model_without_parts_to_promote_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixed_precision, "_problems", lambda *_: {"a": "a/tokens"})
    monkeypatch.setattr(mixed_precision, "promoted", lambda *_: (None, None))
    model: Any = SimpleNamespace(promotable=())
    nothing: Any = None
    reference: Any = Reference(CASES)
    result = mixed_precision.search(nothing, model, nothing, reference, nothing)
    assert result.fp32 is None and len(result.trials) == 1
