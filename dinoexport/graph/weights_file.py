"""The initializers of an ONNX file, and the file of external data that holds all but the smallest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from threading import Condition, Lock
from typing import TYPE_CHECKING, Any, Protocol

from dinoexport.spec import Progress
from dinoexport.system import files

if TYPE_CHECKING:
    from collections.abc import Iterator
    from io import FileIO

    from _typeshed import SupportsWrite
    from onnx import GraphProto

# Shapes and axes stay in the file itself: shape inference does not read external data.
INLINE_BYTES = 256
# One tensor is read and folded while another is being written, unless both are larger than Llama 13B's widest in fp16.
WRITERS = 2
IN_FLIGHT_BYTES = 320 * 2**20


class Held(Protocol):
    """A tensor of a graph, whose bytes may be made when they are needed. dtype: ONNX's number of it."""

    @property
    def name(self) -> str | None:
        """Its name in the graph."""

    @property
    def dtype(self) -> Any:
        """What its numbers are."""

    @property
    def shape(self) -> Iterable[Any]:
        """Its sizes, outermost first."""

    @property
    def nbytes(self) -> int:
        """How many bytes it takes in a file."""

    @property
    def working_bytes(self) -> int:
        """About how many bytes are held while it is made and written."""

    def tobytes(self) -> bytes:
        """All bytes."""

    def tofile(self, file: SupportsWrite[bytes | memoryview]) -> None:
        """Writes them where `file` stands."""


@dataclass(frozen=True, kw_only=True)
class Constant:
    """A tensor that is there already."""

    name: str
    dtype: int
    shape: tuple[int, ...]
    content: bytes

    @property
    def nbytes(self) -> int:
        """How many bytes it takes in a file."""
        return len(self.content)

    @property
    def working_bytes(self) -> int:
        """The same."""
        return self.nbytes

    def tobytes(self) -> bytes:
        """All bytes."""
        return self.content

    def tofile(self, file: SupportsWrite[bytes | memoryview]) -> None:
        """Writes them where `file` stands."""
        file.write(self.content)


def write(graph: GraphProto, held: Sequence[Held], path: Path, *, progress: Progress) -> str:
    """Adds `held` to the graph's initializers, and writes to `path` those of more than INLINE_BYTES, in that order.

    Returns the SHA-256 of the file, which is read and hashed as far as it is complete while the rest is being written.
    """
    places: list[tuple[Held, int]] = []
    offset = 0
    for tensor in held:
        made = graph.initializer.add(name=tensor.name, data_type=int(tensor.dtype), dims=list(tensor.shape))
        if tensor.nbytes <= INLINE_BYTES:
            made.raw_data = tensor.tobytes()
            continue
        made.data_location = made.EXTERNAL
        for key, value in (("location", path.name), ("offset", str(offset)), ("length", str(tensor.nbytes))):
            made.external_data.add(key=key, value=value)
        places.append((tensor, offset))
        offset += tensor.nbytes
    with path.open("wb") as file:
        file.truncate(offset)
    budget, written, turn = _Budget(IN_FLIGHT_BYTES), count(1), Lock()

    def put(place: tuple[Held, int]) -> None:
        tensor, at = place
        with budget.of(tensor.working_bytes), path.open("r+b", buffering=0) as file:
            file.seek(at)
            tensor.tofile(_InTurn(file, turn))
            assert file.tell() == at + tensor.nbytes, tensor.name
        # In whatever order they are done.
        progress(f"writing {path.name}", next(written), len(places))

    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as complete, ThreadPoolExecutor(WRITERS) as pool:
        begun = [pool.submit(put, place) for place in places]
        try:
            for (tensor, _), each in zip(places, begun, strict=True):
                each.result()
                files.hash_more(digest, complete, tensor.nbytes)
        finally:
            pool.shutdown(cancel_futures=True)
    return digest.hexdigest()


class _InTurn:
    """A file that threads write to in turn.

    The kernel lets in one of them, and keeps the other in a busy loop on the CPU that would hash or transpose: ViT-g in
    fp32 took 34 to 50 s of CPU time and 24 to 30 s by the clock; in turn it takes 28 to 30 s and 22 to 23.
    """

    def __init__(self, file: FileIO, turn: Lock) -> None:
        self._file, self._turn = file, turn

    def write(self, content: bytes | memoryview, /) -> None:
        """Writes all of it."""
        left = memoryview(content)
        with self._turn:
            while left:
                left = left[self._file.write(left) :]


class _Budget:
    """How many bytes may be held at once; one tensor of more goes alone."""

    def __init__(self, most: int) -> None:
        self._most, self._held, self._changed = most, 0, Condition()

    @contextmanager
    def of(self, nbytes: int) -> Iterator[None]:
        taken = min(nbytes, self._most)
        with self._changed:
            self._changed.wait_for(lambda: self._held + taken <= self._most)
            self._held += taken
        try:
            yield
        finally:
            with self._changed:
                self._held -= taken
                self._changed.notify_all()
