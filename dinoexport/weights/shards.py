"""Join a checkpoint in several files: whole tensors in each file, or for model parallelism a part of each tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from dinoexport.errors import WeightsError
from dinoexport.family import Read, Shapes
from dinoexport.spec import Array

# Along which axis the parts of a tensor are joined, by its name; None for one that is whole in each file.
SplitAxis = Callable[[str], int | None]


def merged(
    opened: Mapping[Path, tuple[Shapes, Read]], wanted: Shapes, split_axis: SplitAxis | None = None
) -> tuple[Shapes, Read]:
    """The files of one checkpoint as a single one.

    A name in several files is a tensor in parts, which are joined in the order of the files along the axis on which
    they add up to the `wanted` size; if other tensors are in parts, it may be a copy in each file. Anything else
    raises WeightsError. split_axis: decides instead while the wanted sizes are unknown.
    """
    holders: dict[str, list[Path]] = {}
    for path, (found, _) in opened.items():
        for name in found:
            holders.setdefault(name, []).append(path)
    several = {name: paths for name, paths in holders.items() if len(paths) > 1}
    axes = {
        name: split_axis(name) if split_axis else _axis([opened[path][0][name] for path in paths], wanted.get(name))
        for name, paths in several.items()
    }
    in_parts = any(axis is not None for axis in axes.values())
    for name, paths in several.items():
        parts = [opened[path][0][name] for path in paths]
        if axes[name] is None and not (in_parts and set(parts) == {parts[0]}):
            raise WeightsError(
                _why(name, paths, parts, wanted.get(name)), next_step="Give all files of one checkpoint."
            )

    def shape(name: str) -> tuple[int, ...]:
        parts = [opened[path][0][name] for path in holders[name]]
        axis = axes.get(name)
        if axis is None:
            return parts[0]
        return tuple(sum(part[i] for part in parts) if i == axis else size for i, size in enumerate(parts[0]))

    def read(name: str) -> Array:
        import numpy as np

        arrays = [opened[path][1](name) for path in holders[name]]
        axis = axes.get(name)
        if axis is not None:
            return np.concatenate(arrays, axis=axis)
        if any(not np.array_equal(array, arrays[0]) for array in arrays[1:]):
            raise WeightsError(
                f"{holders[name][0]} and {holders[name][1]} hold different copies of {name}.",
                next_step="Give the files of one checkpoint.",
            )
        return arrays[0]

    return {name: shape(name) for name in holders}, read


def _axis(parts: list[tuple[int, ...]], wanted: tuple[int, ...] | None) -> int | None:
    """The axis along which the parts add up to the wanted shape."""
    if wanted is None or {len(part) for part in parts} != {len(wanted)}:
        return None
    for axis in range(len(wanted)):
        others = {part[:axis] + part[axis + 1 :] for part in parts}
        if others == {wanted[:axis] + wanted[axis + 1 :]} and sum(part[axis] for part in parts) == wanted[axis]:
            return axis
    return None


def _why(name: str, paths: list[Path], parts: list[tuple[int, ...]], wanted: tuple[int, ...] | None) -> str:
    if wanted is None or set(parts) == {wanted}:
        return f"{paths[1]} and {paths[0]} both hold {name}: they are not parts of one checkpoint."
    return f"{name} is {parts} in {len(paths)} files, which do not make {wanted}: a file is missing or doubled."
