"""The files of a served version: which are copied and checked, what a server can read, and where each ends up."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dinoexport import bundle
from dinoexport.bundle import BundleFile, GraphFacts, onnx_file
from dinoexport.config.target import Reads
from dinoexport.errors import UsageError
from dinoexport.serving.triton import model_files
from dinoexport.serving.triton.served_models import TritonModel
from tests.serving.triton.conftest import CONTENT
from tests.serving.triton.test_made_models import GRAPH, manifest


@pytest.mark.parametrize(("wanted", "graphs"), [({"model.onnx", "reference.npz"}, True), ({"reference.npz"}, False)])
def test_a_graph_is_checked_where_it_is_served(
    wanted: set[str], graphs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All files are compared with the manifest; only those that are wanted are copied."""
    checked: list[Any] = []
    monkeypatch.setattr(bundle, "check_files", lambda _folder, rest, **_: checked.append({f.name for f in rest}))
    monkeypatch.setattr(bundle, "check_graphs", lambda copies, _manifest: checked.append(copies))
    (tmp_path / "bundle").mkdir()
    (tmp_path / "new").mkdir()
    for name, raw in CONTENT.items():
        (tmp_path / "bundle" / name).write_bytes(raw)
    files = tuple(
        BundleFile(name=name, stage="export", sha256=hashlib.sha256(raw).hexdigest(), size_bytes=len(raw))
        for name, raw in CONTENT.items()
    )
    copies = model_files.copied(tmp_path / "bundle", tmp_path / "new", manifest(files=files), wanted)
    assert {path.name: path.read_bytes() for path in copies.iterdir()} == {name: CONTENT[name] for name in wanted}
    assert checked == [CONTENT.keys() - wanted, *([copies] if graphs else [])]


@pytest.mark.parametrize(
    ("reads", "versions", "said"),
    [
        (Reads(opset=20, ir=9), (9, 20), ""),
        (Reads(opset=20, ir=9), (10, 20), "opset 20 and IR version 9 at most"),
        (Reads(opset=20, ir=9), (9, 21), "opset 20 and IR version 9 at most"),
        (Reads(opset=0, ir=0), (9, 20), "nothing: the image holds none"),
        (None, (1, 1), "older ones"),
    ],
)
def test_what_the_image_reads(
    reads: Reads | None, versions: tuple[int, int], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(model_files, "triton_reads", lambda tag: asked.append(tag) or reads)
    monkeypatch.setattr(onnx_file, "versions", lambda _path: versions)
    of: Any = SimpleNamespace(graphs=(GraphFacts.of(GRAPH, "model.onnx"),))
    model_files.check_readable(Path(), of, None)
    assert not asked
    if not said:
        model_files.check_readable(Path(), of, "26.08=10.1")
    else:
        with pytest.raises(UsageError) as refused:
            model_files.check_readable(Path(), of, "26.08=10.1")
        assert refused.value.message == (
            f"model.onnx has opset {versions[1]} and IR version {versions[0]}; the ONNX Runtime in Triton 26.08 reads "
            f"{said}."
        )
    assert asked == ["26.08"]


def test_a_file_that_several_models_need_is_no_link(tmp_path: Path) -> None:
    """The last one gets the copy itself."""
    copied = tmp_path / ".copied"
    copied.mkdir()
    for name in ("a", "b"):
        (copied / name).write_bytes(name.encode())
    uses = Counter({"a": 3, "b": 1})
    numbers = np.arange(3, dtype=np.int16)
    first = TritonModel(name="first", config="config\n", files={"deep/a": "a", "b": "b"}, code="code\n")
    second = TritonModel(name="second", config="", files={"a": "a", "another": "a"}, warmup={"7-0-0": numbers})
    for model in (first, second):
        model_files.write(copied, tmp_path / model.name, model, 7, uses)
    found = {str(p.relative_to(tmp_path)): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert found == {
        "first/7/deep/a": b"a", "first/7/b": b"b", "first/7/model.py": b"code\n", "first/7/config.pbtxt": b"config\n",
        "first/config.pbtxt": b"config\n", "second/7/a": b"a", "second/7/another": b"a", "second/7/config.pbtxt": b"",
        "second/config.pbtxt": b"", "second/warmup/7-0-0": b"\0\0\1\0\2\0",
    }  # fmt: skip
    assert len({(tmp_path / name).stat().st_ino for name in found}) == len(found)
