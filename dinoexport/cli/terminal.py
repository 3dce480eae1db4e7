"""Shared by all commands: exit codes, errors, progress, and everything that is printed."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from dinoexport.cli.escaping import paragraph, printable
from dinoexport.cli.streams import OutputLost
from dinoexport.cli.tables import table
from dinoexport.errors import DinoexportError, MissingRequirement, UsageError
from dinoexport.system import interrupts

if TYPE_CHECKING:
    from rich.table import Table

    from dinoexport.spec import Progress
    from dinoexport.validation.judge import Report

_LINES_MAX = 19  # of an error's message; the next step is one more
_NAME_MAX = 300  # characters of a file's name in an error
Sign = Annotated[
    Path | None,
    typer.Option(
        "--sign", metavar="KEY", help="Sign a bundle that passed with this private key (PEM, elliptic curve)."
    ),
]
Verify = Annotated[
    Path | None,
    typer.Option(
        "--verify", metavar="KEY", help="Refuse a bundle that was not signed by the owner of this public key."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]


@contextmanager
def reporting(as_json: bool) -> Iterator[None]:
    """Exits with an error's own code, with one sentence on stderr or one object on stdout."""
    try:
        with interrupts.raised():
            yield
    except OutputLost:
        raise  # there is no place for an object on stdout
    except DinoexportError as error:
        fail(error, as_json)
    except OSError as error:
        fail(_of_the_system(error), as_json)
    except UnicodeEncodeError as error:
        fail(
            UsageError(f"{error.object[:_NAME_MAX]!r} is not a valid file name.", next_step="Check the path."),
            as_json,
        )
    except KeyboardInterrupt:
        typer.echo(f"\n{printable(interrupts.last_words())}", err=True)
        sys.exit(interrupts.EXIT_CODE)


def _of_the_system(error: OSError) -> DinoexportError:
    """The error for an unexpected refusal of the system, such as a name that is too long; it names the file."""
    where = "" if error.filename is None else f"{str(error.filename)[:_NAME_MAX]}: "
    return MissingRequirement(
        f"{where}{error.strerror or error}.", next_step="Check the path, its permissions, and the disk."
    )


def fail(error: DinoexportError, as_json: bool, **facts: Any) -> NoReturn:
    """Exits with the error's code; with --json the known facts are printed to stdout."""
    if as_json:
        say_json({"error": error.message, "next_step": error.next_step, "exit_code": error.exit_code} | facts)
    typer.echo(f"error: {paragraph(_shortened(error.message))}", err=True)
    if error.next_step:
        typer.echo(f"  next: {paragraph(error.next_step)}", err=True)
    sys.exit(error.exit_code)


def output_lost(lost: OutputLost) -> NoReturn:
    """Exits with its code. A reader that left, as in `| head`, has seen what it wanted, and no line is printed."""
    if not lost.reader_left:
        changes = sys.modules.get("dinoexport.system.changes")
        done = " This was done: " + " ".join(changes.done()) if changes is not None and changes.done() else ""
        typer.echo(f"error: {printable(lost.message + done)}", err=True)
        typer.echo(f"  next: {printable(lost.next_step)}", err=True)
    sys.exit(lost.exit_code)


def _shortened(text: str) -> str:
    """At most as many lines as a person reads; --json has them all."""
    lines = text.rstrip("\n").split("\n")
    if len(lines) <= _LINES_MAX:
        return text
    return "\n".join((*lines[: _LINES_MAX - 1], f"  and {len(lines) - _LINES_MAX + 1} more; --json lists them all"))


@contextmanager
def progress_lines() -> Iterator[Progress]:
    """A progress line per piece of work on stderr, drawn only on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:

        def report(doing: str, done: int, total: int) -> None:
            if doing not in tasks:
                tasks[doing] = bars.add_task(printable(doing), total=total or None)
                if not console.is_terminal:
                    typer.echo(f"{printable(doing)} ...", err=True)
            bars.update(tasks[doing], completed=done, total=total or None)

        yield report


def choice(option: str, word: str, known: tuple[str, ...]) -> Any:
    """The word, if the option knows it; if not, a UsageError that names the known ones."""
    from dinoexport.spec import closest

    if word not in known:
        raise UsageError(f"--{option} {word!r} is unknown.{closest(word, known)}", next_step=f"Use {', '.join(known)}.")
    return word


def runtime_of(word: str | None) -> Any:
    """The requested runtime, or None."""
    from dinoexport.spec import Runtime

    return None if word is None else Runtime(choice("runtime", word, tuple(Runtime)))


def signer_of(key: Path | None) -> Any:
    """The signing key, opened before any work; asks for its passphrase on a terminal. None without a key."""
    if key is None:
        return None
    from dinoexport.bundle import signing

    def ask() -> str:
        if not sys.stdin.isatty():
            raise UsageError(
                f"{key} is encrypted, and there is no terminal to ask for its passphrase.",
                next_step="Run it on a terminal, or decrypt the key: "
                f"openssl ec -in {shlex.quote(str(key))} -out PLAIN.pem",
            )
        return str(typer.prompt(f"Passphrase of {printable(str(key))}", hide_input=True, err=True))

    return signing.open_signer(key, ask=ask)


def say(what: Table | str, *, to_stderr: bool = False) -> None:
    """Prints a line or a table. A line stays one line of visible characters, whatever its content."""
    from rich.console import Console

    if isinstance(what, str):
        typer.echo(printable(what), err=to_stderr)
        return
    Console(stderr=to_stderr, width=columns(to_stderr=to_stderr)).print(what)


def columns(*, to_stderr: bool = False) -> int:
    """How wide a table may be. A pipe has no width; 80 columns would cut the figures off."""
    from rich.console import Console

    console = Console(stderr=to_stderr)
    return console.width if console.is_terminal else 140


def say_text(piece: str) -> None:
    """Prints text from a model. On a terminal, control characters are escaped, except line ends and tabs."""
    if sys.stdout.isatty():
        piece = "".join(c if c in "\n\t" else printable(c) for c in piece)
    sys.stdout.write(piece)
    sys.stdout.flush()


def say_json(content: Any) -> None:
    """Prints the one JSON object on stdout."""
    typer.echo(_json(content, indent=1))


def say_json_line(content: Any) -> None:
    """A JSON object as one line on stderr: progress beside the one object on stdout."""
    typer.echo(_json(content, indent=None), err=True)


def _json(content: Any, *, indent: int | None) -> str:
    """As JSON; DEL is the one control character that JSON does not escape by itself."""
    return json.dumps(content, indent=indent, allow_nan=False).replace("\x7f", "\\u007f")


@contextmanager
def state_line() -> Iterator[tuple[Callable[[str], None], bool]]:
    """Prints a command's progress on stderr; tells whether that is a terminal, where each line replaces the last."""
    drawn, said = sys.stderr.isatty(), False

    def line(text: str) -> None:
        nonlocal said
        said = True
        typer.echo(("\r\x1b[K" if drawn else "") + printable(text), nl=not drawn, err=True)

    try:
        yield line, drawn
    finally:
        if drawn and said:
            typer.echo("", err=True)


def show_report(report: Report, *, to_stderr: bool = False) -> None:
    """The verdict as a table: a row for each output of each case."""
    from dinoexport.cli import formatting

    verdict = "PASSED" if report.passed else "FAILED"
    title = f"{verdict}: {report.candidate}, against {report.reference}"
    say(table(title, formatting.report_rows(report)), to_stderr=to_stderr)
    if report.determinism is not None:
        lines = [f"{words}: {found}" for words, found in report.determinism.lines.items()]
        say(f"Repeatability: {'; '.join(lines)}", to_stderr=to_stderr)


def show_ways(manifest: Any, *, not_run: str = "", to_stderr: bool = False) -> None:
    """How a bundle runs: on a CPU, and its engines."""
    from dinoexport.cli import formatting

    for line in (*formatting.cpu_lines(manifest), *formatting.engine_lines(manifest, not_run)):
        say(line, to_stderr=to_stderr)
