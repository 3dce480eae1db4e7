"""What every verb takes for granted when only the words that it must have are given, and the limits of numbers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

import dinoexport
from dinoexport import cli
from tests.command_line import run

B = Path("B")
# Verb -> what it must be told, and what it then takes for granted beside flags that are off and options without value.
GIVEN: dict[str, tuple[str, dict[str, Any]]] = {
    "bench": ("B", {"bundle": B}),
    "build": ("", {"reference": "plain"}),
    "check": ("URL B", {"url": "URL", "bundle": "B", "timeout_s": 60.0}),
    "compile": ("B", {"bundle": "B"}),
    "deploy": ("B --to M", {"bundle": "B", "to": "M"}),
    "diff": ("B C", {"first": B, "second": Path("C")}),
    "doctor": ("", {}),
    "embed": (
        "B --images I --out O",
        {
            "bundle": "B", "images": "I", "out": "O", "size": "default", "dtype": "float32", "shard": "0/1",
            "engine": "local", "max_failed": "1%",
        },
    ),
    "export": ("", {}),
    "fit": ("B --images I", {"bundle": B, "images": Path("I"), "head": "logreg"}),
    "generate": ("B", {"bundle": B, "max_tokens": 256, "temperature": 0.0, "top_p": 1.0}),
    "inspect": ("B", {"path": "B"}),
    "list": ("", {}),
    "merge": ("B C --out O", {"first": B, "second": Path("C"), "out": Path("O")}),
    "openai": ("URL", {"model_place": "URL", "host": "127.0.0.1", "port": 8080, "timeout_s": 60.0}),
    "pull": ("R --out O", {"reference": "R", "out": Path("O")}),
    "push": ("B R", {"bundle": "B", "reference": "R"}),
    "report": ("B", {"bundle": B}),
    "rollback": ("M N", {"repository": "M", "name": "N"}),
    "schema": ("", {}),
    "validate": ("B", {"bundle": "B", "reference": "plain"}),
}  # fmt: skip
FLAGS = {
    "build": {"force", "keep_rejected", "dry_run"}, "check": {"quick"}, "compile": {"force"}, "export": {"force"},
    "embed": {"normalise", "retry_failed", "extend", "verify"}, "fit": {"balanced", "force"},
    "generate": {"suffix_first", "chat"}, "pull": {"plain_http"}, "push": {"plain_http"}, "report": {"show"},
    "validate": {"explain", "trust_plan"},
}  # fmt: skip
COMMANDS: Any = typer.main.get_command(cli.app)


def asked(words: str) -> dict[str, Any]:
    verb, *others = words.split()
    found: dict[str, Any] = COMMANDS.commands[verb].make_context(verb, others).params
    return found


def test_what_is_taken_for_granted() -> None:
    assert set(COMMANDS.commands) == set(GIVEN)
    for verb, (words, expected) in GIVEN.items():
        found = asked(f"{verb} {words}")
        off = {name for name, value in found.items() if value is False}
        assert off == FLAGS.get(verb, set()) | {"as_json"}, verb
        values = {name: value for name, value in found.items() if name not in off and value not in (None, ())}
        assert values == expected, verb


@pytest.mark.parametrize(
    ("words", "option", "least", "most"),
    [
        ("openai URL", "port", 0, 65535),
        ("embed B --images I --out O", "shards", 1, 100_000),
        ("embed B --images I --out O", "workers", 1, None),
    ],
)
def test_numbers_that_an_option_takes(words: str, option: str, least: int, most: int | None) -> None:
    for limit, beside, relation in ((least, -1, "greater"), (most, 1, "less")):
        if limit is not None:
            assert asked(f"{words} --{option} {limit}")[option] == limit
            refused = run(*words.split(), f"--{option}", limit + beside)
            assert refused.exit_code == 2 and f"should be {relation} than or equal to {limit}\n" in refused.stderr


def test_the_program_without_a_verb() -> None:
    nothing = run()
    assert nothing.exit_code == 2 and "Export a checkpoint to ONNX and TensorRT" in nothing.output
    assert run("--version", "--help").stdout == f"{dinoexport.__version__}\n", "whatever else is asked"
    assert "--install-completion" not in run("--help").stdout
    assert not cli.app.pretty_exceptions_enable, "a traceback never shows the values of variables"


def test_sizes_to_be_timed_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what was timed is shown, as a table and as JSON."""
    sizes: list[Any] = []

    def bench(_bundle: Path, **how: Any) -> Any:
        sizes.append(how["sizes"])
        return SimpleNamespace(
            candidate="tiny", machine="a CPU", usable_cpus=2, table=lambda: [{"case": "one", "ms": "1.5"}],
            peak_gflop_per_s=123.4, notes=["noisy"], to_json=lambda: {"candidate": "tiny"},
        )  # fmt: skip

    monkeypatch.setattr("dinoexport.bench.bench", bench)
    shown = run("bench", "B", "--size", "8x8", "--size", "2x8x8")
    assert shown.stdout.startswith("tiny; a CPU, 2\nCPUs") and shown.stdout.endswith(
        "Peak of a large fp32 matrix product here: 123 GFLOP/s\nnote: noisy\n"
    )
    assert run("bench", "B", "--json").stdout == '{\n "candidate": "tiny"\n}\n'
    assert sizes == [["8x8", "2x8x8"], ()]
