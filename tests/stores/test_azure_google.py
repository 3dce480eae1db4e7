"""Azure's and Google's storage, by an emulator each: bundles, releases, images and rows as in S3 and on disk."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import dinoexport
from dinoexport import cli
from dinoexport.bundle import in_store
from dinoexport.embed import run
from dinoexport.errors import MissingRequirement
from dinoexport.system import store
from tests.embed.conftest import fill
from tests.stores import google_server, real_servers
from tests.stores.test_repositories import is_whole, served


@pytest.fixture(scope="module", params=["az", "gs"])
def cloud(request: pytest.FixtureRequest) -> Iterator[str]:
    """The scheme of a running store's addresses."""
    running: Any
    if request.param == "az":
        if not real_servers.AZURITE.exists():
            pytest.skip("no Azurite here: make stores installs it")
        running, environment = real_servers.azurite()
    else:
        if not google_server.BINARY.exists():
            pytest.skip("no fake-gcs-server here: make stores installs it")
        running = google_server.GoogleServer()
        environment = running.environment
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield request.param
    running.stop()


def test_whole_files_and_one_winner(cloud: str) -> None:
    place = store.RemotePlace(f"{cloud}://bucket/files")
    place.write("a/b", b"first", new=True)
    with pytest.raises(FileExistsError):
        place.write("a/b", b"second", new=True)
    content, tag = place.read_tagged("a/b", max_bytes=100)
    place.write_over("a/b", content + b" and more", tag=tag)
    with pytest.raises(FileExistsError):
        place.write_over("a/b", b"of somebody who read the first", tag=tag)
    assert place.read("a/b") == b"first and more" and list(place.files("a")) == [("a/b", 14)]
    draft = place.draft("large")
    draft.write_bytes(bytes(12 << 20))  # more than one block
    place.publish(draft, "large")
    assert place.size("large") == 12 << 20 and place.size("none") is None
    place.remove("a/b")
    place.remove("a/b")
    with pytest.raises(FileNotFoundError):
        place.read("a/b")


def test_a_bundle_and_its_releases(cloud: str, tiny: Path) -> None:
    there = f"{cloud}://bucket/bundles/tiny"
    in_store.send(tiny, there)
    with dinoexport.load(there) as ours, dinoexport.load(tiny) as theirs:
        pixels = np.random.default_rng(0).standard_normal((1, 3, 28, 42)).astype(np.float32)
        np.testing.assert_array_equal(ours(pixels)["class_token"], theirs(pixels)["class_token"])
        assert ours.validate().report.passed
    models = f"{cloud}://bucket/models"
    for number in (1, 2):
        shown = CliRunner().invoke(cli.app, ["deploy", there, "--to", models, "--json"])
        assert shown.exit_code == 0 and json.loads(shown.stdout)["version"] == number, shown.output
        assert is_whole(models) == number
    shown = CliRunner().invoke(cli.app, ["rollback", models, "tiny_swiglu", "--json"])
    assert shown.exit_code == 0 and served(models)[0] == 1, shown.output


def test_images_and_rows(cloud: str, tiny: Path, tmp_path: Path) -> None:
    fill(tmp_path / "photos", 12)
    images = store.open_place(f"{cloud}://bucket/photos")
    for path in (tmp_path / "photos").rglob("*.jpg"):
        images.write(path.relative_to(tmp_path / "photos").as_posix(), path.read_bytes())
    for photos, out in (
        (f"{cloud}://bucket/photos", f"{cloud}://bucket/out"),
        (str(tmp_path / "photos"), str(tmp_path / "out")),
    ):
        assert run.embed(tiny, photos, out, shards=2, max_failed=0.2, workers=1).complete
    for part in sorted((tmp_path / "out").glob("*.parquet")):
        theirs = pq.read_table(io.BytesIO(store.open_place(f"{cloud}://bucket/out").read(part.name)))
        assert theirs.replace_schema_metadata() == pq.read_table(part).replace_schema_metadata()


def test_a_wrong_key_is_one_sentence_without_it(cloud: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if cloud == "gs":
        pytest.skip("fake-gcs-server takes every key")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "YS1zZWNyZXQta2V5")
    with pytest.raises(MissingRequirement, match="access denied") as raised:
        store.open_place(f"{cloud}://bucket/x").read("a")
    assert "YS1zZWNyZXQta2V5" not in raised.value.message + raised.value.next_step
