"""Set how many of an engine's weights stay on the device; the others are streamed from host memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dinoexport.errors import BuildError, MissingRequirement
from dinoexport.runtime.cuda import Cuda


def fit(cuda: Cuda, opened: Any, buffer_bytes: Callable[[], int]) -> int:
    """Sets the engine's budget to the device memory that scratch memory and tensors leave free; returns it in bytes.

    TensorRT accepts a budget only while there are no execution contexts and silently drops one that it does not accept,
    so the budget is read back. `buffer_bytes` returns the largest size of the tensors; it may make temporary contexts.

    Raises MissingRequirement if there is too little memory even with every weight streamed, BuildError if the engine
    does not accept the budget.
    """
    _set(opened, 0)
    free_bytes, _ = cuda("cudaMemGetInfo")
    tensor_bytes = buffer_bytes()
    scratch_bytes = opened.device_memory_size_v2  # includes the memory that streaming needs
    room_bytes = free_bytes - tensor_bytes - scratch_bytes
    if room_bytes < 0:
        raise MissingRequirement(
            f"The engine needs {(tensor_bytes + scratch_bytes) / 1e9:.2f} GB even with every weight streamed; the "
            f"device has {free_bytes / 1e9:.2f} GB free.",
            next_step="Free the device, or build with a smaller profile.",
        )
    budget_bytes = int(min(opened.streamable_weights_size, room_bytes))
    _set(opened, budget_bytes)
    return budget_bytes


def _set(opened: Any, budget_bytes: int) -> None:
    opened.weight_streaming_budget_v2 = budget_bytes
    if opened.weight_streaming_budget_v2 != budget_bytes:
        raise BuildError(
            f"The engine keeps {opened.weight_streaming_budget_v2} bytes of its weights on the device, not the "
            f"{budget_bytes} that were set.",
            next_step="Report it.",
        )
