"""What becomes of a shard whose worker has died: repeated, searched for the image that killed it, or given up."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dinoexport.embed import local
from dinoexport.embed.local import DEATHS_MAX, ShardTask
from dinoexport.errors import BuildError, UsageError


@pytest.fixture
def died(tmp_path: Path) -> Any:
    """A worker that ended with a code, and the rows that are no longer counted."""

    def die(code: int, said: str = "", **facts: Any) -> tuple[Any, Any, list[tuple[int, int]]]:
        (tmp_path / "log").write_text(said)
        process: Any = SimpleNamespace(wait=lambda: code)
        worker = local._Worker(process=process, pipe=0, log=tmp_path / "log", **facts)
        ticks: list[tuple[int, int]] = []
        return local._buried(worker, lambda *rows: ticks.append(rows)), worker, ticks

    return die


def task(**facts: Any) -> ShardTask:
    plan: Any = None
    return ShardTask(plan=plan, shard=7, rows=10, **facts)


@pytest.mark.parametrize(
    ("code", "facts", "words", "next_step"),
    [
        (-9, {"ready": True}, "", ""),
        (0, {"ready": True}, "", ""),
        (-9, {"lost_before": DEATHS_MAX - 1}, "", ""),
        (-9, {"lost_before": DEATHS_MAX}, "A worker died of SIGKILL before its first shard: last", "If memory ran out"),
        (0, {}, "A worker ended with 0 before its first shard: last", "Report it."),
        (1, {}, "A worker ended with 1 before its first shard: last", "Report it."),
    ],
)
def test_a_worker_without_a_shard(code: int, facts: dict[str, Any], words: str, next_step: str, died: Any) -> None:
    """One that was ready, or was killed, is replaced; killed ones not for ever."""
    if not words:
        left, _, ticks = died(code, "first\nlast\n", **facts)
        assert left is None and ticks == []
    else:
        with pytest.raises(BuildError) as raised:
            died(code, "first\nlast\n", **facts)
        assert raised.value.message == words and raised.value.next_step.startswith(next_step)


def test_the_image_that_was_begun_is_left_out(died: Any) -> None:
    """Its shard is repeated, item by item from the next death on."""
    of = task(deaths=3)
    left, _, ticks = died(-11, ready=True, task=of, begun="a.png", counted=(5, 2))
    assert left is of and of.known_bad == {"a.png": "the decoder died of SIGSEGV on it"} and of.deaths == 2
    assert ticks == [(-5, -2)], "its rows will be counted again"
    left, _, _ = died(1, ready=True, task=of, begun="a.png")
    assert left is of and of.deaths == 3 and len(of.known_bad) == 1, "the same image is no cause twice"
    died(1, ready=True, task=of, begun="b.png")
    assert of.known_bad["b.png"] == "the decoder ended with 1 on it"


def test_a_shard_that_kills_without_an_image_is_given_up(died: Any) -> None:
    of = task()
    for count in range(1, DEATHS_MAX + 1):
        left, _, _ = died(-9, ready=True, task=of)
        assert left is of and of.deaths == count
    with pytest.raises(BuildError, match=r"Shard 7 killed 5 workers, the last one died of SIGKILL: Its log is empty\."):
        died(-9, " \n", ready=True, task=of)


def test_an_error_of_a_worker_is_its_own_kind() -> None:
    facts = {"kind": "UsageError", "message": "m", "next_step": "n"}
    found = local._raised(facts)
    assert type(found) is UsageError and (found.message, found.next_step) == ("m", "n")
    assert type(local._raised(facts | {"kind": "Unheard"})) is BuildError


def test_messages_come_in_any_pieces() -> None:
    worker: Any = SimpleNamespace(heard=b"", ready=False, task=None, begun=None, counted=(0, 0))
    raw = b'{"ready": true}\n{"begins": "a"}\n{"rows": 3, "failed": 1}\n{"rows": 2, "failed": 0}\n{"beg'
    found = [message for at in range(0, len(raw), 5) for message in local._messages(worker, raw[at : at + 5])]
    assert found == [{"ready": True}, {"begins": "a"}, {"rows": 3, "failed": 1}, {"rows": 2, "failed": 0}]
    assert worker.heard == b'{"beg'
    ticks: list[tuple[int, int]] = []
    for message in found[:2]:
        local._hear(worker, message, lambda _done: None, lambda *rows: ticks.append(rows))
    assert worker.ready and worker.begun == "a" and not ticks
    for message in found[2:]:
        local._hear(worker, message, lambda _done: None, lambda *rows: ticks.append(rows))
    assert ticks == [(3, 1), (2, 0)] and worker.counted == (5, 1) and worker.begun is None
    worker.task = task()
    done = {"rows": 5, "failed": 1, "sha256": "0" * 64, "size_bytes": 9}
    finished: list[Any] = []
    local._hear(worker, {"done": done}, finished.append, lambda *_: None)
    assert worker.task is None and finished[0].rows == 5
    with pytest.raises(UsageError, match="m"):
        local._hear(worker, {"error": {"kind": "UsageError", "message": "m", "next_step": ""}}, finished.append, print)
