"""What `deploy` writes is right by Triton's own schema, and says what it was derived from."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

import numpy as np
import pytest

from dinoexport import bundle
from dinoexport.bundle import reference_file
from dinoexport.cli import formatting
from dinoexport.errors import UsageError
from dinoexport.serving.triton import model_repository, served_models
from dinoexport.serving.triton.signature import Served
from dinoexport.spec import Dim, Precision, Runtime, Way
from tests.conftest import DATA, as_if_chosen
from tests.serving.triton.repositories import config_of, parsed

pytestmark = pytest.mark.usefixtures("fixed_latencies")


@pytest.mark.parametrize(("tag", "limited"), [(None, True), ("24.10", False), ("26.07", False), ("26.08", True)])
def test_queues_have_limits_where_triton_can_keep_them(
    built: Path, tmp_path: Path, tag: str | None, limited: bool
) -> None:
    model_repository.deploy(built, tmp_path / "models", name="tiny", backend="python", triton=tag)
    for name in ("tiny", "tiny_images_prepare"):
        path = tmp_path / "models" / name / "config.pbtxt"
        config = parsed(path)
        assert config.HasField("dynamic_batching") == (name == "tiny")
        assert config.dynamic_batching.HasField("default_queue_policy") == (limited and name == "tiny")
        assert ("no limits to the queue" in path.read_text()) == (not limited and name == "tiny")


def test_a_precision_that_the_server_does_not_have_is_said(built: Path, tmp_path: Path) -> None:
    """The tokens are right all the same; it is the time that is not what was measured."""
    assert model_repository.deploy(built, tmp_path / "models").note == ""
    other = as_if_chosen(built, tmp_path / "int8", Way(runtime=Runtime.OPENVINO, precision=Precision.INT8, threads=2))
    deployed = model_repository.deploy(other, tmp_path / "models", name="int8")
    assert all(part in deployed.note for part in ("int8 in OpenVINO", "in fp32", "--backend python"))
    assert deployed.note in "\n".join(formatting.deployed_lines(deployed))
    # Python's backend runs it as it was judged, with as many threads as the server's machine has.
    deployed = model_repository.deploy(other, tmp_path / "models", name="python", backend="python")
    config = parsed(tmp_path / "models" / "python" / "config.pbtxt")
    served = Served.model_validate_json(config.parameters["dinoexport"].string_value)
    assert deployed.note == "" and served.way == Way(runtime=Runtime.OPENVINO, precision=Precision.INT8)


def test_named_sizes_get_forms_in_the_python_backend(built: Path, tmp_path: Path) -> None:
    model_repository.deploy(built, tmp_path / "models", name="tiny", backend="python", sizes=["28x42"])
    config = parsed(tmp_path / "models" / "tiny" / "config.pbtxt")
    served = Served.model_validate_json(config.parameters["dinoexport"].string_value)
    assert served.recipe["sizes"] == ["28x42"]
    for backend, size, said in (
        ("onnxruntime", "28x42", "compiles no forms"),
        ("python", "28x4300", "4300"),
        ("python", "small", "is not a size"),
    ):
        with pytest.raises(UsageError, match=said):
            model_repository.deploy(built, tmp_path / "others", backend=backend, sizes=[size])  # type: ignore[arg-type]
    assert not (tmp_path / "others").exists()


@pytest.mark.parametrize("backend", ["onnxruntime", "python"])
def test_what_is_written(built: Path, tmp_path: Path, backend: served_models.Backend) -> None:
    deployed = model_repository.deploy(built, tmp_path / "models", name="tiny", backend=backend)
    assert (deployed.version, deployed.previous, deployed.backend) == (1, None, backend)
    assert {path.name for path in (tmp_path / "models").iterdir()} == {*deployed.models, "tiny.releases.json"}
    assert set(deployed.models) == {"tiny", "tiny_images", "tiny_images_prepare"}
    assert [path.name for path in tmp_path.iterdir()] == ["models"]
    folder = tmp_path / "models" / "tiny"
    # The layout Triton wants for external data: a folder of the graph's name.
    for name in ("model.onnx", "model.onnx.data"):
        assert (folder / "1" / "model.onnx" / name).read_bytes() == (built / name).read_bytes()
    assert (folder / "1" / "model.py").exists() == (backend == "python")
    for name in deployed.models:
        config = parsed(tmp_path / "models" / name / "config.pbtxt")
        assert config.name == name and config.max_batch_size == 4
        assert list(config.version_policy.specific.versions) == [1]
    config = parsed(folder / "config.pbtxt")
    assert config.backend == backend and config.platform == ("onnxruntime_onnx" if backend == "onnxruntime" else "")
    assert [(i.name, i.data_type, list(i.dims)) for i in config.input] == [("pixels", 11, [3, -1, -1])]
    assert [(o.name, list(o.dims)) for o in config.output] == [("class_token", [96]), ("patch_tokens", [-1, 96])]
    assert not config.response_cache.enable and not config.instance_group[0].HasField("rate_limiter")


@pytest.mark.parametrize(
    ("target", "backend", "kind"),
    [("cpu", "onnxruntime", "KIND_CPU"), ("a100", "onnxruntime", "KIND_AUTO"), ("a100", "python", "KIND_CPU")],
)
def test_the_kind_of_the_instance(
    built: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    backend: served_models.Backend,
    kind: str,
) -> None:
    """A bundle for a GPU leaves the choice to Triton's ONNX Runtime; the Python backend runs on the CPU."""
    manifest = bundle.read_manifest(built).changed(target=target)
    monkeypatch.setattr(bundle, "read_manifest", lambda *_: manifest)
    model_repository.deploy(built, tmp_path / "models", name="tiny", backend=backend)
    (group,) = parsed(tmp_path / "models" / "tiny" / "config.pbtxt").instance_group
    assert group.Kind.Name(group.kind) == kind


@pytest.mark.parametrize("backend", ["onnxruntime", "python"])
def test_configurations_are_these_to_the_letter(built: Path, tmp_path: Path, backend: served_models.Backend) -> None:
    """`data/served/BACKEND/MODEL.pbtxt`, whose long string of facts is cut: what Triton obeys, and what people read.

    After a wanted change read the difference, then write them anew with UPDATE_GOLDEN=1 in the environment.
    """
    deployed = model_repository.deploy(built, tmp_path / "models", name="tiny", backend=backend)
    for name in deployed.models:
        written = re.sub(r'string_value: ".*"', 'string_value: "..."', config_of(tmp_path / "models", name))
        golden = DATA / "served" / backend / f"{name}.pbtxt"
        if os.environ.get("UPDATE_GOLDEN"):
            golden.parent.mkdir(parents=True, exist_ok=True)
            golden.write_text(written)
        assert written == golden.read_text(), golden


def test_derived_lines_say_what_they_were_derived_from(built: Path, tmp_path: Path) -> None:
    model_repository.deploy(built, tmp_path / "models", backend="python")
    config = parsed(tmp_path / "models" / "tiny_swiglu" / "config.pbtxt")
    assert list(config.dynamic_batching.preferred_batch_size) == [2]  # 9 ms an item, and 4 gain nothing on that
    assert config.dynamic_batching.max_queue_delay_microseconds == 1000
    policy = config.dynamic_batching.default_queue_policy
    assert policy.max_queue_size == 1024 and policy.default_timeout_microseconds == 10_000_000
    text = (tmp_path / "models" / "tiny_swiglu" / "config.pbtxt").read_text()
    for line in (
        "preferred_batch_size: [2]  # measured where it was deployed, with 3x28x42, ms a batch: 1 in 10, 2 in",
        "max_queue_delay_microseconds: 1000  # a tenth",
        "max_batch_size: 4  # the largest batch of the profile",
        "dims: [3, -1, -1]  # height 14 to 1022, width 14 to 1022",
    ):
        assert line in text


def test_warmup_is_what_the_bundle_passed_on(built: Path, tmp_path: Path) -> None:
    model_repository.deploy(built, tmp_path / "models", backend="python")
    folder = tmp_path / "models" / "tiny_swiglu"
    reference = reference_file.read(built / bundle.REFERENCE)
    known = {e.case.inputs["pixels"][:1].tobytes() for e in reference.expectations}
    samples = parsed(folder / "config.pbtxt").model_warmup
    assert len(samples) == 2
    for sample in samples:
        value = sample.inputs["pixels"]
        raw = (folder / "warmup" / value.input_data_file).read_bytes()
        assert raw in known and len(raw) == 4 * np.prod(value.dims)


def test_it_is_measured_with_what_is_most_likely(built: Path) -> None:
    graph = bundle.read_manifest(built).graphs[0].graph()
    items = served_models.judged_items(graph, reference_file.read(built / bundle.REFERENCE))
    assert [item["pixels"].shape for item in items] == [(1, 3, 28, 42), (1, 3, 30, 69)]
    for side, expected in ((14, 42), (28, 42), (518, 69)):
        dims = tuple(Dim(name=d.name, min=d.min, opt=side, max=d.max) for d in graph.dims)
        likely = served_models._most_likely(dataclasses.replace(graph, dims=dims), items)
        assert likely["pixels"].shape[-1] == expected
