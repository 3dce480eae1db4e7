"""Check the pickle inside a torch.save file before PyTorch's own unpickler reads it.

`weights_only` runs no foreign code, but it calls allowed functions with any arguments in the file: a hundred bytes can
allocate gigabytes (`bytearray(5 * 10**9)`, `FloatStorage(10**9)`), and tuples nested thirty deep take years to hash.
Saved weights do neither. Nothing is executed here: opcodes are read and a stack of labels is kept.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass
from typing import Any

# The pickle of a checkpoint of a thousand tensors has 100 kB; the numbers are stored beside it.
MAX_BYTES = 1 << 26
_DEPTH_MAX = 16
_FORBIDDEN = frozenset({"FROZENSET", "BYTEARRAY8", "NEXT_BUFFER", "READONLY_BUFFER", "EXT1", "EXT2", "EXT4"})
_MARKS = frozenset({"MARK"})
# The second calls a class's __new__, which allocates as well.
_CALLS = frozenset({"REDUCE", "NEWOBJ"})
_TUPLES = frozenset({"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"})
_PUTS, _GETS = frozenset({"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}), frozenset({"GET", "BINGET", "LONG_BINGET"})


@dataclass(frozen=True, kw_only=True)
class _Label:
    """A value on the stack: a global's name, and the depth of nested tuples in it."""

    name: str = ""
    depth: int = 0
    mark: bool = False


def check(raw: bytes) -> None:
    """Raises ValueError for a pickle that does more than name tensors, numbers and text in lists and dicts."""
    stack: list[_Label] = []
    memo: dict[Any, _Label] = {}
    for opcode, argument, _position in pickletools.genops(raw):
        name = opcode.name
        if name in _FORBIDDEN:
            raise ValueError(f"it holds {name}, which saved weights never do")
        if name in _MARKS:
            stack.append(_Label(mark=True))
        elif name in _PUTS:
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1] if stack else _Label()
        elif name in _GETS:
            stack.append(memo.get(argument, _Label()))
        elif name == "GLOBAL":
            stack.append(_Label(name=str(argument).replace(" ", ".")))
        elif name in _CALLS:
            arguments, function = _pop(stack), _pop(stack)
            _check_call(function.name)
            stack.append(_Label(depth=arguments.depth))
        else:
            _apply(opcode, stack)


def _apply(opcode: Any, stack: list[_Label]) -> None:
    """Any other opcode: by pickletools' table of what it takes from the stack and leaves there."""
    taken: list[_Label] = []
    if pickletools.markobject in opcode.stack_before:
        while stack and not stack[-1].mark:
            taken.append(stack.pop())
        _pop(stack)
        below = opcode.stack_before.index(pickletools.markobject)
        taken += [_pop(stack) for _ in range(below)]
    else:
        taken = [_pop(stack) for _ in opcode.stack_before]
    depth = max((label.depth for label in taken), default=0) + (opcode.name in _TUPLES)
    if depth > _DEPTH_MAX:
        raise ValueError(f"it holds tuples more than {_DEPTH_MAX} deep")
    stack += [_Label(depth=depth) for _ in opcode.stack_after]


def _pop(stack: list[_Label]) -> _Label:
    return stack.pop() if stack else _Label()


def _check_call(function: str) -> None:
    """Refuses calls that allocate as much as the file demands. PyTorch itself refuses all other functions."""
    last = function.rpartition(".")[2]
    if last in ("bytearray", "bytes", "range", "tensor") or last.endswith(("Storage", "Tensor")):
        raise ValueError(f"it calls {function}, which saved weights never do")
