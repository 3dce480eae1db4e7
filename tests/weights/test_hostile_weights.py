"""Weight files that are cut short, damaged, something else, or made to do harm."""

from __future__ import annotations

import copy
import os
import pickle
import random
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dinoexport.errors import WeightsError
from dinoexport.weights import formats
from tests.checkpoint_files import FORMATS, Tensors, opened, refused, save_pth, save_safetensors, tiny_state


@pytest.fixture
def state() -> Tensors:
    return dict(tiny_state())


# Fractions of the length, then bytes from the start (above 1) and from the end (below 0).
@pytest.mark.parametrize("cut", [0, 1, 3, 4, 7, 8, 9, 100, 0.1, 0.5, 0.9, 0.999, -1000, -22, -21, -1])
@FORMATS
def test_a_truncated_file_says_so(
    tmp_path: Path, state: Tensors, name: str, save: Callable[[Path, Tensors], Path], cut: float
) -> None:
    path = save(tmp_path / name, state)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * cut) if 0 < cut < 1 else int(cut)])
    message = refused(path).message
    assert message.startswith(f"{path} is truncated")


@pytest.mark.parametrize(("name", "save"), [("w.pth", save_pth), ("w.safetensors", save_safetensors)])
def test_a_damaged_file_never_ends_in_a_traceback(
    tmp_path: Path, state: Tensors, name: str, save: Callable[[Path, Tensors], Path]
) -> None:
    """Bytes changed where a format keeps its structure: the file is refused, or still means finite tensors."""
    content = save(tmp_path / name, state).read_bytes()
    path = tmp_path / f"damaged{Path(name).suffix}"
    rng = random.Random(0)
    refusals = 0
    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(rng.choice((1, 1, 20))):
            edge = rng.randrange(4000)
            damaged[rng.choice((edge, -1 - edge))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            checkpoint = opened(path)
            for key in state:
                assert np.isfinite(checkpoint.read(key)).all()
        except WeightsError:
            refusals += 1
    assert refusals > 50


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("w.pth", b"<!DOCTYPE html><html>sign in</html>", "neither"),
        ("w.pth", b"version https://git-lfs.github.com/spec/v1\n", "neither"),
        ("w.safetensors", b"<!DOCTYPE html><html>sign in</html>", "no safetensors file"),
        ("w.safetensors", b"\xff" * 100, "no safetensors file"),
        ("w.safetensors", b"\x02\0\0\0\0\0\0\0{}", "holds no tensors"),
    ],
)
def test_a_file_of_another_kind(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert says in refused(path).message


@pytest.mark.parametrize("content", [{}, [1, 2], {"epoch": 3}, None])
def test_a_file_without_tensors(tmp_path: Path, content: Any) -> None:
    assert "holds no tensors" in refused(save_pth(tmp_path / "w.pth", content)).message


def test_a_zip_that_torch_did_not_write(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    message = refused(tmp_path / "w.pth").message
    assert "damaged or no torch.save file" in message
    assert "weights_only" not in message


# Hostile files


class MakesAFolder:
    """Unpickled by Python's own unpickler, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def save_legacy(path: Path, content: Any) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def save_pickle(path: Path, content: Any) -> None:
    path.write_bytes(pickle.dumps(content))


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("w.pth", save_pth),
        ("w.bin", save_pth),
        ("w.pth", save_legacy),
        ("w.pth", save_pickle),
        ("w.safetensors", save_pickle),
        ("w.safetensors", save_pth),
    ],
)
def test_pickled_code_is_never_run(
    tmp_path: Path, state: Tensors, name: str, save: Callable[[Path, Any], None]
) -> None:
    trace = tmp_path / "trace"
    path = tmp_path / name
    save(path, state | {"extra": MakesAFolder(trace)})
    message = refused(path).message
    assert not trace.exists()
    assert str(path) in message
    assert "weights_only" not in message, "torch's advice how to load it all the same is not passed on"
    if name == "w.pth" and save is save_pth:
        assert "mkdir" in message
        assert "nothing of it was run" in message
        torch.load(path, weights_only=False)
        assert trace.exists(), "the trap works"


def test_a_whole_model_is_refused_with_advice(tmp_path: Path) -> None:
    error = refused(save_pth(tmp_path / "w.pth", torch.nn.Linear(2, 2)))
    assert "torch.nn.modules.linear.Linear" in error.message
    assert "state_dict" in error.next_step


def with_pickle(path: Path, pickled: bytes) -> Path:
    """A torch.save file whose pickle is this one."""
    torch.save({"cls_token": torch.zeros(3)}, path.with_suffix(".whole"))
    with zipfile.ZipFile(path.with_suffix(".whole")) as source, zipfile.ZipFile(path, "w") as changed:
        for entry in source.infolist():
            changed.writestr(entry.filename, pickled if entry.filename.endswith(".pkl") else source.read(entry))
    return path


class TenTerabytes:
    """A pickle of forty bytes, and one that torch's careful unpickler carries out."""

    def __reduce__(self) -> Any:
        return bytearray, (10**13,)


def _within_itself() -> Any:
    content: dict[str, Any] = {}
    content["again"] = content
    return content


def _a_billion() -> Any:
    content: dict[str, Any] = {}
    for _ in range(30):
        content = {"left": content, "right": content}
    return content


def _wide() -> Any:
    content: dict[str, Any] = {}
    for _ in range(6):
        content = {f"{i}": content for i in range(1000)}
    return content


@pytest.mark.parametrize("make", [TenTerabytes, _within_itself, _a_billion, _wide])
def test_a_pickle_that_grows_is_refused_quickly(tmp_path: Path, make: Callable[[], Any]) -> None:
    path = with_pickle(tmp_path / "w.pth", pickle.dumps(make(), protocol=2))
    start_s = time.monotonic()
    assert "damaged or no torch.save file" in refused(path).message
    assert time.monotonic() - start_s < 5


def test_a_compressed_checkpoint_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("w/data/0", "w") as entry:
        for _ in range(64):
            entry.write(bytes(1 << 20))
    assert path.stat().st_size < 1 << 17
    assert "compressed zip" in refused(path).message


def test_compression_that_saves_nothing_is_refused_too(tmp_path: Path, state: Tensors) -> None:
    """Mapped from disk, the packed bytes would be taken for the numbers."""
    path = tmp_path / "w.pth"
    with (
        zipfile.ZipFile(save_pth(tmp_path / "stored.pth", state)) as source,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=0) as archive,
    ):
        for entry in source.infolist():
            archive.writestr(entry.filename, source.read(entry))
    assert path.stat().st_size > sum(tensor.nbytes for tensor in state.values())
    assert "compressed zip" in refused(path).message


def test_a_zip_whose_entries_overlap_is_not_unpacked(tmp_path: Path, state: Tensors) -> None:
    path = save_pth(tmp_path / "w.pth", state)
    with zipfile.ZipFile(path, "a") as archive:
        large = max(archive.infolist(), key=lambda entry: entry.file_size)
        for i in range(10):
            twin = copy.copy(large)
            twin.filename = f"w/data/{1000 + i}"
            archive.filelist.append(twin)
        archive.writestr("w/last", b"")  # has the directory written again
    assert "it was not unpacked" in refused(path).message


@pytest.mark.parametrize(
    "others", [b"", b"\x02\0\0\0\0\0\0\0[]", b'\x0f\0\0\0\0\0\0\0{"a": {"b": 1}}', b"\x01\0\0\0\0\0\0\0{"]
)
def test_a_safetensors_file_that_is_exchanged_while_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: bytes
) -> None:
    import safetensors
    from safetensors.torch import save_file

    path, real = tmp_path / "w.safetensors", safetensors.safe_open
    save_file({"a": torch.ones(2)}, path)

    def opening(*args: Any, **settings: Any) -> Any:
        found = real(*args, **settings)
        path.unlink()
        path.write_bytes(others)
        return found

    monkeypatch.setattr(safetensors, "safe_open", opening)
    with pytest.raises(WeightsError, match="truncated or no safetensors file"):
        formats.opened((path,), prefix="", wanted={})
