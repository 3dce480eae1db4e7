"""Bundles as OCI artifacts in Docker's own registry: open to all, and behind the password that `docker login` keeps."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from tests.command_line import run
from tests.stores import real_servers
from tests.stores.real_servers import PASSWORD, USER


@pytest.mark.parametrize("private", [False, True])
def test_pushed_and_pulled(private: bool, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not real_servers.REGISTRY.exists():
        pytest.skip("no registry here: make stores gets Debian's docker-registry")
    monkeypatch.setenv("HOME", str(tmp_path))
    server = real_servers.registry(tmp_path, private=private)
    try:
        host = f"127.0.0.1:{server.port}"
        if private:
            refused = run("push", tiny, f"{host}/a/tiny:v1", "--plain-http")
            assert refused.exit_code == 4 and "docker login" in refused.stderr, refused.output
            (tmp_path / ".docker").mkdir()
            kept = {"auths": {host: {"auth": base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()}}}
            (tmp_path / ".docker" / "config.json").write_text(json.dumps(kept))
        pushed = run("push", tiny, f"{host}/a/tiny:v1", "--plain-http", "--json")
        assert pushed.exit_code == 0, pushed.output
        pinned = json.loads(pushed.stdout)["reference"]
        for number, reference in enumerate((pinned, f"{host}/a/tiny:v1")):
            pulled = run("pull", reference, "--out", tmp_path / str(number), "--plain-http", "--json")
            assert pulled.exit_code == 0 and json.loads(pulled.stdout)["reference"] == pinned, pulled.output
            theirs = {path.name: path.read_bytes() for path in (tmp_path / str(number)).iterdir()}
            assert theirs == {path.name: path.read_bytes() for path in tiny.iterdir()}
        missing = run("pull", f"{host}/a/tiny:v2", "--out", tmp_path / "none", "--plain-http")
        assert missing.exit_code == 4 and "answers 404" in missing.stderr and not (tmp_path / "none").exists()
        assert PASSWORD not in pushed.output + missing.output
    finally:
        server.stop()
