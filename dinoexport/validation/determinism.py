"""The same question asked otherwise: again, alone instead of in a batch, with one thread. Are the answers the same?

Figures without limits. How a product is cut into pieces, and so how its sum is rounded, may depend on the batch and on
the number of threads; that each answer is PyTorch's is what the judge's limits are for. What is seen here is whether a
user who asks twice, or asks for more at once, can count on equal bytes, and how far off they are if not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import inf, isnan

from dinoexport.errors import DinoexportError
from dinoexport.spec import Array, Arrays, Case, Runner
from dinoexport.validation.metrics import distance


@dataclass(frozen=True, kw_only=True)
class Determinism:
    """The largest relative L2 difference, over all outputs of `cases`, between two answers to the same question.

    again: asked twice. alone: an item by itself and among the others of its batch; None where no case has a batch.
    one_thread: with one thread and with as many as usual; None where there is no choice. 0 is equal to the last bit;
    NaN says that an answer was not finite, or had another shape.
    """

    cases: tuple[str, ...]
    again: float
    alone: float | None
    one_thread: float | None

    @property
    def lines(self) -> dict[str, str]:
        """What was asked otherwise, and how far apart the answers were, in words."""
        measured = {
            "the same inputs again": self.again,
            "alone and in a batch": self.alone,
            "with one thread and with all": self.one_thread,
        }
        return {words: _apart(value) for words, value in measured.items() if value is not None}


def _apart(relative_l2: float) -> str:
    if isnan(relative_l2):
        return "not finite, or of another shape"
    return f"{relative_l2:.1e} apart" if relative_l2 else "equal to the last bit"


def measure(candidate: Runner, cases: Sequence[Case], one_thread: Callable[[], Runner] | None) -> Determinism | None:
    """Asks `candidate` a few of `cases` otherwise; None when it could answer none of them.

    one_thread: opens the same candidate with one thread, where it has threads; closed again at the end, for it holds
    the weights once more.
    """
    asked, again, alone, threads = [], [], [], []
    single: Runner | None = None
    for case in chosen(cases):
        try:
            answer = candidate(case.inputs)
            again.append(_difference(candidate(case.inputs), answer))
            alone += [_difference(candidate(inputs), part) for inputs, part in _ends(case, answer)]
            if one_thread is not None:
                single = single or one_thread()
                threads.append(_difference(single(case.inputs), answer))
        except DinoexportError:  # outside an engine's profiles, or broken: the judge's report says so
            continue
        asked.append(case.name)
    if not asked:
        return None
    return Determinism(cases=tuple(asked), again=_worst(again) or 0.0, alone=_worst(alone), one_thread=_worst(threads))


def chosen(cases: Sequence[Case]) -> tuple[Case, ...]:
    """The largest batch, and the smallest one of the largest items; the smallest case where none is a batch."""
    answerable = [case for case in cases if not case.expect_refusal]
    batches = [case for case in answerable if _items(case) > 1]
    if not batches:
        return tuple(sorted(answerable, key=_size_bytes)[:1])
    most = max(batches, key=_items)
    largest = min(batches, key=lambda case: (-_size_bytes(case) / _items(case), _items(case)))
    return (most,) if most is largest else (most, largest)


def _items(case: Case) -> int:
    """How many items are asked about at once: the first dimension, where all inputs share it."""
    firsts = {array.shape[0] if array.ndim else 0 for array in case.inputs.values()}
    return firsts.pop() if len(firsts) == 1 else 0


def _size_bytes(case: Case) -> int:
    return sum(array.nbytes for array in case.inputs.values())


def _ends(case: Case, answer: Arrays) -> Iterator[tuple[Arrays, Arrays]]:
    """The first and the last item of a batch by themselves, and what they were answered in it."""
    items = _items(case)
    for i in (0, items - 1) if items > 1 else ():
        yield (
            {name: array[i : i + 1] for name, array in case.inputs.items()},
            {name: array[i : i + 1] for name, array in answer.items() if array.ndim and array.shape[0] == items},
        )


def _difference(ours: Arrays, theirs: Arrays) -> float:
    """The largest relative difference of any of `theirs`."""
    return _worst([_relative(ours[name], array) for name, array in theirs.items()]) or 0.0


def _relative(ours: Array, theirs: Array) -> float:
    return distance(ours, theirs).relative_l2 if ours.shape == theirs.shape else float("nan")


def _worst(values: Sequence[float]) -> float | None:
    """The largest, NaN above all; None of none."""
    return max(values, key=lambda value: inf if isnan(value) else value, default=None)
