"""Text bundles whose tokenizer or other files are not what the manifest lists: one error, and nothing else is read."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dinoexport import bundle, cli
from dinoexport.errors import DinoexportError
from dinoexport.runtime import text_model
from dinoexport.serving.triton import model_repository
from dinoexport.text import requests, tokenizer
from tests.attack import hostile
from tests.text import tiny


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A judged bundle with a tokenizer, from a folder as Hugging Face publishes one."""
    return tiny.bundle(tmp_path_factory.mktemp("tiny_text"))


@pytest.fixture(scope="module")
def model(built: Path) -> requests.OpenTextModel:
    return text_model.open_bundle(built)


def copied(built: Path, tmp_path: Path) -> Path:
    place = tmp_path / "bundle"
    shutil.copytree(built, place)
    return place


def refused(place: Path, tmp_path: Path, pattern: str) -> None:
    """By every verb that would give a tokenizer text: one error, and nothing deployed."""
    for words in (["generate", str(place), "hello"], ["openai", str(place), "--port", "0"], ["validate", str(place)],
                  ["deploy", str(place), "--to", str(tmp_path / "models")]):  # fmt: skip
        ended = CliRunner().invoke(cli.app, words)
        assert ended.exit_code in (1, 2), f"{words}: {ended.output}"
        assert ended.stderr.count("error: ") == 1 and re.search(pattern, ended.stderr), f"{words}: {ended.stderr}"
    assert not list((tmp_path / "models").rglob("tokenizer*"))


@pytest.mark.parametrize("how", ["exchanged", "a pipe", "a link", "a terabyte", "gone"])
def test_a_tokenizer_that_is_not_the_listed_one(built: Path, tmp_path: Path, how: str) -> None:
    place = copied(built, tmp_path)
    path = place / tokenizer.JSON
    content = path.read_bytes()
    path.unlink()
    if how == "exchanged":
        (tmp_path / "other").mkdir()
        shutil.copy(tiny.tokenizer_json(tmp_path / "other", controls=(*tiny.CONTROLS[:-1], "<|other|>")), path)
        assert path.read_bytes() != content
    elif how == "a pipe":
        os.mkfifo(path)
    elif how == "a link":
        (tmp_path / "same.json").write_bytes(content)
        path.symlink_to(tmp_path / "same.json")
    elif how == "a terabyte":
        with path.open("wb") as file:
            file.truncate(1 << 40)
    refused(place, tmp_path, r"tokenizer\.json")
    assert sum(path.stat().st_blocks for path in tmp_path.rglob("*")) < 1 << 17  # of 512 bytes: no terabyte was copied


def test_a_tokenizer_that_is_not_listed_is_not_used(built: Path, tmp_path: Path, model: requests.OpenTextModel) -> None:
    """`tokenizer.model` has precedence where weights are read; in a bundle the manifest alone decides."""
    place = copied(built, tmp_path)
    (place / tokenizer.SENTENCEPIECE).write_bytes(b"not listed")
    (place / "extra.json").write_text("{}")
    assert text_model.open_bundle(place).tokenizer.encode("hello world") == model.tokenizer.encode("hello world")
    model_repository.deploy(place, tmp_path / "models", name="words")
    deployed = {path.name for path in (tmp_path / "models" / "words").rglob("*")}
    assert tokenizer.JSON in deployed and not {tokenizer.SENTENCEPIECE, "extra.json"} & deployed


def test_a_manifest_that_lists_no_tokenizer(built: Path, tmp_path: Path) -> None:
    place = copied(built, tmp_path)
    manifest = bundle.read_manifest(place)
    files = tuple(file for file in manifest.files if file.name != tokenizer.JSON)
    (place / bundle.MANIFEST).write_bytes(manifest.changed(files=files).to_bytes())
    for words in (["generate", str(place), "hello"], ["deploy", str(place), "--to", str(tmp_path / "models")]):
        ended = CliRunner().invoke(cli.app, words)
        assert ended.exit_code == 2 and "no tokenizer" in ended.stderr, ended.output


def test_a_listed_tokenizer_of_any_bytes_is_one_error(built: Path, tmp_path: Path) -> None:
    """Its hash is right: a number, noise, one of another vocabulary, and the real one with bytes changed by chance."""
    place = copied(built, tmp_path)
    whole = (place / tokenizer.JSON).read_bytes()
    contents = [b"", b"7", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000, bytes(range(256)) * 40, whole[: len(whole) // 2]]
    smaller = json.loads(whole)
    smaller["model"]["vocab"].popitem()
    contents.append(json.dumps(smaller).encode())
    for _ in range(20):
        spoilt = bytearray(whole)
        for _ in range(random.choice((1, 3, 20))):
            spoilt[random.randrange(len(spoilt))] = random.randrange(256)
        contents.append(bytes(spoilt))
    opened = 0
    for content in contents:
        hostile.relisted(place, tokenizer.JSON, content)
        with suppress(DinoexportError):  # anything else fails this test
            text_model.open_bundle(place).tokenizer.encode("hello world")
            opened += 1
    assert opened < 20
