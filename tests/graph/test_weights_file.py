"""Weights beside a graph: where each lies, what the file's hash is, how much is held, and what an error stops."""

from __future__ import annotations

import hashlib
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from onnx import GraphProto, TensorProto

from dinoexport.graph import weights_file
from dinoexport.graph.weights_file import Constant
from dinoexport.spec import silent


def constant(name: str, size_bytes: int) -> Constant:
    content = bytes((len(name) * 7 + i) % 251 for i in range(size_bytes))
    return Constant(name=name, dtype=TensorProto.UINT8, shape=(size_bytes,), content=content)


def test_each_tensor_lies_where_the_graph_says(tmp_path: Path) -> None:
    """Behind each other without a gap, in their order; small ones are in the graph itself."""
    sizes = (256, 257, 5000, 1, 70_000)
    held = [constant("x" * (i + 1), size) for i, size in enumerate(sizes)]
    graph, path = GraphProto(), tmp_path / "m.onnx.data"
    told: list[tuple[str, int, int]] = []
    digest = weights_file.write(graph, held, path, progress=lambda *words: told.append(words))
    raw = path.read_bytes()
    assert digest == hashlib.sha256(raw).hexdigest() and raw == b"".join(held[i].content for i in (1, 2, 4))
    offset = 0
    for tensor, made in zip(held, graph.initializer, strict=True):
        assert (made.name, list(made.dims), made.data_type) == (tensor.name, list(tensor.shape), TensorProto.UINT8)
        if tensor.nbytes <= 256:
            assert made.raw_data == tensor.content and not made.external_data
            continue
        entries = {entry.key: entry.value for entry in made.external_data}
        assert entries == {"location": path.name, "offset": str(offset), "length": str(tensor.nbytes)}
        assert made.data_location == TensorProto.EXTERNAL
        offset += tensor.nbytes
    assert sorted(told) == [(f"writing {path.name}", done, 3) for done in (1, 2, 3)]


class Failing:
    """A tensor that cannot be written, or one that takes a while and is counted."""

    dtype, shape, nbytes, working_bytes = TensorProto.UINT8, (5000,), 5000, 5000

    def __init__(self, name: str, begun: list[str], *, fails: bool) -> None:
        self.name, self._begun, self._fails = name, begun, fails

    def tobytes(self) -> bytes:
        return bytes(5000)

    def tofile(self, file: Any) -> None:
        self._begun.append(self.name)
        if self._fails:
            raise OSError(28, "No space left on device")
        time.sleep(0.02)
        file.write(self.tobytes())


def test_after_an_error_nothing_more_is_begun(tmp_path: Path) -> None:
    """A full disk is said at once, not after the rest of 30 GB."""
    begun: list[str] = []
    held = [Failing(str(i), begun, fails=i == 0) for i in range(200)]
    with pytest.raises(OSError, match="No space left"):
        weights_file.write(GraphProto(), held, tmp_path / "data", progress=silent)
    assert "0" in begun and len(begun) < 50, "two are written at once, in either order"


def test_two_are_written_at_once_within_320_mib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Counted(weights_file._Budget):
        def __init__(self, size: int) -> None:
            asked.append(size)
            super().__init__(size)

    now, most, lock = [0], [0], threading.Lock()

    class Met(Failing):
        def tofile(self, file: Any) -> None:
            with lock:
                now[0] += 1
                most[0] = max(most[0], now[0])
            super().tofile(file)
            with lock:
                now[0] -= 1

    monkeypatch.setattr(weights_file, "_Budget", Counted)
    weights_file.write(GraphProto(), [Met(str(i), [], fails=False) for i in range(6)], tmp_path / "d", progress=silent)
    assert asked == [335_544_320] and most == [2]


@pytest.mark.parametrize(("size", "at_once"), [(50, 2), (51, 1), (33, 3), (101, 1), (100, 1), (0, 9)])
def test_no_more_is_held_than_the_budget(size: int, at_once: int) -> None:
    """One that is larger than all of it goes alone."""
    budget, now, most = weights_file._Budget(100), [0], [0]
    lock, all_here = threading.Lock(), threading.Event()

    def take() -> None:
        with budget.of(size):
            with lock:
                now[0] += 1
                most[0] = max(most[0], now[0])
                if now[0] == at_once:
                    all_here.set()
            all_here.wait(5)
            time.sleep(0.005)
            with lock:
                now[0] -= 1

    threads = [threading.Thread(target=take) for _ in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert most[0] == at_once and budget._held == 0
