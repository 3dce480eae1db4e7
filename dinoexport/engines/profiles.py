"""Optimisation profiles: the shape ranges of an engine, and an estimate of the device memory they need."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dinoexport.config.recipe import Range, Recipe
from dinoexport.errors import UsageError
from dinoexport.runtime.sizes import shapes_of
from dinoexport.spec import Dim, Graph, Profile, closest

# In addition to the live tensors the compiler needs workspace: TensorRT-RTX 1.7 needed 1.11 to 1.33 times
# them (ViT-S, fp16, 1x518x518 to 16x1022x1022), and in fp32 for 0.9 times them at 16x1022x1022.
HEADROOM = 1.35
WHOLE = "whole"
SIZE = "size_"


def of(recipe: Recipe, graph: Graph) -> tuple[Profile, ...]:
    """The profiles that the recipe chooses for `graph`'s engine; if it chooses none, one over the whole range.

    Before them, one for each size that the recipe names, of that size alone: the first that covers an input is used.
    Raises UsageError that names a profile that does not exist, exceeds the graph's range, or ends between legal sizes.
    """
    return (*_of_sizes(recipe.sizes, graph), *_chosen(recipe, graph))


def _of_sizes(sizes: Sequence[str], graph: Graph) -> tuple[Profile, ...]:
    """A profile for each size, whose ends are equal. A graph that carries state has none: its sizes always change."""
    found: dict[tuple[tuple[str, tuple[int, ...]], ...], Profile] = {}
    for size in () if graph.carried else sizes:
        shapes = shapes_of(size, graph)
        alone = Profile(name=f"{SIZE}{size}", shapes={name: (shape, shape, shape) for name, shape in shapes.items()})
        found.setdefault(tuple(shapes.items()), alone)
    return tuple(found.values())


def _chosen(recipe: Recipe, graph: Graph) -> tuple[Profile, ...]:
    chosen = recipe.engine.profiles
    if not chosen:
        return (profile(WHOLE, graph, {}),)
    if unknown := [name for name in chosen if name not in recipe.profiles]:
        raise UsageError(
            f"recipe {recipe.name} has no profile {unknown[0]!r}.{closest(unknown[0], list(recipe.profiles))}",
            next_step=f"It has: {', '.join(recipe.profiles) or 'none; add [profiles.NAME]'}.",
        )
    return tuple(profile(name, graph, recipe.profiles[name]) for name in dict.fromkeys(chosen))


def profile(name: str, graph: Graph, ranges: Mapping[str, Range]) -> Profile:
    """The profile `name` of `graph` with these ranges; a dimension without one keeps the graph's.

    Without a profile TensorRT silently takes 1 for every dynamic dimension.
    """
    dims = {dim.name: dim for dim in graph.dims}
    if unknown := sorted(ranges.keys() - dims.keys()):
        raise _wrong(name, f"the model has no dimension {unknown[0]!r}.{closest(unknown[0], list(dims))}")
    ends = {dim.name: _ends(name, dim, ranges.get(dim.name)) for dim in graph.dims}
    # A compiler holds the sum to its parts at every end; that a model takes no more is for the caller to refuse.
    sums = {dim.name: [ends[part] for part in dim.sum_of] for dim in graph.dims if dim.sum_of}
    ends |= {name: (sum(a), sum(b), sum(c)) for name, parts in sums.items() for a, b, c in [zip(*parts, strict=True)]}
    dynamic = {size for tensor in graph.inputs for size in tensor.shape if isinstance(size, str)}
    if unbounded := sorted(dynamic - ends.keys()):
        raise _wrong(name, f"an engine needs a range for {unbounded[0]}, and [profile] has none.")

    def shape(sizes: tuple[int | str, ...], end: int) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else ends[size][end] for size in sizes)

    given = [t for t in graph.inputs if t.default is None]  # a compiler treats an input with a default as a constant
    return Profile(name=name, shapes={t.name: (shape(t.shape, 0), shape(t.shape, 1), shape(t.shape, 2)) for t in given})


def _ends(name: str, dim: Dim, wanted: Range | None) -> tuple[int, int, int]:
    if wanted is None:
        return dim.min, dim.opt, dim.max
    ends = (wanted.min, wanted.opt, wanted.max)
    if ends[0] < dim.min or ends[2] > dim.max:
        raise _wrong(name, f"{dim.name} {ends[0]} to {ends[2]} exceeds [profile]'s {dim.min} to {dim.max}.")
    if off := [size for size in ends if size % dim.step]:
        raise _wrong(name, f"{dim.name} {off[0]} is not a multiple of {dim.step}.")
    return ends


def _wrong(name: str, problem: str) -> UsageError:
    return UsageError(f"[profiles.{name}]: {problem}", next_step="Fix the profile.")


def fitting(onnx: Path, graph: Graph, wanted: Profile, budget_bytes: int) -> dict[str, int]:
    """For each dimension the largest size whose profile needs at most `budget_bytes` if the others stay the same."""
    found = {}
    for dim in graph.dims:
        smallest, _, largest = _ends_in(wanted, graph, dim.name)
        sizes = range(smallest, largest + 1, dim.step)

        def too_much(at: int, name: str = dim.name, sizes: range = sizes) -> bool:
            return scratch_bytes(onnx, _narrowed(wanted, graph, name, sizes[at])) > budget_bytes

        fit = bisect.bisect_left(range(len(sizes)), True, key=too_much)
        if 0 < fit < len(sizes):
            found[dim.name] = sizes[fit - 1]
    return found


def _ends_in(wanted: Profile, graph: Graph, dim: str) -> tuple[int, ...]:
    tensor, axis = next((t, t.shape.index(dim)) for t in graph.inputs if dim in t.shape)
    return tuple(shape[axis] for shape in wanted.shapes[tensor.name])


def _narrowed(wanted: Profile, graph: Graph, dim: str, largest: int) -> Profile:
    """The profile with another largest size of one dimension."""
    ranges = {}
    for other in graph.dims:
        low, likely, high = _ends_in(wanted, graph, other.name)
        high = largest if other.name == dim else high
        ranges[other.name] = Range(min=low, opt=min(likely, high), max=high)
    return profile(wanted.name, graph, ranges)


def scratch_bytes(onnx: Path, profile: Profile) -> int:
    """The approximate device memory of an engine at the profile's largest shapes, without its weights.

    The largest sum of tensors that are alive at once while the graph's nodes run in order. Attention is counted as
    fused, without its scores: in fp32 the compiler stores them only if there is enough memory.
    """
    import onnx as onnx_package

    model = onnx_package.load(onnx, load_external_data=False)
    size_bytes = _tensor_bytes(model, {name: shapes[2] for name, shapes in profile.shapes.items()})
    for node in model.graph.node:
        if node.op_type == "Softmax":
            size_bytes |= dict.fromkeys((*node.input, *node.output), 0)
    bound = {value.name for value in (*model.graph.input, *model.graph.output)}  # in the caller's own buffers
    last_use = {name: at for at, node in enumerate(model.graph.node) for name in node.input}
    alive: dict[str, int] = {}
    peak = 0
    for at, node in enumerate(model.graph.node):
        alive |= {name: size_bytes.get(name, 0) for name in node.output if name not in bound}
        peak = max(peak, sum(alive.values()))
        alive = {name: size for name, size in alive.items() if last_use.get(name, -1) > at}
    return math.ceil(peak * HEADROOM)


def largest_weight_bytes(onnx: Path) -> int:
    """The size of the graph's largest single weight."""
    import onnx as onnx_package

    def size_bytes(tensor: Any) -> int:
        return int(math.prod(tensor.dims)) * int(
            onnx_package.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        )

    weights = onnx_package.load(onnx, load_external_data=False).graph.initializer
    return max(map(size_bytes, weights), default=0)


def _tensor_bytes(model: Any, inputs: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Bytes of every tensor whose shape follows from the inputs' shapes."""
    import onnx as onnx_package

    for value in model.graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, inputs[value.name], strict=True):
            dim.dim_value = size
    del model.graph.value_info[:]
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")  # its named dimensions would contradict the numbers
    graph = onnx_package.shape_inference.infer_shapes(model, data_prop=True).graph
    known = {}
    for value in (*graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        if all(dim.HasField("dim_value") for dim in tensor.shape.dim):
            width = onnx_package.helper.tensor_dtype_to_np_dtype(tensor.elem_type).itemsize
            known[value.name] = width * math.prod(dim.dim_value for dim in tensor.shape.dim)
    return known
