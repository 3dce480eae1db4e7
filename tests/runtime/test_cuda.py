"""Buffers on a device that is faked: when they grow, what is freed, and how CUDA's failures are said."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from dinoexport.errors import BuildError, MissingRequirement
from dinoexport.runtime.cuda import Buffers, Cuda


class Runtime(ModuleType):
    """`cuda.bindings.runtime`: calls return an error and their values; memory has `room` bytes."""

    def __init__(self, room: int = 1000) -> None:
        super().__init__("cuda.bindings.runtime")
        self.room, self.held = room, dict[int, int]()
        self.calls: list[tuple[Any, ...]] = []
        self.refused_frees: set[int] = set()
        self.cleared = 0

    def cudaMalloc(self, size_bytes: int) -> tuple[int, int]:  # noqa: N802
        self.calls.append(("malloc", size_bytes))
        if sum(self.held.values()) + size_bytes > self.room:
            return 2, 0
        address = 100 * len(self.calls)
        self.held[address] = size_bytes
        return 0, address

    def cudaFree(self, address: int) -> tuple[int]:  # noqa: N802
        self.calls.append(("free", address))
        del self.held[address]
        return (1 if address in self.refused_frees else 0,)

    def cudaGetLastError(self) -> tuple[int]:  # noqa: N802
        self.cleared += 1
        return (0,)

    def cudaMemGetInfo(self) -> tuple[int, int, int]:  # noqa: N802
        return 0, 7, 9

    def cudaGetDevice(self) -> tuple[int, int]:  # noqa: N802
        raise RuntimeError("no driver")


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    fake = Runtime()
    package, bindings = ModuleType("cuda"), ModuleType("cuda.bindings")
    bindings.runtime = fake  # type: ignore[attr-defined]
    for name, module in (("cuda", package), ("cuda.bindings", bindings), (fake.__name__, fake)):
        monkeypatch.setitem(sys.modules, name, module)
    return fake


def test_a_buffer_moves_only_to_grow(runtime: Runtime) -> None:
    moved: list[list[tuple[Any, ...]]] = []
    buffers = Buffers(Cuda(), lambda: moved.append(list(runtime.calls)))
    assert buffers.grown("a", 10) == (100, 10) and buffers.address("a") == 100
    for size_bytes in (10, 9, 1, 0):
        assert buffers.grown("a", size_bytes) == (100, 10), "one that is large enough stays"
    assert runtime.calls == [("malloc", 10)] and len(moved) == 1
    assert buffers.grown("b", 5) == (200, 5)
    assert buffers.grown("a", 11) == (400, 11), "the old memory is freed first"
    assert runtime.calls[2:] == [("free", 100), ("malloc", 11)]
    assert moved[-1] == runtime.calls[:2], "told before its memory is freed"
    assert runtime.held == {200: 5, 400: 11}
    buffers.free()
    assert not runtime.held
    buffers.free()
    assert len(runtime.calls) == 6


def test_a_buffer_for_which_there_is_no_memory_is_gone(runtime: Runtime) -> None:
    buffers = Buffers(Cuda(), lambda: None)
    buffers.grown("a", 400)
    buffers.grown("b", 400)
    with pytest.raises(BuildError, match="2 from cudaMalloc"):
        buffers.grown("b", 601)
    assert runtime.cleared == 1, "the next call does not report it"
    assert list(runtime.held.values()) == [400]
    with pytest.raises(KeyError):
        buffers.address("b")
    assert buffers.grown("b", 600)[1] == 600


def test_every_buffer_is_freed_and_the_first_failure_raised(runtime: Runtime) -> None:
    buffers = Buffers(Cuda(), lambda: None)
    addresses = [buffers.grown(name, 1)[0] for name in "abc"]
    runtime.refused_frees = set(addresses[:2])
    with pytest.raises(BuildError, match="from cudaFree"):
        buffers.free()
    assert not runtime.held


def test_calls(runtime: Runtime) -> None:
    cuda = Cuda()
    assert cuda("cudaMemGetInfo") == (7, 9) and cuda("cudaMalloc", 1) == 100 and cuda("cudaFree", 100) == ()
    with pytest.raises(BuildError, match=r"cudaGetDevice: no driver\."):
        cuda("cudaGetDevice")


def test_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(MissingRequirement, match="cuda-bindings cannot be loaded"):
        Cuda()
