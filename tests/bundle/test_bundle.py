"""Bundles: what is written comes back, and whatever was changed is noticed in one sentence."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dinoexport import bundle
from dinoexport.bundle import BundleFile, CheckpointFacts, GraphFacts, Manifest
from dinoexport.bundle import manifest as bundle_manifest
from dinoexport.config.recipe import load
from dinoexport.errors import DinoexportError, MissingRequirement, UsageError, ValidationFailed
from dinoexport.spec import Dim, Graph, Precision, Tensor

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
    for size, problem in ((16 << 20, "is not readable: Expecting value"), ((16 << 20) + 1, "than 16,777,216")):
        os.truncate(tmp_path / bundle.MANIFEST, size)
        with pytest.raises(ValidationFailed, match=problem):
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


def test_what_older_bundles_do_not_say_is_left_out_where_it_is_empty() -> None:
    """And nothing else is: an empty licence stands."""
    plain = {"source": "", "sha256": sha256(b"weights"), "licence": ""}
    assert CheckpointFacts(**plain).model_dump() == plain
    more = {"prefix": "backbone.", "assumed": {"heads": "6"}, "notes": ("one",)}
    assert CheckpointFacts(**plain, **more).model_dump() == plain | more


def test_how_long_the_chosen_way_took() -> None:
    ways = [{"runtime": runtime, "precision": "fp32"} for runtime in ("openvino", "onnxruntime")]
    timed = [
        {"way": way, "median_ms": median, "best_ms": 3.0, "cpu_ms": 7.0, "spread": 0.1, "samples": 9}
        for way, median in zip(ways, (4.0, 5.0), strict=True)
    ]
    facts = {"machine": "x", "usable_cpus": 2, "load": "y", "runtime_version": "1", "arithmetic": {}}
    facts |= {"times_fp32": None, "others_share": 0.0}
    for way, median in zip(ways, (4.0, 5.0), strict=True):
        assert bundle.CpuFacts.model_validate({**facts, "chosen": way, "measured": timed}).measured_ms == median
    assert bundle.CpuFacts.model_validate({**facts, "chosen": ways[0], "measured": []}).measured_ms is None


def test_a_manifest_has_no_number_that_json_has_not() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        bundle_manifest._canonical({"row": float("nan")})


def test_a_folder_that_cannot_be_written_keeps_its_manifest(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = bundle.read_manifest(small)
    assert bundle_manifest.rewrite_manifest(small, before.changed(target="other"))
    assert bundle.read_manifest(small).target == "other"

    def refusing(*_: Any, **__: Any) -> None:
        raise MissingRequirement("read-only", next_step="x")

    monkeypatch.setattr(bundle_manifest, "rewrite", refusing)
    assert not bundle_manifest.rewrite_manifest(small, before)
    assert bundle.read_manifest(small).target == "other"


def test_a_way_that_leaves_the_rest_to_the_runtime_is_as_in_older_bundles() -> None:
    """Whose bytes must come out the same, or they would count as changed."""
    old = {"runtime": "openvino", "precision": "int8", "threads": 2}
    cpu = {"machine": "x", "usable_cpus": 2, "load": "y", "runtime_version": "1", "arithmetic": {"int8": 3}}
    cpu |= {"times_fp32": None, "others_share": 0.0, "refused": {}, "basis": "measured"}
    timed = {"median_ms": 4.0, "best_ms": 3.0, "cpu_ms": 7.0, "spread": 0.1, "samples": 9}
    for way in (old, {**old, "rest": "bf16"}):
        written = {**cpu, "chosen": way, "measured": [{"way": way, **timed}]}
        content = json.loads(manifest(cpu=bundle.CpuFacts.model_validate(written)).to_bytes())
        assert content["cpu"]["chosen"] == content["cpu"]["measured"][0]["way"] == way
        read = Manifest.from_bytes(json.dumps(content, indent=1).encode() + b"\n")
        assert read.cpu is not None and read.cpu.chosen.rest == way.get("rest")
