"""NVIDIA's own bindings of TensorRT, each call answered by a stand-in: names, overloads, conversions are the real ones.

`drive` puts itself between the bindings' classes and whoever calls them. A call asks the stand-in first, sets its
answer in the fake library (`fake_nvinfer.cpp`) and then calls the real method, which converts arguments and answer and
refuses what it refuses. Where the stand-in has nothing to say, the answer is True, 0, an empty text or a new object.
"""

from __future__ import annotations

import ctypes
import os
import re
import weakref
from collections.abc import Callable
from typing import Any

# What the bindings let Python implement: the library calls those, we do not.
_INTERFACES = ("ILogger", "Logger", "IProgressMonitor", "IStreamReader", "IStreamReaderV2", "Dims", "Weights")
_ASKED_BY_PYTHON = ("__bool__", "__len__", "__getitem__")
_KEPT: list[Any] = []  # memory the fake library points to


class Unknown(Exception):
    """The stand-in has no such tensor; the real bindings say so in their own way."""


class Driven:
    """The classes of one module, wrapped. models: what answers for an object, by the object."""

    def __init__(self, module: Any, device: Any) -> None:
        self.library = ctypes.CDLL(os.environ["DINOEXPORT_FAKE_NVINFER"])
        for name in ("fake_object", "fake_memory"):
            getattr(self.library, name).restype = ctypes.c_void_p
        self.module, self.device = module, device
        self.models: dict[int, Any] = {}
        for name, kind in list(vars(module).items()):
            if isinstance(kind, type) and name not in _INTERFACES and not hasattr(kind, "__members__"):
                self._wrap(name, kind)

    def model(self, of: Any) -> Any:
        """What answers for an object; None where nothing does."""
        return self.models.get(id(of))

    def _answers(self, of: Any, model: Any) -> None:
        """Lets `model` answer for an object as long as that lives."""
        self.models[id(of)] = model
        weakref.finalize(of, self._forget, id(of))

    def _forget(self, number: int) -> None:
        self.models.pop(number).dropped = True

    def _wrap(self, class_name: str, kind: type) -> None:
        for name, member in list(vars(kind).items()):
            if type(member) is property and member.fget is not None:  # not a static one
                read = self._called(name, member.fget)
                write = member.fset and self._set(name, member.fset)
                setattr(kind, name, property(read, write))
            elif name == "__init__":
                kind.__init__ = self._made(class_name, member)  # type: ignore[misc]
            elif callable(member) and "->" in (member.__doc__ or "") and (name[0] != "_" or name in _ASKED_BY_PYTHON):
                setattr(kind, name, self._called(name, member))

    def _called(self, name: str, real: Any) -> Callable[..., Any]:
        first = next((line for line in (real.__doc__ or "").splitlines() if "->" in line), "")
        returns = first.rpartition("->")[2].strip()

        def call(this: Any, *args: Any, **kwargs: Any) -> Any:
            model = self.model(this)
            answer = None
            if model is not None and hasattr(model, name):
                answer = getattr(model, name)
                known = [self.model(part) or part for part in args]
                known_by_name = {key: self.model(part) or part for key, part in kwargs.items()}
                try:
                    answer = answer(*known, **known_by_name) if callable(answer) else answer
                except Unknown:
                    self.library.fake_integer(ctypes.c_int64(0))
                    return real(this, *args, **kwargs)
                self.say(returns, answer)
            else:
                # Python goes through a network by index until there is no more: at once, with none in it.
                self.say(returns, 0 if name == "__getitem__" else _default(returns))
            result = real(this, *args, **kwargs)
            if result is not None and type(answer).__module__.startswith("tests.standin"):
                self._answers(result, answer)
            return result

        call.__doc__ = real.__doc__
        return call

    def _set(self, name: str, real: Any) -> Callable[[Any, Any], None]:
        def put(this: Any, value: Any) -> None:
            self.library.fake_integer(ctypes.c_int64(1))
            real(this, value)
            if self.model(this) is not None:
                setattr(self.model(this), name, value)

        return put

    def _made(self, class_name: str, real: Any) -> Callable[..., None]:
        def init(this: Any, *args: Any, **kwargs: Any) -> None:
            self.library.fake_integer(ctypes.c_int64(1))
            real(this, *args, **kwargs)
            model = self.device.made(class_name, tuple(self.model(part) or part for part in args))
            if model is not None:
                self._answers(this, model)

        init.__doc__ = real.__doc__
        return init

    def say(self, returns: str, answer: Any) -> None:
        """Sets what the library will answer."""
        if hasattr(type(answer), "__members__"):
            self.library.fake_integer(ctypes.c_int64(int(answer)))
        elif answer is None and returns != "None":
            self.library.fake_integer(ctypes.c_int64(0))
        elif returns == "float":
            self.library.fake_real(ctypes.c_double(answer), 1)
        elif isinstance(answer, (bool, int)):
            self.library.fake_integer(ctypes.c_int64(answer))
        elif isinstance(answer, str):
            _KEPT.append(ctypes.create_string_buffer(answer.encode()))
            self.library.fake_integer(ctypes.c_int64(ctypes.addressof(_KEPT[-1])))
        elif isinstance(answer, bytes):
            _KEPT.append(ctypes.create_string_buffer(answer, len(answer)))
            memory = self.library.fake_memory(ctypes.c_void_p(ctypes.addressof(_KEPT[-1])), ctypes.c_int64(len(answer)))
            self.library.fake_integer(ctypes.c_int64(memory))
        elif isinstance(answer, (tuple, list)):
            self.library.fake_shape(len(answer), (ctypes.c_int64 * max(1, len(answer)))(*answer))
        else:
            self.library.fake_integer(ctypes.c_int64(self.library.fake_object()))


def _default(returns: str) -> Any:
    """What is answered where the stand-in has nothing to say."""
    kind = re.sub(r"\[.*", "", returns).rpartition(".")[2]
    simple = {"bool": True, "int": 0, "float": 0.0, "str": "", "None": 0, "Dims": (), "IHostMemory": b"nothing"}
    if kind in simple:
        return simple[kind]
    if (kind[:1] == "I" and kind[1:2].isupper()) or kind in ("EngineInspector", "Refitter", "Runtime"):
        return object()
    return (1,) if "Dims" in returns else 0
