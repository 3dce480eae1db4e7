"""What tests ask a real server, what they ask it about itself, and the load they put on it."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from dinoexport.serving.client import DinoClient
from tests.command_line import run
from tests.conftest import DATA
from tests.triton_server import Server

IMAGES = DATA.parent.parent / "validate" / "images"


def photographs(*names: str) -> list[bytes]:
    return [(IMAGES / name).read_bytes() for name in names]


def executions(server: Server, model: str, *, beyond: Counter[int] | None = None, items: int = 0) -> Counter[int]:
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


def infer(server: Server, model: str, inputs: Any, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    body = inputs if isinstance(inputs, bytes | str) else json.dumps({"inputs": inputs})
    return server.ask("POST", f"/v2/models/{model}/infer", body, headers)


def pixels(shape: list[int], datatype: str = "UINT8", data: list[Any] | None = None) -> list[dict[str, Any]]:
    size = int(np.prod(shape))
    return [{"name": "images", "datatype": datatype, "shape": shape, "data": [0] * size if data is None else data}]


def still_serves(server: Server) -> None:
    assert infer(server, "bytes", pixels([1, 14, 14, 3]))[0] == 200


def check(*args: str) -> Any:
    return run("check", *args)


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


def under_load(server: Server, model: str, fault: Any, *, ask_s: float = 0.3) -> list[BaseException | None]:
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


def wait_until(holds: Callable[[], object], *, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def versions(server: Server, model: str) -> list[str]:
    index = server.ask("POST", "/v2/repository/index")[1]
    return [entry["version"] for entry in index if entry["name"] == model and entry.get("state") == "READY"]
