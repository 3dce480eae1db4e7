"""Progress, errors and lost output as a person sees them, on a terminal and beside one."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dinoexport.cli import inspect, streams, terminal
from dinoexport.cli.streams import OutputLost
from dinoexport.errors import DinoexportError, UsageError


@pytest.mark.parametrize("count", [1, 19, 20, 5000])
def test_a_long_message_is_cut_for_people_and_whole_for_programs(count: int, capsys: Any) -> None:
    message = "\n".join(f"line {i}" for i in range(count))
    with pytest.raises(SystemExit) as ended:
        terminal.fail(UsageError(message, next_step="Do it."), True, more=1)
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert json.loads(said.out) == {"error": message, "next_step": "Do it.", "exit_code": 2, "more": 1}
    lines = said.err.splitlines()
    assert lines[0] == "error: line 0" and lines[-1] == "  next: Do it." and len(lines) == min(count, 19) + 1
    if count > 19:
        assert lines[17].endswith("line 17") and f"and {count - 18} more; --json lists them all" in lines[18]


def test_an_error_without_a_next_step(capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended, terminal.reporting(False):
        raise DinoexportError("It is so.")
    said = capsys.readouterr()
    assert (ended.value.code, said.out, said.err) == (5, "", "error: It is so.\n")


@pytest.mark.parametrize("left", [True, False])
def test_output_that_is_lost(left: bool, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A reader that left gets no line; for a full disk, what was done is said."""
    from dinoexport.system import changes

    monkeypatch.setattr(changes, "_done", ["tiny is served."])
    lost = OutputLost(OSError(errno.EPIPE if left else errno.ENOSPC, "why"))
    with pytest.raises(OutputLost), terminal.reporting(True):
        raise lost
    with pytest.raises(SystemExit) as ended:
        terminal.output_lost(lost)
    said = capsys.readouterr()
    assert ended.value.code == 4 and not said.out
    first = "error: The output cannot be written: why. This was done: tiny is served."
    assert said.err == ("" if left else f"{first}\n  next: Write it to another place.\n")
    monkeypatch.setattr(changes, "_done", [])
    with pytest.raises(SystemExit):
        terminal.output_lost(lost)
    assert "This was done" not in capsys.readouterr().err


def test_progress_beside_a_terminal_is_one_line_for_each_work(capsys: Any) -> None:
    with terminal.progress_lines() as progress:
        for done in range(3):
            progress("reading\x1b[2J", done, 3)
        progress("writing", 0, 0)
    assert capsys.readouterr().err == "reading\\x1b[2J ...\nwriting ...\n"


def test_progress_on_a_terminal_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []

    class Bars:
        def __init__(self, *_columns: Any, console: Any, disable: bool) -> None:
            drawn.append(("disable", disable, console.stderr))

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def add_task(self, words: str, *, total: int | None) -> int:
            drawn.append(("add", words, total))
            return len(drawn)

        def update(self, task: int, *, completed: int, total: int | None) -> None:
            drawn.append((task, completed, total))

    monkeypatch.setattr("rich.progress.Progress", Bars)
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    with terminal.progress_lines() as progress:
        progress("reading", 0, 0)
        progress("reading", 2, 5)
    assert drawn == [("disable", False, True), ("add", "reading", None), (2, 0, None), (2, 2, 5)]


@pytest.mark.parametrize("on_terminal", [True, False])
def test_a_line_of_state(on_terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: on_terminal)
    with terminal.state_line() as (line, drawn):
        assert drawn is on_terminal
        line("one")
        line("two\n")
    begin, end = ("\r\x1b[K", "") if on_terminal else ("", "\n")
    last = "\n" if on_terminal else ""
    assert capsys.readouterr().err == f"{begin}one{end}{begin}two\\n{end}{last}"
    with terminal.state_line():
        pass
    assert capsys.readouterr().err == "", "nothing was said"


@pytest.mark.parametrize(("word", "words"), [("gpu", ""), ("gpus", "Did you mean 'gpu'?"), ("", "Use cpu, gpu.")])
def test_words_of_an_option(word: str, words: str) -> None:
    if not words:
        assert terminal.choice("device", word, ("cpu", "gpu")) == word
        return
    with pytest.raises(UsageError) as refused:
        terminal.choice("device", word, ("cpu", "gpu"))
    assert words in refused.value.message + refused.value.next_step


def test_no_runtime_and_no_key_are_none() -> None:
    assert terminal.runtime_of(None) is None and terminal.signer_of(None) is None
    assert terminal.runtime_of("openvino") == "openvino"


def validated(**changes: Any) -> Any:
    found = SimpleNamespace(measures=("k-NN",), table=[{"measure": "k-NN", "agreement": "99 %"}], lines=["a line"])
    return SimpleNamespace(
        aggregate=SimpleNamespace(agreement=changes.get("agreement", found), said=["said"]), skipped=["x.png: broken"]
    )  # fmt: skip


@pytest.mark.parametrize("page", [None, Path("/page.html")])
def test_results_over_all_files_of_a_user(page: Path | None, capsys: Any) -> None:
    inspect._show_together(validated(), page, to_stderr=False)
    shown = capsys.readouterr().out
    assert "Decisions, candidate" in shown and "99 %" in shown
    lines = shown.splitlines()[-(4 if page else 3) :]
    assert lines == ["said", "a line", "skipped: x.png: broken", *(["Page: /page.html"] if page else [])]


@pytest.mark.parametrize("agreement", [None, SimpleNamespace(measures=(), table=[], lines=["too few"])])
def test_results_without_decisions(agreement: Any, capsys: Any) -> None:
    inspect._show_together(validated(agreement=agreement), None, to_stderr=True)
    shown = capsys.readouterr()
    more = ["too few"] if agreement is not None else []
    assert shown.out == "" and shown.err.splitlines() == ["said", *more, "skipped: x.png: broken"]


def test_a_closed_descriptor_is_opened_before_a_file_takes_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    asked: list[int] = []

    def fstat(number: int) -> None:
        asked.append(number)
        if number == 1:
            raise OSError(errno.EBADF, "closed")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", fstat)
        patch.setattr(os, "open", lambda *what: opened.append(what))
        streams.three_descriptors()
    assert asked == [0, 1, 2] and opened == [(os.devnull, os.O_RDWR)]
