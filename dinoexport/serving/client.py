"""A client of a served model: named arrays or encoded files in, named outputs out.

The client reads the signature in the served model, and raises the server's own error before it sends a bad request.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from dinoexport.errors import DinoexportError, InputRefused, UsageError
from dinoexport.runtime import check_inputs
from dinoexport.serving import address, answers, connection
from dinoexport.serving.transport import MemoryPlace, ServerBusy, Transport
from dinoexport.serving.triton.signature import ENCODED, Served
from dinoexport.spec import Array, Arrays, Graph, closest

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0
_ROLES = ("graph", "front_end")  # roles that a client of a graph uses
T = TypeVar("T")


class DinoClient:
    """One served graph and its front ends. It is a `spec.Runner`, so it can be validated like any runtime.

    url: http://HOST:8000 or grpc://HOST:8001. model: its deployed name; optional if a server has only one.
    shared_memory: send arrays through /dev/shm if client and server share it and the server allows that;
    `shares_memory` tells whether it is used. timeout_s: for one answer; a busy or restarting server is tried again for
    the same time. headers: a file of lines `Name: value` to send with every request; a token in $DINOEXPORT_TOKEN is
    sent too. ca: a file of certificates to trust. Many threads may use it; with shared memory they take turns.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        shared_memory: bool = False,
        timeout_s: float = 60.0,
        headers: Path | None = None,
        ca: Path | None = None,
    ) -> None:
        where = address.parse(url, headers=headers, ca=ca)
        self._transport = connection.connect(where, timeout_s=timeout_s)
        self._timeout_s = timeout_s
        self._region: _SharedRegion | None = None
        found = self._patiently(lambda: discover(self._transport))
        self.served = _chosen(found, str(where), model)
        self._models = {s.front_end: name for name, s in found.items() if s.role in _ROLES and self._belongs(s)}
        self.graph: Graph = self.served.graph.graph()
        # A front end may give another form of the answers.
        self._answering = {end: (found[m].answers or self.served.graph).graph() for end, m in self._models.items()}
        self._transport.limit(max(map(answers.signature, self._answering.values())))
        self.shares_memory = False
        if shared_memory:
            self._region = _SharedRegion(self._transport)
            self.shares_memory = self._region.allowed

    def __call__(self, arrays: Arrays) -> dict[str, Array]:
        """The graph's outputs for one batch of its inputs. Raises InputRefused before anything is sent."""
        check_inputs(self.graph, arrays)
        if self._region is None or not self.shares_memory:
            return self._infer("", arrays, {})
        with self._region.holding(arrays) as shared:
            return self._infer("", arrays, shared)

    def encoded(self, items: Sequence[bytes], *, front_end: str | None = None) -> dict[str, Array]:
        """The graph's outputs, or the front end's own form of them, for encoded files, one batch.

        front_end: optional if there is only one.

        Raises InputRefused, naming the item, for what cannot be decoded.
        """
        import numpy as np

        ends = sorted(name for name in self._models if name)
        if front_end is None and ends:
            front_end = ends[0]
        if front_end not in ends:
            raise UsageError(
                f"{self.served.name} has no front end {front_end!r}.{closest(front_end or '', ends)}",
                next_step=f"It has: {', '.join(ends) or 'none; send arrays'}.",
            )
        batch = next(dim for dim in self.graph.dims if dim.name == self.graph.inputs[0].shape[0])
        if not 1 <= len(items) <= batch.max:
            raise InputRefused(
                f"{len(items)} items are not a batch of 1 to {batch.max}.", next_step="Send them in several requests."
            )
        return self._infer(front_end, {ENCODED: np.array(list(items), dtype=object).reshape(-1, 1)}, {})

    async def call_async(self, arrays: Arrays) -> dict[str, Array]:
        """The same as calling it, without blocking the event loop."""
        return await asyncio.to_thread(self, arrays)

    async def encoded_async(self, items: Sequence[bytes], *, front_end: str | None = None) -> dict[str, Array]:
        """The same as `encoded`, without blocking the event loop."""
        return await asyncio.to_thread(self.encoded, items, front_end=front_end)

    def close(self) -> None:
        """Releases shared memory."""
        if self._region is not None:
            self._region.close()
            self._region, self.shares_memory = None, False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def _belongs(self, served: Served) -> bool:
        return served.name == self.served.name and served.graph == self.served.graph

    def _infer(self, front_end: str, arrays: Arrays, shared: dict[str, MemoryPlace]) -> dict[str, Array]:
        model, answering = self._models[front_end], self._answering[front_end]
        names = [tensor.name for tensor in answering.outputs]
        found = self._patiently(lambda: self._transport.infer(model, arrays, names, shared=shared))
        for tensor in answering.outputs:  # Triton has no outputs of one number for each item: they come as (B, 1)
            if len(tensor.shape) == 1 and tensor.name in found and found[tensor.name].shape[1:] == (1,):
                found[tensor.name] = found[tensor.name][:, 0]
        answers.check_outputs(answering, found, arrays)
        return found

    def _patiently(self, ask: Callable[[], T]) -> T:
        """The result of `ask`, repeated while the server is busy, each time after a longer, random pause."""
        deadline, pause_s = time.monotonic() + self._timeout_s, _FIRST_PAUSE_S
        while True:
            try:
                return ask()
            except ServerBusy:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise
                time.sleep(min(left_s, pause_s * random.uniform(0.5, 1.5)))  # noqa: S311
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def open_graphs(
    url: str,
    *,
    model: str | None = None,
    timeout_s: float = 60.0,
    headers: Path | None = None,
    ca: Path | None = None,
) -> dict[str, DinoClient]:
    """A client for each graph of one deployed model, by the graph's name; its family drives them."""
    where = address.parse(url, headers=headers, ca=ca)
    found = discover(connection.connect(where, timeout_s=timeout_s))
    names = sorted({served.name for served in found.values()})
    if model is None and len(names) == 1:
        model = names[0]
    graphs = sorted(s.graph.name for s in found.values() if s.role == "graph" and s.name == model)
    if not graphs:
        _chosen(found, str(where), model)  # raises an error that lists the models
    return {
        graph: DinoClient(url, model=f"{model}/{graph}", timeout_s=timeout_s, headers=headers, ca=ca)
        for graph in graphs
    }


def text_served(
    url: str, *, model: str | None = None, timeout_s: float = 60.0, headers: Path | None = None, ca: Path | None = None
) -> bool:
    """Whether the model of this name, or the only one, generates text."""
    where = address.parse(url, headers=headers, ca=ca)
    found = discover(connection.connect(where, timeout_s=timeout_s))
    wanted = {served.role for served in found.values() if model in (None, served.name)}
    return wanted == {"text"}


def discover(transport: Transport) -> dict[str, Served]:
    """Every Triton model at the server that dinoexport deployed, by Triton's name for it."""
    facts = {name: Served.of_config(transport.config(name)) for name in transport.models()}
    return {name: served for name, served in facts.items() if served is not None}


def _chosen(found: dict[str, Served], url: str, model: str | None) -> Served:
    graphs = {f"{s.name}/{s.graph.name}": s for s in found.values() if s.role == "graph"}
    wanted = [s for key, s in graphs.items() if model in (None, s.name, key)]
    if len(wanted) == 1:
        return wanted[0]
    if not graphs:
        raise UsageError(f"{url} serves no model of dinoexport's.", next_step="dinoexport deploy makes one.")
    if wanted:
        message = f"{url} serves {len(wanted)} graphs{f' called {model}' if model else ''}."
    else:
        message = f"{url} serves no {model!r}.{closest(model or '', [s.name for s in graphs.values()])}"
    raise UsageError(message, next_step=f"Name one as the model: {', '.join(sorted(graphs))}.")


class _SharedRegion:
    """System shared memory that holds one request's inputs at a time; created again if a request needs more.

    allowed: whether the server maps it. Since 2026 servers do only if started with --allow-client-shm=true.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport, self._lock = transport, threading.Lock()
        self._name, self._size_bytes = "", 0
        self._handle: Any = None
        try:
            self._make(1)
            self.allowed = True
        except (
            DinoexportError
        ):  # a server that does not allow it, or runs on another machine, reports that in many ways
            self.close()
            self.allowed = False

    @contextmanager
    def holding(self, arrays: Arrays) -> Iterator[dict[str, MemoryPlace]]:
        """The place of each of `arrays` while the block runs."""
        from tritonclient.utils import shared_memory

        with self._lock:
            needed = sum(array.nbytes for array in arrays.values())
            if needed > self._size_bytes:
                self.close()
                self._make(needed)
            shared_memory.set_shared_memory_region(self._handle, list(arrays.values()))
            places, offset = {}, 0
            for name, array in arrays.items():
                places[name] = (self._name, array.nbytes, offset)
                offset += array.nbytes
            yield places

    def _make(self, size_bytes: int) -> None:
        from tritonclient.utils import shared_memory

        self._name, self._size_bytes = f"dinoexport-{uuid.uuid4().hex}", size_bytes
        self._handle = shared_memory.create_shared_memory_region(self._name, f"/{self._name}", size_bytes)
        self._transport.register(self._name, f"/{self._name}", size_bytes)

    def close(self) -> None:
        """Unmaps the region on both sides."""
        from tritonclient.utils import shared_memory

        if self._handle is not None:
            with suppress(DinoexportError):
                self._transport.unregister(self._name)
            shared_memory.destroy_shared_memory_region(self._handle)
            self._handle, self._size_bytes = None, 0
