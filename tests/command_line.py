"""The command line in the process of the test: what it printed, and how it ended."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner

from dinoexport import cli


def run(*words: object) -> Any:
    """`dinoexport WORDS`: a result with exit_code, stdout, stderr and output."""
    return CliRunner().invoke(cli.app, [str(word) for word in words])
