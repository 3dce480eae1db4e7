"""A module that looks as one version of TensorRT's Python bindings does, made from that version's facts.

A member that version lacks is not there, an argument it has not is refused, and so are values of another kind. What
answers is the stand-in of `gpu.py`. The bindings themselves, where they can be had, are put before it by `driven.py`.
"""

from __future__ import annotations

import ast
import functools
import importlib.machinery
import json
import types
import weakref
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from tests.standin import facts as facts_of
from tests.standin.driven import Unknown

TABLE = json.loads((Path(__file__).parents[1] / "data" / "tensorrt_facts.json").read_text())
VERSIONS = tuple(version for version in TABLE["versions"] if not version.startswith("rtx-"))
RTX = next(version for version in TABLE["versions"] if version.startswith("rtx-"))


class Dims(tuple[int, ...]):
    """TensorRT's shapes."""


def tensorrt(version: str, device: Any) -> Any:
    """The module, with `device` behind it."""
    facts = facts_of.at(TABLE, version)
    module: Any = types.ModuleType("tensorrt")
    module.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None)
    module.__version__ = version.removeprefix("rtx-")
    module.Dims = Dims
    for name, members in facts.items():
        if name != "Dims" and "." not in name:
            setattr(module, name, _class(name, members, module, device))
    module.ILogger.Severity = _enumeration("Severity", facts["ILogger.Severity"])
    device.severity = module.ILogger.Severity
    made = _made("Logger", facts["Logger"]["__init__"], module, device)
    module.Logger = type("Logger", (module.ILogger,), {"__init__": made})
    for severity in module.ILogger.Severity:
        setattr(module.Logger, severity.name, severity)
    return module


class _Value(Enum):
    """Like pybind11's: an integer only when it is asked to be one."""

    def __int__(self) -> int:
        return int(self.value)


def _enumeration(name: str, members: Mapping[str, str]) -> Any:
    return _Value(name, {member: int(value) for member, value in members.items()})


def _class(name: str, members: Mapping[str, str], module: Any, device: Any) -> Any:
    if all(value.lstrip("-").isdigit() for value in members.values()):
        return _enumeration(name, members)
    content: dict[str, Any] = {}
    for member, said in members.items():
        if "property " in said:
            content[member] = _property(member, settable=said.startswith("settable"), module=module)
        elif member == "__init__":
            content[member] = _made(name, said, module, device)
        else:
            content[member] = _method(name, member, said, module)
    return type(name, (), content)


def _property(member: str, *, settable: bool, module: Any) -> property:
    def read(this: Any) -> Any:
        return _wrapped(getattr(this.model, member), module)

    def write(this: Any, value: Any) -> None:
        setattr(this.model, member, value)

    return property(read, write if settable else None)


def _made(name: str, said: str, module: Any, device: Any) -> Any:
    def init(this: Any, *args: Any, **kwargs: Any) -> None:
        _check(name, said, module, args, kwargs)
        this.model = device.made(name, tuple(getattr(part, "model", None) or part for part in args))

    return init


def _method(name: str, member: str, said: str, module: Any) -> Any:
    def call(this: Any, *args: Any, **kwargs: Any) -> Any:
        _check(f"{name}.{member}", said, module, args, kwargs)
        if (module.__version__[:7], member) == ("10.14.1", "get_engine_stat"):
            raise TypeError("cannot create weak reference to 'int' object")  # as that version's bindings do
        plain = [getattr(part, "model", None) or part for part in args]
        try:
            answer = getattr(this.model, member)(*plain, **kwargs)
            if member == "set_optimization_profile_async" and not answer:
                raise RuntimeError("Error in set optimization profile async.")  # as every version's bindings do
            return _wrapped(answer, module)
        except Unknown as unknown:
            kind = ValueError if module.__version__.startswith("10.13") else RuntimeError
            raise kind(f"Provided tensor name {unknown} is not known.") from None

    return call


def _wrapped(answer: Any, module: Any) -> Any:
    """The stand-in's answer as an object of the version's own class."""
    names = {"Opened": "ICudaEngine", "Context": "IExecutionContext", "RuntimeConfig": "IRuntimeConfig"}
    names |= {"Inspector": "EngineInspector"}
    kind = names.get(type(answer).__name__)
    if kind is None:
        return Dims(answer) if isinstance(answer, tuple) else answer
    made = object.__new__(getattr(module, kind))
    made.model = answer
    weakref.finalize(made, setattr, answer, "dropped", True)
    return made


@functools.cache
def _overloads(said: str) -> tuple[list[tuple[str, str, bool]], ...]:
    """(name, kind, whether it may be left out) of each argument, for each overload."""
    found = []
    for overload in said.split(" | "):
        arguments = overload.rpartition("->")[0].strip().replace("::", ".")
        parsed = ast.parse(f"def f({arguments}): pass").body[0]
        assert isinstance(parsed, ast.FunctionDef)
        required = len(parsed.args.args) - len(parsed.args.defaults)
        found.append(
            [
                (argument.arg, ast.unparse(argument.annotation).rpartition(".")[2], at >= required)
                for at, argument in enumerate(parsed.args.args)
                if argument.annotation is not None
            ]
        )
    return tuple(found)


def _check(what: str, said: str, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """TypeError where no overload takes these, as pybind11 has it."""
    if not any(_takes(overload, module, args, kwargs) for overload in _overloads(said)):
        raise TypeError(f"{what}(): incompatible function arguments: {args} {dict(kwargs)}; there is: {said}")


def _takes(
    overload: list[tuple[str, str, bool]], module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> bool:
    given = dict(zip((name for name, _, _ in overload), args, strict=False)) | dict(kwargs)
    known = {name for name, _, _ in overload}
    if len(args) > len(overload) or not given.keys() <= known or len(given) < len(args) + len(kwargs):
        return False
    return all(optional or name in given for name, _, optional in overload) and all(
        _fits(given[name], kind, module) or (given[name] is None and optional)
        for name, kind, optional in overload
        if name in given
    )


def _fits(value: Any, kind: str, module: Any) -> bool:
    simple: dict[str, Any] = {"str": str, "tuple": tuple, "list": list, "Dims": Dims}
    if kind == "int":
        return hasattr(value, "__int__") and not isinstance(value, (float, str))
    if kind == "Buffer":
        try:
            memoryview(value)
        except TypeError:
            return False
        return True
    if kind == "Severity":
        return isinstance(value, module.ILogger.Severity)
    expected = simple.get(kind) or getattr(module, kind, None)
    return expected is None or isinstance(value, expected)
