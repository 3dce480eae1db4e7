"""Where `compile` puts engines, and which bundles it refuses before it begins; compiling itself is made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dinoexport import cli
from dinoexport.bundle import signing
from dinoexport.cli import engines
from dinoexport.errors import BuildError, UsageError
from dinoexport.pipeline import compile_bundle


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `compile` asked for, up to the compiler."""
    seen: dict[str, Any] = {"refused": []}

    def refuse(_folder: Path, called: str) -> None:
        seen["refused"].append(called)
        raise UsageError(f"{called} is signed")

    def compile_it(_folder: Path, **how: Any) -> None:
        seen.update(how)
        raise BuildError("far enough")

    monkeypatch.setattr(compile_bundle, "refuse_signed", refuse)
    monkeypatch.setattr(compile_bundle, "compile_bundle", compile_it)
    monkeypatch.setattr(engines, "folder_of", lambda _bundle: tmp_path)
    monkeypatch.setattr(signing, "open_signer", lambda key, **_: f"signer of {key}")
    return seen


STORED = "s3://bucket/tiny"


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        ([STORED], True),
        ([STORED, "--sign", "key.pem"], False),
        ([STORED, "--out", "OUT"], False),
        (["FOLDER"], False),
        (["FOLDER", "--out", "OUT"], False),
    ],
)
def test_a_signed_bundle_in_a_store_is_refused_before_it_is_compiled(
    words: list[str], refused: bool, begun: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder is looked at by the compiler itself; another place or a new signature leaves no wrong one behind."""
    into: list[Any] = []

    class Destination:
        def __init__(self, place: Any) -> None:
            into.append(place)

        def __enter__(self) -> Any:
            return into[0]

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(engines, "destination", Destination)
    ended = CliRunner().invoke(cli.app, ["compile", *words])
    assert begun["refused"] == ([STORED] if refused else [])
    assert ended.exit_code == (2 if refused else 5), ended.output
    if not refused:
        assert into == ["OUT" if "--out" in words else STORED if STORED in words else None]
        assert begun["out"] == into[0] and begun["signer"] == ("signer of key.pem" if "--sign" in words else None)
