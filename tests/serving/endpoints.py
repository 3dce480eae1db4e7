"""An HTTP endpoint that answers as a test says, rightly or not, byte by byte."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st

from dinoexport.bundle import GraphFacts
from dinoexport.serving.triton.signature import PARAMETER, Served
from dinoexport.spec import Dim, Graph, Precision, Tensor

GRAPH = Graph(
    name="model",
    inputs=(Tensor(name="x", dtype="float32", shape=("batch", 3, "width"), meaning=""),),
    outputs=(
        Tensor(name="y", dtype="float32", shape=("batch", 4), meaning=""),
        Tensor(name="z", dtype="float32", shape=("batch", "patches", 2), meaning=""),
    ),
    dims=(Dim(name="batch", min=1, opt=1, max=2), Dim(name="width", min=1, opt=4, max=8)),
)

SERVED = Served(
    name="tiny", version=1, role="graph", variant="tiny", family="dinov2", precision=Precision.FP32, recipe={},
    graph=GraphFacts.of(GRAPH, "model.onnx"),
)  # fmt: skip

CONFIG = {"name": "tiny", "parameters": {PARAMETER: {"string_value": SERVED.model_dump_json()}}}

INPUT = {"x": np.zeros((1, 3, 4), np.float32)}

RIGHT = {
    "outputs": [
        {"name": "y", "datatype": "FP32", "shape": [1, 4], "parameters": {"binary_data_size": 16}},
        {"name": "z", "datatype": "FP32", "shape": [1, 3, 2], "parameters": {"binary_data_size": 24}},
    ]
}


def response(body: bytes, *, status: str = "200 OK", headers: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body


NOT_FOUND = response(b"{}", status="404 Not Found")


def inferred(header: Any = RIGHT, data: bytes = bytes(40), length: object = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return response(
        raw + data, headers=f"Inference-Header-Content-Length: {len(raw) if length is None else length}\r\n"
    )


class Endpoint:
    """Answers each request with what `answers` has for its path; a function of the connection does as it likes."""

    def __init__(self) -> None:
        self.answers: dict[str, bytes | Callable[[socket.socket], None]] = {}
        self.requests: list[bytes] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()
        self.reset()

    def reset(self) -> None:
        self.requests.clear()
        self.answers = {
            "/v2/repository/index": response(b'[{"name": "tiny"}]'),
            "/v2/models/tiny/config": response(json.dumps(CONFIG).encode()),
            "/v2/models/tiny/infer": inferred(),
        }

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        with connection:
            try:
                while request := self._read(connection):
                    self.requests.append(request)
                    answer = self.answers.get(request.split(b" ", 2)[1].decode(errors="replace"), NOT_FOUND)
                    if callable(answer):
                        answer(connection)
                        return
                    connection.sendall(answer)
            except OSError:
                return

    def _read(self, connection: socket.socket) -> bytes:
        raw = b""
        while b"\r\n\r\n" not in raw:
            piece = connection.recv(1 << 16)
            if not piece:
                return b""
            raw += piece
        head, _, body = raw.partition(b"\r\n\r\n")
        length = next(
            (int(v) for k, _, v in (x.partition(b": ") for x in head.split(b"\r\n")) if k.lower() == b"content-length"),
            0,
        )
        while len(body) < length:
            body += connection.recv(1 << 16)
        return head + b"\r\n\r\n" + body

    def close(self) -> None:
        self._socket.close()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def drip(prefix: bytes, piece: bytes) -> Callable[[socket.socket], None]:
    def answer(connection: socket.socket) -> None:
        connection.sendall(prefix)
        while True:
            time.sleep(0.05)
            connection.sendall(piece)

    return answer
