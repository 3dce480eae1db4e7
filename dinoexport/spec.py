"""Types that all packages share. Uses only the standard library, so any module can import it.

Shapes are written outermost first; a `str` in a shape is the name of a dynamic dimension.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]
    Arrays = Mapping[str, Array]
    # Anything that maps a graph's named inputs to its named outputs: a session, an engine, a server.
    Runner = Callable[[Arrays], dict[str, Array]]
    # Maps one case's inputs to named outputs; it may call runners many times.
    Candidate = Callable[[Arrays], dict[str, Array]]
else:  # names that other modules can import without loading NumPy
    Array = Arrays = Runner = Candidate = object

Shape = tuple[int | str, ...]
# Progress of long work: (what is being done, units done, units in all; 0 in all means unknown).
Progress = Callable[[str, int, int], None]


def silent(_doing: str, _done: int, _total: int) -> None:
    """A `Progress` that reports nothing."""


# How the source of weights begins that are generated from a seed: their outputs mean nothing.
SYNTHETIC = ("synthetic:", "synthetic-stress:")


class Precision(enum.StrEnum):
    """The arithmetic of a model's body. The family or the runtime decides which parts stay in fp32."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"


class Runtime(enum.StrEnum):
    """The runtime of a bundle: it runs the ONNX itself, or an engine built from it."""

    ONNXRUNTIME = "onnxruntime"
    OPENVINO = "openvino"
    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt_rtx"

    @property
    def has_engine(self) -> bool:
        """Whether an engine is built from the ONNX for this runtime."""
        return self in (Runtime.TENSORRT, Runtime.TENSORRT_RTX)


@dataclass(frozen=True, kw_only=True)
class Dim:
    """A dynamic dimension and the range it may take.

    Sizes that are not multiples of `multiple_of` are refused; the part beyond a multiple of `step` is ignored.
    sum_of: the dimensions whose sum it always is; none where it is free.
    """

    name: str
    min: int
    opt: int
    max: int
    multiple_of: int = 1
    step: int = 1
    sum_of: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.multiple_of < 1 or self.step < 1 or self.min > self.max:
            raise ValueError(
                f"{self.name} is a multiple of {self.multiple_of}, step {self.step}, {self.min} to {self.max}"
            )


@dataclass(frozen=True, kw_only=True)
class HeadFacts:
    """What a model's outputs mean if they are not plain features. kind: the head's name.

    dataset, terms: the training data and its terms of use. value_range: the range of the values, if they have one, in
    the unit of the output. classes: their names, in the order of the outputs.
    """

    kind: str
    dataset: str
    terms: str
    value_range: tuple[float, float] | None = None
    classes: tuple[str, ...] = ()


# The kind of an output's numbers, which decides how outputs are compared: vectors (..., D) of features or logits;
# maps of such vectors, (B, D, h, w); probabilities, which sum to one over the last axis; depth, one number a pixel;
# labels, the index of the best class.
OutputKind = Literal["vectors", "maps", "probabilities", "depth", "labels"]


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """A named input or output of a graph; `meaning` gives its unit or normalisation in words.

    kind: of an output. decided_by: for labels, the output with the scores; a label is the index of the best score.
    default: the value of every element of an input that may be left out; None if it may not.
    """

    name: str
    dtype: str
    shape: Shape
    meaning: str
    kind: OutputKind = "vectors"
    decided_by: str = ""
    default: int | None = None


@dataclass(frozen=True, kw_only=True)
class Graph:
    """The signature of one ONNX graph of a model.

    carried: input -> the output that is its value in the next call: state, such as a decoder's cache. Each is empty
    along one dynamic dimension at the beginning.
    """

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    dims: tuple[Dim, ...]
    carried: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A range of shapes that an engine is tuned for. shapes: input name -> (smallest, most likely, largest) shape."""

    name: str
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]

    def covers(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether inputs of these shapes are within the range."""
        return all(map(self._covers, shapes, shapes.values()))

    def _covers(self, name: str, shape: tuple[int, ...]) -> bool:
        smallest, _, largest = self.shapes[name]
        ranks_agree = len(shape) == len(smallest)
        return ranks_agree and all(low <= n <= high for low, n, high in zip(smallest, shape, largest, strict=True))


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One tensor of the exported graph; `read` returns its float32 values, on any thread.

    bits: 8 or 4 for a product's weight (I, O) that is stored in that many bits, 0 for any other. block: how many of its
    rows share a scale in each column. offsets_of: the parameter whose offsets this weight holds, one for each block and
    column; they are computed together with that parameter's codes, from the same values.
    """

    shape: tuple[int, ...]
    read: Callable[[], Array]
    bits: int = 0
    block: int = 0
    offsets_of: str = ""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One validation case: named inputs, and the reason for the case.

    `expect_refusal` marks inputs the model must not accept; no reference exists for them. `neighbours` marks real data,
    for which nearest neighbours among the outputs' vectors are meaningful. shown: whether the case is worth looking
    at, such as a photograph. label: the class it belongs to, if that is known.
    distributions: outputs (..., V) that are unnormalised log probabilities. choices: output of chosen indices (B, N) ->
    the distributions (B, N, V) they were chosen from, each after the choices before it.
    """

    name: str
    why: str
    inputs: Arrays
    expect_refusal: bool = False
    neighbours: bool = False
    shown: bool = False
    label: str = ""
    distributions: tuple[str, ...] = ()
    choices: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Inputs whose run time is measured. They contain `items` of what a user counts, such as 8 `images`."""

    name: str
    inputs: Arrays
    items: int
    unit: str


# The runtimes that run an ONNX graph itself, on a CPU too.
CPU_RUNTIMES = tuple(runtime for runtime in Runtime if not runtime.has_engine)


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to run a model's graphs on a CPU. threads: 0 leaves their number to the runtime.

    rest: with int8 and int4, what the runtime computes in besides products of narrow weights; None leaves it to the
    runtime.
    """

    runtime: Runtime
    precision: Precision
    threads: int = 0
    rest: Precision | None = None


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture of a case in a report: the content of an image file, its title, and how to read it.

    legend: (colour as `#rrggbb`, what it means) for pictures whose colours are names.
    """

    title: str
    caption: str
    data: bytes
    media_type: str
    legend: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """A case with its reference outputs.

    outputs: PyTorch's, as float32 arrays by output name. own_error: output name -> the relative L2 error of PyTorch
    itself on this case in the candidate's precision (empty for fp32). own_outputs: PyTorch's outputs in that precision,
    as float16, for cases that the report draws. leads: for outputs that are labels, by how much each label's best
    score exceeds the second.
    """

    case: Case
    outputs: Arrays
    leads: Arrays = field(default_factory=dict)
    own_error: Mapping[str, float] = field(default_factory=dict)
    own_outputs: Arrays = field(default_factory=dict)


def closest(word: str, known: Sequence[str]) -> str:
    """` Did you mean …?` for a misspelt word, or nothing when no known word is near."""
    import difflib

    near = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""
