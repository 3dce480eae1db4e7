"""`embed` from and to a real S3 server in a process of its own; a store that refuses, breaks off, or is not there."""

from __future__ import annotations

import http.server
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from dinoexport.embed import plan as plans
from dinoexport.embed import run, verify
from dinoexport.errors import MissingRequirement
from dinoexport.system import store
from tests.embed.conftest import BROKEN, COUNT
from tests.stores.s3_server import S3Server, missing


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    if reason := missing():
        pytest.skip(reason)
    running = S3Server()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in running.environment.items():
            patch.setenv(name, value)
        yield running
    running.stop()


def test_whole_files_and_one_winner(server: S3Server, tmp_path: Path) -> None:
    place = store.open_place("s3://bucket/files")
    place.write("a/b", b"first", new=True)
    with pytest.raises(FileExistsError):
        place.write("a/b", b"second", new=True)
    assert place.read("a/b") == b"first" and list(place.files("a")) == [("a/b", 5)]
    draft = place.draft("large")
    draft.write_bytes(bytes(12 << 20))  # more than one part of a multipart upload
    place.publish(draft, "large")
    assert dict(place.files())["large"] == 12 << 20 and not draft.exists()
    with pytest.raises(ValueError, match="more than"):
        place.fetch("large", tmp_path / "bounded", max_bytes=(12 << 20) - 1)
    assert (tmp_path / "bounded").stat().st_size == 0
    place.fetch("large", tmp_path / "whole", max_bytes=12 << 20)
    assert (tmp_path / "whole").stat().st_size == 12 << 20
    place.remove("a/b")
    place.remove("a/b")
    with pytest.raises(FileNotFoundError):
        place.read("a/b")
    with pytest.raises(MissingRequirement, match="there is no such bucket"):
        store.open_place("s3://another/x").write("a", b"1")


def test_from_a_bucket_to_a_bucket(server: S3Server, tiny: Path, photos: Path, tmp_path: Path) -> None:
    """The same rows as from the disk to the disk; a second call finds them done."""
    images = store.open_place("s3://bucket/photos")
    for path in photos.rglob("*.jpg"):
        images.write(path.relative_to(photos).as_posix(), path.read_bytes())
    found = run.embed(tiny, "s3://bucket/photos", "s3://bucket/out", shards=3, max_failed=0.2, workers=1)
    assert (found.rows, found.failed, found.complete) == (COUNT, BROKEN, True)
    run.embed(tiny, str(photos), str(tmp_path), shards=3, max_failed=0.2, workers=1)
    out = store.open_place("s3://bucket/out")
    for part in sorted(tmp_path.glob("*.parquet")):
        theirs = pq.read_table(io.BytesIO(out.read(part.name)))
        assert theirs.replace_schema_metadata() == pq.read_table(part).replace_schema_metadata()
    assert json.loads(out.read(plans.SUCCESS))["rows"] == COUNT
    again = run.embed(tiny, "s3://bucket/photos", "s3://bucket/out", max_failed=0.2, workers=1)
    assert again.done_before == 3
    assert verify.verify(tiny, "s3://bucket/photos", "s3://bucket/out", seed=1).passed


def test_no_server_and_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store.remote, "_RETRY_S", 0.3)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "an-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-key")
    with pytest.raises(MissingRequirement, match="cannot be reached") as raised:
        store.open_place("s3://bucket/x").read("a")
    assert "secret" not in raised.value.message and raised.value.next_step
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(MissingRequirement, match="no credentials were found"):
        store.open_place("s3://bucket/x").read("a")


class _Moody(http.server.BaseHTTPRequestHandler):
    """Answers each request with the next of `answers`, and 503 when there is none."""

    answers: list[int] = []  # noqa: RUF012
    asked = 0

    def do_PUT(self) -> None:
        type(self).asked += 1
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status = self.answers.pop(0) if self.answers else 503
        if status == 0:
            self.connection.close()  # breaks off
            return
        self.send_response(status)
        self.send_header("ETag", '"x"')
        body = b"<Error><Message>a-secret-key</Message></Error>" if status >= 400 else b""
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_a_store_that_is_busy_or_breaks_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked again until it answers; when it never does, one sentence that repeats nothing it said."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Moody)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        monkeypatch.setattr(store.remote, "_RETRY_S", 2)
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
            "AWS_ACCESS_KEY_ID": "an-id",
            "AWS_SECRET_ACCESS_KEY": "a-secret-key",
            "AWS_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        _Moody.answers = [503, 503, 200]
        store.open_place("s3://bucket/x").write("a", b"1")
        assert _Moody.asked == 3
        monkeypatch.setattr(store.remote, "_RETRY_S", 0.3)
        with pytest.raises(MissingRequirement, match=r"answers 503|broke off") as raised:
            store.open_place("s3://bucket/x").write("a", b"1")
        assert "secret" not in raised.value.message
        _Moody.answers = [403]
        with pytest.raises(MissingRequirement, match="access denied") as raised:
            store.open_place("s3://bucket/x").write("a", b"1")
        assert "secret" not in raised.value.message
    finally:
        server.shutdown()
        server.server_close()
