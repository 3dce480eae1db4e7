"""Under load: new versions, broken ones, killed processes, clients that leave. Each test repairs what it broke."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path

import numpy as np
import pytest

from dinoexport.serving.client import DinoClient
from dinoexport.serving.transport import ServerError
from dinoexport.serving.triton import model_repository
from tests.serving.triton.real_server.server_requests import (
    check,
    infer,
    photographs,
    pixels,
    still_serves,
    under_load,
    versions,
    wait_until,
)
from tests.triton_server import Server

pytestmark = pytest.mark.triton


def test_nothing_is_lost_on_a_new_version_and_on_rollback(server: Server, bundles: dict[str, Path]) -> None:
    client = DinoClient(server.grpc, model="floats")

    def new_version() -> None:
        deployed = model_repository.deploy(bundles["floats"], server.repository, name="floats", backend="python")
        for model in deployed.models:
            assert server.load(model)[0] == 200
        assert versions(server, "floats") == ["2"]

    def back() -> None:
        for model in model_repository.rollback(server.repository, "floats").models:
            assert server.load(model)[0] == 200
        assert versions(server, "floats") == ["1"]

    for change in (new_version, back):
        ends = under_load(server, "floats", change)
        assert len(ends) > 20 and set(ends) == {None}, [end for end in ends if end][:3]
    assert client({"pixels": np.zeros((1, 3, 28, 28), np.float32)})["class_token"].shape == (1, 96)
    assert check(server.http, str(bundles["floats"]), "--model", "floats").exit_code == 0


def test_a_broken_new_version_leaves_the_old_one_serving(server: Server, bundles: dict[str, Path]) -> None:
    """Broken after it was deployed, as a bad disk would: the load fails, the version before it goes on."""
    deployed = model_repository.deploy(bundles["floats"], server.repository, name="floats", backend="python")
    place = server.repository / "floats" / str(deployed.version)
    (place / "model.onnx" / "model.onnx").unlink()
    (place / "model.onnx" / "model.onnx").write_bytes(b"no graph")

    def load() -> None:
        status, told = server.load("floats")
        assert status == 400 and "ONNX Runtime refuses model.onnx" in told["error"], told

    try:
        assert set(under_load(server, "floats", load)) == {None}
        assert versions(server, "floats") == [str(deployed.previous)]
    finally:
        back = model_repository.rollback(server.repository, "floats")
    for model in back.models:  # all of them: an ensemble that is not loaded again holds the version it was loaded with
        assert server.load(model)[0] == 200
    assert check(server.http, str(bundles["floats"]), "--model", "floats").exit_code == 0


def test_a_killed_model_process_turns_check_red_and_a_reload_heals_it(server: Server, bundles: dict[str, Path]) -> None:
    probe = (server.http, str(server.repository), "--model", "floats", "--quick", "--timeout-s", "5")
    assert check(*probe).exit_code == 0

    def kill() -> None:
        for process in server.stubs("floats"):
            os.kill(process, signal.SIGKILL)

    ends = under_load(server, "floats", kill)
    failed = [end for end in ends if end is not None]
    assert None in ends and failed
    assert all(isinstance(end, ServerError) for end in failed), failed[:3]  # an error each, never a wrong answer
    assert server.ask("GET", "/v2/models/floats/ready")[0] == 200, "Triton's own word on it is what it always was"
    red = check(*probe)
    assert red.exit_code == 1 and "does not give PyTorch's outputs" in red.stderr
    assert server.unload("floats")[0] == 200
    wait_until(lambda: not versions(server, "floats"))
    assert server.load("floats")[0] == 200
    assert check(*probe).exit_code == 0
    assert infer(server, "bytes", pixels([1, 14, 14, 3]))[0] == 200  # the other model never noticed
    # The ensembles were unloaded with the graph they need; they come back the same way.
    for model in ("floats_images_prepare", "floats_images"):
        assert server.load(model)[0] == 200
    DinoClient(server.http, model="floats").encoded(photographs("rocket.jpg"))


def test_clients_that_leave_in_the_middle(server: Server) -> None:
    """Half a request, and a whole one nobody waits for: the server answers the next as ever."""
    header = json.dumps({"inputs": pixels([1, 14, 14, 3])}).encode()
    for sent in (len(header) // 2, len(header)):
        for _ in range(8):
            with socket.create_connection(("127.0.0.1", server.http_port)) as connection:
                connection.sendall(
                    b"POST /v2/models/bytes/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(header)
                )
                connection.sendall(header[:sent])
    still_serves(server)
    stub = server.stubs("bytes")
    assert len(stub) == 1


def test_the_server_killed_and_started_again(server: Server, bundles: dict[str, Path]) -> None:
    """Requests wait for it: a client that may wait long enough loses none."""

    def restart() -> None:
        server.kill()
        assert check(server.http, str(bundles["floats"]), "--model", "floats", "--timeout-s", "0.3").exit_code == 4
        server.start()

    ends = under_load(server, "floats", restart)
    failed = [end for end in ends if end is not None]
    assert not failed, failed[:3]
    assert check(server.http, str(bundles["floats"]), "--model", "floats", "--quick").exit_code == 0
