"""Pickles that allocate or never end are refused before PyTorch follows them; those of saved weights are not."""

from __future__ import annotations

import pickle
import time
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from dinoexport.errors import WeightsError
from dinoexport.weights import formats, pickle_check


def calling(module: str, name: str, argument: bytes, *, call: bytes = b"R") -> bytes:
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + argument + b"\x85" + call + b"."


def nested(deep: int, pair: bytes) -> bytes:
    """A dict whose key is a tuple that holds itself twice, so many times over: 2**deep tuples to hash.

    pair: the opcodes that make a tuple of twice what is kept under the number `i`.
    """
    return b"\x80\x02}K\x01" + b"".join(b"q%c" % i + pair.replace(b"i", b"%c" % i) for i in range(deep)) + b"K\x01s."


FIVE_GB = b"\x8a\x05\x00\xf2\x05\x2a\x01"
HOSTILE = {
    "bytearray": calling("builtins", "bytearray", FIVE_GB),
    "bytearray of a tuple after a mark": b"\x80\x02cbuiltins\nbytearray\n(" + FIVE_GB + b"tR.",
    "bytearray as a new object": calling("builtins", "bytearray", FIVE_GB, call=b"\x81"),
    "a storage": calling("torch", "FloatStorage", b"J\x00\xca\x9a\x3b"),
    "a tensor": calling("torch", "FloatTensor", b"J\x00\xca\x9a\x3b"),
    "a new tensor": calling("torch", "FloatTensor", b"J\x00\xca\x9a\x3b", call=b"\x81"),
    "tuples in tuples": nested(60, b"hi\x86"),
    "tuples in tuples after marks": nested(60, b"(hihit"),
    "a frozen set": b"\x80\x04(K\x01\x91.",
    "an opcode that is none": b"\x80\x02\xff.",
    "no end": b"\x80\x02K\x01",
}


def saved(path: Path, pickled: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
    return path


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_refused(tmp_path: Path, kind: str) -> None:
    started = time.monotonic()
    with pytest.raises(Exception):  # noqa: B017 (pickletools' own for what is not pickle)
        pickle_check.check(HOSTILE[kind])
    path = saved(tmp_path / "w.pth", HOSTILE[kind])
    with pytest.raises(WeightsError, match="nothing of it was run"):
        formats.opened((path,), prefix="", wanted={})
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "content",
    [
        {"a": torch.ones(3)}, OrderedDict(a=torch.nn.Parameter(torch.ones(3))), {"model": {"a": torch.ones(2, 2).T}},
        {"milestones": Counter({30: 1}), "a": torch.ones(1), "steps": (1, (2, (3,))), "words": ["x", None, True, 1.5]},
        {"a": torch.ones(3, dtype=torch.bfloat16), "device": torch.device("cpu"), "size": torch.Size([1, 2])},
    ],
)  # fmt: skip
@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_what_training_saves_is_taken(tmp_path: Path, content: Any, protocol: int) -> None:
    torch.save(content, tmp_path / "w.pth", pickle_protocol=protocol)
    with zipfile.ZipFile(tmp_path / "w.pth") as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
        pickle_check.check(archive.read(name))


def deep(levels: int, keep: bytes, take: bytes, close: bytes, inmost: bytes) -> bytes:
    """Tuples around `inmost`: each value is kept under the number `i`, taken from there, and closed in a tuple."""
    steps = (keep + take + close for _ in range(levels))
    return b"\x80\x04" + inmost + b"".join(step.replace(b"i", b"%c" % i) for i, step in enumerate(steps)) + b"."


@pytest.mark.parametrize(
    ("keep", "take", "close"),
    [
        (b"", b"", b"\x85"),
        (b"qi", b"hi", b"\x85"),
        (b"\x94", b"hi", b"\x85"),
        (b"ri\0\0\0", b"ji\0\0\0", b"\x85"),
        (b"\x94", b"(hi", b"t"),
        (b"\x94", b"hiK\x01K\x01", b"\x87"),
    ],
    ids=["plain", "put", "memoize", "long put", "a mark", "of three"],
)
@pytest.mark.parametrize("inmost", [b"K\x01", b"ctorch\nFloatStorage\n"], ids=["a number", "a class"])
def test_tuples_are_counted_through_the_memo(keep: bytes, take: bytes, close: bytes, inmost: bytes) -> None:
    """Sixteen deep, and no deeper."""
    pickle_check.check(deep(16, keep, take, close, inmost))
    with pytest.raises(ValueError, match="tuples more than 16 deep"):
        pickle_check.check(deep(17, keep, take, close, inmost))
