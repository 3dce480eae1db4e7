"""What is read of a `torch.save` file without torch, and what is left to torch: by pickles torch does not write."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dinoexport.weights import mapped_tensors, torch_zip
from dinoexport.weights.mapped_tensors import Stored

VALUES = np.arange(1, 7, dtype=np.float32)


class Pid:
    """What a storage is in a pickle: its kind, its class, the file with its numbers, a device and their count."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts


class Made:
    """A value that a call makes."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.made = function, arguments

    def __reduce__(self) -> Any:
        return self.made


def saved(
    path: Path,
    *,
    kind: Any = "storage",
    storage: Any = torch.FloatStorage,
    count: Any = 6,
    offset: Any = 0,
    shape: Any = (6,),
    strides: Any = (1,),
    order: bytes | None = b"little",
    raw: Any = None,
    comment: bytes = b"",
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """A file with one tensor of a storage of six numbers. raw: in the place of its storage."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return value.parts if isinstance(value, Pid) else None

    pickled = io.BytesIO()
    held = Pid(kind, storage, "0", "cpu", count) if raw is None else raw
    tensor = Made(torch._utils._rebuild_tensor_v2, held, offset, shape, strides, False, OrderedDict())
    Pickler(pickled, protocol=2).dump({"a": tensor})
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("w/data.pkl", pickled.getvalue())
        if order is not None:
            archive.writestr("w/byteorder", order)
        archive.writestr("w/data/0", VALUES.tobytes())
        archive.comment = comment
    return path


def numbers(path: Path) -> list[Any] | None:
    """The tensor's numbers; None if the file is left to torch."""
    content = torch_zip.content_of(path)
    return None if content is None else mapped_tensors.mapped(path, content)("a").tolist()


@pytest.mark.parametrize(
    ("facts", "values"),
    [
        ({}, [1, 2, 3, 4, 5, 6]),
        ({"order": None}, [1, 2, 3, 4, 5, 6]),
        ({"count": 4, "shape": (4,)}, [1, 2, 3, 4]),
        ({"offset": 2, "shape": (2, 2), "strides": (2, 1)}, [[3, 4], [5, 6]]),
        ({"offset": 5, "shape": (1, 1), "strides": (9, 7)}, [[6]]),
        ({"shape": (), "strides": ()}, 1),
        ({"shape": (2, 1, 3), "strides": (3, 5, 1)}, [[[1, 2, 3]], [[4, 5, 6]]]),
        ({"count": 0, "shape": (0,)}, []),
    ],
)
def test_what_is_read(facts: dict[str, Any], values: Any, tmp_path: Path) -> None:
    """An axis of one entry may have any stride; numbers and storages may be none."""
    assert numbers(saved(tmp_path / "w.pth", **facts)) == values


@pytest.mark.parametrize(
    "facts",
    [
        {"order": b"big"},
        {"kind": "module"},
        {"storage": torch.IntStorage},
        {"storage": Path},
        {"count": 6.0},
        {"count": 7},
        {"count": 24},
        {"count": -1, "shape": (0,)},
        {"compression": zipfile.ZIP_DEFLATED},
        {"offset": 1},
        {"offset": -1},
        {"offset": 0.0},
        {"offset": True},
        {"shape": (7,)},
        {"shape": (-1,)},
        {"shape": (2, -3), "strides": (-3, 1)},
        {"shape": (3,), "strides": (2,)},
        {"shape": (2,), "strides": (2,)},
        {"shape": (2, 3), "strides": (1, 2)},
        {"shape": (2, 3), "strides": (3,)},
        {"raw": 5},
        {"raw": [6]},
    ],
    ids=str,
)
def test_what_is_left_to_torch(facts: dict[str, Any], tmp_path: Path) -> None:
    assert torch_zip.content_of(saved(tmp_path / "w.pth", **facts)) is None


@pytest.mark.parametrize("name", [b"torch\nFloatStorage", b"torch\nload", b"my\nFloatStorage", b"builtins\neval"])
def test_only_storages_of_torch_are_found(name: bytes, tmp_path: Path) -> None:
    """As words, which nothing can call."""
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
        archive.writestr("w/data.pkl", b"\x80\x02}X\x01\x00\x00\x00ac" + name + b"\ns.")
    wanted = {"a": "FloatStorage"} if name == b"torch\nFloatStorage" else None
    assert torch_zip.content_of(tmp_path / "w.pth") == wanted


def test_a_parameter_is_its_tensor(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth")
    assert torch_zip._parameter(torch_zip.content_of(path)["a"], True) == Stored(  # type: ignore[index]
        dtype="float32", shape=(6,), start=path.read_bytes().index(VALUES.tobytes())
    )
    with pytest.raises(torch_zip._NotPlain):
        torch_zip._parameter([1.0])  # type: ignore[arg-type]


@pytest.mark.parametrize(("more", "read"), [(0, True), (4, False)])
def test_no_storage_ends_behind_the_file(more: int, read: bool, tmp_path: Path) -> None:
    """The directory says that the last entry has so many bytes: all up to the end of the file, or one number more."""
    whole = saved(tmp_path / "short.pth").read_bytes()
    begin = whole.index(VALUES.tobytes())
    padding = b" " * (-(len(whole) - begin) % 4)
    size = len(whole) + len(padding) - begin + more
    path = saved(tmp_path / "w.pth", count=size // 4, shape=(1,), comment=padding)
    content = bytearray(path.read_bytes())
    begin = content.index(VALUES.tobytes())
    size = len(content) - begin + more
    assert size % 4 == 0
    entry = content.rindex(b"PK\x01\x02")
    assert content[entry + 46 :].startswith(b"w/data/0")
    content[entry + 20 : entry + 28] = struct.pack("<II", size, size)
    path.write_bytes(content)
    assert (torch_zip.content_of(path) is not None) is read
