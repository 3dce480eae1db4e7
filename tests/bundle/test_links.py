"""Nothing of a bundle is read through a link, whatever it leads to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dinoexport import bundle
from dinoexport.bundle import archive, onnx_file, signing
from dinoexport.bundle.manifest import unreadable
from dinoexport.errors import DinoexportError, UsageError, ValidationFailed
from dinoexport.system.untrusted import Unreadable
from tests.bundle.test_onnx_file import model


def to_a_copy(path: Path) -> Path:
    """The file, now a link to what it was."""
    path.rename(path.with_name("copy"))
    path.symlink_to(path.with_name("copy"))
    return path


@pytest.mark.parametrize(
    "read",
    [onnx_file.versions, lambda path: onnx_file.check(path, data_bytes=None), archive.read],
    ids=["versions", "check", "archive"],
)
def test_a_graph_and_an_archive(read: Callable[[Path], Any], tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(model())
    if read is archive.read:
        with path.open("wb") as file:
            np.savez(file, one=np.ones(1))
    read(path)
    with pytest.raises(Unreadable) as caught:
        read(to_a_copy(path))
    assert caught.value.is_link


def test_a_manifest_and_a_file_of_a_bundle(small: Path) -> None:
    bundle.verify(small)
    seen = bundle.check_files(small, bundle.read_manifest(small).files)
    bundle.check_same(small, seen)
    to_a_copy(small / "model.onnx.data")
    with pytest.raises(ValidationFailed, match="was changed or replaced while it was used"):
        bundle.check_same(small, seen)
    with pytest.raises(ValidationFailed, match=r"model\.onnx\.data in .* is a link, and a bundle holds plain files"):
        bundle.verify(small)
    (small / "copy").unlink()
    to_a_copy(small / bundle.MANIFEST)
    with pytest.raises(ValidationFailed, match=rf"{bundle.MANIFEST} in .* is a link"):
        bundle.read_manifest(small)


def test_a_file_that_became_a_link_after_it_failed_is_no_regular_file(small: Path) -> None:
    path = small / "model.onnx"
    error = Unreadable(path, "Input/output error")
    assert unreadable(small, path.name, error).message == (
        "The bundle is damaged: model.onnx cannot be read: Input/output error."
    )
    for change in (to_a_copy, Path.unlink):
        change(path)
        assert unreadable(small, path.name, error).message == (
            "The bundle is damaged: model.onnx is missing or not a regular file."
        )


def naming(hint: Any) -> str:
    """A signature that says no more than by which key it was made."""
    return json.dumps({"verificationMaterial": {"publicKey": {"hint": hint}}})


def test_a_signature(small: Path) -> None:
    (small / bundle.SIGNATURE).write_text(naming("0" * 64))
    assert signing.signed_by(small) == "0" * 64
    to_a_copy(small / bundle.SIGNATURE)
    with pytest.raises(ValidationFailed, match="is not readable: it is a link"):
        signing.signed_by(small)


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir], ids=["nothing", "a folder"])
def test_a_folder_that_is_no_bundle(make: Callable[[Path], Any], tmp_path: Path) -> None:
    make(tmp_path / bundle.MANIFEST)
    with pytest.raises(UsageError, match="is not a bundle: it has no"):
        bundle.read_manifest(tmp_path)


@pytest.mark.parametrize("hint", ["00", "G" * 64, 5, [], "0" * 65])
def test_a_signature_that_names_no_key(hint: Any, small: Path) -> None:
    (small / bundle.SIGNATURE).write_text(naming(hint))
    with pytest.raises(DinoexportError, match=r"is not readable: ValueError\('it names no key'\)"):
        signing.signed_by(small)


def rewritten(folder: Path, monkeypatch: pytest.MonkeyPatch, *, change: bool, sign: bool) -> str:
    """What is said of a manifest that is written anew."""
    from dinoexport.system import changes

    said: list[str] = []
    plain = changes.Change.commit
    monkeypatch.setattr(
        changes.Change, "commit", lambda self, steps, *, done: said.append(done) or plain(self, steps, done=done)
    )
    (folder / bundle.SIGNATURE).write_bytes(b"old")
    before = bundle.read_manifest(folder)
    after = before.changed(card={"limits": "new"}) if change else before
    bundle.rewrite(folder, before=before, after=after, sign=(lambda _manifest, name: name.encode()) if sign else None)
    assert bundle.read_manifest(folder) == after
    return said[0]


@pytest.mark.parametrize(
    ("change", "sign", "what", "signature"),
    [
        (True, True, "recorded in its manifest, which is signed", b"bundle"),
        (True, False, "recorded", None),
        (False, True, "signed", b"bundle"),
        (False, False, "signed", b"old"),
    ],
)
def test_a_rewritten_manifest_takes_the_old_signature_with_it(
    change: bool, sign: bool, what: str, signature: bytes | None, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = rewritten(small, monkeypatch, change=change, sign=sign)
    assert said == f"{small}: the verdict is {what}."
    path = small / bundle.SIGNATURE
    assert (path.read_bytes() if path.exists() else None) == signature
