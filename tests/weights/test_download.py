"""Downloads against a real HTTP server on this machine, which breaks, lies and redirects on demand."""

from __future__ import annotations

import hashlib
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dinoexport.config.recipe import WeightFile
from dinoexport.errors import MissingRequirement, WeightsError
from dinoexport.spec import silent
from dinoexport.system import cache, locks
from dinoexport.weights import download

# Two and a half of the downloader's reads: a break can fall inside, a resume can start inside.
CONTENT = np.random.RandomState(0).bytes(5 << 19)
BREAK = 1_234_567

Answer = Callable[[BaseHTTPRequestHandler], None]


def ranged(handler: BaseHTTPRequestHandler) -> None:
    """A good server: 206 for a range, 200 otherwise."""
    asked = handler.headers.get("Range")
    start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
    if start >= len(CONTENT):
        handler.send_error(416)
        return
    handler.send_response(206 if asked else 200)
    if asked:
        handler.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
    handler.send_header("Content-Length", str(len(CONTENT) - start))
    handler.end_headers()
    handler.wfile.write(CONTENT[start:])


def whole(handler: BaseHTTPRequestHandler) -> None:
    """A server that knows no ranges."""
    sends(CONTENT)(handler)


def sends(content: bytes, *, announced: int | None = None) -> Answer:
    """200 with `content`; with `announced` larger than it, the connection breaks before the end."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content) if announced is None else announced))
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def chunked_break(handler: BaseHTTPRequestHandler) -> None:
    """No length announced, and the connection breaks within a chunk."""
    handler.protocol_version = "HTTP/1.1"
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b"%x\r\n" % len(CONTENT) + CONTENT[:BREAK])
    handler.close_connection = True


def status(code: int, **headers: str) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


BROKEN = sends(CONTENT[:BREAK], announced=len(CONTENT))


@dataclass
class Site:
    """The server: `answers` are used up first, then `ranged` answers everything."""

    address: str = ""
    answers: list[Answer] = field(default_factory=list)
    ranges: list[str | None] = field(default_factory=list)

    def file(self, path: str = "/dinov2/weights.pth", content: bytes = CONTENT) -> WeightFile:
        return WeightFile(url=self.address + path, sha256=hashlib.sha256(content).hexdigest())


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    served = Site()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.ranges.append(self.headers.get("Range"))
            (served.answers.pop(0) if served.answers else ranged)(self)

        def log_message(self, *_: object) -> None:
            """Silent."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        served.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield served
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between attempts, noted and not waited for."""
    noted: list[float] = []
    monkeypatch.setattr(download, "time", SimpleNamespace(sleep=noted.append, monotonic=time.monotonic))
    return noted


def left_behind(path: Path) -> set[str]:
    """What lies beside the cached file, the lock apart."""
    return {other.name for other in path.parent.iterdir()} - {".lock"}


def test_a_file_is_downloaded_once(site: Site) -> None:
    file = site.file()
    reports: list[tuple[str, int, int]] = []
    there: list[bool] = []

    def progress(doing: str, done: int, total: int) -> None:
        reports.append((doing, done, total))
        there.append(download.cached_path(file).exists())

    path = download.fetch(file, progress=progress)
    assert not any(there), "the final name appears by rename, when nothing is left to do"
    assert path.read_bytes() == CONTENT
    assert path == download.cached_path(file)
    assert path.name == "weights.pth"
    assert left_behind(path) == {"weights.pth"}

    received = [done for doing, done, _ in reports if doing == "downloading weights.pth"]
    assert received == sorted(received)
    assert received[-1] == len(CONTENT)
    assert {total for doing, _, total in reports if "downloading" in doing} == {len(CONTENT)}

    assert download.fetch(file, progress=silent) == path
    assert site.ranges == [None], "the second fetch needs no network"


@pytest.mark.parametrize("broken", [BROKEN, chunked_break], ids=["length known", "chunked"])
def test_a_break_is_resumed_where_it_stopped(site: Site, waits: list[float], broken: Answer) -> None:
    site.answers = [broken]
    path = download.fetch(site.file(), progress=silent)
    assert path.read_bytes() == CONTENT
    first, second = site.ranges
    assert first is None
    assert second is not None
    # Of a chunk that breaks, Python hands over only the reads that were complete.
    assert 0 < int(second.removeprefix("bytes=").removesuffix("-")) <= BREAK
    if broken is BROKEN:
        assert second == f"bytes={BREAK}-"
    assert len(waits) == 1


def test_a_reset_connection_is_a_break(site: Site) -> None:
    def reset(handler: BaseHTTPRequestHandler) -> None:
        BROKEN(handler)
        handler.wfile.flush()
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(handler.connection.detach())

    site.answers = [reset]
    assert download.fetch(site.file(), progress=silent).read_bytes() == CONTENT
    assert len(site.ranges) == 2


def test_a_later_run_resumes_too(site: Site) -> None:
    site.answers = [BROKEN, *[status(503)] * 3]
    with pytest.raises(WeightsError) as caught:
        download.fetch(site.file(), progress=silent)
    assert f"{BREAK} bytes are kept" in caught.value.next_step
    path = download.cached_path(site.file())
    assert not path.exists()

    site.ranges.clear()
    assert download.fetch(site.file(), progress=silent).read_bytes() == CONTENT
    assert site.ranges == [f"bytes={BREAK}-"]
    assert left_behind(path) == {"weights.pth"}


def test_an_interrupt_keeps_what_has_come(site: Site) -> None:
    def interrupt(_doing: str, _done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download.fetch(site.file(), progress=interrupt)
    path = download.cached_path(site.file())
    assert left_behind(path) == {"weights.pth.part"}
    kept = path.with_name("weights.pth.part").stat().st_size
    assert kept > 0
    download.fetch(site.file(), progress=silent)
    assert site.ranges == [None, f"bytes={kept}-"]


def test_a_server_without_ranges_starts_again(site: Site) -> None:
    site.answers = [BROKEN, whole]
    path = download.fetch(site.file(), progress=silent)
    assert path.read_bytes() == CONTENT
    assert site.ranges == [None, f"bytes={BREAK}-"]


def test_a_complete_part_is_only_checked(site: Site) -> None:
    """The run before was killed between the last byte and the rename: the server answers 416."""
    path = download.cached_path(site.file())
    path.parent.mkdir(parents=True)
    path.with_name("weights.pth.part").write_bytes(CONTENT)
    assert download.fetch(site.file(), progress=silent).read_bytes() == CONTENT
    assert site.ranges == [f"bytes={len(CONTENT)}-"]


@pytest.mark.parametrize("length", [100, len(CONTENT), len(CONTENT) + 5])
def test_a_damaged_part_is_thrown_away(site: Site, length: int) -> None:
    path = download.cached_path(site.file())
    path.parent.mkdir(parents=True)
    path.with_name("weights.pth.part").write_bytes(bytes(length))
    assert download.fetch(site.file(), progress=silent).read_bytes() == CONTENT
    assert site.ranges == [f"bytes={length}-", None]


def test_a_wrong_hash_is_refused_and_leaves_nothing(site: Site) -> None:
    file = site.file(content=b"what was published")
    with pytest.raises(WeightsError, match="SHA-256") as caught:
        download.fetch(file, progress=silent)
    assert caught.value.exit_code == 3
    assert file.url in caught.value.message
    assert file.sha256 in caught.value.message
    assert "--weights PATH" in caught.value.next_step
    assert left_behind(download.cached_path(file)) == set()


def test_a_damaged_cache_file_is_fetched_again(site: Site) -> None:
    path = download.fetch(site.file(), progress=silent)
    path.write_bytes(CONTENT[:-1] + b"\0")
    assert download.fetch(site.file(), progress=silent).read_bytes() == CONTENT
    assert site.ranges == [None, None]


def test_offline_says_what_is_missing_and_where_it_may_lie() -> None:
    with socket.socket() as reserved:  # bound, not listening: every connection is refused
        reserved.bind(("127.0.0.1", 0))
        file = WeightFile(url=f"http://127.0.0.1:{reserved.getsockname()[1]}/vit.pth", sha256="0" * 64)
        with pytest.raises(WeightsError, match="refused") as caught:
            download.fetch(file, progress=silent)
    assert caught.value.exit_code == 3
    assert file.url in caught.value.message
    assert str(download.cached_path(file)) in caught.value.next_step
    assert "--weights PATH" in caught.value.next_step
    assert "\n" not in caught.value.message + caught.value.next_step


def test_offline_needs_no_network_for_a_file_put_in_place() -> None:
    file = WeightFile(url="http://127.0.0.1:9/vit.pth", sha256=hashlib.sha256(CONTENT).hexdigest())
    path = download.cached_path(file)
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    assert download.fetch(file, progress=silent) == path


def test_server_errors_are_tried_again(site: Site, waits: list[float]) -> None:
    site.answers = [status(500), status(502), status(503)]
    assert download.fetch(site.file(), progress=silent).read_bytes() == CONTENT
    assert len(waits) == 3
    assert waits == sorted(set(waits)), "each pause is longer than the one before"


def test_server_errors_are_not_tried_for_ever(site: Site) -> None:
    site.answers = [status(500)] * 99
    with pytest.raises(WeightsError, match="the server answered 500"):
        download.fetch(site.file(), progress=silent)
    assert len(site.ranges) == 4


@pytest.mark.parametrize("code", [403, 404, 416])
def test_a_file_that_is_not_there_is_asked_for_once(site: Site, code: int) -> None:
    site.answers = [status(code)]
    with pytest.raises(WeightsError, match=f"the server answered {code}") as caught:
        download.fetch(site.file(), progress=silent)
    assert site.file().url in caught.value.message
    assert site.ranges == [None]


def test_an_unending_stream_of_breaks_is_given_up(site: Site) -> None:
    site.answers = [sends(b"", announced=len(CONTENT))] * 99
    with pytest.raises(WeightsError, match="the connection ended early"):
        download.fetch(site.file(), progress=silent)


def test_a_redirect_to_another_address_is_followed(site: Site) -> None:
    site.answers = [status(302, Location="/mirror/weights.pth")]
    assert download.fetch(site.file(), progress=silent).read_bytes() == CONTENT


def test_a_redirect_to_a_local_file_is_not_followed(site: Site, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(CONTENT)
    site.answers = [status(302, Location=secret.as_uri())]
    with pytest.raises(WeightsError, match="302"):
        download.fetch(site.file(), progress=silent)
    assert left_behind(download.cached_path(site.file())) == set()


@pytest.mark.parametrize(
    "path",
    [
        "", "/", "/..", "/a/..", "/../../x", "/.", "/.lock", "/...", "/..%2f..%2fx", "/..\\..\\x", "/a?f=../../x",
        "/a#/../x", "/a/" + "n" * 5000, "/nul\0", "/\u202etxt.htp", "/a b;rm",
    ],
)  # fmt: skip
def test_no_address_leads_out_of_the_cache(path: str) -> None:
    file = WeightFile(url=f"http://127.0.0.1{path}", sha256="ab" * 32)
    place = download.cached_path(file)
    assert place.parent == cache.cache_folder() / "weights" / ("ab" * 8)
    assert place.name.isascii()
    assert place.name.isprintable()
    assert 0 < len(place.name) <= 100
    assert not place.name.startswith(".")
    assert not set(place.name) & set("/\\ ;")


@pytest.mark.parametrize("path", ["/..", "/../../x", "/.lock"])
def test_a_hostile_address_is_saved_inside_the_cache(site: Site, tmp_path: Path, path: str) -> None:
    saved = download.fetch(site.file(path), progress=silent)
    assert saved.read_bytes() == CONTENT
    written = [p for p in cache.cache_folder().rglob("*") if p.is_file() and p.name != ".lock"]
    assert written == [saved] and not any(tmp_path.iterdir())


@pytest.mark.parametrize("url", ["http://[bad/x.pth", "http://127.0.0.1:port/x.pth", "http://", "http:///x.pth"])
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(WeightsError, match="could not be downloaded") as caught:
        download.fetch(WeightFile(url=url, sha256="0" * 64), progress=silent)
    assert url in caught.value.message


@pytest.mark.parametrize("length", ["many", "-1", ""])
def test_a_server_that_lies_about_the_length(site: Site, length: str) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", length)
        handler.end_headers()
        handler.wfile.write(CONTENT)

    site.answers = [answer]
    assert download.fetch(site.file(), progress=silent).read_bytes() == CONTENT


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the device that is always full is Linux's")
def test_a_full_disk_is_named_at_once(site: Site, waits: list[float]) -> None:
    path = download.cached_path(site.file())
    path.parent.mkdir(parents=True)
    path.with_name("weights.pth.part").symlink_to("/dev/full")
    with pytest.raises(MissingRequirement, match="No room left") as caught:
        download.fetch(site.file(), progress=silent)
    assert caught.value.exit_code == 4
    assert str(path.parent) in caught.value.message
    assert waits == [], "a full disk is no broken connection: nothing is tried again"


def test_a_cache_that_is_no_folder(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file where the cache should be")
    monkeypatch.setenv("DINOEXPORT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(MissingRequirement, match="cannot be written") as caught:
        download.fetch(site.file(), progress=silent)
    assert caught.value.exit_code == 4
    assert caught.value.next_step


def unending(handler: BaseHTTPRequestHandler) -> None:
    """No length announced, and no end."""
    handler.protocol_version = "HTTP/1.1"
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    with suppress(OSError):
        for _ in range(1 << 10):
            handler.wfile.write(b"%x\r\n" % (1 << 20) + bytes(1 << 20) + b"\r\n")
    handler.close_connection = True


@pytest.mark.parametrize("known", [True, False], ids=["hash known", "hash unknown"])
@pytest.mark.parametrize("answer", [unending, whole, ranged], ids=["unending", "longer", "longer, in parts"])
def test_more_than_the_declared_size_is_never_kept(site: Site, answer: Answer, known: bool) -> None:
    """Of a file of half the size: nothing beyond it is written, and what a range would add to it is not taken."""
    half = site.file(content=CONTENT[: len(CONTENT) // 2]).changed(size_bytes=len(CONTENT) // 2)
    site.answers = [answer] * 4
    get = download.fetch if known else download.fetch_unknown
    largest: list[int] = []
    with pytest.raises(WeightsError, match=rf"more than the {len(CONTENT) // 2} bytes it has"):
        get(half if known else half.changed(sha256=None), progress=lambda _doing, done, _total: largest.append(done))
    folder = download.cached_path(half if known else half.changed(sha256=None)).parent
    assert max(largest) <= len(CONTENT) // 2
    assert sum(path.stat().st_size for path in folder.iterdir()) == 0 and left_behind(folder / "x") <= {
        ".lock", "weights.pth.part",
    }  # fmt: skip


def test_a_trickle_is_given_up(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then: each read ends in time, and the whole never would."""
    monkeypatch.setattr(download, "_SLOW_S", 0.1)

    def trickles(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(CONTENT)))
        handler.end_headers()
        with suppress(OSError):
            for i in range(1000):
                handler.wfile.write(CONTENT[i : i + 1])
                time.sleep(0.01)

    site.answers = [trickles] * 4
    with pytest.raises(WeightsError, match=r"only \d+ bytes came in 0 s"):
        download.fetch(site.file(), progress=silent)
    assert len(site.ranges) == 4


def test_three_downloads_of_one_file_are_one(site: Site) -> None:
    """The others wait, and then find it there."""
    asked, go_on, waiting = threading.Event(), threading.Event(), threading.Event()

    def slowly(handler: BaseHTTPRequestHandler) -> None:
        asked.set()
        go_on.wait(10)
        ranged(handler)

    def told(doing: str, _done: int, _total: int) -> None:
        if doing.startswith("waiting for another process that is downloading"):
            waiting.set()

    site.answers = [slowly]
    found: list[Path] = []
    builds = [threading.Thread(target=lambda: found.append(download.fetch(site.file(), progress=told))) for _ in "abc"]
    for build in builds:
        build.start()
    assert asked.wait(10) and waiting.wait(10)
    go_on.set()
    for build in builds:
        build.join()
    assert found == [download.cached_path(site.file())] * 3 and found[0].read_bytes() == CONTENT
    assert site.ranges == [None]


def test_two_builds_may_use_one_cached_file(site: Site) -> None:
    path = download.fetch(site.file(), progress=silent)
    with locks.exclusive(path.with_name(".lock"), doing="something else"):
        assert download.fetch(site.file(), progress=silent) == path


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINOEXPORT_CACHE", str(tmp_path / "cache"))
    assert cache.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("DINOEXPORT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_folder() == tmp_path / "xdg" / "dinoexport"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache.cache_folder() == Path("~/.cache/dinoexport").expanduser()
