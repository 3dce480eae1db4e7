"""Bundles by URL: built to, validated from and replaced in a real S3 server; damaged, claimed, unreachable ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dinoexport import bundle
from dinoexport.bundle import in_store
from dinoexport.errors import BuildError, MissingRequirement, UsageError, ValidationFailed
from dinoexport.system import store
from tests.command_line import run
from tests.conftest import DATA
from tests.stores.s3_server import S3Server


def url(request: pytest.FixtureRequest) -> str:
    """A prefix of this test's own."""
    return f"s3://bucket/{request.node.name.replace('[', '-').strip(']')}"


def test_made_in_and_validated_from_a_bucket(server: S3Server, tiny: Path, request: pytest.FixtureRequest) -> None:
    there = url(request) + "/tiny"
    made = run("export", DATA / "tiny_swiglu.toml", "--weights", "synthetic:0", "--out", there, "--json")
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["bundle"] == there
    manifest = bundle.read_manifest(in_store.local_copy(there))
    names = {name for name, _ in store.open_place(there).files()}
    assert names == {file.name for file in manifest.files} | {bundle.MANIFEST} and manifest.verdict == "unjudged"
    in_store.send(tiny, there)
    validated = run("validate", there, "--json")
    assert validated.exit_code == 0 and json.loads(validated.stdout)["bundle"] == there, validated.output
    assert run("inspect", there).exit_code == 0
    assert run("validate", there, "--sign", "key.pem").exit_code == 2


def test_a_copy_is_taken_once_and_mended(server: S3Server, tiny: Path, request: pytest.FixtureRequest) -> None:
    there = url(request)
    told: list[tuple[int, int | None]] = []
    in_store.send(tiny, there, progress=lambda _doing, done, total: told.append((done, total)))
    count = len(bundle.read_manifest(tiny).files)
    assert told == [(number, count) for number in range(1, count + 1)]
    said: list[str] = []
    folder = in_store.local_copy(there, progress=lambda doing, *_: said.append(doing))
    assert any("taking model.onnx" in words for words in said)
    said.clear()
    assert in_store.local_copy(there, progress=lambda doing, *_: said.append(doing)) == folder
    assert not any("taking" in words for words in said)
    (folder / "model.onnx").write_bytes(b"bit rot")
    assert bundle.verify(in_store.local_copy(there)) == bundle.read_manifest(tiny)


def test_replaced_by_one_with_fewer_files(
    server: S3Server, tiny: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    there = url(request)
    in_store.send(tiny, there)
    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    manifest = bundle.read_manifest(other)
    fewer = manifest.model_copy(update={"files": tuple(f for f in manifest.files if f.name != bundle.REPORT_HTML)})
    (other / bundle.MANIFEST).write_bytes(fewer.to_bytes())
    (other / bundle.SIGNATURE).write_bytes(b"a signature")
    in_store.send(other, there)
    names = {name for name, _ in store.open_place(there).files()}
    assert names == {file.name for file in fewer.files} | {bundle.MANIFEST, bundle.SIGNATURE}
    in_store.send(tiny, there)
    assert bundle.SIGNATURE not in {name for name, _ in store.open_place(there).files()}


def test_a_reader_while_it_is_replaced(
    server: S3Server, tiny: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old manifest with a new file is noticed, and the new manifest read; what stays wrong is damage."""
    there = url(request)
    in_store.send(tiny, there)
    place = store.RemotePlace(there)
    real, manifest = place.read(bundle.MANIFEST), bundle.read_manifest(tiny)
    changed = manifest.model_copy(update={"target": "another"}).to_bytes()
    page = place.read(bundle.REPORT_HTML)
    place.write(bundle.REPORT_HTML, b"of another bundle")
    fetch = store.RemotePlace.fetch

    def finished_meanwhile(self: store.RemotePlace, name: str, target: Path, **how: int) -> None:
        fetch(self, name, target, **how)
        if name == bundle.REPORT_HTML and place.read(bundle.MANIFEST) == real:
            place.write(bundle.REPORT_HTML, page)
            place.write(bundle.MANIFEST, changed)

    monkeypatch.setattr(store.RemotePlace, "fetch", finished_meanwhile)
    assert bundle.verify(in_store.local_copy(there)).target == "another"
    monkeypatch.undo()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    place.write("model.onnx", b"of another bundle")
    shutil.rmtree(in_store.cache_folder() / "bundles", ignore_errors=True)
    with pytest.raises(ValidationFailed, match="its files are not those of its manifest"):
        in_store.local_copy(there)


def test_two_writers(server: S3Server, tiny: Path, request: pytest.FixtureRequest, monkeypatch: Any) -> None:
    there = url(request)
    upload = store.RemotePlace.upload
    tried: list[str] = []

    def meanwhile(self: store.RemotePlace, source: Path, name: str, *, new: bool = False) -> None:
        if not tried:
            tried.append(name)
            with pytest.raises(BuildError, match="Another process is writing") as raised:
                in_store.send(tiny, there)
            assert in_store.WRITING in str(raised.value.next_step)
        upload(self, source, name, new=new)

    monkeypatch.setattr(store.RemotePlace, "upload", meanwhile)
    in_store.send(tiny, there)
    assert tried and bundle.verify(in_store.local_copy(there))
    assert in_store.WRITING not in {name for name, _ in store.open_place(there).files()}


def test_what_is_refused(server: S3Server, tiny: Path, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    there = url(request)
    with pytest.raises(UsageError, match="is not a bundle"):
        in_store.local_copy(there)
    store.open_place(there).write("photo.jpg", b"a photo")
    for refuses in (in_store.check_reachable, lambda place: in_store.send(tiny, place)):
        with pytest.raises(UsageError, match="holds files that belong to no bundle"):
            refuses(there)
    assert store.open_place(there).read("photo.jpg") == b"a photo"
    shown = run("build", "vits14", "--weights", "synthetic:0", "--out", "https://example.org/x")
    assert shown.exit_code == 2 and "cannot be written to" in shown.stderr
    store.open_place(there).write(bundle.MANIFEST, b"x" * (bundle.MANIFEST_MAX_BYTES + 1))
    with pytest.raises(ValidationFailed, match="not readable"):
        in_store.local_copy(there)


def test_no_store_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before the first stage, in one sentence without the credentials."""
    monkeypatch.setattr(store.remote, "_RETRY_S", 0.3)
    for name, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "an-id", "AWS_SECRET_ACCESS_KEY": "a-secret-key",
        "AWS_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    shown = run("build", DATA / "tiny_swiglu.toml", "--weights", "synthetic:0", "--out", "s3://bucket/x")
    assert shown.exit_code == MissingRequirement.exit_code
    assert "cannot be reached" in shown.stderr and "secret" not in shown.output and "hashing" not in shown.output
