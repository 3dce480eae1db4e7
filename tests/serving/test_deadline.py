"""What an answer in pieces may take: counted, and timed by a clock that stands still."""

from __future__ import annotations

from typing import Any

import pytest

from dinoexport.serving import deadline
from dinoexport.serving.answers import Malformed
from dinoexport.serving.deadline import Deadline, EventLines, StreamBounds

# Around all tokens, and for each of them, as the module says.
AROUND, TOKEN = 1 << 20, 4096


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(deadline.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("values", "timeout_s", "whole_s"),
    [
        ({"max_tokens": 2}, 1.0, 1.0 + 2 * 1.0),
        ({"max_tokens": 2}, 60.0, 60.0 + 2 * 5.0),
        ({}, 60.0, 60.0 + 256 * 5.0),
        ({"max_tokens": None}, 0.5, 0.5 + 256 * 0.5),
        ({"max_tokens": 1 << 40}, 1.0, 1.0 + (1 << 20) * 1.0),
    ],
)
def test_the_time_in_all(values: dict[str, Any], timeout_s: float, whole_s: float, clock: list[float]) -> None:
    """The time of one event for the first, and at most five seconds for each token; no wait is zero."""
    bounds = StreamBounds(values, timeout_s)
    assert bounds.next_s == timeout_s
    clock[0] += whole_s - timeout_s
    assert bounds.next_s == pytest.approx(timeout_s)
    clock[0] += timeout_s / 2
    assert bounds.next_s == pytest.approx(timeout_s / 2)
    for _ in range(2):
        clock[0] += timeout_s
        assert bounds.next_s == 1e-3


def test_events_are_counted() -> None:
    """One for each token, one for the end, and one of the protocol's own; bytes are no events."""
    bounds = StreamBounds({"max_tokens": 3}, 1.0)
    for _ in range(5):
        bounds.count(events=1)
        bounds.count(size_bytes=10)
    with pytest.raises(Malformed, match="more events than an answer of 3 tokens"):
        bounds.count(events=1)


def test_bytes_are_counted() -> None:
    bounds = StreamBounds({"max_tokens": 3}, 1.0)
    bounds.count(size_bytes=AROUND)
    bounds.count(size_bytes=3 * TOKEN)
    bounds.count(events=5)
    with pytest.raises(Malformed, match="more bytes than an answer of 3 tokens"):
        bounds.count(size_bytes=1)


def test_lines_of_events() -> None:
    """Whole lines alone, without what is no event, however they are cut."""
    lines = EventLines(StreamBounds({"max_tokens": 1}, 1.0))
    assert lines.next() is None
    lines.add(b": a comment\ndata: {")
    assert lines.next() is None
    lines.add(b"}\n\nevent: x\ndata:2\ndata: 3\n")
    assert [lines.next(), lines.next()] == [b"data: {}", b"data:2"]
    assert [lines.next(), lines.next()] == [b"data: 3", None]
    lines.add(b"data: 4\n")
    with pytest.raises(Malformed, match="more events"):
        lines.next()


def test_every_piece_counts() -> None:
    lines = EventLines(StreamBounds({"max_tokens": 1}, 1.0))
    lines.add(b":" * (AROUND + TOKEN))
    with pytest.raises(Malformed, match="more bytes"):
        lines.add(b":")


def test_a_deadline_shuts_what_is_open_and_what_is_opened_later() -> None:
    shut: list[str] = []

    def refuses() -> None:
        shut.append("refuses")
        raise OSError

    never = Deadline(60.0, lambda: shut.append("first"))
    with never:
        never.also(lambda: shut.append("second"))
    assert not shut and not never.expired
    late = Deadline(60.0, refuses, lambda: shut.append("first"))
    late._shut()
    assert late.expired and shut == ["refuses", "first"]
    shut.clear()
    late.also(lambda: shut.append("second"))
    assert shut == ["refuses", "first", "second"]
