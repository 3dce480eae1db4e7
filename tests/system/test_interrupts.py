"""An interrupt that a library drops is not lost."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from dinoexport.system import interrupts


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """The process as `main` leaves it, and after the test as it was."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    hook = sys.unraisablehook
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
    interrupts.leave_at_once()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    sys.unraisablehook = hook


def test_without_work_the_process_ends_with_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one line of visible characters, whatever a file was called."""
    done: list[Any] = []
    monkeypatch.setattr(interrupts, "last_words", lambda: "a\x1f b\x1b[2J ~ü\udc80")
    monkeypatch.setattr(os, "write", lambda *what: done.append(what))
    monkeypatch.setattr(os, "_exit", done.append)
    handler: Any = signal.getsignal(signal.SIGTERM)
    handler(signal.SIGTERM, None)  # not raised: one that came late would end the process of all tests
    assert signal.getsignal(signal.SIGINT) is handler and done == [(2, b"\na? b?[2J ~\xc3\xbc\\udc80\n"), 130]


class Drops:
    """An object whose end cannot pass an exception on, as a compiled library cannot that asks for a text."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __del__(self) -> None:
        raise self.error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_such_a_place_ends_the_block(number: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    class Signalled:
        def __del__(self) -> None:
            signal.raise_signal(number)

    with pytest.raises(KeyboardInterrupt), interrupts.raised():
        Signalled()
    assert capsys.readouterr().err == "", "no traceback"


def test_it_replaces_the_error_that_followed() -> None:
    with pytest.raises(KeyboardInterrupt), interrupts.raised():
        Drops(KeyboardInterrupt())
        raise ValueError("a text that could not be made")


def test_it_is_forgotten_after_the_block() -> None:
    with pytest.raises(KeyboardInterrupt), interrupts.raised():
        Drops(KeyboardInterrupt())
    with interrupts.raised():
        pass


def test_another_error_is_pythons_own_business(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[type[BaseException]] = []
    monkeypatch.setattr(sys, "__unraisablehook__", lambda dropped: told.append(dropped.exc_type))
    before = sys.unraisablehook
    with interrupts.raised():
        Drops(ValueError())
    assert told == [ValueError] and sys.unraisablehook is before
