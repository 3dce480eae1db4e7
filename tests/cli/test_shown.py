"""What is printed of errors, of JSON, of secrets that are asked for, and of an answer's speed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dinoexport.cli import terminal, text
from dinoexport.errors import UsageError


def of_the_system(error: OSError, capsys: Any) -> str:
    with pytest.raises(SystemExit) as ended, terminal.reporting(False):
        raise error
    assert ended.value.code == 4
    return str(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (FileNotFoundError(2, "No such file or directory", "model.onnx"), "model.onnx: No such file or directory."),
        (OSError(36, "File name too long", "n" * 301), "n" * 300 + ": File name too long."),
        (OSError(28, "No space left on device"), "No space left on device."),
        (OSError("in words only"), "in words only."),
    ],
)
def test_a_refusal_of_the_system_names_the_file_if_there_is_one(error: OSError, shown: str, capsys: Any) -> None:
    assert of_the_system(error, capsys) == f"error: {shown}\n  next: Check the path, its permissions, and the disk.\n"


@pytest.mark.parametrize(("lines", "shown"), [(19, 19), (20, 19), (500, 19)])
def test_as_many_lines_as_a_person_reads(lines: int, shown: int, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        terminal.fail(UsageError("\n".join(f"line {n}" for n in range(lines)), next_step=""), False)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == shown and told[0] == "error: line 0"
    assert told[-1].strip() == ("line 18" if lines == 19 else f"and {lines - 18} more; --json lists them all")


def test_one_object_is_printed_with_an_indent_of_one_and_never_nan(capsys: Any) -> None:
    terminal.say_json({"a": [1], "b": "\x7f"})
    assert capsys.readouterr().out == '{\n "a": [\n  1\n ],\n "b": "\\u007f"\n}\n'
    terminal.say_json_line({"a": [1]})
    assert capsys.readouterr().err == '{"a": [1]}\n'
    for say in (terminal.say_json, terminal.say_json_line):
        with pytest.raises(ValueError, match="not JSON compliant"):
            say({"a": float("nan")})


def test_a_pipe_is_as_wide_as_a_table_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert terminal.columns() == terminal.columns(to_stderr=True) == 140
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "77")
    assert terminal.columns() == 77


def test_a_file_in_brackets_keeps_them_in_a_progress_line(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with terminal.progress_lines() as progress:
        progress("hashing [bold]x[/bold]", 1, 2)
    assert "hashing [bold]x[/bold]" in capsys.readouterr().err


def test_a_passphrase_is_asked_for_unseen_and_not_in_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    from dinoexport.bundle import signing

    asked: list[Any] = []

    def prompt(words: str, **how: Any) -> str:
        asked.append((words, how))
        return "secret"

    monkeypatch.setattr(terminal.typer, "prompt", prompt)
    monkeypatch.setattr(signing, "open_signer", lambda _key, *, ask: ask())
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    assert terminal.signer_of(Path("my.pem")) == "secret"
    assert asked == [("Passphrase of my.pem", {"hide_input": True, "err": True})]
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False))
    with pytest.raises(UsageError, match=r"^my.pem is encrypted, and there is no terminal") as caught:
        terminal.signer_of(Path("my.pem"))
    assert "openssl ec -in my.pem -out PLAIN.pem" in caught.value.next_step
    assert terminal.signer_of(None) is None


@pytest.mark.parametrize(
    ("tokens", "seconds", "speed"),
    [(1, 2.0, ""), (2, 2.0, ", 2.0 tokens/s"), (11, 2.0, ", 20.0 tokens/s"), (11, 4.0, ", 4.0 tokens/s"), (5, 1.5, "")],
)
def test_the_speed_is_that_after_the_first_token(tokens: int, seconds: float, speed: str, capsys: Any) -> None:
    written = SimpleNamespace(
        text="t", reason="length", prompt_tokens=3, ids=(0,) * tokens, first_s=1.5, seconds=seconds
    )
    text._show_end(written, False)
    shown = f"3 tokens read, {tokens} written, the first after 1.50 s{speed}; the limit of tokens\n"
    assert capsys.readouterr() == ("\n", shown)
