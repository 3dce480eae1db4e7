"""reference.npz: what is written comes back, and what is no reference is refused in one sentence."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.lib import format as npy

from dinoexport import bundle
from dinoexport.bundle import reference_file
from dinoexport.bundle.reference_file import Reference
from dinoexport.config.limits import Limits, load_validation
from dinoexport.errors import UsageError, ValidationFailed
from dinoexport.spec import Case, Expectation, Precision

LIMITS: Limits = load_validation("dinov2", beside=None)[0].limits[Precision.FP16]


def some_reference() -> Reference:
    numbers = np.random.RandomState(0)

    def case(name: str, **inputs: Any) -> Case:
        why = f"why {name} is asked, naïvely"
        return Case(
            name=name, why=why, inputs=inputs, neighbours=name.endswith("3"), shown=name.endswith("4"),
            distributions=("logits",) if name.endswith("5") else (),
            choices={"tokens": "logits"} if name.endswith("5") else {},
        )  # fmt: skip

    expectations = tuple(
        Expectation(
            case=case(f"case {i}", pixels=numbers.standard_normal((1, 3, 2, i + 1)).astype(np.float32)),
            outputs={
                "class_token": numbers.standard_normal((1, 4)).astype(np.float32),
                "patch_tokens": np.asfortranarray(numbers.standard_normal((1, i + 1, 4)).astype(np.float32)),
            },
            own_error={"class_token": 1.25e-3 * i, "patch_tokens": 2e-3} if i % 2 else {},
            own_outputs={"class_token": np.full((1, 4), i, np.float16)} if i % 3 == 0 else {},
            leads={"labels": np.full((1, 2), i, np.float32)} if i % 4 == 0 else {},
        )
        for i in range(12)  # more than ten: the arrays of case 1 are not those of case 11
    )
    odd = Case(
        name="odd",
        why="a size nobody promised",
        inputs={"images": numbers.randint(0, 256, (1, 5, 5, 3), dtype=np.uint8), "flag": np.array(3, np.int64)},
        expect_refusal=True,
    )
    kinds: Any = {"labels": ("labels", "patch_logits"), "depth": ("depth", "")}
    return Reference(name="PyTorch, for a test", limits=LIMITS, expectations=expectations, refusals=(odd,), kinds=kinds)


def same(found: Any, wanted: Any) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array)


def test_a_reference_comes_back(tmp_path: Path) -> None:
    original = some_reference()
    path = tmp_path / bundle.REFERENCE
    reference_file.write(path, original)
    found = reference_file.read(path)
    assert (found.name, found.limits, found.kinds) == (original.name, original.limits, original.kinds)
    for ours, theirs in zip(found.expectations, original.expectations, strict=True):
        assert (ours.case.name, ours.case.why, ours.case.expect_refusal) == (theirs.case.name, theirs.case.why, False)
        assert (ours.case.neighbours, ours.case.shown) == (theirs.case.neighbours, theirs.case.shown)
        assert (ours.case.distributions, ours.case.choices) == (theirs.case.distributions, theirs.case.choices)
        assert ours.own_error == theirs.own_error
        same(ours.case.inputs, theirs.case.inputs)
        same(ours.outputs, theirs.outputs)
        same(ours.own_outputs, theirs.own_outputs)
        same(ours.leads, theirs.leads)
    for refused, wanted in zip(found.refusals, original.refusals, strict=True):
        assert (refused.name, refused.why, refused.expect_refusal) == (wanted.name, wanted.why, True)
        same(refused.inputs, wanted.inputs)


def test_the_smallest_case_is_compared_as_in_the_whole() -> None:
    """A readiness probe and each worker ask it alone: a depth is still a depth, and a label a label."""
    whole = some_reference()
    alone = replace(whole, expectations=whole.expectations[::-1]).smallest()
    assert [e.case.name for e in alone.expectations] == ["case 0"] and alone.refusals == ()
    assert (alone.name, alone.limits, alone.kinds) == (whole.name, whole.limits, whole.kinds)


def test_the_same_reference_gives_the_same_bytes(tmp_path: Path) -> None:
    reference_file.write(tmp_path / "a.npz", some_reference())
    reference_file.write(tmp_path / "b.npz", some_reference())
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def index(**changes: Any) -> Any:
    content = {"version": 1, "reference": "somebody", "limits": LIMITS.model_dump(mode="json"), "cases": [], **changes}
    return np.frombuffer(json.dumps(content).encode(), np.uint8)


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def zipped(member: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("index.json.npy", member)
    return buffer.getvalue()


def header_of(shape: tuple[int, ...]) -> bytes:
    """An array file that says it is this large, and has no values."""
    buffer = io.BytesIO()
    npy.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})  # type: ignore[arg-type]
    return buffer.getvalue()


def broken_deflate() -> bytes:
    raw = bytearray(zipped(header_of((10,)) + bytes(1000), zipfile.ZIP_DEFLATED))
    start = raw.index(b"index.json.npy") + len("index.json.npy")
    raw[start : start + 20] = b"\xff" * 20
    return bytes(raw)


def npy_file() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.arange(3))
    return buffer.getvalue()


class Bomb:
    """Sets off when it is unpickled."""

    def __reduce__(self) -> Any:
        return (pytest.fail, ("it was unpickled",))


ENTRY = {"name": "one", "why": "asked", "refused": False, "own_error": {}}


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"garbage",
        b"PK\x03\x04garbage",
        npz(**{"index.json": index()})[:-30],
        npz(**{"index.json": index(), "0/in/x": np.array([Bomb()], dtype=object)}),
        npz(**{"index.json": np.array([Bomb()], dtype=object)}),
        npz(other=np.zeros(3)),
        npz(**{"index.json": np.frombuffer(b"{", np.uint8)}),
        npz(**{"index.json": np.frombuffer(b"[1]", np.uint8)}),
        npz(**{"index.json": np.frombuffer(b"[" * 500_000, np.uint8)}),
        npz(**{"index.json": index(reference=None)}),
        npz(**{"index.json": index(cases=[{**ENTRY, "own_error": [1]}])}),
        npz(**{"index.json": index(cases=[{**ENTRY, "refused": "perhaps"}])}),
        npz(**{"index.json": index(cases=[{"name": "one"}])}),
        npz(**{"index.json": index(cases=3)}),
        npz(**{"index.json": index(limits={})}),
        npz(**{"index.json": index(surprise=1)}),
        zipped(b"no array"),
        zipped(header_of((10,))),
        zipped(header_of((1 << 50,))),
        zipped(header_of((-1,))),
        broken_deflate(),
        npy_file(),
    ],
    ids=[
        "empty",
        "text",
        "no zip",
        "truncated",
        "pickle",
        "pickled index",
        "no index",
        "half an index",
        "a list",
        "deep",
        "no name",
        "own error",
        "refused",
        "half a case",
        "no cases",
        "no limits",
        "unknown key",
        "no array",
        "short array",
        "larger than memory",
        "negative",
        "deflate",
        "npy",
    ],
)
def test_what_is_no_reference_gets_one_sentence(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / bundle.REFERENCE
    path.write_bytes(raw)
    with pytest.raises(ValidationFailed, match=r"reference\.npz is not readable") as caught:
        reference_file.read(path)
    assert caught.value.next_step


@pytest.mark.parametrize("version", [2, None, "1", [1]])
def test_a_reference_of_another_version_says_so(tmp_path: Path, version: Any) -> None:
    """Whatever else it holds: what a later version means by its keys is not known here."""
    path = tmp_path / bundle.REFERENCE
    path.write_bytes(npz(**{"index.json": index(version=version, surprise=1)}))
    with pytest.raises(UsageError, match=r"reference\.npz has version .*; this dinoexport reads 1") as caught:
        reference_file.read(path)
    assert "built the bundle" in caught.value.next_step


def test_a_missing_reference_gets_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValidationFailed, match=r"reference\.npz is not readable"):
        reference_file.read(tmp_path / bundle.REFERENCE)


def test_an_error_that_is_no_number_is_not_written(tmp_path: Path) -> None:
    """NaN is not JSON, and a bound of NaN would fail every candidate."""
    whole = some_reference()
    spoilt = Expectation(case=whole.expectations[0].case, outputs={}, own_error={"class_token": float("nan")})
    with pytest.raises(ValueError, match="JSON"):
        reference_file.write(
            tmp_path / "x.npz", Reference(name="x", limits=LIMITS, expectations=(spoilt,), refusals=())
        )
