"""A server's answers are PyTorch's, for arrays, photographs and heads, at every size and in batches."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from dinoexport import bundle, images
from dinoexport.bundle import reference_file
from dinoexport.errors import InputRefused
from dinoexport.images import Preprocessing
from dinoexport.models.dinov2 import cases, serving
from dinoexport.pipeline import build as pipeline
from dinoexport.pipeline.fit import flow
from dinoexport.runtime import openvino, ort
from dinoexport.serving.client import DinoClient
from dinoexport.serving.triton import model_repository
from dinoexport.spec import Precision, Runtime, Way
from dinoexport.validation import evaluate
from tests.conftest import DATA, as_if_chosen
from tests.image_inputs import taken
from tests.serving.triton.real_server.server_requests import IMAGES, check, executions, photographs
from tests.test_docs import PAGES
from tests.triton_server import Server

PHOTOGRAPHS = sorted(IMAGES.glob("*.*g"))

pytestmark = pytest.mark.triton


@pytest.mark.parametrize("way", ["http", "grpc", "shared memory over http", "shared memory over grpc"])
@pytest.mark.parametrize("name", ["bytes", "floats"])
def test_answers_are_judged_like_any_runtime(server: Server, bundles: dict[str, Path], name: str, way: str) -> None:
    """Five sizes, batch 1 and more, and the size the strict graph must refuse: all of the bundle's own limits."""
    reference = reference_file.read(bundles[name] / bundle.REFERENCE)
    url = server.grpc if way.endswith("grpc") else server.http
    with DinoClient(url, model=name, shared_memory=way.startswith("shared")) as client:
        assert client.shares_memory == way.startswith("shared")
        report = evaluate.judged(client, reference, way)
    assert report.passed, report.failures
    assert len(report.rows) == (6 * 3 + 1 if name == "bytes" else 2 * 2)


def test_a_graph_runs_as_its_bundle_did(server: Server, bundles: dict[str, Path], tmp_path: Path) -> None:
    """In OpenVINO and bf16, where ONNX Runtime would compute the same file in fp32."""
    if not openvino.computes(Precision.BF16):
        pytest.skip("this CPU has no bf16 that OpenVINO would use")
    built = as_if_chosen(bundles["floats"], tmp_path / "bf16", Way(runtime=Runtime.OPENVINO, precision=Precision.BF16))
    graph = bundle.read_manifest(built).graphs[0].graph()
    inputs = {"pixels": np.random.RandomState(0).standard_normal((1, 3, 70, 98)).astype(np.float32)}
    deployed = model_repository.deploy(built, server.repository, name="bf16", backend="python")
    try:
        assert server.load("bf16")[0] == 200
        served = DinoClient(server.http, model="bf16")(inputs)["patch_tokens"]
    finally:
        server.unload("bf16")
        for model in deployed.models:
            shutil.rmtree(server.repository / model)
    narrow = openvino.open_graph(built / "model.onnx", graph, precision=Precision.BF16)(inputs)["patch_tokens"]
    wide = ort.open_graph(built / "model.onnx", graph)(inputs)["patch_tokens"]
    np.testing.assert_allclose(served, narrow, rtol=0, atol=1e-5)
    assert np.abs(served - wide).max() > 1e-3


def test_front_end_answers_as_the_validator_does(server: Server, bundles: dict[str, Path]) -> None:
    """Encoded photographs through the ensemble, against ONNX Runtime on what the validation makes of them."""
    manifest = bundle.read_manifest(bundles["floats"])
    run = ort.open_graph(bundles["floats"] / "model.onnx", manifest.graphs[0].graph())
    names = ["chelsea.png", "china.jpg", "coffee.png", "rocket.jpg"]
    case = cases.read_case(
        {"name": "photographs", "why": "as the validation has them", "photographs": names},
        IMAGES.parent, taken(as_bytes=False),
    )  # fmt: skip
    expected = run(case.inputs)
    for url in (server.http, server.grpc):
        answer = DinoClient(url, model="floats").encoded(photographs(*names))
        assert answer.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_allclose(answer[name], array, rtol=0, atol=1e-5)


def test_a_heads_answers_as_files_and_at_the_photographs_size(server: Server, tmp_path: Path) -> None:
    """Depth of a photograph in PNG and as an array: both are the graph's, which `check` compares with PyTorch's."""
    from PIL import Image

    request = pipeline.build_request(
        str(DATA / "tiny_heads.toml"), weights="synthetic:0", head="nyu_linear", head_weights="synthetic:0",
        target="cpu", runtime=Runtime.ONNXRUNTIME, out=tmp_path / "depth",
    )  # fmt: skip
    pipeline.build(request)
    graph = bundle.read_manifest(tmp_path / "depth").graphs[0].graph()
    (encoded,) = photographs("chelsea.png")
    pixels = Preprocessing().normalised(np.asarray(images.decode(encoded, named="chelsea"))[np.newaxis])
    expected = ort.open_graph(tmp_path / "depth" / "model.onnx", graph)({"pixels": pixels})["depth"]
    deployed = model_repository.deploy(
        tmp_path / "depth", server.repository, name="depth", backend="python", answers=("png", "resized")
    )
    assert {"depth_images", "depth_images_png", "depth_images_resized"} < set(deployed.models)
    try:
        for model in deployed.models:
            assert server.load(model)[0] == 200, model
        for url in (server.http, server.grpc):
            client = DinoClient(url, model="depth")
            np.testing.assert_allclose(client.encoded([encoded])["depth"], expected, rtol=1e-5)
            resized = client.encoded([encoded], front_end="images_resized")
            np.testing.assert_allclose(resized["photograph_depth"], expected, rtol=1e-5)
            answer = client.encoded([encoded], front_end="images_png")
            steps = np.asarray(Image.open(io.BytesIO(answer["depth_png"][0, 0]))).astype(np.float64)
            scale = answer["depth_scale"][0, 0]
            np.testing.assert_allclose(steps * scale, expected[0], rtol=0, atol=0.51 * scale)
            with pytest.raises(InputRefused, match="image 1"):
                client.encoded([b"no image"], front_end="images_png")
        assert evaluate.judged(client, reference_file.read(tmp_path / "depth" / bundle.REFERENCE), "served").passed
    finally:
        for model in reversed(deployed.models):
            server.unload(model)
            shutil.rmtree(server.repository / model)


def test_classes_of_a_fitted_head(server: Server, bundles: dict[str, Path], tmp_path: Path) -> None:
    """class_index is one number for each image, which Triton has only as a row of one."""
    from PIL import Image

    for name in ("chelsea", "coffee"):
        (tmp_path / "photographs" / name).mkdir(parents=True)
        whole = Image.open(IMAGES / f"{name}.png").convert("RGB")
        for i in range(6):
            whole.crop((20 * i, 10 * i, 20 * i + 200, 10 * i + 150)).save(tmp_path / "photographs" / name / f"{i}.png")
    flow.fit(bundles["floats"], tmp_path / "photographs", out=tmp_path / "own")
    graph = bundle.read_manifest(tmp_path / "own").graphs[0].graph()
    pixels = np.random.RandomState(0).standard_normal((2, 3, 70, 98)).astype(np.float32)
    expected = ort.open_graph(tmp_path / "own" / "model.onnx", graph)({"pixels": pixels})
    deployed = model_repository.deploy(
        tmp_path / "own", server.repository, name="own", backend="python", answers=("names",)
    )
    try:
        for model in deployed.models:
            assert server.load(model)[0] == 200, model
        for url in (server.http, server.grpc):
            client = DinoClient(url, model="own")
            answer = client({"pixels": pixels})
            assert answer.keys() == expected.keys()
            for name, array in expected.items():
                assert answer[name].shape == array.shape, name
                np.testing.assert_allclose(answer[name], array, rtol=0, atol=1e-5)
            named = client.encoded(photographs("chelsea.png"), front_end="images_names")["class_names"]
            assert sorted(named[0].tolist()) == [b"chelsea", b"coffee"]
    finally:
        for model in reversed(deployed.models):
            server.unload(model)
            shutil.rmtree(server.repository / model)


def test_front_end_turns_images_upright(server: Server) -> None:
    """A photograph stored lying on its side, with the EXIF note of it, gives the same as the upright one."""
    from PIL import Image

    client = DinoClient(server.http, model="bytes")
    upright = Image.open(IMAGES / "chelsea.png").convert("RGB")
    stored = {}
    for orientation, turn in ((1, None), (6, Image.Transpose.ROTATE_90), (3, Image.Transpose.ROTATE_180)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        file = io.BytesIO()
        (upright if turn is None else upright.transpose(turn)).save(file, "PNG", exif=exif)
        stored[orientation] = client.encoded([file.getvalue()], front_end="images")["class_token"]
    np.testing.assert_allclose(stored[6], stored[1], atol=1e-5)
    np.testing.assert_allclose(stored[3], stored[1], atol=1e-5)


def test_the_readmes_curl(server: Server, tmp_path: Path) -> None:
    """As it stands there, with this server's port and model."""
    (line,) = re.findall(r"^curl localhost.*\\\n.*$", PAGES["docs/triton.md"], re.MULTILINE)
    (tmp_path / "photograph.jpg").write_bytes((IMAGES / "rocket.jpg").read_bytes())
    words = shlex.split(
        line.replace("\\\n", "").replace("localhost:8000", server.http).replace("vits14", "floats"), comments=True
    )
    subprocess.run([*words, "--silent"], check=True, cwd=tmp_path)
    raw = (tmp_path / "tokens").read_bytes()
    head, end = json.JSONDecoder().raw_decode(raw.decode("latin-1"))
    expected = DinoClient(server.http, model="floats").encoded(photographs("rocket.jpg"))
    for output in head["outputs"]:
        size = output["parameters"]["binary_data_size"]
        answer = np.frombuffer(raw[end : end + size], np.float32).reshape(output["shape"])
        np.testing.assert_allclose(answer, expected[output["name"]], atol=1e-5)
        end += size
    assert end == len(raw) and len(head["outputs"]) == len(expected)


def test_size_router(server: Server, bundles: dict[str, Path]) -> None:
    """Each photograph is answered at the nearest size of the set that was derived from the samples."""
    client = DinoClient(server.http, model="bytes")
    manifest = bundle.read_manifest(bundles["bytes"])
    run = ort.open_graph(bundles["bytes"] / "model.onnx", manifest.graphs[0].graph())
    config = server.ask("GET", "/v2/models/bytes_sized_images/config")[1]
    sizes = [tuple(s) for s in json.loads(config["parameters"]["dinoexport"]["string_value"])["settings"]["sizes"]]
    assert 1 <= len(sizes) <= serving.SIZES_MAX
    for path in PHOTOGRAPHS:
        image = images.load(path)
        size = serving.nearest((image.height, image.width), sizes)
        expected = run({"images": Preprocessing().covering(image, size)[np.newaxis]})
        answer = client.encoded([path.read_bytes()], front_end="sized_images")
        assert answer["patch_tokens"].shape[1] == size[0] // 14 * (size[1] // 14)
        np.testing.assert_allclose(answer["class_token"], expected["class_token"], atol=1e-5)


def test_batching_merges(server: Server) -> None:
    """Triton's own statistics: single requests of one shape were answered by fewer, larger executions."""
    client = DinoClient(server.grpc, model="bytes")
    rng = np.random.default_rng(0)
    inputs = [rng.integers(0, 256, (1, 224, 224, 3), dtype=np.uint8) for _ in range(32)]
    before = executions(server, "bytes")
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda x: client({"images": x}), inputs))
    formed = executions(server, "bytes", beyond=before, items=len(inputs)) - before
    assert sum(size * count for size, count in formed.items()) == len(inputs), formed
    assert formed.total() <= 24 and max(formed) > 1, formed
    for x, answer in zip(inputs, answers, strict=True):  # and nobody got his neighbour's answer
        np.testing.assert_allclose(answer["class_token"], client({"images": x})["class_token"], atol=1e-5)


def test_no_batch_forms_that_costs_more(server: Server) -> None:
    """Measured to be worth no more than two at once, it is never asked for more, however many wait."""
    client = DinoClient(server.grpc, model="floats")
    pixels = np.zeros((1, 3, 224, 224), np.float32)
    before = executions(server, "floats")
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda _: client({"pixels": pixels}), range(64)))
    after = executions(server, "floats", beyond=before, items=64)
    assert after[2] - before[2] >= 10, (before, after)
    assert (after[3], after[4]) == (before[3], before[4])
    client({"pixels": np.repeat(pixels, 4, axis=0)})  # a batch that comes as one is still answered as one
    assert executions(server, "floats", beyond=after, items=4) - after == Counter({4: 1})


def test_a_second_family_is_served_as_it_is(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder of two graphs, which nothing here knows of: deployed, driven over the network, judged."""
    monkeypatch.syspath_prepend(str(DATA.parent / "toy_family"))
    toy = str(DATA.parent / "toy_family" / "toy.toml")
    pipeline.build(pipeline.build_request(toy, weights="synthetic:3", out=tmp_path / "toy"))
    deployed = model_repository.deploy(tmp_path / "toy", server.repository, backend="python")
    assert deployed.models == ("toy_prefill", "toy_step")
    try:
        for model in deployed.models:
            assert server.load(model)[0] == 200
        for url, what in ((server.http, tmp_path / "toy"), (server.grpc, server.repository)):
            told = json.loads(check(url, str(what), "--model", "toy", "--json").stdout)
            assert told["report"]["passed"] and told["latency_ms"]
    finally:
        for model in deployed.models:
            server.unload(model)
            shutil.rmtree(server.repository / model)
