"""Everything that reaches the terminal goes through one place, and nothing that came from outside steers it."""

from __future__ import annotations

import ast
import json
import signal
import subprocess
import sys
import time
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import dinoexport
from dinoexport.cli import tables, terminal
from dinoexport.errors import UsageError
from tests.conftest import HEARING_SIGINT

HOSTILE = st.text(st.characters(exclude_categories=()), max_size=40)
PACKAGE = Path(dinoexport.__file__).parent


def steers(text: str) -> list[str]:
    """The characters that do something to a terminal besides being seen."""
    return [c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c != "\n"]


@given(HOSTILE)
@example("\x1b]0;owned\x07\x1b[2J")
@example("\x9b31m")
@example("safe\u202egnp.exe")
@example("caf\udce9")
@example("ok\nVerified: by key 1234")
def test_no_text_steers_the_terminal(text: str) -> None:
    outputs: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("typer.echo", lambda words, err=False: outputs.append(words))
        terminal.say(text)
        with pytest.raises(SystemExit):
            terminal.fail(UsageError(text, next_step=text), False)
        with terminal.progress_lines() as progress:
            progress(text, 0, 1)
        terminal.say_json({text: text})
    for words in outputs:
        assert not steers(words), words
    assert "\n" not in outputs[0] and all(line.startswith(("error: ", "  ")) for line in outputs[1].splitlines())
    assert json.loads(outputs[-1]) == {text: text}


@given(HOSTILE)
def test_no_table_steers_the_terminal(text: str) -> None:
    from io import StringIO

    from rich.console import Console

    out = StringIO()
    console = Console(file=out, width=2000)  # each of 40 characters may be a code of ten
    console.print(tables.table(text, [{text: text, "more": [text, text]}]))
    console.print(tables.facts(text, {text: text, "more": text}))
    shown = out.getvalue()
    assert not steers(shown)
    assert len(shown.splitlines()) <= 11, "a cell is one line"


@pytest.mark.parametrize("columns", [80, 100, 140])
def test_list_breaks_no_number_and_no_word(columns: int) -> None:
    """At any usual width; what a narrow table leaves out is named."""
    from io import StringIO

    from rich.console import Console

    from dinoexport.cli import catalogue

    variants = catalogue.everything()["variants"]
    seen: list[str] = []
    for title, rows in catalogue.variant_tables(variants, columns):
        out = StringIO()
        Console(file=out, width=columns).print(tables.table(title, rows, breaks="licence"))
        shown = out.getvalue()
        assert max(map(len, shown.splitlines())) <= columns
        for row in rows:
            (line,) = [line for line in shown.splitlines() if line.startswith(f"│ {row['variant']} ")]
            assert all(f"│ {tables.cell(value)} " in line for name, value in row.items() if name != "licence"), line
        left_out = {name for row in variants if row["variant"] == rows[0]["variant"] for name, value in row.items()
                    if value is not None and name.replace("_", " ") not in rows[0]}  # fmt: skip
        assert all(name.replace("_", " ") in title for name in left_out) and ("(" in title) == bool(left_out)
        seen += [row["variant"] for row in rows]
    assert sorted(seen) == sorted(row["variant"] for row in variants)


def test_nobody_else_prints() -> None:
    """Found in the syntax: a new module is under this the moment it exists."""
    allowed = {PACKAGE / "cli" / "terminal.py", PACKAGE / "cli" / "app.py"}
    for path in set(PACKAGE.rglob("*.py")) - allowed:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("print", "typer.echo", "typer.secho", "click.echo"), path
                assert not ast.unparse(node.func).endswith(("stdout.write", "stderr.write", "Console")), path


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_while_it_loads(number: signal.Signals) -> None:
    """At any time after its first line there is one line and the exit code of a shell, never a traceback."""
    code = "import dinoexport.__main__ as m, sys\nm.interrupts.leave_at_once()\nprint('up', flush=True)\nm.main()"
    for pause_s in (0.0, 0.1, 0.25):
        command = [*HEARING_SIGINT, sys.executable, "-c", code, "list"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        time.sleep(pause_s)
        process.send_signal(number)
        _, words = process.communicate(timeout=60)
        assert "Traceback" not in words and process.returncode in (0, 130), words
        if process.returncode:
            assert words.strip() == "Interrupted. Nothing was changed; finished stages of a build are kept and reused."


def test_last_words_say_what_was_done(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from dinoexport.system import changes

    monkeypatch.setattr(changes, "_done", ["models serves tiny version 2."])
    with pytest.raises(SystemExit) as ended, terminal.reporting(False):
        raise KeyboardInterrupt
    assert ended.value.code == 130
    assert "after this was done: models serves tiny version 2." in capsys.readouterr().err


@pytest.mark.parametrize("raised", [OSError(36, "File name too long", "x" * 9000), OSError("no reason"),
                                    PermissionError(13, "Permission denied", b"caf\xe9\x1b[2J")])  # fmt: skip
def test_what_the_system_refuses_is_one_error(raised: OSError, capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended, terminal.reporting(True):
        raise raised
    said = capsys.readouterr()
    assert ended.value.code == 4 and said.err.startswith("error: ") and len(said.err) < 600
    assert json.loads(said.out)["exit_code"] == 4 and not steers(said.err)


def test_a_name_that_no_file_can_have_is_one_error(capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended, terminal.reporting(False):
        Path("\ud800").stat()
    assert ended.value.code == 2 and "is not a valid file name" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["list", "X"], ["X"], ["validate", "--X"], ["generate", "a", "b", "X"],
                                   ["openai", "a", "--port", "X"], ["--X"]])  # fmt: skip
def test_words_of_the_command_line_do_not_steer_it(words: list[str]) -> None:
    """They are refused before a command begins, by typer itself."""
    from typer.testing import CliRunner

    from dinoexport import cli

    hostile = "\u202egnp.exe\x1b[2J\u2066"
    ended = CliRunner().invoke(cli.app, [word.replace("X", hostile) for word in words])
    assert ended.exit_code == 2 and "Error: " in ended.stderr and not steers(ended.output), ended.output


def test_no_line_that_is_printed_is_two() -> None:
    """`say` escapes a line end, for it may come from a file; one of our own is two calls."""
    for path in (PACKAGE / "cli").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("say", "terminal.say"):
                parts = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
                assert not [part for part in parts if isinstance(part, str) and "\n" in part], path


def test_a_librarys_warning_does_not_steer_the_terminal() -> None:
    """As the real command line prints it, not as a test's runner does."""
    code = (
        "import sys, warnings, dinoexport.cli as cli\n"
        "cli.app = lambda: warnings.warn('\\x1b[2J\\nerror: forged\\u202e')\n"
        "cli.main()"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0 and ran.stderr == "UserWarning: \\x1b[2J\\nerror: forged\\u202e\n", ran.stderr


@pytest.mark.parametrize("terminal_there", [True, False])
def test_a_models_text_keeps_its_lines_and_steers_nothing(
    terminal_there: bool, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A file or another program gets the text as it is."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal_there)
    text = "a\tb\n\x1b[2Jc\u202e"
    terminal.say_text(text)
    assert capsys.readouterr().out == ("a\tb\n\\x1b[2Jc\\u202e" if terminal_there else text)
