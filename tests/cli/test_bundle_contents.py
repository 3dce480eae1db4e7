"""What `inspect` says of a bundle and of an ONNX file, and `report` of a bundle's page."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dinoexport import bundle
from dinoexport.bundle import BundleFile, GraphFacts, HeadManifest, signing
from dinoexport.cli import contents
from dinoexport.spec import Precision, Runtime, Way
from dinoexport.system import changes, memory, untrusted
from tests.command_line import run
from tests.serving.endpoints import GRAPH
from tests.text.tiny import GRAPH as DECODER


@pytest.mark.parametrize(
    ("count", "shown"), [(1, "1: a"), (6, "6: a, b, c, d, e, f"), (7, "7: a, b, c, d, e, f, …"), (0, None)]
)
def test_a_heads_first_classes(count: int, shown: str | None) -> None:
    head = HeadManifest(kind="k", dataset="d", terms="t", classes=tuple("abcdefg"[:count]), source="head.pth")
    manifest: Any = SimpleNamespace(head=head)
    assert contents._head(manifest).get("classes") == shown


@pytest.mark.parametrize(("source", "sha256"), [("head.pth", "0" * 64), ("", None)])
def test_where_a_heads_weights_are_from(source: str, sha256: str | None) -> None:
    manifest: Any = SimpleNamespace(head=HeadManifest(kind="k", dataset="d", terms="t", source=source, sha256=sha256))
    found = contents._head(manifest)
    assert found["head's weights"] == (source or "in the checkpoint") and found.get("head's SHA-256") == sha256
    without: Any = SimpleNamespace(head=None)
    assert contents._head(without) == {}


PLAIN = Way(runtime=Runtime.ONNXRUNTIME, threads=2, precision=Precision.FP32)
OTHER = Way(runtime=Runtime.OPENVINO, threads=1, precision=Precision.INT8)


def manifest(**changed: Any) -> Any:
    facts = {
        "verdict": "passed", "variant": "tiny", "precision": Precision.FP32, "target": "cpu", "head": None,
        "checkpoint": SimpleNamespace(source="tiny.pth", sha256="0" * 64, assumed={}, notes=(), licence="MIT"),
        "report": {}, "cpu": None, "created": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        "versions": {"dinoexport": "1.0", "torch": "2.0"}, "card": {"bias": "unknown"}, "engines": (),
        "graphs": (GraphFacts.of(GRAPH, "model.onnx"),),
        "files": (BundleFile(name="model.onnx", stage="export", sha256="1" * 64, size_bytes=9),),
    }  # fmt: skip
    return SimpleNamespace(**facts | changed)


def engine(file: str, **changed: Any) -> Any:
    facts = {
        "file": file, "runtime": Runtime.TENSORRT, "runtime_version": "10.1", "compute_capabilities": ("8.0", "9.0"),
        "precision": Precision.FP16, "size_bytes": 10, "profiles": {"small": {}, "wide": {}}, "scratch_bytes": 20,
        "fused_attentions": 0, "attentions": 12, "executed": "no",
    }  # fmt: skip
    return SimpleNamespace(**facts | changed)


def timed(way: Way, median_ms: float, best_ms: float | None, cpu_ms: float | None) -> Any:
    return SimpleNamespace(way=way, median_ms=median_ms, best_ms=best_ms, cpu_ms=cpu_ms, spread=0.125)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """`inspect --json` of a bundle with this manifest, signed by this key."""

    def inspected(signer: str | None = None, **changed: Any) -> Any:
        monkeypatch.setattr(bundle, "read_manifest", lambda _folder: manifest(**changed))
        monkeypatch.setattr(signing, "signed_by", lambda _folder: signer)
        ran = run("inspect", tmp_path, "--json")
        assert ran.exit_code == 0, ran.output
        return json.loads(ran.stdout)

    monkeypatch.setattr(changes, "settle", lambda _folder: None)
    monkeypatch.setattr(memory, "available_bytes", lambda: None)
    return inspected


FACTS = {
    "verdict": "passed", "variant": "tiny", "precision": "fp32", "target": "cpu", "weights": "tiny.pth",
    "weights' SHA-256": "0" * 64, "licence": "MIT", "signed": "no", "judged": "never",
    "built": "2026-01-02 03:04 UTC with dinoexport 1.0, torch 2.0", "bias": "unknown",
}  # fmt: skip


def test_a_bundle_that_was_only_exported(shown: Any) -> None:
    found = shown()
    assert found.pop("Dimensions") == [
        {"name": "batch", "min": 1, "opt": 1, "max": 2, "multiple_of": 1, "step": 1},
        {"name": "width", "min": 1, "opt": 4, "max": 8, "multiple_of": 1, "step": 1},
    ]
    tensor = {"graph": "model", "dtype": "float32", "meaning": ""}
    assert found == {
        "Bundle": FACTS,
        "Inputs and outputs": [
            tensor | {"": "in", "name": "x", "shape": "batch x 3 x width"},
            tensor | {"": "out", "name": "y", "shape": "batch x 4"},
            tensor | {"": "out", "name": "z", "shape": "batch x patches x 2"},
        ],
        "Files": [{"file": "model.onnx", "stage": "export", "bytes": 9, "SHA-256": "1" * 64}],
    }


def test_a_bundle_with_engines_that_was_judged_and_timed(shown: Any) -> None:
    cpu = SimpleNamespace(
        machine="a CPU", usable_cpus=2, load="batch 1", chosen=PLAIN,
        measured=(timed(PLAIN, 12.34, 11.11, 22.22), timed(OTHER, 15.0, None, None)),
    )  # fmt: skip
    assumed = SimpleNamespace(
        source="tiny.pth", sha256="0" * 64, assumed={"a": 1, "b": "x"}, notes=("c", "d"), licence=""
    )
    found = shown(
        "a key",
        checkpoint=assumed,
        report={"candidate": "ONNX", "reference": "PyTorch"},
        cpu=cpu,
        engines=(engine("a.plan"), engine("b.plan", fused_attentions=None, executed="yes")),
    )
    changed = {"signed": "by key a key, not verified here", "judged": "ONNX, against PyTorch", "licence": ""}
    more = {"assumed": "a = 1; b = x", "about the weights": "c d", "runs on": "a CPU, 2 CPUs"}
    assert found["Bundle"] == FACTS | changed | more
    row = {
        "runtime": "tensorrt 10.1", "SM": ["8.0", "9.0"], "precision": "fp16", "bytes": 10,
        "profiles": ["small", "wide"], "scratch bytes": 20,
    }  # fmt: skip
    assert found["Engines"] == [
        {"engine": "a.plan"} | row | {"fused attention": "0 of 12", "executed": "no"},
        {"engine": "b.plan"} | row | {"fused attention": "? of 12", "executed": "yes"},
    ]
    same = {"load": "batch 1", "spread": "12%"}
    assert found["Measured on the CPU that built it"] == [
        same | {
            "runtime": "onnxruntime", "precision": "fp32", "threads": 2, "median ms": "12.3", "best ms": "11.1",
            "CPU ms": "22.2", "of the fastest": "1.00", "": "chosen",
        },
        same | {
            "runtime": "openvino", "precision": "int8", "threads": 1, "median ms": "15.0", "best ms": "", "CPU ms": "",
            "of the fastest": "1.22", "": "",
        },
    ]  # fmt: skip
    assert list(found) == [
        "Bundle", "Inputs and outputs", "Engines", "Measured on the CPU that built it", "Dimensions", "Files",
    ]  # fmt: skip
    cpu.measured = ()
    assert "Measured on the CPU that built it" not in shown(cpu=cpu)


def test_the_memory_of_a_decoder(shown: Any) -> None:
    """Of keys and values in fp32, 2 heads of 8 numbers; the weights are in a file of their own."""
    files = tuple(
        BundleFile(name=name, stage="export", sha256="1" * 64, size_bytes=size)
        for name, size in (("model.onnx", 9), ("model.onnx.data", 2_000_000_000))
    )
    dims = [dim | {"name": "total"} if dim["name"] == "length" else dim for dim in GraphFacts.of(DECODER, "m").dims]
    graph = GraphFacts.of(DECODER, "model.onnx").model_copy(update={"dims": tuple(dims)})
    found = shown(graphs=(graph,), files=files)["Memory"]
    assert found == {"memory of the weights": "2.00 GB", "cache": "0.1 kB a token, 0.00 GB for 96 tokens"}
    assert shown(graphs=(graph,), files=files[:1])["Memory"]["memory of the weights"] == "0.00 GB"


def test_an_onnx_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx
    from onnx import TensorProto, helper

    def tensor(name: str, *shape: int, place: str = "") -> Any:
        made = helper.make_tensor(name, TensorProto.FLOAT, shape, bytes(4 * shape[0] * shape[1]), raw=True)
        if place:
            made.ClearField("raw_data")
            made.data_location = TensorProto.EXTERNAL
            made.external_data.add(key="offset", value="4096")
            made.external_data.add(key="location", value=place)
        return made

    def model(*weights: Any) -> Any:
        graph = helper.make_graph(
            [helper.make_node("Add", ["x", "w"], ["a"]), helper.make_node("Relu", ["a"], ["b"]),
             helper.make_node("Add", ["b", "v"], ["y"])],
            "main",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT16, [1, 3])],
            weights,
        )  # fmt: skip
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets)

    weights = tensor("w", 50, 30, place="b.data"), tensor("v", 1, 3, place="a.data"), tensor("u", 1, 3, place="a.data")
    made = model(*weights)
    made.metadata_props.add(key="variant", value="tiny")
    onnx.save_model(made, tmp_path / "external.onnx")
    shown = json.loads(run("inspect", tmp_path / "external.onnx", "--json").stdout)
    assert shown == {
        "ONNX": {
            "opset": "ai.onnx 20, com.microsoft 1", "nodes": "3: Add 2, Relu 1", "weights": "1,506 in 3 tensors",
            "external data": "a.data, b.data", "variant": "tiny",
        },
        "Inputs and outputs": [
            {"": "in", "name": "x", "dtype": "float", "shape": "batch x 3"},
            {"": "out", "name": "y", "dtype": "float16", "shape": "1 x 3"},
        ],
    }  # fmt: skip
    onnx.save_model(model(tensor("w", 1, 3), tensor("v", 1, 3)), tmp_path / "plain.onnx")
    assert contents.of_path(tmp_path / "plain.onnx")["ONNX"]["external data"] == "none"
    (tmp_path / "none.onnx").write_bytes(b"\xff")
    refused = run("inspect", tmp_path / "none.onnx")
    assert refused.exit_code == 2 and "none.onnx is not a readable ONNX file" in refused.stderr
    asked: list[int] = []
    monkeypatch.setattr(untrusted, "read_bytes", lambda _path, *, max_bytes: asked.append(max_bytes) or b"")
    contents.of_path(tmp_path / "plain.onnx")
    assert asked == [2147483647], "protobuf reads no more"


def test_the_page_of_a_bundle_is_checked_before_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setattr(changes, "settle", lambda _folder: None)
    page = tmp_path / "report.html"
    page.write_bytes(b"page")
    listed = BundleFile(name="report.html", stage="judge", sha256=hashlib.sha256(b"page").hexdigest(), size_bytes=4)
    files = [listed, *manifest().files]  # the other one, which is not there, is not asked for
    monkeypatch.setattr(bundle, "read_manifest", lambda _folder: manifest(files=tuple(files)))
    assert run("report", tmp_path).stdout == f"Report: {page}\n" and not opened
    assert json.loads(run("report", tmp_path, "--json", "--open").stdout) == {"report": str(page)}
    assert opened == [page.as_uri()]
    page.write_bytes(b"pale")
    assert run("report", tmp_path).exit_code == 1
    del files[0]
    refused = run("report", tmp_path)
    assert refused.exit_code == 2 and refused.stderr == (
        f"error: {tmp_path} has no report.html: it was never validated, or an older dinoexport built it.\n"
        "  next: dinoexport build makes one.\n"
    )
