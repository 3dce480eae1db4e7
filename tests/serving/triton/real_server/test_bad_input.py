"""Every bad input is refused in one helpful sentence, and the server still serves."""

from __future__ import annotations

import json
import struct
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from dinoexport.errors import InputRefused
from dinoexport.serving.client import DinoClient
from tests.pictures import png_header
from tests.serving.triton.real_server.server_requests import IMAGES, infer, photographs, pixels, still_serves
from tests.triton_server import Server

pytestmark = pytest.mark.triton


BAD_ARRAYS = {
    "wrong dtype": (pixels([1, 14, 14, 3], "FP32"), "data-type"),
    "wrong rank": (pixels([1, 14, 42]), "shape"),
    "four channels": (pixels([1, 14, 14, 4]), "shape"),
    "empty batch": (pixels([0, 14, 14, 3]), "Expected 588, got 0"),
    "too large a batch": (pixels([9, 14, 14, 3]), "batch-size must be <= 8"),
    "too high": (pixels([1, 532, 14, 3]), "height 532 is outside 14 to 518"),
    "no multiple of 14": (pixels([1, 28, 30, 3]), "nearest legal sizes are 28 and 42"),
    "no pixel": (pixels([1, 0, 14, 3]), "height 0 is outside"),
    "a name it does not have": ([{**pixels([1, 14, 14, 3])[0], "name": "pixels"}], "pixels"),
    "no input": ([], "input"),
}

# What Triton's own HTTP front end cannot parse never reaches a model; its 2.51 calls that a 500.
UNPARSABLE = {
    "fewer numbers than the shape": (pixels([1, 14, 14, 3], data=[1, 2, 3]), "Shape does not match"),
    "malformed JSON": ('{"inputs": [', "failed to parse the request JSON"),
    "not JSON": (b"\xff\xd8\xff garbage", "failed to parse the request JSON"),
}


@pytest.mark.parametrize("what", BAD_ARRAYS)
def test_bad_arrays_are_refused(server: Server, what: str) -> None:
    inputs, words = BAD_ARRAYS[what]
    _is_a_helpful_refusal(infer(server, "bytes", inputs), words)
    still_serves(server)


@pytest.mark.parametrize("what", UNPARSABLE)
def test_what_triton_cannot_parse(server: Server, what: str) -> None:
    inputs, words = UNPARSABLE[what]
    _is_a_helpful_refusal(infer(server, "bytes", inputs), words, statuses=(400, 500))
    still_serves(server)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_is_refused(server: Server, value: float) -> None:
    raw = np.full((1, 3, 14, 14), value, np.float32).tobytes()
    told = {"inputs": [{"name": "pixels", "datatype": "FP32", "shape": [1, 3, 14, 14],
                        "parameters": {"binary_data_size": len(raw)}}]}  # fmt: skip
    header = json.dumps(told).encode()
    answer = infer(server, "floats", header + raw, {"Inference-Header-Content-Length": str(len(header))})
    _is_a_helpful_refusal(answer, "NaN or Inf")
    still_serves(server)


BAD_IMAGES = {
    "garbage": (b"these are not the bytes of an image", "image 1: not a readable image"),
    "nothing": (b"", "image 1: not a readable image"),
    "truncated JPEG": ((IMAGES / "rocket.jpg").read_bytes()[:5000], "truncated"),
    "large image": (png_header(10_000, 10_000), "10000x10000 is more than 64 Mpx"),
    "decompression bomb": (png_header(40_000, 40_000), "decompression bomb"),  # 4.8 GB when decoded
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
    answer = infer(server, f"bytes_{front_end}", body, {"Inference-Header-Content-Length": str(len(header))})
    _is_a_helpful_refusal(answer, words)
    still_serves(server)


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
