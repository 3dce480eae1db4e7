"""Against a real tritonserver: answers judged like any runtime, every bad input refused, every fault survived.

One server for the whole file: `bytes` takes uint8 and refuses sizes, `floats` takes normalised pixels and crops.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from dinoexport import bundle, cli, images
from dinoexport.bundle import reference_file
from dinoexport.errors import InputRefused, UsageError
from dinoexport.images import Preprocessing
from dinoexport.models.dinov2 import cases, serving
from dinoexport.pipeline import build as pipeline
from dinoexport.pipeline.fit import flow
from dinoexport.runtime import openvino, ort
from dinoexport.serving.client import DinoClient
from dinoexport.serving.transport import ServerBusy, ServerError
from dinoexport.serving.triton import batching, model_repository
from dinoexport.spec import Precision, Runtime, Way
from dinoexport.validation import evaluate
from tests.conftest import DATA, as_if_chosen
from tests.image_inputs import taken
from tests.serving.test_serving_files import GPU_METRICS, metrics_asked_for
from tests.serving.triton.plans import with_plans
from tests.test_docs import PAGES
from tests.triton_server import Server

pytestmark = pytest.mark.triton
IMAGES = DATA.parent.parent / "validate" / "images"
PHOTOGRAPHS = sorted(IMAGES.glob("*.*g"))


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two tiny bundles, by the name they are served under."""
    folder = tmp_path_factory.mktemp("bundles")
    for name, recipe in (("bytes", "tiny_served"), ("floats", "tiny_swiglu")):
        pipeline.build(pipeline.build_request(str(DATA / f"{recipe}.toml"), weights="synthetic:0", out=folder / name))
    return {name: folder / name for name in ("bytes", "floats")}


@pytest.fixture(scope="module")
def server(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Both bundles, on the Python backend; as measured, merging pays the first, and the second two at a time."""
    scratch = tmp_path_factory.mktemp("server")
    for name, samples, latency_ms in (
        ("bytes", IMAGES, {1: 10.0, 2: 18.0, 4: 30.0}),
        ("floats", None, {1: 10.0, 2: 18.0, 4: 60.0}),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(batching, "measure", lambda *_, found=latency_ms, **__: found)
            patch.setattr(batching, "_LEAST_LARGEST", 1)  # the largest batch of these is four
            model_repository.deploy(bundles[name], scratch / "models", name=name, backend="python", samples=samples)
    running = Server(scratch / "models", scratch, "--model-control-mode=explicit", "--load-model=*")
    try:
        yield running
    finally:
        running.kill(gently=True)


def photographs(*names: str) -> list[bytes]:
    return [(IMAGES / name).read_bytes() for name in names]


# ---- the answers are PyTorch's ----


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
    before = _executions(server, "bytes")
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda x: client({"images": x}), inputs))
    formed = _executions(server, "bytes", beyond=before, items=len(inputs)) - before
    assert sum(size * count for size, count in formed.items()) == len(inputs), formed
    assert formed.total() <= 24 and max(formed) > 1, formed
    for x, answer in zip(inputs, answers, strict=True):  # and nobody got his neighbour's answer
        np.testing.assert_allclose(answer["class_token"], client({"images": x})["class_token"], atol=1e-5)


def test_no_batch_forms_that_costs_more(server: Server) -> None:
    """Measured to be worth no more than two at once, it is never asked for more, however many wait."""
    client = DinoClient(server.grpc, model="floats")
    pixels = np.zeros((1, 3, 224, 224), np.float32)
    before = _executions(server, "floats")
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda _: client({"pixels": pixels}), range(64)))
    after = _executions(server, "floats", beyond=before, items=64)
    assert after[2] - before[2] >= 10, (before, after)
    assert (after[3], after[4]) == (before[3], before[4])
    client({"pixels": np.repeat(pixels, 4, axis=0)})  # a batch that comes as one is still answered as one
    assert _executions(server, "floats", beyond=after, items=4) - after == Counter({4: 1})


def _executions(server: Server, model: str, *, beyond: Counter[int] | None = None, items: int = 0) -> Counter[int]:
    """How often each batch size was executed, once `items` more than `beyond` are counted: that is after the answer."""
    deadline = time.monotonic() + 10
    while True:
        stats = server.ask("GET", f"/v2/models/{model}/stats")[1]["model_stats"][0]["batch_stats"]
        found = Counter({b["batch_size"]: b["compute_infer"]["count"] for b in stats})
        counted = sum(size * count for size, count in (found - (beyond or Counter())).items())
        if counted >= items:
            return found
        assert time.monotonic() < deadline, (beyond, found)
        time.sleep(0.05)


# ---- bad input ----


def _infer(server: Server, model: str, inputs: Any, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    body = inputs if isinstance(inputs, bytes | str) else json.dumps({"inputs": inputs})
    return server.ask("POST", f"/v2/models/{model}/infer", body, headers)


def _pixels(shape: list[int], datatype: str = "UINT8", data: list[Any] | None = None) -> list[dict[str, Any]]:
    size = int(np.prod(shape))
    return [{"name": "images", "datatype": datatype, "shape": shape, "data": [0] * size if data is None else data}]


BAD_ARRAYS = {
    "wrong dtype": (_pixels([1, 14, 14, 3], "FP32"), "data-type"),
    "wrong rank": (_pixels([1, 14, 42]), "shape"),
    "four channels": (_pixels([1, 14, 14, 4]), "shape"),
    "empty batch": (_pixels([0, 14, 14, 3]), "Expected 588, got 0"),
    "too large a batch": (_pixels([9, 14, 14, 3]), "batch-size must be <= 8"),
    "too high": (_pixels([1, 532, 14, 3]), "height 532 is outside 14 to 518"),
    "no multiple of 14": (_pixels([1, 28, 30, 3]), "nearest legal sizes are 28 and 42"),
    "no pixel": (_pixels([1, 0, 14, 3]), "height 0 is outside"),
    "a name it does not have": ([{**_pixels([1, 14, 14, 3])[0], "name": "pixels"}], "pixels"),
    "no input": ([], "input"),
}
# What Triton's own HTTP front end cannot parse never reaches a model; its 2.51 calls that a 500.
UNPARSABLE = {
    "fewer numbers than the shape": (_pixels([1, 14, 14, 3], data=[1, 2, 3]), "Shape does not match"),
    "malformed JSON": ('{"inputs": [', "failed to parse the request JSON"),
    "not JSON": (b"\xff\xd8\xff garbage", "failed to parse the request JSON"),
}


@pytest.mark.parametrize("what", BAD_ARRAYS)
def test_bad_arrays_are_refused(server: Server, what: str) -> None:
    inputs, words = BAD_ARRAYS[what]
    _is_a_helpful_refusal(_infer(server, "bytes", inputs), words)
    _still_serves(server)


@pytest.mark.parametrize("what", UNPARSABLE)
def test_what_triton_cannot_parse(server: Server, what: str) -> None:
    inputs, words = UNPARSABLE[what]
    _is_a_helpful_refusal(_infer(server, "bytes", inputs), words, statuses=(400, 500))
    _still_serves(server)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_is_refused(server: Server, value: float) -> None:
    raw = np.full((1, 3, 14, 14), value, np.float32).tobytes()
    told = {"inputs": [{"name": "pixels", "datatype": "FP32", "shape": [1, 3, 14, 14],
                        "parameters": {"binary_data_size": len(raw)}}]}  # fmt: skip
    header = json.dumps(told).encode()
    answer = _infer(server, "floats", header + raw, {"Inference-Header-Content-Length": str(len(header))})
    _is_a_helpful_refusal(answer, "NaN or Inf")
    _still_serves(server)


def _bomb(side: int) -> bytes:
    """A PNG that says it is `side` x `side` pixels, in a kilobyte."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1_000_000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


BAD_IMAGES = {
    "garbage": (b"these are not the bytes of an image", "image 1: not a readable image"),
    "nothing": (b"", "image 1: not a readable image"),
    "truncated JPEG": ((IMAGES / "rocket.jpg").read_bytes()[:5000], "truncated"),
    "large image": (_bomb(10_000), "10000x10000 is more than 64 Mpx"),
    "decompression bomb": (_bomb(40_000), "decompression bomb"),  # 4.8 GB when decoded
    "pickle": (b"\x80\x04\x95.", "not a readable image"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a readable image"),
}


@pytest.mark.parametrize("what", BAD_IMAGES)
@pytest.mark.parametrize("front_end", ["images", "sized_images"])
def test_bad_images_are_refused(server: Server, what: str, front_end: str) -> None:
    encoded, words = BAD_IMAGES[what]
    client = DinoClient(server.http, model="bytes")
    with pytest.raises(InputRefused, match=words):
        client.encoded([encoded], front_end=front_end)
    told = {"inputs": [{"name": "encoded", "datatype": "BYTES", "shape": [1, 1],
                        "parameters": {"binary_data_size": len(encoded) + 4}}]}  # fmt: skip
    header = json.dumps(told).encode()
    body = header + struct.pack("<I", len(encoded)) + encoded
    answer = _infer(server, f"bytes_{front_end}", body, {"Inference-Header-Content-Length": str(len(header))})
    _is_a_helpful_refusal(answer, words)
    _still_serves(server)


def test_one_bad_image_of_a_batch_is_named(server: Server) -> None:
    client = DinoClient(server.http, model="bytes")
    with pytest.raises(InputRefused, match="image 2: not a readable"):
        client.encoded([photographs("rocket.jpg")[0], b"no image"], front_end="images")
    with pytest.raises(InputRefused, match="go to different sizes"):
        client.encoded(photographs("chelsea.png", "china.jpg", "coffee.png", "rocket.jpg"), front_end="sized_images")


def test_a_bad_request_does_not_spoil_its_batch(server: Server) -> None:
    """Refused and good requests of one shape at once: each gets its own answer. NaN passes no client, so sent raw."""
    good = np.full((1, 3, 28, 28), 0.5, np.float32)
    client = DinoClient(server.grpc, model="floats")
    expected = client({"pixels": good})["class_token"]
    raw = DinoClient(server.grpc, model="floats")

    def ask(i: int) -> str:
        arrays = {"pixels": good * np.float32(np.nan) if i % 2 else good}
        try:
            answer = raw._transport.infer("floats", arrays, ["class_token"], shared={})
        except InputRefused:
            return "refused"
        return "right" if np.allclose(answer["class_token"], expected, atol=1e-5) else "wrong"

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(24))) == ["right", "refused"] * 12


def _is_a_helpful_refusal(answer: tuple[int, Any], words: str, *, statuses: tuple[int, ...] = (400,)) -> None:
    """A 4xx with one sentence that says what is wrong, without a path or a traceback."""
    status, content = answer
    assert status in statuses, answer
    message = content["error"]
    assert words in message, message
    assert "Traceback" not in message and ".py" not in message and len(message) < 600
    assert not any(f"{folder}/" in message for folder in ("/tmp", "/root", "/home", "/usr")), message


def _still_serves(server: Server) -> None:
    assert _infer(server, "bytes", _pixels([1, 14, 14, 3]))[0] == 200


# ---- the client ----


def test_client_refuses_what_the_server_would(server: Server) -> None:
    """Before anything is sent: with no server behind the transport it is refused all the same."""
    client = DinoClient(server.http, model="bytes")
    client._transport = None  # type: ignore[assignment]
    for shape, words in (
        ((1, 28, 30, 3), "not a multiple of 14"),
        ((9, 14, 14, 3), "batch 9 is outside 1 to 8"),
        ((1, 14, 14, 4), "shape"),
    ):
        with pytest.raises(InputRefused, match=words):
            client({"images": np.zeros(shape, np.uint8)})
    with pytest.raises(InputRefused, match="nearest legal sizes are 28 and 42") as refused:
        try:
            client({"images": np.zeros((1, 28, 30, 3), np.uint8)})
        except InputRefused as error:
            raise InputRefused(f"{error.message} {error.next_step}") from None
    assert refused.value.exit_code == 2
    for count in (0, 9):
        with pytest.raises(InputRefused, match=f"{count} items are not a batch of 1 to 8"):
            client.encoded([b"x"] * count, front_end="images")


def test_client_finds_its_model(server: Server) -> None:
    with pytest.raises(UsageError, match="serves 2 graphs"):
        DinoClient(server.http)
    with pytest.raises(UsageError, match="Did you mean 'floats'"):
        DinoClient(server.http, model="flots")
    with pytest.raises(UsageError, match=r"no front end 'image'\. Did you mean 'images'"):
        DinoClient(server.http, model="bytes").encoded([b"x"], front_end="image")
    with pytest.raises(UsageError, match="not an address"):
        DinoClient("ftp://127.0.0.1")
    client = DinoClient(f"127.0.0.1:{server.http_port}", model="floats")
    assert client.served.variant == "tiny_swiglu" and [t.name for t in client.graph.inputs] == ["pixels"]


def test_client_is_async(server: Server) -> None:
    client = DinoClient(server.http, model="floats")
    arrays = [{"pixels": np.full((1, 3, 28, 28), value, np.float32)} for value in (0.0, 0.5, 1.0)]

    async def ask() -> list[dict[str, Any]]:
        return await asyncio.gather(*(client.call_async(each) for each in arrays))

    for each, answer in zip(arrays, asyncio.run(ask()), strict=True):
        np.testing.assert_allclose(answer["class_token"], client(each)["class_token"], atol=1e-5)
    (encoded,) = asyncio.run(_together(client.encoded_async(photographs("rocket.jpg"))))
    assert encoded["class_token"].shape == (1, 96)


async def _together(*coroutines: Any) -> list[Any]:
    return await asyncio.gather(*coroutines)


def test_shared_memory_grows_and_is_given_back(server: Server) -> None:
    def regions() -> set[str]:
        """What the server has registered. One that is given back stays until the last request that used it is gone."""
        return {entry["name"] for entry in server.ask("GET", "/v2/systemsharedmemory/status")[1]}

    registered: set[str] = set()
    with DinoClient(server.http, model="floats", shared_memory=True) as client:
        for side in (14, 140, 28):
            x = {"pixels": np.random.default_rng(side).standard_normal((2, 3, side, side)).astype(np.float32)}
            plain = DinoClient(server.http, model="floats")(x)
            np.testing.assert_array_equal(client(x)["patch_tokens"].shape, plain["patch_tokens"].shape)
            np.testing.assert_allclose(client(x)["patch_tokens"], plain["patch_tokens"], atol=1e-5)
            _wait_until(lambda: len(regions()) == 1, seconds=30)
            registered |= regions()
    assert len(registered) == 2 and not any(Path("/dev/shm", name).exists() for name in registered)
    _wait_until(lambda: not regions(), seconds=30)


def test_a_full_queue_is_tried_again(server: Server) -> None:
    """503 is retried with growing pauses until the time-out; what is refused is not."""
    client = DinoClient(server.http, model="floats", timeout_s=2.0)
    real, asked = client._transport, []

    class Busy:
        def infer(self, *args: Any, **kwargs: Any) -> Any:
            asked.append(time.monotonic())
            if len(asked) < 4:
                raise ServerBusy("Exceeds maximum queue size.")
            return real.infer(*args, **kwargs)

    client._transport = Busy()  # type: ignore[assignment]
    x = {"pixels": np.zeros((1, 3, 14, 14), np.float32)}
    assert client(x)["class_token"].shape == (1, 96)
    pauses = np.diff(asked)
    assert len(asked) == 4 and pauses[0] < 0.2 and pauses[-1] > 0.09
    started = time.monotonic()
    client._transport = type("Never", (), {"infer": staticmethod(_always_busy)})()
    with pytest.raises(ServerBusy):
        client(x)
    assert time.monotonic() - started < 4


def _always_busy(*_: Any, **__: Any) -> Any:
    raise ServerBusy("Exceeds maximum queue size.")


def test_nobody_there() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        for scheme in ("http", "grpc"):
            with pytest.raises(ServerError) as error:
                DinoClient(f"{scheme}://127.0.0.1:{port}", timeout_s=0.3)
            assert error.value.exit_code == 4
    for seconds in (0, -1, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="is not a valid timeout"):
            DinoClient("http://127.0.0.1:9", timeout_s=seconds)


# ---- check ----


def _check(*args: str) -> Any:
    return CliRunner().invoke(cli.app, ["check", *args])


def test_check_is_green(server: Server, bundles: dict[str, Path]) -> None:
    shown = _check(server.http, str(bundles["bytes"]), "--model", "bytes")
    assert shown.exit_code == 0 and "PASSED: bytes 1 at http" in shown.stdout and "latency ms" in shown.stdout
    told = json.loads(_check(server.grpc, str(server.repository), "--model", "floats", "--json").stdout)
    assert told["report"]["passed"] and set(told["latency_ms"]) == {"batch", "cropped"}
    quick = json.loads(_check(server.http, str(server.repository), "--model", "bytes", "--quick", "--json").stdout)
    assert set(quick["latency_ms"]) == {"smallest"} and quick["latency_ms"]["smallest"] > 0


def test_check_says_what_is_wrong(server: Server, bundles: dict[str, Path], tmp_path: Path) -> None:
    assert _check(server.http, str(bundles["bytes"])).exit_code == 2  # which of the two?
    other = _check(server.http, str(bundles["bytes"]), "--model", "floats")
    assert other.exit_code == 2 and "the server has a tiny_swiglu" in other.stderr
    assert _check(server.http, str(tmp_path), "--model", "floats").exit_code == 2
    nobody = _check("http://127.0.0.1:9", str(bundles["bytes"]), "--timeout-s", "0.3", "--json")
    assert nobody.exit_code == 4 and "cannot be reached" in json.loads(nobody.stdout)["error"]


def test_check_sees_other_weights(server: Server, tmp_path: Path) -> None:
    """The same architecture from another checkpoint answers, but not what this bundle's PyTorch answered."""
    out = tmp_path / "other"
    pipeline.build(pipeline.build_request(str(DATA / "tiny_swiglu.toml"), weights="synthetic:1", out=out))
    shown = _check(server.http, str(out), "--model", "floats", "--json")
    assert shown.exit_code == 1 and not json.loads(shown.stdout)["report"]["passed"]


# ---- faults, last: each leaves the server as it found it ----


def _run_until(done: threading.Event, ask: Any) -> list[BaseException | None]:
    """Asks again and again from four threads until `done`; what each request ended in, None for an answer."""

    def one() -> list[BaseException | None]:
        ends: list[BaseException | None] = []
        while not done.is_set():
            try:
                ask()
                ends.append(None)
            except Exception as error:
                ends.append(error)
        return ends

    with ThreadPoolExecutor(4) as pool:
        return [end for future in [pool.submit(one) for _ in range(4)] for end in future.result()]


def _under_load(server: Server, model: str, fault: Any, *, ask_s: float = 0.3) -> list[BaseException | None]:
    """What requests end in while `fault` happens between two stretches of `ask_s` seconds of load."""
    client = DinoClient(server.grpc, model=model, timeout_s=120)  # a busy machine starts a server in a minute
    x = {"pixels": np.zeros((1, 3, 28, 28), np.float32)}
    done, ends = threading.Event(), []
    loader = threading.Thread(target=lambda: ends.extend(_run_until(done, lambda: client(x))))
    loader.start()
    try:
        time.sleep(ask_s)
        fault()
        time.sleep(ask_s)
    finally:
        done.set()
        loader.join()
    return ends


def test_nothing_is_lost_on_a_new_version_and_on_rollback(server: Server, bundles: dict[str, Path]) -> None:
    client = DinoClient(server.grpc, model="floats")

    def new_version() -> None:
        deployed = model_repository.deploy(bundles["floats"], server.repository, name="floats", backend="python")
        for model in deployed.models:
            assert server.load(model)[0] == 200
        assert _versions(server, "floats") == ["2"]

    def back() -> None:
        for model in model_repository.rollback(server.repository, "floats").models:
            assert server.load(model)[0] == 200
        assert _versions(server, "floats") == ["1"]

    for change in (new_version, back):
        ends = _under_load(server, "floats", change)
        assert len(ends) > 20 and set(ends) == {None}, [end for end in ends if end][:3]
    assert client({"pixels": np.zeros((1, 3, 28, 28), np.float32)})["class_token"].shape == (1, 96)
    assert _check(server.http, str(bundles["floats"]), "--model", "floats").exit_code == 0


def _wait_until(holds: Callable[[], object], *, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _versions(server: Server, model: str) -> list[str]:
    index = server.ask("POST", "/v2/repository/index")[1]
    return [entry["version"] for entry in index if entry["name"] == model and entry.get("state") == "READY"]


def test_a_broken_new_version_leaves_the_old_one_serving(server: Server, bundles: dict[str, Path]) -> None:
    """Broken after it was deployed, as a bad disk would: the load fails, the version before it goes on."""
    deployed = model_repository.deploy(bundles["floats"], server.repository, name="floats", backend="python")
    place = server.repository / "floats" / str(deployed.version)
    (place / "model.onnx" / "model.onnx").unlink()
    (place / "model.onnx" / "model.onnx").write_bytes(b"no graph")

    def load() -> None:
        status, told = server.load("floats")
        assert status == 400 and "ONNX Runtime refuses model.onnx" in told["error"], told

    try:
        assert set(_under_load(server, "floats", load)) == {None}
        assert _versions(server, "floats") == [str(deployed.previous)]
    finally:
        back = model_repository.rollback(server.repository, "floats")
    for model in back.models:  # all of them: an ensemble that is not loaded again holds the version it was loaded with
        assert server.load(model)[0] == 200
    assert _check(server.http, str(bundles["floats"]), "--model", "floats").exit_code == 0


def test_a_killed_model_process_turns_check_red_and_a_reload_heals_it(server: Server, bundles: dict[str, Path]) -> None:
    probe = (server.http, str(server.repository), "--model", "floats", "--quick", "--timeout-s", "5")
    assert _check(*probe).exit_code == 0

    def kill() -> None:
        for process in server.stubs("floats"):
            os.kill(process, signal.SIGKILL)

    ends = _under_load(server, "floats", kill)
    failed = [end for end in ends if end is not None]
    assert None in ends and failed
    assert all(isinstance(end, ServerError) for end in failed), failed[:3]  # an error each, never a wrong answer
    assert server.ask("GET", "/v2/models/floats/ready")[0] == 200, "Triton's own word on it is what it always was"
    red = _check(*probe)
    assert red.exit_code == 1 and "does not give PyTorch's outputs" in red.stderr
    assert server.unload("floats")[0] == 200
    _wait_until(lambda: not _versions(server, "floats"))
    assert server.load("floats")[0] == 200
    assert _check(*probe).exit_code == 0
    assert _infer(server, "bytes", _pixels([1, 14, 14, 3]))[0] == 200  # the other model never noticed
    # The ensembles were unloaded with the graph they need; they come back the same way.
    for model in ("floats_images_prepare", "floats_images"):
        assert server.load(model)[0] == 200
    DinoClient(server.http, model="floats").encoded(photographs("rocket.jpg"))


def test_clients_that_leave_in_the_middle(server: Server) -> None:
    """Half a request, and a whole one nobody waits for: the server answers the next as ever."""
    header = json.dumps({"inputs": _pixels([1, 14, 14, 3])}).encode()
    for sent in (len(header) // 2, len(header)):
        for _ in range(8):
            with socket.create_connection(("127.0.0.1", server.http_port)) as connection:
                connection.sendall(
                    b"POST /v2/models/bytes/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(header)
                )
                connection.sendall(header[:sent])
    _still_serves(server)
    stub = server.stubs("bytes")
    assert len(stub) == 1


def test_the_server_killed_and_started_again(server: Server, bundles: dict[str, Path]) -> None:
    """Requests wait for it: a client that may wait long enough loses none."""

    def restart() -> None:
        server.kill()
        assert _check(server.http, str(bundles["floats"]), "--model", "floats", "--timeout-s", "0.3").exit_code == 4
        server.start()

    ends = _under_load(server, "floats", restart)
    failed = [end for end in ends if end is not None]
    assert not failed, failed[:3]
    assert _check(server.http, str(bundles["floats"]), "--model", "floats", "--quick").exit_code == 0


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
            told = json.loads(_check(url, str(what), "--model", "toy", "--json").stdout)
            assert told["report"]["passed"] and told["latency_ms"]
    finally:
        for model in deployed.models:
            server.unload(model)
            shutil.rmtree(server.repository / model)


# ---- configurations no CPU server can load ----


@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt"])
def test_other_backends_pass_the_servers_own_checks(
    server: Server, bundles: dict[str, Path], backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real server reads the configuration and the version's files, and stops at the backend it does not have."""
    folder = tmp_path / "bundle"
    shutil.copytree(bundles["bytes"], folder)
    if backend == "tensorrt":
        with_plans(monkeypatch, folder, *map(_plan, ("8.0", "9.0")))
    deployed = model_repository.deploy(folder, server.repository, name=f"for_{backend}")
    try:
        assert deployed.backend == ("tensorrt_plan" if backend == "tensorrt" else "onnxruntime")
        status, told = server.load(deployed.name)
        assert status == 400 and f"unable to find backend library for backend '{backend}'" in told["error"], told
    finally:
        for model in deployed.models:
            shutil.rmtree(server.repository / model)


def _plan(compute_capability: str) -> Any:
    """A manifest's facts of a classic plan with two profiles; no machine of ours can build one."""
    smallest, largest = (1, 14, 14, 3), (8, 14, 14, 3)
    profiles = {f"tuned for {opt}": {"images": (smallest, (opt, 14, 14, 3), largest)} for opt in (1, 8)}
    return SimpleNamespace(
        file=f"model.sm{compute_capability.replace('.', '')}.plan",
        graph="model",
        runtime=Runtime.TENSORRT,
        version_compatible=False,
        stripped=False,
        runtime_version="11.2.1",
        compute_capabilities=(compute_capability,),
        profiles=profiles,
    )


def test_dashboard_and_alerts_ask_for_metrics_there_are(server: Server) -> None:
    _infer(server, "bytes", _pixels([1, 14, 14, 3]))
    there = set(re.findall(r"^# TYPE (\w+)", server.metrics(), re.MULTILINE))
    assert metrics_asked_for() - GPU_METRICS <= there
    assert "nv_inference_pending_request_count" in there  # what the autoscaler goes by
    reasons = set(re.findall(r'nv_inference_request_failure{[^}]*reason="(\w+)"', server.metrics()))
    assert {"BACKEND", "OTHER", "REJECTED"} <= reasons
