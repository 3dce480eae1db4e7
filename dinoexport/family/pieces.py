"""A graph as traced pieces: plain data, so that a kept trace can take the place of a new one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any

from dinoexport.spec import Array, Weight

if TYPE_CHECKING:
    import torch


# LayerNormalization is one operator since 17, Gelu since 20; every runtime we target takes 20.
OPSET = 20
# Tensor name in the family's own layout -> its shape.
Shapes = Mapping[str, tuple[int, ...]]
# Reads one tensor of a checkpoint as float32; several threads may read at once.
Read = Callable[[str], "Array"]


@dataclass(frozen=True, kw_only=True)
class Example:
    """A tensor that a piece is traced with; its numbers do not matter. dtype: PyTorch's name, as `float16`."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of a graph that is traced once, however often it is used. Pieces with the same name are identical.

    Nothing but data, so that a trace of the same code and data can take the place of a new one, without torch.

    code: the class of the traced module, as `package.module:Class`. arguments: what it is made with: numbers, text,
    booleans, None, and tuples and mappings of them. Its parameters are the tensors of the exported graph, in their
    final layout and dtype; their values are not used. example_inputs: in the order of the module's `forward`.
    dynamic: input name -> {axis: dimension name}. least_sizes: dimension name -> the smallest size that the module
    takes, if that is not 1; the tracer checks it by tracing twice. opset: the ONNX operator set it is traced to; all
    pieces of a graph share one.
    """

    name: str
    code: str
    arguments: Mapping[str, Any]
    example_inputs: Mapping[str, Example]
    dynamic: Mapping[str, Mapping[int, str]]
    least_sizes: Mapping[str, int] = field(default_factory=dict)
    opset: int = OPSET

    @cached_property
    def module(self) -> torch.nn.Module:
        """The module itself. Imports torch."""
        place, _, name = self.code.partition(":")
        made: torch.nn.Module = getattr(import_module(place), name)(**self.arguments)
        return made


@dataclass(frozen=True, kw_only=True)
class Call:
    """One use of a piece: its input and output values, and the weights of its parameters in this use."""

    piece: Piece
    scope: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: Mapping[str, Weight]
