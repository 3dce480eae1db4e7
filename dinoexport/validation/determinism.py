"""Measure repeatability: run a case again, item by item instead of as a batch, and with one thread.

These figures have no limits. A runtime may split a product, and so round its sum, differently for another batch size or
number of threads; the limits of the validation compare each output with PyTorch. These figures tell users whether they
can expect equal bytes, and how large the differences are if not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import inf, isnan

from dinoexport.errors import DinoexportError
from dinoexport.spec import Arrays, Case, Runner
from dinoexport.validation import answers as comparison
from dinoexport.validation.metrics import centred, distance


@dataclass(frozen=True, kw_only=True)
class Determinism:
    """The largest relative L2 difference, over all outputs of `cases`, between two runs of the same inputs.

    Of integers, the share that differs; of logits, the difference up to the first choice that differs, because later
    ones follow other choices.

    again: the same call twice. alone: an item by itself and inside its batch; None where no case has a batch.
    one_thread: one thread and the usual number; None where there is no choice. 0 means bit-identical; NaN means that an
    output was not finite, or had another shape. changed_choice_gap: the widest gap between the logits of two choices
    where runs chose differently for the first time; None where all chose the same.
    """

    cases: tuple[str, ...]
    again: float
    alone: float | None
    one_thread: float | None
    changed_choice_gap: float | None = None

    @property
    def lines(self) -> dict[str, str]:
        """What was compared, and the largest difference, as text."""
        measured = {
            "same inputs again": self.again,
            "alone and in a batch": self.alone,
            "one thread and all threads": self.one_thread,
        }
        lines = {words: _apart(value) for words, value in measured.items() if value is not None}
        if self.changed_choice_gap is not None:
            lines["choices that differed"] = f"logits at most {self.changed_choice_gap:.2g} apart"
        return lines


def _apart(relative_l2: float) -> str:
    if isnan(relative_l2):
        return "not finite, or another shape"
    return f"{relative_l2:.1e} apart" if relative_l2 else "bit-identical"


def measure(candidate: Runner, cases: Sequence[Case], one_thread: Callable[[], Runner] | None) -> Determinism | None:
    """Repeats a few of `cases` under other conditions; None when the candidate could run none of them.

    one_thread: opens the same candidate with one thread. It is closed at the end, because it holds the weights a second
    time.
    """
    asked, again, alone, threads = [], [], [], []
    gaps: list[float] = []
    single: Runner | None = None
    for case in chosen(cases):
        try:
            answer = candidate(case.inputs)
            again.append(_difference(case, candidate(case.inputs), answer, gaps))
            alone += [_difference(case, candidate(inputs), part, gaps) for inputs, part in _ends(case, answer)]
            if one_thread is not None:
                single = single or one_thread()
                threads.append(_difference(case, single(case.inputs), answer, gaps))
        except DinoexportError:  # outside an engine's profiles, or failed: the report has a row for it
            continue
        asked.append(case.name)
    if not asked:
        return None
    return Determinism(
        cases=tuple(asked),
        again=_worst(again) or 0.0,
        alone=_worst(alone),
        one_thread=_worst(threads),
        changed_choice_gap=_worst(gaps),
    )


def chosen(cases: Sequence[Case]) -> tuple[Case, ...]:
    """The largest batch, and the smallest batch of the largest items; the smallest case if none is a batch."""
    answerable = [case for case in cases if not case.expect_refusal]
    batches = [case for case in answerable if _items(case) > 1]
    if not batches:
        return tuple(sorted(answerable, key=_size_bytes)[:1])
    most = max(batches, key=_items)
    largest = min(batches, key=lambda case: (-_size_bytes(case) / _items(case), _items(case)))
    return (most,) if most is largest else (most, largest)


def _items(case: Case) -> int:
    """The batch size: the first dimension, if all inputs share it."""
    firsts = {array.shape[0] if array.ndim else 0 for array in case.inputs.values()}
    return firsts.pop() if len(firsts) == 1 else 0


def _size_bytes(case: Case) -> int:
    return sum(array.nbytes for array in case.inputs.values())


def _ends(case: Case, answer: Arrays) -> Iterator[tuple[Arrays, Arrays]]:
    """The first and the last item of a batch by themselves, and their outputs inside the batch."""
    items = _items(case)
    for i in (0, items - 1) if items > 1 else ():
        yield (
            {name: array[i : i + 1] for name, array in case.inputs.items()},
            {name: array[i : i + 1] for name, array in answer.items() if array.ndim and array.shape[0] == items},
        )


def _difference(case: Case, ours: Arrays, theirs: Arrays, gaps: list[float]) -> float:
    """The largest difference of any of `theirs`; adds the gap of a choice that differs to `gaps`."""
    differences = []
    for name, array in theirs.items():
        if ours[name].shape != array.shape:
            return float("nan")
        if name in case.choices:
            gap = comparison.changed_choice_gap(ours[name], array, theirs[case.choices[name]])
            gaps += [] if gap is None else [gap]
        elif name in case.distributions:
            lossy, wanted = comparison.comparable(case, name, ours, theirs)
            differences.append(distance(centred(lossy), centred(wanted)).relative_l2)
        elif array.dtype.kind in "iu":
            differences.append(float((ours[name] != array).mean()))
        else:
            differences.append(distance(ours[name], array).relative_l2)
    return _worst(differences) or 0.0


def _worst(values: Sequence[float]) -> float | None:
    """The largest value, NaN if there is one; None for an empty sequence."""
    return max(values, key=lambda value: inf if isnan(value) else value, default=None)
