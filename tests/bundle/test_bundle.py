"""Bundles: what is written comes back, and whatever was changed is noticed in one sentence."""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib import format as npy
from pydantic import ValidationError

from dinoexport import bundle
from dinoexport.bundle import BundleFile, CheckpointFacts, GraphFacts, Manifest, reference_file
from dinoexport.bundle.reference_file import Reference
from dinoexport.config.limits import Limits, load_validation
from dinoexport.config.recipe import load
from dinoexport.errors import DinoexportError, UsageError, ValidationFailed
from dinoexport.spec import Case, Dim, Expectation, Graph, Precision, Tensor

LIMITS: Limits = load_validation("dinov2", beside=None)[0].limits[Precision.FP16]
GRAPH = Graph(
    name="model",
    inputs=(Tensor(name="pixels", dtype="float32", shape=("batch", 3, "height", "width"), meaning="RGB"),),
    outputs=(Tensor(name="class_token", dtype="float32", shape=("batch", 384), meaning="a token"),),
    dims=(Dim(name="batch", min=1, opt=1, max=4), Dim(name="height", min=14, opt=28, max=56, multiple_of=14)),
)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def listed(name: str, content: bytes = b"", stage: str = "export") -> BundleFile:
    return BundleFile(name=name, stage=stage, sha256=sha256(content), size_bytes=len(content))


def manifest(**changes: Any) -> Manifest:
    facts: dict[str, Any] = {
        "variant": "vits14",
        "family": "dinov2",
        "precision": Precision.FP16,
        "target": "cpu",
        "verdict": "unjudged",
        "recipe": load("vits14").model_dump(mode="json"),
        "checkpoint": CheckpointFacts(source="synthetic:0", sha256=sha256(b"weights"), licence="Apache-2.0"),
        "graphs": (GraphFacts.of(GRAPH, "model.onnx"),),
        "files": (listed("model.onnx"),),
        "stage_keys": {"export": sha256(b"key")},
        "versions": {"dinoexport": "0.1.0"},
        "card": {"limits": "naïve"},
        "report": {"passed": True, "rows": [{"relative_l2": 1e-6, "cosine": None}]},
        "created": datetime(2025, 1, 2, 3, 4, 5, 678, tzinfo=UTC),
    }
    return Manifest(**{**facts, **changes})


def small_manifest() -> bytes:
    return manifest(recipe={"name": "x"}, report={}, card={}).to_bytes()


def signed(content: dict[str, Any]) -> bytes:
    """A manifest file of this content whose own hash is right: damage by somebody who knows how it is made."""
    plain = (json.dumps(content, indent=1) + "\n").encode()
    return (json.dumps({**content, "manifest_sha256": sha256(plain)}, indent=1) + "\n").encode()


def content_of(found: Manifest) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(found.to_bytes())
    del content["manifest_sha256"]
    return content


# The manifest


def test_a_manifest_comes_back() -> None:
    original = manifest()
    raw = original.to_bytes()
    assert raw.endswith(b"}\n")
    found = Manifest.from_bytes(raw)
    assert found == original
    assert found.to_bytes() == raw
    assert found.graphs[0].graph() == GRAPH
    assert raw == signed(content_of(original))


texts = st.text(max_size=20)
hashes = st.from_regex(r"[0-9a-f]{64}", fullmatch=True)
file_names = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}", fullmatch=True)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
tensors = st.builds(
    Tensor,
    name=texts,
    dtype=st.sampled_from(["float32", "uint8"]),
    shape=st.lists(st.integers(0, 2**40) | texts, max_size=4).map(tuple),
    meaning=texts,
)
dims = st.tuples(st.integers(1), st.integers(1)).flatmap(
    lambda ends: st.builds(
        Dim, name=texts, min=st.just(min(ends)), opt=st.integers(1), max=st.just(max(ends)), multiple_of=st.integers(1)
    )
)
graphs = st.builds(
    Graph,
    name=file_names,
    inputs=st.lists(tensors, max_size=2).map(tuple),
    outputs=st.lists(tensors, max_size=2).map(tuple),
    dims=st.lists(dims, max_size=2).map(tuple),
)


@settings(max_examples=100, deadline=None)
@given(
    graph=graphs,
    file=file_names,
    changes=st.fixed_dictionaries(
        {},
        optional={
            "variant": texts,
            "precision": st.sampled_from(Precision),
            "verdict": st.sampled_from(["passed", "rejected", "unjudged"]),
            "recipe": st.dictionaries(texts, json_values, max_size=3),
            "checkpoint": st.builds(CheckpointFacts, source=texts, sha256=hashes, licence=texts),
            "stage_keys": st.dictionaries(texts, hashes, max_size=3),
            "versions": st.dictionaries(texts, texts, max_size=3),
            "card": st.dictionaries(texts, texts, max_size=3),
            "report": st.dictionaries(texts, json_values, max_size=3),
            "created": st.datetimes(timezones=st.just(UTC)),
        },
    ),
)
def test_any_plausible_manifest_comes_back(graph: Graph, file: str, changes: dict[str, Any]) -> None:
    original = manifest(graphs=(GraphFacts.of(graph, file),), files=(listed(file), listed(bundle.REFERENCE)), **changes)
    found = Manifest.from_bytes(original.to_bytes())
    assert found == original
    assert found.graphs[0].graph() == graph


@pytest.mark.parametrize("flip", [0x01, 0x20, 0x80])
def test_every_changed_byte_of_a_manifest_is_noticed(flip: int) -> None:
    raw = small_manifest()
    for place in range(len(raw)):
        changed = raw[:place] + bytes([raw[place] ^ flip]) + raw[place + 1 :]
        with pytest.raises(DinoexportError) as caught:
            Manifest.from_bytes(changed)
        assert caught.value.next_step


def test_every_added_space_and_every_lost_byte_is_noticed() -> None:
    raw = small_manifest()
    for place in range(len(raw) + 1):
        with pytest.raises(DinoexportError):
            Manifest.from_bytes(raw[:place] + b" " + raw[place:])
        with pytest.raises(DinoexportError):
            Manifest.from_bytes(raw[:place] + raw[place + 1 :] if place < len(raw) else raw + raw)
        if place < len(raw):
            with pytest.raises(DinoexportError):
                Manifest.from_bytes(raw[:place])


def test_the_same_content_written_otherwise_is_noticed() -> None:
    content = json.loads(manifest().to_bytes())
    for other in (
        json.dumps(content),
        json.dumps(content, indent=1),  # no newline at the end
        json.dumps(content, indent=1, sort_keys=True) + "\n",
        json.dumps(content, indent=1, ensure_ascii=False) + "\n",
    ):
        with pytest.raises(ValidationFailed):
            Manifest.from_bytes(other.encode())


@pytest.mark.parametrize("version", [0, 2, "1", None, [1]])
def test_another_schema_version_says_so(version: Any) -> None:
    raw = signed({**content_of(manifest()), "schema_version": version})
    with pytest.raises(UsageError, match=f"schema version {version!r}".replace("[", r"\[")) as caught:
        Manifest.from_bytes(raw)
    assert "this dinoexport reads 1" in caught.value.message
    assert "dinoexport that built" in caught.value.next_step


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"[1]",
        b"3",
        b'"text"',
        b"{",
        b"\xff\xfe\x00",
        b"\x80abc",
        b"[" * 1_000_000,
        b'{"a":' * 1_000_000,
        b'{"schema_version": 1, "report": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"schema_version": ' + b"1" * 5_000 + b"}",
        b'{"schema_version": 1}',
    ],
    ids=lambda raw: repr(raw[:12]),
)
def test_what_is_no_manifest_gets_one_sentence(raw: bytes) -> None:
    with pytest.raises(ValidationFailed, match=r"The bundle is damaged: manifest\.json") as caught:
        Manifest.from_bytes(raw)
    assert len(caught.value.message) < 500


@pytest.mark.parametrize(
    "report",
    [
        {"figure": float("nan")},
        {"figure": float("inf")},
        json.loads('{"a":' * 300 + "1" + "}" * 300),  # deeper than what writes it out again can go
    ],
    ids=["NaN", "Inf", "deep"],
)
def test_what_json_reads_but_nobody_writes_is_refused(report: dict[str, Any]) -> None:
    raw = signed({**content_of(manifest()), "report": report})
    with pytest.raises(ValidationFailed):
        Manifest.from_bytes(raw)


def test_a_huge_manifest_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / bundle.MANIFEST).open("wb") as file:
        file.truncate(1 << 40)  # takes no room on the disk, and would take all of the memory
    with pytest.raises(ValidationFailed, match="1,099,511,627,776 bytes or more"):
        bundle.read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["../x", "/abs", "a/b", ".hidden", "", "..", "a\\b", "x\n", "a b", "é", "x" * 129])
def test_a_file_name_that_could_leave_the_bundle_is_refused(name: str) -> None:
    content = content_of(manifest())
    content["files"][0]["name"] = content["graphs"][0]["file"] = name
    with pytest.raises(ValidationFailed, match=r"graphs\.0\.file|files\.0\.name"):
        Manifest.from_bytes(signed(content))
    with pytest.raises(ValidationError):
        listed(name)


def test_a_graph_and_a_reference_must_be_among_the_files() -> None:
    """What is not listed has no hash, so whoever opens it opens anything."""
    content = content_of(manifest())
    content["graphs"][0]["file"] = "other.onnx"
    with pytest.raises(ValidationFailed, match=r"files lacks other\.onnx"):
        Manifest.from_bytes(signed(content))
    content = content_of(manifest()) | {"verdict": "passed"}
    with pytest.raises(ValidationFailed, match=r"files lacks reference\.npz"):
        Manifest.from_bytes(signed(content))


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        ("inputs", [{"name": "pixels"}]),
        ("inputs", [{"name": "pixels", "dtype": "float32", "shape": 3, "meaning": "x"}]),
        ("inputs", [{"name": "pixels", "dtype": "float32", "shape": [None], "meaning": "x"}]),
        ("outputs", [3]),
        ("dims", [{"name": "batch", "min": "few", "opt": 1, "max": 2, "multiple_of": 1}]),
        ("dims", [{"name": "batch"}]),
    ],
)
def test_a_signature_that_is_none_is_refused(place: str, wrong: Any) -> None:
    content = content_of(manifest())
    content["graphs"][0][place] = wrong
    with pytest.raises(ValidationFailed, match=r"manifest\.json: graphs\.0"):
        Manifest.from_bytes(signed(content))


def test_an_unknown_key_is_refused() -> None:
    with pytest.raises(ValidationFailed, match="surprise"):
        Manifest.from_bytes(signed(content_of(manifest()) | {"surprise": 1}))


# The folder


FILES = {
    "model.onnx": b"graph",
    "model.onnx.data": bytes(range(256)) * 4,
    bundle.REFERENCE: b"questions",
    "empty.txt": b"",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle of four small files."""
    place = tmp_path / "bundle"
    place.mkdir()
    for name, content in FILES.items():
        (place / name).write_bytes(content)
    whole = manifest(files=bundle.describe(place, list(FILES), "export"), verdict="passed")
    (place / bundle.MANIFEST).write_bytes(whole.to_bytes())
    return place


def test_a_bundle_as_it_was_made_is_verified(folder: Path) -> None:
    told: list[str] = []
    found = bundle.verify(folder, progress=lambda doing, done, total: told.append(doing))
    assert [(file.name, file.size_bytes) for file in found.files] == [(n, len(c)) for n, c in FILES.items()]
    assert [file.sha256 for file in found.files] == [sha256(content) for content in FILES.values()]
    assert "hashing model.onnx.data" in told
    assert found == bundle.read_manifest(folder)


def changed(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def link_to_a_copy(path: Path) -> None:
    copy = path.with_name("elsewhere")
    path.rename(copy)
    path.symlink_to(copy)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("name", [name for name, content in FILES.items() if content])
@pytest.mark.parametrize("damage", [changed, truncated, longer, Path.unlink, link_to_a_copy, a_folder, a_pipe])
def test_a_damaged_file_is_noticed_by_name(folder: Path, name: str, damage: Callable[[Path], None]) -> None:
    damage(folder / name)
    words = f"{name} in .* is a link" if damage is link_to_a_copy else f"damaged: {name} "
    with pytest.raises(ValidationFailed, match=words) as caught:
        bundle.verify(folder)
    assert ("cp -rL" if damage is link_to_a_copy else "Copy it again") in caught.value.next_step
    # The size is looked at first: nobody hashes gigabytes to learn that a copy ended early.
    assert (damage in (truncated, longer)) == (" bytes, not " in caught.value.message)


def test_a_damaged_manifest_is_noticed_in_the_folder(folder: Path) -> None:
    changed(folder / bundle.MANIFEST)
    with pytest.raises(DinoexportError):
        bundle.verify(folder)


def test_a_file_that_cannot_be_read_is_said_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    real = os.open
    only = ["model.onnx"]
    monkeypatch.setattr(os, "open", lambda path, *a, **k: denied() if Path(path).name in only else real(path, *a, **k))
    with pytest.raises(ValidationFailed, match=r"model\.onnx cannot be read: Permission denied"):
        bundle.verify(folder)
    only.append(bundle.MANIFEST)
    with pytest.raises(UsageError, match=r"manifest\.json cannot be read: Permission denied"):
        bundle.read_manifest(folder)


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UsageError, match="is not a bundle"):
            bundle.verify(place)


# The reference


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
