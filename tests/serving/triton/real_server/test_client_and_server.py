"""Our client with a real server: what it refuses, finds, shares and tries again."""

from __future__ import annotations

import asyncio
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dinoexport.errors import InputRefused, UsageError
from dinoexport.serving.client import DinoClient
from dinoexport.serving.transport import ServerBusy, ServerError
from tests.serving.triton.real_server.server_requests import photographs, wait_until
from tests.triton_server import Server

pytestmark = pytest.mark.triton


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
            wait_until(lambda: len(regions()) == 1, seconds=30)
            registered |= regions()
    assert len(registered) == 2 and not any(Path("/dev/shm", name).exists() for name in registered)
    wait_until(lambda: not regions(), seconds=30)


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
