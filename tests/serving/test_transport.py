"""What both protocols share: the names in an index, and one error for each of a server's sentences."""

from __future__ import annotations

import inspect
import threading
from typing import Any

import pytest

from dinoexport.errors import DinoexportError, InputRefused, UsageError
from dinoexport.serving import check, client, connection, transport
from dinoexport.serving.address import parse
from dinoexport.serving.answers import HEADER_MAX_BYTES, Malformed
from dinoexport.serving.client import DinoClient
from dinoexport.serving.openai import sources
from dinoexport.serving.text_client import TextClient
from dinoexport.serving.transport import ServerBusy, ServerError
from dinoexport.serving.triton import text_signature

SEND_ANOTHER = "The server refused the input; send another."
DEPLOY = "Deploy the model, or name another."
AGAIN = "Try again in a moment, or serve with more instances."
LOG = "Read the server's log."


def shown(error: DinoexportError) -> tuple[type, str, str]:
    return type(error), error.message, error.next_step


@pytest.mark.parametrize(
    ("kind", "message", "error"),
    [
        ("invalid", " the shape is wrong. ", (InputRefused, "the shape is wrong.", SEND_ANOTHER)),
        ("missing", "no such model", (UsageError, "no such model.", DEPLOY)),
        ("busy", "unavailable", (ServerBusy, "unavailable.", AGAIN)),
        ("broken", "CUDA error", (ServerError, "CUDA error.", LOG)),
        ("invalid", f"{text_signature.QUEUE_FULL} now", (ServerBusy, f"{text_signature.QUEUE_FULL} now.", AGAIN)),
        ("invalid", "Stub process is unhealthy", (ServerError, "Stub process is unhealthy.", LOG)),
        ("broken", "  ", (ServerError, "The server gave no reason.", LOG)),
    ],
)
def test_a_servers_sentence_is_one_error(kind: str, message: str, error: tuple[type, str, str]) -> None:
    assert shown(transport.refused(kind, message)) == error


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (400, b'{"error": "wrong"}', (InputRefused, "wrong.", SEND_ANOTHER)),
        (404, b' data: {"error": "unknown"}', (UsageError, "unknown.", DEPLOY)),
        (503, b"<html>", (ServerBusy, "status 503.", AGAIN)),
        (500, b"[]", (ServerError, "status 500.", LOG)),
        (200, b'{"error": 3}', (ServerError, "3.", LOG)),
        (500, b'{"error": "' + b"x" * 1001 + b'"}', (ServerError, "x" * 1000 + ".", LOG)),
    ],
)
def test_an_http_status_is_one_error(status: int, body: bytes, error: tuple[type, str, str]) -> None:
    assert shown(transport.refusal(status, body)) == error


def test_an_event_is_an_object_or_an_error() -> None:
    assert transport.event_of(b'data: {"text": "a"}') == {"text": "a"}
    with pytest.raises(Malformed, match="an event is not an object"):
        transport.event_of(b"data: []")
    with pytest.raises(ServerError) as told:
        transport.event_of(b'data: {"error": "' + b"x" * 1001 + b'"}')
    assert told.value.message == "x" * 1000 + "."


def test_the_names_in_an_index() -> None:
    """Ten thousand at most, each with a name."""
    most = [{"name": f"m{i}"} for i in range(10_000)]
    assert transport.names_of(most)[-1] == "m9999" and transport.names_of([]) == ()
    for wrong in ([*most, {"name": "one more"}], [{"name": ""}], [{"name": 3}], [{}], ["m"], {"name": "m"}, None):
        with pytest.raises(Malformed, match="its index of models is invalid"):
            transport.names_of(wrong)


@pytest.mark.parametrize("timeout_s", [0, -1.0, float("nan"), threading.TIMEOUT_MAX])
@pytest.mark.parametrize("url", ["http://host", "grpc://host"])
def test_a_time_that_nobody_can_wait(url: str, timeout_s: float) -> None:
    with pytest.raises(UsageError) as refused:
        connection.connect(url, timeout_s=timeout_s)
    assert refused.value.message == f"{timeout_s} s is not a valid timeout."
    for possible in (0.5, threading.TIMEOUT_MAX / 2):
        connection.connect(url, timeout_s=possible)


@pytest.mark.parametrize("scheme", ["http", "grpc", "https", "grpcs"])
def test_certificates_are_for_encrypted_addresses(scheme: str, tmp_path: Any) -> None:
    (tmp_path / "ca.pem").write_text("-")
    if scheme.endswith("s"):
        found = parse(f"{scheme}://host", ca=tmp_path / "ca.pem")
        assert (found.secure, found.ca) == (True, tmp_path / "ca.pem")
    else:
        with pytest.raises(UsageError, match=f"^{scheme} uses no certificates"):
            parse(f"{scheme}://host", ca=tmp_path / "ca.pem")
        assert parse(f"{scheme}://host").secure is False


def test_an_address_is_shown_without_its_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINOEXPORT_TOKEN", "s3cret")
    found = parse("http://host/prefix")
    assert found.headers == {"authorization": "Bearer s3cret"}
    assert repr(found) == "Address(scheme='http', host='host', port=8000, path='/prefix', ca=None)"


def test_ports_and_times_that_nobody_names() -> None:
    assert {scheme: parse(f"{scheme}://host").port for scheme in ("http", "https", "grpc", "grpcs")} == {
        "http": 8000, "https": 443, "grpc": 8001, "grpcs": 443,
    }  # fmt: skip
    for opened in (DinoClient, client.open_graphs, client.text_served, TextClient, sources.TritonSource):
        assert inspect.signature(opened).parameters["timeout_s"].default == 60.0
    assert inspect.signature(DinoClient).parameters["shared_memory"].default is False
    asked = inspect.signature(check.check).parameters
    assert (asked["quick"].default, asked["timeout_s"].default) == (False, 60.0)
    assert (transport.METADATA_MAX_BYTES, HEADER_MAX_BYTES) == (1 << 24, 1 << 20)


@pytest.mark.parametrize(("option", "most"), [("headers", 1 << 16), ("ca", 1 << 22)])
def test_how_large_files_of_credentials_may_be(option: str, most: int, tmp_path: Any) -> None:
    """The headers are one long comment here."""
    for size, taken in ((most, True), (most + 1, False)):
        (tmp_path / "file").write_bytes(b"#" + b"x" * (size - 1))
        given = {option: tmp_path / "file"}
        if taken:
            assert parse("https://host", **given).headers == {}
        else:
            with pytest.raises(DinoexportError):
                parse("https://host", **given)
