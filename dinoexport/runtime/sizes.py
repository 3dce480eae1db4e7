"""Forms of a graph for one size each, beside the one that takes every size.

With fixed shapes, OpenVINO and ONNX Runtime fold more and choose better kernels, so a size that is often requested is
answered faster. Such a form is compiled in the background while the general form answers, so no answer waits for it.
Before it is used, it runs the same inputs as the general form, and is left out if the outputs differ by more than the
limit for two forms. As many forms are kept as fit into a memory budget, by their measured sizes.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dinoexport.errors import DinoexportError, UsageError
from dinoexport.runtime import Opened, check_inputs
from dinoexport.spec import Array, Arrays, Graph, Precision

# Input name -> its shape.
InputShapes = Mapping[str, tuple[int, ...]]
# Compiles the graph for these shapes alone.
Specialise = Callable[[InputShapes], Opened]
# Inputs and what the general form answered.
_Asked = tuple[Arrays, Arrays]
FormState = Literal["compiling", "ready", "differs", "refused", "no room"]

# Asked so often for one size, a form of its own will be worth its compilation.
_OFTEN = 32
_MOST = 4
# Sizes that are counted; with more than these in use, none is often asked, and counting starts again.
_COUNTED_MAX = 4096
# Of the memory that is free when the graph is opened.
_MEMORY_SHARE = 0.25
# How far two forms of one graph may be apart, relative L2, each within its own precision's rounding.
_APART_MAX: Mapping[Precision, float] = {Precision.FP32: 1e-5}
_APART_MAX_NARROW = 3e-2


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How many forms of one size may be kept, in how many bytes, and after how many requests one is made."""

    most: int
    memory_bytes: int
    often: int = _OFTEN


@dataclass(kw_only=True)
class Form:
    """One size's form. memory_bytes: how much this process grew while it was compiled. why: why it is not used."""

    shapes: InputShapes
    state: FormState
    memory_bytes: int = 0
    why: str = ""


def budget() -> Budget:
    """What this machine can spare now."""
    return Budget(most=_MOST, memory_bytes=int(_MEMORY_SHARE * _free_bytes()))


def dims_of(size: str, graph: Graph) -> dict[str, int]:
    """The value of each of the graph's dynamic dimensions for a size as people write it, `224x224` or `8x518x518`.

    The numbers are the last of the dimensions, two or more, in order; those before them are 1. Raises UsageError for a
    text that is not a size.
    """
    names = [dim.name for dim in graph.dims if any(dim.name in tensor.shape for tensor in graph.inputs)]
    example = "x".join(str(dim.opt) for dim in graph.dims if dim.name in names[-2:])
    parts = size.lower().split("x")
    numbers = all(part.isascii() and part.isdecimal() and len(part) < 10 for part in parts)
    if not numbers or not min(2, len(names)) <= len(parts) <= len(names):
        raise UsageError(f"{size!r} is not a size of {', '.join(names)}.", next_step=f"Write it as {example}.")
    return dict.fromkeys(names, 1) | dict(zip(names[-len(parts) :], map(int, parts), strict=True))


def shapes_of(size: str, graph: Graph) -> InputShapes:
    """The shapes of the graph's inputs for a size, as `dims_of`; also a UsageError for one the graph does not take."""
    import numpy as np

    values = dims_of(size, graph)
    shapes = {
        tensor.name: tuple(size if isinstance(size, int) else values[size] for size in tensor.shape)
        for tensor in graph.inputs
        if tensor.default is None
    }
    dtypes = {tensor.name: tensor.dtype for tensor in graph.inputs}
    check_inputs(graph, {name: np.broadcast_to(np.zeros((), dtypes[name]), s) for name, s in shapes.items()})
    return shapes


class Specialised:
    """A runner of a graph in its general form, and in forms of one size as they become ready. Safe to call in threads.

    named: shapes that get a form at once, before anybody asks for them.
    """

    def __init__(
        self,
        graph: Graph,
        general: Opened,
        specialise: Specialise,
        *,
        precision: Precision,
        spend: Budget,
        named: Sequence[InputShapes] = (),
    ) -> None:
        self._graph, self._general, self._specialise = graph, general, specialise
        self._apart_max = _APART_MAX.get(precision, _APART_MAX_NARROW)
        self._spend = spend
        self._asked: Counter[tuple[tuple[int, ...], ...]] = Counter()
        self._forms: dict[tuple[tuple[int, ...], ...], Form] = {}
        self._ready: dict[tuple[tuple[int, ...], ...], tuple[Opened, threading.Lock]] = {}
        self._lock, self._general_turn = threading.Lock(), threading.Lock()
        self._worker: threading.Thread | None = None
        self._waiting: list[tuple[InputShapes, _Asked | None]] = []
        self._closed = False
        for shapes in named:
            self._begin(shapes, None)

    @property
    def forms(self) -> tuple[Form, ...]:
        """The forms of one size, with their states and what they take, in the order they were begun."""
        with self._lock:
            return tuple(self._forms.values())

    def __call__(self, arrays: Arrays) -> dict[str, Array]:
        """The graph's outputs, by name."""
        key = _key(arrays)
        ready = self._ready.get(key)
        if ready is not None:
            opened, turn = ready
            with turn:
                return opened(arrays)
        with self._general_turn:
            answers = self._general(arrays)  # refuses what the graph does not take
        with self._lock:
            if len(self._asked) >= _COUNTED_MAX:
                self._asked.clear()
            self._asked[key] += 1
            wanted = key not in self._forms and self._asked[key] >= self._spend.often
        if wanted:
            self._begin({name: array.shape for name, array in arrays.items()}, (arrays, answers))
        return answers

    def close(self) -> None:
        """Begins no more forms, and waits for the one that is being compiled."""
        with self._lock:
            self._closed, self._waiting = True, []
            worker = self._worker
        if worker is not None:
            worker.join()
        self._ready.clear()

    def settle(self) -> None:
        """Waits until every form that was begun is ready or left out."""
        while (worker := self._worker) is not None and worker.is_alive():
            worker.join()

    def _begin(self, shapes: InputShapes, asked: _Asked | None) -> None:
        key = tuple(shapes[name] for name in sorted(shapes))
        with self._lock:
            used = [form for form in self._forms.values() if form.state in ("compiling", "ready")]
            if self._closed or key in self._forms:
                return
            if len(used) >= self._spend.most or sum(f.memory_bytes for f in used) >= self._spend.memory_bytes:
                self._forms[key] = Form(shapes=dict(shapes), state="no room", why="other sizes' forms fill the budget")
                return
            self._forms[key] = Form(shapes=dict(shapes), state="compiling")
            # Copies: the caller may go on and change his.
            kept = None if asked is None else (_copy(asked[0]), _copy(asked[1]))
            self._waiting.append((dict(shapes), kept))
            if self._worker is None or not self._worker.is_alive():
                self._worker = threading.Thread(target=self._compile_all, name="forms of one size")
                self._worker.start()

    def _compile_all(self) -> None:
        while True:
            with self._lock:
                if not self._waiting or self._closed:
                    self._worker = None
                    return
                shapes, asked = self._waiting.pop(0)
            self._compile(shapes, asked)

    def _compile(self, shapes: InputShapes, asked: _Asked | None) -> None:
        key = tuple(shapes[name] for name in sorted(shapes))
        form = self._forms[key]
        before = _resident_bytes()
        try:
            opened = self._specialise(shapes)
            if asked is None:
                arrays = sample(self._graph, shapes)
                with self._general_turn:
                    asked = arrays, self._general(arrays)
            apart = _apart(opened(asked[0]), asked[1])
        except Exception as error:  # nothing that goes wrong here may cost an answer, which the general form gives
            form.state = "refused"
            form.why = error.message if isinstance(error, DinoexportError) else f"{type(error).__name__}: {error}"
            return
        form.memory_bytes = max(0, _resident_bytes() - before)
        if not apart <= self._apart_max:
            form.state, form.why = "differs", f"its answers are off by {apart:.1e}"
            return
        with self._lock:
            others = sum(f.memory_bytes for f in self._forms.values() if f.state == "ready")
            if others + form.memory_bytes > self._spend.memory_bytes:
                form.state, form.why = "no room", f"it takes {form.memory_bytes / 1e6:.0f} MB"
                return
            form.state = "ready"
            if not self._closed:
                self._ready[key] = (opened, threading.Lock())


def _copy(arrays: Arrays) -> dict[str, Array]:
    return {name: array.copy() for name, array in arrays.items()}


def _key(arrays: Arrays) -> tuple[tuple[int, ...], ...]:
    return tuple(arrays[name].shape for name in sorted(arrays))


def sample(graph: Graph, shapes: InputShapes) -> Arrays:
    """Inputs of these shapes that reveal a wrong form: noise, the same each time."""
    import numpy as np

    random = np.random.RandomState(0)
    found = {}
    for tensor in graph.inputs:
        if tensor.name in shapes:
            integers = np.dtype(tensor.dtype).kind in "iu"
            values = random.randint(0, 2**8, shapes[tensor.name]) if integers else random.randn(*shapes[tensor.name])
            found[tensor.name] = values.astype(tensor.dtype)
    return found


def _apart(ours: Arrays, general: Arrays) -> float:
    """The largest relative L2 distance of any output; infinite where one is not finite."""
    import numpy as np

    worst = 0.0
    for name, expected in general.items():
        wanted, got = expected.astype(np.float64), ours[name].astype(np.float64)
        if got.shape != wanted.shape or not np.isfinite(got).all():
            return float("inf")
        worst = max(worst, float(np.linalg.norm(got - wanted)) / max(float(np.linalg.norm(wanted)), 1e-30))
    return worst


def _free_bytes() -> int:
    """Memory that is free or can be freed on this machine."""
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable:")


def _resident_bytes() -> int:
    """What this process holds now."""
    return _kilobytes(Path("/proc/self/status"), "VmRSS:")


def _kilobytes(path: Path, name: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:  # another system than Linux
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)
