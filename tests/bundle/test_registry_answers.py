"""Bundles in a registry that is a dict: what is pushed, what a pull believes, and what its errors say."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests

from dinoexport import bundle
from dinoexport.bundle import registry as artifacts
from dinoexport.errors import MissingRequirement, UsageError, ValidationFailed

REFERENCE = "registry.example:5000/a/tiny:v1"
NAMES = ("model.onnx", "model.onnx.data", bundle.REFERENCE, bundle.MANIFEST)


def digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


class Registry:
    """Layers by their digest, one artifact, and what it was asked to push."""

    prefix = "https"

    def __init__(self) -> None:
        self.layers: dict[str, bytes] = {}
        self.artifact = b""
        self.pushed: dict[str, Any] = {}
        self.plain: list[bool] = []
        self.auth = SimpleNamespace(load_configs=lambda _container: None)

    def hold(self, contents: dict[str, bytes]) -> None:
        """An artifact of these files."""
        self.layers = {digest(content): content for content in contents.values()}
        layers = [
            {"digest": digest(content), "annotations": {artifacts._TITLE: name}} for name, content in contents.items()
        ]
        self.artifact = json.dumps({"layers": layers}).encode()

    def push(self, reference: str, **facts: Any) -> None:
        self.pushed = {"reference": reference, **facts}
        self.hold(
            {Path(file.rpartition(":")[0]).name: Path(file.rpartition(":")[0]).read_bytes() for file in facts["files"]}
        )

    def get_container(self, reference: str) -> Any:
        return SimpleNamespace(manifest_url=lambda: reference)

    @contextmanager
    def do_request(self, url: str, method: str, *, headers: dict[str, str], stream: bool) -> Iterator[Any]:
        assert (url, method, stream) == (f"https://{self.asked}", "GET", True)
        assert headers == {"Accept": "application/vnd.oci.image.manifest.v1+json"}
        yield answer(self.artifact)

    @contextmanager
    def get_blob(self, reference: str, layer: str, *, stream: bool) -> Iterator[Any]:
        assert reference == self.asked and stream
        yield answer(self.layers[layer])

    asked = REFERENCE


def answer(content: bytes) -> Any:
    """In pieces of three bytes; a large one in two."""
    step = 3 if len(content) < 1 << 20 else len(content) - 1
    pieces = [content[at : at + step] for at in range(0, len(content), step)]
    return SimpleNamespace(raise_for_status=lambda: None, iter_content=lambda _size: iter(pieces))


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    made = Registry()
    monkeypatch.setattr(artifacts, "_registry", lambda plain_http: made.plain.append(plain_http) or made)
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("signed", [False, True])
def test_pushed_and_pulled(signed: bool, small: Path, registry: Registry, tmp_path: Path) -> None:
    """By its tag, and by the digest that the push returned; the signature too, if there is one."""
    if signed:
        (small / bundle.SIGNATURE).write_bytes(b"a signature")
    pinned = artifacts.push(small, REFERENCE)
    assert pinned == f"registry.example:5000/a/tiny@{digest(registry.artifact)}"
    names = [*NAMES, bundle.SIGNATURE] if signed else NAMES
    assert registry.pushed == {
        "reference": REFERENCE,
        "files": [f"{small / name}:application/vnd.dinoexport.bundle.file" for name in names],
        "disable_path_validation": True,
        "manifest_annotations": {
            "org.opencontainers.image.licenses": "Apache-2.0",
            "dinoexport.variant": "vits14",
            "dinoexport.verdict": "passed",
        },
        "quiet": True,
    }
    told: list[tuple[str, int, int]] = []
    for reference in (REFERENCE, pinned):
        registry.asked = reference
        told.clear()
        out = tmp_path / "new" / reference[-2:]
        assert artifacts.pull(reference, out, progress=lambda *words: told.append(words)) == pinned
        assert contents(out) == contents(small) and [path.name for path in out.parent.glob(".*")] == []
        pulls = [words for words in told if words[0].startswith("pulling")]
        assert pulls == [(f"pulling {name}", 0, (small / name).stat().st_size) for name in NAMES[:3]]


def test_nothing_is_sent_or_taken_in_the_clear_unless_asked(small: Path, registry: Registry, tmp_path: Path) -> None:
    artifacts.push(small, REFERENCE)
    artifacts.pull(REFERENCE, tmp_path / "one")
    artifacts.push(small, REFERENCE, plain_http=True)
    artifacts.pull(REFERENCE, tmp_path / "two", plain_http=True)
    assert registry.plain == [False, False, True, True]


def test_what_cannot_be_pushed(small: Path, registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no tag to push to"):
        artifacts.push(small, f"registry.example/tiny@{digest(b'')}")
    with pytest.raises(UsageError, match="names nothing in a registry"):
        artifacts.push(small, "registry.example/tiny")
    odd = small.rename(tmp_path / "a:b")
    with pytest.raises(UsageError, match="has a colon in its path"):
        artifacts.push(odd, REFERENCE)
    assert not registry.pushed


def test_an_answer_that_is_not_the_bundle(small: Path, registry: Registry, tmp_path: Path) -> None:
    """Another artifact than was asked for by digest, one without a file, a changed layer, and one that is too large."""
    whole, out = contents(small), tmp_path / "out"
    registry.hold(whole)
    registry.asked = f"registry.example/tiny@{digest(b'another')}"
    with pytest.raises(ValidationFailed, match=f"answers with another artifact, {digest(registry.artifact)}"):
        artifacts.pull(registry.asked, out)
    registry.asked = REFERENCE
    for name, problem in ((bundle.MANIFEST, "is not a bundle"), ("model.onnx", "model.onnx is not in the artifact")):
        registry.hold({key: content for key, content in whole.items() if key != name})
        with pytest.raises(ValidationFailed, match=problem):
            artifacts.pull(REFERENCE, out)
    for content, problem in (
        (b"grapj", "does not have the digest of its layer"),
        (b"graph!", "is larger than 5 bytes"),
    ):
        registry.hold(whole)
        registry.layers[digest(b"graph")] = content
        with pytest.raises(ValidationFailed, match=f"model.onnx {problem}"):
            artifacts.pull(REFERENCE, out)
    for raw in (b"[]", b"{}", b"no json", b'{"layers": [{"digest": "x"}]}'):
        registry.artifact = raw
        with pytest.raises(ValidationFailed, match="is not a bundle"):
            artifacts.pull(REFERENCE, out)
    assert not out.exists() and not [*tmp_path.glob(".*")]
    out.mkdir()
    with pytest.raises(UsageError, match="is there already"):
        artifacts.pull(REFERENCE, out)


@pytest.mark.parametrize(("more", "taken"), [(0, True), (1, False)])
def test_the_largest_signature_and_artifact(
    more: int, taken: bool, small: Path, registry: Registry, tmp_path: Path
) -> None:
    """Four mebibytes each, of which no manifest could know."""
    registry.hold(contents(small) | {bundle.SIGNATURE: bytes((4 << 20) + more)})
    if taken:
        artifacts.pull(REFERENCE, tmp_path / "out")
        assert (tmp_path / "out" / bundle.SIGNATURE).stat().st_size == 4 << 20
    else:
        with pytest.raises(ValidationFailed, match=r"model\.sig is larger than 4194304 bytes"):
            artifacts.pull(REFERENCE, tmp_path / "out")
    registry.artifact = bytes((4 << 20) + more)
    with pytest.raises(ValidationFailed, match="is not a bundle" if taken else "artifact is larger than 4194304 bytes"):
        artifacts.pull(REFERENCE, tmp_path / "other")


def of_status(code: int | None) -> requests.HTTPError:
    response = None if code is None else SimpleNamespace(status_code=code)
    return requests.HTTPError("secret", response=response)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "problem", "next_step"),
    [
        (of_status(401), "the registry answers 401.", "Check the name and `docker login`."),
        (of_status(403), "the registry answers 403.", "Check the name and `docker login`."),
        (of_status(404), "the registry answers 404.", "Check the name and `docker login`."),
        (of_status(402), "the registry answers 402.", "Try again later."),
        (of_status(405), "the registry answers 405.", "Try again later."),
        (of_status(500), "the registry answers 500.", "Try again later."),
        (of_status(None), "the registry answers an error.", "Try again later."),
        (ValueError("secret"), "the registry refuses.", "Check the address"),
        (requests.exceptions.InvalidURL("secret"), "the registry cannot be reached or broke off.", "Check the address"),
        (requests.ConnectionError("secret"), "the registry cannot be reached or broke off.", "Check the address"),
        (ConnectionResetError("secret"), "the registry cannot be reached or broke off.", "Check the address"),
    ],
    ids=str,
)
def test_an_error_is_one_sentence_without_the_answer(error: Exception, problem: str, next_step: str) -> None:
    with pytest.raises(MissingRequirement) as caught, artifacts._errors("host/x:v1"):
        raise error
    assert caught.value.message == f"host/x:v1: {problem}" and caught.value.next_step.startswith(next_step)


# The client itself


class Answers:
    """A session that gives these answers in turn: a status and headers, or an error."""

    def __init__(self, *answers: Any) -> None:
        self.answers, self.asked = list(answers), []
        self.headers: dict[str, str] = {}

    def request(self, _method: str, _url: str, *, headers: Any, verify: Any, **_: Any) -> Any:
        self.asked.append((dict(headers), verify))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        status, of_answer = answer
        return SimpleNamespace(status_code=status, headers=of_answer)


@pytest.mark.parametrize(("plain_http", "prefix"), [(False, "https"), (True, "http")])
def test_a_client_checks_certificates_and_tells_nothing(plain_http: bool, prefix: str) -> None:
    """What a registry answers may repeat credentials, so that not even a critical message is shown."""
    import logging

    from oras.logger import logger

    made = artifacts._registry(plain_http)
    assert (made.prefix, made.auth.prefix) == (prefix, prefix)
    assert made._tls_verify is made.auth._tls_verify is True and made.auth.session is made.session
    assert not logger.logger.isEnabledFor(logging.CRITICAL)


@pytest.mark.parametrize(("failures", "waits", "fails"), [(0, [], False), (2, [3, 5], False), (3, [3, 5], True)])
def test_a_request_is_tried_three_times(
    failures: int, waits: list[int], fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[int] = []
    monkeypatch.setattr("time.sleep", waited.append)
    made = artifacts._registry(False)
    made.session = Answers(*[requests.ConnectionError("broken")] * failures, (200, {}))
    if fails:
        with pytest.raises(requests.ConnectionError):
            made.do_request("https://host/v2/")
    else:
        assert made.do_request("https://host/v2/").status_code == 200
    assert waited == waits and len(made.session.asked) == min(failures, 2) + 1


@pytest.mark.parametrize("known", ["bmFtZTpwYXNz", ""])
def test_a_registry_with_passwords_gets_the_known_one(known: str) -> None:
    """And keeps it for all that follows; without one the request is refused as it was."""
    made = artifacts._registry(False)
    made.session = made.auth.session = Answers()
    made.auth._basic_auth = known
    asking = SimpleNamespace(headers={"Www-Authenticate": 'Basic realm="here"'})
    headers, again = made.auth.authenticate_request(asking, {"Accept": "x"})
    ours = {"Authorization": f"Basic {known}"} if known else {}
    assert (headers, again) == ({"Accept": "x"} | ours, bool(known)) and made.session.headers == ours


@pytest.mark.parametrize("refresh", [None, False, True])
def test_a_registry_with_tokens_is_asked_by_oras(refresh: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that is known is kept, unless the registry has just refused it."""
    from oras.auth import TokenAuth

    asked: list[Any] = []
    monkeypatch.setattr(
        TokenAuth, "authenticate_request", lambda _self, *given: asked.append(given) or ({"token": "x"}, True)
    )
    made = artifacts._registry(False)
    asking = SimpleNamespace(headers={"Www-Authenticate": 'Bearer realm="there"'})
    more = {} if refresh is None else {"refresh": refresh}
    assert made.auth.authenticate_request(asking, {}, **more) == ({"token": "x"}, True)
    assert asked == [(asking, {}, bool(refresh))]
