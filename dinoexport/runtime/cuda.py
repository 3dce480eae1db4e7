"""CUDA's runtime, with failures as dinoexport's errors, and device buffers that grow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dinoexport.errors import BuildError, MissingRequirement

_NEXT_STEP = "dinoexport doctor shows what this machine has."


class Cuda:
    """The calls of `cuda.bindings.runtime`. Each returns its value or raises BuildError."""

    def __init__(self) -> None:
        try:
            from cuda.bindings import runtime
        except (ImportError, OSError, RuntimeError) as error:
            raise MissingRequirement(f"cuda-bindings cannot be loaded: {error}.", next_step=_NEXT_STEP) from None
        self.api: Any = runtime

    def __call__(self, name: str, *args: Any) -> Any:
        """The result of the call `name`: nothing, one value or several."""
        try:
            error, *values = getattr(self.api, name)(*args)
        except RuntimeError as failed:  # cuda-bindings 12 without a driver
            raise BuildError(f"CUDA failed: {name}: {failed}.", next_step=_NEXT_STEP) from None
        if int(error):
            raise BuildError(f"CUDA failed: {getattr(error, 'name', error)} from {name}.", next_step=_NEXT_STEP)
        return values[0] if len(values) == 1 else tuple(values)


class Buffers:
    """Named buffers on the device. A buffer that grows moves; `moved` is called before its old memory is freed."""

    def __init__(self, cuda: Cuda, moved: Callable[[], None]) -> None:
        self._cuda = cuda
        self._moved = moved
        self._held: dict[str, tuple[int, int]] = {}  # name -> (device address, capacity in bytes)

    def address(self, name: str) -> int:
        """The buffer's address."""
        return self._held[name][0]

    def grown(self, name: str, size_bytes: int) -> tuple[int, int]:
        """The buffer's address and capacity, which is at least `size_bytes`.

        If there is not enough memory, the buffer is gone and its memory is free: nothing points to it.
        """
        if name not in self._held or self._held[name][1] < size_bytes:
            self._moved()
            if name in self._held:
                address, _ = self._held.pop(name)
                self._cuda("cudaFree", address)
            try:
                self._held[name] = (int(self._cuda("cudaMalloc", size_bytes)), size_bytes)
            except BuildError:
                self._cuda.api.cudaGetLastError()  # so that the next call does not report this error
                raise
        return self._held[name]

    def free(self) -> None:
        """Frees every buffer; raises the first failure after all were tried."""
        failed: BuildError | None = None
        while self._held:
            _, (address, _) = self._held.popitem()
            try:
                self._cuda("cudaFree", address)
            except BuildError as error:
                failed = failed or error
        if failed:
            raise failed
