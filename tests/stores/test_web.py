"""A plain web server is read from: bundles by their names, images where it lists them, as WebDAV does."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import dinoexport
from dinoexport import cli
from dinoexport.embed import run
from dinoexport.errors import UsageError, ValidationFailed
from tests.embed.conftest import fill
from tests.stores import real_servers


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """(address, folder) of Python's own web server."""
    folder = tmp_path / "web"
    folder.mkdir()
    handler = functools.partial(_Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()
    server.server_close()


def test_a_bundle_is_loaded_and_validated(web: tuple[str, Path], tiny: Path) -> None:
    address, folder = web
    (folder / "tiny").symlink_to(tiny)
    before = (tiny / "manifest.json").read_bytes()
    with dinoexport.load(f"{address}/tiny") as ours, dinoexport.load(tiny) as theirs:
        pixels = np.random.default_rng(0).standard_normal((1, 3, 28, 42)).astype(np.float32)
        np.testing.assert_array_equal(ours(pixels)["class_token"], theirs(pixels)["class_token"])
        assert ours.validate().report.passed
    shown = CliRunner().invoke(cli.app, ["validate", f"{address}/tiny"])
    assert shown.exit_code == 0 and "PASSED" in shown.stdout, shown.output
    assert (tiny / "manifest.json").read_bytes() == before
    with pytest.raises(UsageError, match="is not a bundle"):
        dinoexport.load(f"{address}/none")
    with pytest.raises(UsageError, match="is a web server, which cannot be written to"):
        dinoexport.build("vits14", weights="synthetic:0", out=f"{address}/new")


def test_damage_on_the_way_is_found(web: tuple[str, Path], tiny: Path) -> None:
    address, folder = web
    (folder / "tiny").mkdir()
    for path in tiny.iterdir():
        (folder / "tiny" / path.name).write_bytes(path.read_bytes())
    (folder / "tiny" / "model.onnx.data").write_bytes(b"of somebody else")
    with pytest.raises(ValidationFailed, match="its files are not those of its manifest"):
        dinoexport.load(f"{address}/tiny")


def test_a_server_that_lists_nothing_is_said(web: tuple[str, Path], tiny: Path, tmp_path: Path) -> None:
    address, folder = web
    fill(folder / "photos", 3)
    with pytest.raises(UsageError, match="does not list its files"):
        run.embed(tiny, f"{address}/photos", str(tmp_path / "out"), workers=1)


def test_images_of_a_server_that_lists_them(tiny: Path, tmp_path: Path) -> None:
    if not real_servers.WEBDAV.exists():
        pytest.skip("no WebDAV server here: make stores installs one")
    fill(tmp_path / "web" / "photos", 12)
    server = real_servers.webdav(tmp_path / "web")
    try:
        for images, out in (
            (f"http://127.0.0.1:{server.port}/photos", "theirs"),
            (str(tmp_path / "web" / "photos"), "ours"),
        ):
            assert run.embed(tiny, images, str(tmp_path / out), shards=2, max_failed=0.2, workers=1).complete
    finally:
        server.stop()
    parts = sorted((tmp_path / "ours").glob("*.parquet"))
    assert len(parts) == 2
    for part in parts:
        theirs = pq.read_table(tmp_path / "theirs" / part.name)
        assert theirs.replace_schema_metadata() == pq.read_table(part).replace_schema_metadata()
