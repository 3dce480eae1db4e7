"""A graph with a fitted head, by ONNX's own reference implementation of its operators, which is plain NumPy."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from dinoexport.errors import BuildError
from dinoexport.pipeline.fit import classifiers, fitted_graph
from dinoexport.pipeline.fit.classifiers import Fitted
from dinoexport.spec import Graph, Tensor

SCALE = np.array([1.5, 0.25, -2.0], np.float32)
HEAD = Graph(
    name="model", inputs=(), dims=(),
    outputs=(
        Tensor(name="probabilities", dtype="float32", shape=("batch", 2), meaning=""),
        Tensor(name="class_index", dtype="int32", shape=("batch",), meaning=""),
    ),
)  # fmt: skip
TOKENS = np.array([[[0.1, 0.2, 0.3], [0.5, -0.4, 0.3]], [[2.0, 1.0, 0.0], [-0.5, 0.25, 4.0]]], np.float32)


def backbone(folder: Path) -> Path:
    """A graph with two outputs, the scaled patches and the first of them, and its weights in a file beside it."""
    folder.mkdir()
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("x", ["batch", 2, 3]), ("class_token", ["batch", 3]), ("patch_tokens", ["batch", 2, 3]))
    ]
    nodes = [
        helper.make_node("Mul", ["x", "scale"], ["patch_tokens"], name="scaled"),
        helper.make_node("Gather", ["patch_tokens", "first"], ["class_token"], name="taken", axis=1),
    ]
    scale = numpy_helper.from_array(SCALE, "scale")
    (folder / "model.onnx.data").write_bytes(scale.raw_data)
    scale.ClearField("raw_data")
    scale.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "model.onnx.data"), ("offset", "0"), ("length", "12")):
        scale.external_data.add(key=key, value=value)
    first = numpy_helper.from_array(np.array(0, np.int64), "first")
    model = helper.make_model(
        helper.make_graph(nodes, "model", values[:1], values[1:], [scale, first]),
        opset_imports=[helper.make_opsetid("", 18)], ir_version=9,
    )  # fmt: skip
    helper.set_model_props(model, {"dinoexport.variant": "tiny", "dinoexport.recipe": "old"})
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def with_head(tmp_path: Path, fitted: Fitted, features: Any) -> Path:
    source, target = backbone(tmp_path / "source"), tmp_path / "model.onnx"
    (tmp_path / "model.onnx.data").write_bytes((tmp_path / "source" / "model.onnx.data").read_bytes())
    metadata = {"dinoexport.recipe": "new", "dinoexport.head": "linear"}
    fitted_graph.Extension(
        graph=HEAD, features=features, tensors=fitted.tensors, table=fitted.table, metadata=metadata
    ).write(source, target)
    return target


def regression(size: int) -> Fitted:
    rng = np.random.RandomState(0)
    weight, bias = rng.standard_normal((2, size)).astype(np.float32), np.array([0.5, -0.25], np.float32)
    return Fitted(tensors={"fitted.weight": weight, "fitted.bias": bias}, facts={})


def neighbours(size: int) -> Fitted:
    bank = np.random.RandomState(1).standard_normal((5, size))
    bank = (bank / np.linalg.norm(bank, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)
    votes = np.eye(2, dtype=np.float32)[[0, 1, 0, 1, 1]]
    return Fitted(
        tensors={"fitted.bank": bank, "fitted.votes": votes}, facts={}, table={"neighbours": 3, "temperature": 0.07}
    )


AS_IS, MEAN = ("class_token", "as is"), ("patch_tokens", "mean")


@pytest.mark.parametrize("features", [(AS_IS,), (MEAN,), (AS_IS, MEAN)])
@pytest.mark.parametrize(("kind", "of_size"), [("logreg", regression), ("knn", neighbours)])
def test_a_head_computes_its_definition(kind: Any, of_size: Any, features: Any, tmp_path: Path) -> None:
    """On a token as it is, on the mean of several, and on both one after the other; a zero feature has neighbours."""
    x = np.concatenate([TOKENS, 0 * TOKENS[:1]])
    patches = x.astype(np.float64) * SCALE
    parts = {AS_IS: patches[:, 0], MEAN: patches.mean(axis=1)}
    joined = np.concatenate([parts[feature] for feature in features], axis=1)
    fitted = of_size(joined.shape[1])
    target = with_head(tmp_path, fitted, features)
    probabilities, index = ReferenceEvaluator(str(target)).run(None, {"x": x})
    expected = classifiers.probabilities(kind, fitted, joined.astype(np.float32))
    np.testing.assert_allclose(probabilities, expected, atol=1e-6)
    assert index.dtype == np.int32 and index.tolist() == expected.argmax(axis=1).tolist()
    assert probabilities.dtype == np.float32


def test_the_backbone_stays_as_it_was(tmp_path: Path) -> None:
    """Its nodes, and its weights in their own file; the outputs are the head's, and new metadata replace the old."""
    model = onnx.load(with_head(tmp_path, regression(3), (AS_IS,)), load_external_data=False)
    (scale,) = [weight for weight in model.graph.initializer if weight.name == "scale"]
    assert scale.data_location == TensorProto.EXTERNAL and not scale.raw_data
    assert [node.name for node in model.graph.node] == [
        "scaled", "taken", "head/logits", "head/shares", "head/probabilities", "head/best", "head/class_index",
    ]  # fmt: skip
    assert [weight.name for weight in model.graph.initializer][2:] == ["head.weight_KC", "head.bias_K"]
    assert [output.name for output in model.graph.output] == ["probabilities", "class_index"]
    assert {entry.key: entry.value for entry in model.metadata_props} == {
        "dinoexport.variant": "tiny", "dinoexport.recipe": "new", "dinoexport.head": "linear",
    }  # fmt: skip


def test_a_head_of_another_width_is_not_written_as_valid(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"^model\.onnx with its head is not valid: "):
        with_head(tmp_path, regression(4), (AS_IS,))


def test_a_long_message_of_the_checker_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check_model(*_: Any, **__: Any) -> None:
        raise onnx.checker.ValidationError("".join(chr(0x100 + i) for i in range(400)))

    real = onnx.checker.ValidationError
    monkeypatch.setattr(onnx, "checker", SimpleNamespace(check_model=check_model, ValidationError=real))
    with pytest.raises(BuildError) as caught:
        with_head(tmp_path, regression(3), (AS_IS,))
    told = "model.onnx with its head is not valid: "
    assert caught.value.message == told + "".join(chr(0x100 + i) for i in range(300))
