"""What `embed` says of its plan and of how far it is."""

from __future__ import annotations

import json
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest

from dinoexport.cli import embed
from dinoexport.embed.run import State


def state(**changes: Any) -> State:
    facts = {
        "rows": 5, "rows_total": 60, "failed": 1, "shards": 2, "shards_total": 8, "rate": 12.34, "left_s": 89.4,
    }  # fmt: skip
    return State(**facts | changes)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "0 s"), (89.4, "89 s"), (89.99, "90 s"), (90, "2 min"), (150, "2 min"), (151, "3 min"), (5369, "89 min"),
        (5400, "1.5 h"), (172_000, "47.8 h"), (172_800, "2.0 days"), (864_000, "10.0 days"),
    ],
)  # fmt: skip
def test_durations(seconds: float, words: str) -> None:
    assert embed.duration(seconds) == words


def test_a_line() -> None:
    assert embed.line_of(state()) == "5 of about 60 rows, 2 of 8 shards, 1 failed, 12.3 rows/s, 89 s left"
    assert embed.line_of(state(left_s=None)).endswith(", unknown left")


@pytest.mark.parametrize(
    ("as_json", "on_terminal", "pause_s"), [(False, False, 10.0), (False, True, 0.2), (True, True, 10.0)]
)
def test_lines_are_not_too_many(
    as_json: bool, on_terminal: bool, pause_s: float, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """And the last is always said."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: on_terminal)
    said = []
    with embed._watching(as_json) as watch:
        for wait_s, shards in ((0.0, 2), (0.75 * pause_s, 3), (0.26 * pause_s, 4), (0.0, 7), (0.0, 8)):
            now[0] += wait_s
            watch(state(shards=shards))
            said.append(bool(capsys.readouterr().err))
    assert said == [True, False, True, False, True]


def test_progress_in_json(capsys: Any) -> None:
    with embed._watching(True) as watch:
        watch(state())
    shown = capsys.readouterr()
    assert not shown.out and json.loads(shown.err) == {
        "rows": 5, "rows_total": 60, "failed": 1, "shards": 2, "shards_total": 8, "rate": 12.34, "left_s": 89.4,
    }  # fmt: skip


def plan(**changes: Any) -> Any:
    settings = SimpleNamespace(**{
        "outputs": ("class_token",), "dtype": "float16", "front_end": "bytes", "preparation": {}, "batch": 4
    } | changes)  # fmt: skip
    return SimpleNamespace(items=30, image_bytes=100, shards=3, settings=settings)


LAYOUT: Any = SimpleNamespace(workers=2, threads=3, decoders=4, why="8 CPUs")
FACTS = {
    "images": 60, "image_bytes": 200, "shards": 6, "columns": ["class_token"], "dtype": "float16",
    "preparation": "bytes", "batch": 4, "workers": 2, "threads_each": 3, "decoding_threads_each": 4,
    "because": "8 CPUs",
}  # fmt: skip


def test_a_plan_and_its_extension(capsys: Any) -> None:
    embed._say_plan([plan(), plan()], LAYOUT, True)
    assert json.loads(capsys.readouterr().err) == {"plan": FACTS}
    embed._say_plan([plan(preparation={"size": 5}), plan()], LAYOUT, False)
    shown = capsys.readouterr()
    assert not shown.out and shown.err.startswith(
        "Plan:   images 60, image bytes 200, shards 6, columns ['class_token']"
    )
    assert "preparation bytes {'size': 5}, batch 4" in shown.err and shown.err.endswith(", because 8 CPUs\n")


@pytest.mark.parametrize("layout", [None, LAYOUT])
def test_facts_of_a_run(layout: Any) -> None:
    found: Any = SimpleNamespace(out="o", rows=1, failed=2, shards=3, done_before=4, complete=False, layout=layout)
    assert embed._facts(found) == {
        "out": "o", "rows": 1, "failed": 2, "shards": 3, "done_before": 4, "complete": False,
        "workers": layout and 2,
    }  # fmt: skip
