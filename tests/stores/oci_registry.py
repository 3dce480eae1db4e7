"""A registry in memory for tests: what the OCI distribution specification asks of pushing and pulling one artifact."""

from __future__ import annotations

import hashlib
import http.server
import threading
from contextlib import suppress
from typing import Any

ENDLESS_BYTES = 200 << 20


class Handler(http.server.BaseHTTPRequestHandler):
    """Blobs and manifests by digest, manifests by tag too."""

    protocol_version = "HTTP/1.1"
    store: dict[str, bytes]
    refuses = 0
    endless = ""
    sent_bytes = 0

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_POST(self) -> None:
        self._body()
        self._answer(202, Location=f"{self.path}session")

    def do_PUT(self) -> None:
        body = self._body()
        digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
        if self.refuses:
            self._answer(self.refuses, b"a-secret-token")
            return
        if "/manifests/" in self.path:
            self.store[self.path.rpartition("/")[2]] = body
        self.store[digest] = body
        self._answer(201, Location=f"/{digest}", Docker_Content_Digest=digest)

    def _answer_endlessly(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(ENDLESS_BYTES))
        self.end_headers()
        with suppress(OSError):
            while type(self).sent_bytes < ENDLESS_BYTES:
                self.wfile.write(bytes(1 << 20))
                type(self).sent_bytes += 1 << 20

    def do_GET(self) -> None:
        if self.endless and self.path.endswith(self.endless):
            self._answer_endlessly()
            return
        found = self.store.get(self.path.rpartition("/")[2])
        if self.refuses or found is None:
            self._answer(self.refuses or 404, b"a-secret-token")
        else:
            self._answer(200, found, Content_Type="application/vnd.oci.image.manifest.v1+json")

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        pass


class Registry:
    """A running registry. store: its content, by digest and by tag."""

    def __init__(self) -> None:
        self.store: dict[str, bytes] = {}
        self.handler: Any = type("Own", (Handler,), {"store": self.store})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self.handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.host = f"127.0.0.1:{self._server.server_port}"

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
