"""`check` on a real server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dinoexport.pipeline import build as pipeline
from tests.conftest import DATA
from tests.serving.triton.real_server.server_requests import check
from tests.triton_server import Server

pytestmark = pytest.mark.triton


def test_check_is_green(server: Server, bundles: dict[str, Path]) -> None:
    shown = check(server.http, str(bundles["bytes"]), "--model", "bytes")
    assert shown.exit_code == 0 and "PASSED: bytes 1 at http" in shown.stdout and "latency ms" in shown.stdout
    told = json.loads(check(server.grpc, str(server.repository), "--model", "floats", "--json").stdout)
    assert told["report"]["passed"] and set(told["latency_ms"]) == {"batch", "cropped"}
    quick = json.loads(check(server.http, str(server.repository), "--model", "bytes", "--quick", "--json").stdout)
    assert set(quick["latency_ms"]) == {"smallest"} and quick["latency_ms"]["smallest"] > 0


def test_check_says_what_is_wrong(server: Server, bundles: dict[str, Path], tmp_path: Path) -> None:
    assert check(server.http, str(bundles["bytes"])).exit_code == 2  # which of the two?
    other = check(server.http, str(bundles["bytes"]), "--model", "floats")
    assert other.exit_code == 2 and "the server has a tiny_swiglu" in other.stderr
    assert check(server.http, str(tmp_path), "--model", "floats").exit_code == 2
    nobody = check("http://127.0.0.1:9", str(bundles["bytes"]), "--timeout-s", "0.3", "--json")
    assert nobody.exit_code == 4 and "cannot be reached" in json.loads(nobody.stdout)["error"]


def test_check_sees_other_weights(server: Server, tmp_path: Path) -> None:
    """The same architecture from another checkpoint answers, but not what this bundle's PyTorch answered."""
    out = tmp_path / "other"
    pipeline.build(pipeline.build_request(str(DATA / "tiny_swiglu.toml"), weights="synthetic:1", out=out))
    shown = check(server.http, str(out), "--model", "floats", "--json")
    assert shown.exit_code == 1 and not json.loads(shown.stdout)["report"]["passed"]
