"""Signatures: made and read by OpenSSF's own tool, and whatever was changed, swapped or left unsigned is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from base64 import b64decode
from pathlib import Path
from typing import Any

import pytest
import typer

from dinoexport import bundle
from dinoexport.bundle import signing
from dinoexport.errors import DinoexportError, MissingRequirement, UsageError, ValidationFailed
from dinoexport.pipeline import build as pipeline
from dinoexport.runtime import runners
from tests.bundle.test_bundle import manifest
from tests.command_line import run
from tests.conftest import DATA
from tests.runtime.test_engine_bundles import A100, with_engine

TINY = str(DATA / "tiny_swiglu.toml")
KEYS = {
    "sign": ("prime256v1",),
    "other": ("secp384r1",),
    "locked": ("prime256v1", "-aes256", "-passout", "pass:open sesame"),
    "bitcoin": ("secp256k1",),
}


def openssl(*args: object) -> None:
    subprocess.run(["openssl", *map(str, args)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs NAME.pem and NAME.pub, made by OpenSSL as the error messages say."""
    folder = tmp_path_factory.mktemp("keys")
    for name, (curve, *lock) in KEYS.items():
        openssl("ecparam", "-name", curve, "-genkey", "-noout", "-out", folder / "plain.pem")
        openssl("ec", "-in", folder / "plain.pem", "-pubout", "-out", folder / f"{name}.pub")
        openssl("ec", "-in", folder / "plain.pem", *lock, "-out", folder / f"{name}.pem")
    openssl("genrsa", "-out", folder / "rsa.pem", "1024")
    openssl("rsa", "-in", folder / "rsa.pem", "-pubout", "-out", folder / "rsa.pub")
    (folder / "text.pem").write_text("no key at all")
    (folder / "large.pem").write_bytes((folder / "sign.pem").read_bytes() + b"\n" * (1 << 16))
    return folder


def never() -> str:
    raise AssertionError("nobody was to be asked")


@pytest.fixture
def signed(small: Path, keys: Path) -> Path:
    signing.open_signer(keys / "sign.pem", ask=never).sign(small)
    return small


def test_openssf_own_tool_takes_it(signed: Path, keys: Path) -> None:
    """The oracle is the command of the scheme's own authors."""
    tool = [sys.executable, "-m", "model_signing", "verify", "key", str(signed)]
    tool += ["--signature", str(signed / bundle.SIGNATURE), "--public_key"]
    assert subprocess.run([*tool, str(keys / "sign.pub")], check=False, capture_output=True).returncode == 0
    assert subprocess.run([*tool, str(keys / "other.pub")], check=False, capture_output=True).returncode != 0
    envelope = json.loads((signed / bundle.SIGNATURE).read_text())["dsseEnvelope"]
    assert envelope["payloadType"] == "application/vnd.in-toto+json"
    fingerprint = signing.verify(signed, keys / "sign.pub").fingerprint
    assert fingerprint == signing.signed_by(signed) != signing.open_signer(keys / "other.pem", ask=never).fingerprint


def test_what_a_signature_states(signed: Path) -> None:
    """The files by their SHA-256, and that none of them is a link."""
    statement = json.loads(b64decode(json.loads((signed / bundle.SIGNATURE).read_text())["dsseEnvelope"]["payload"]))
    stated = statement["predicate"]["serialization"]
    assert stated == {
        "method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": [bundle.SIGNATURE],
    }  # fmt: skip
    resources = {resource["name"]: resource["digest"] for resource in statement["predicate"]["resources"]}
    assert resources == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in signed.iterdir()
        if path.name != bundle.SIGNATURE
    }


@pytest.mark.parametrize("fits", [True, False])
def test_only_files_of_the_listed_size_are_hashed(fits: bool, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A manifest has no listed size, but a largest one."""
    (small / "model.onnx.data").write_bytes(b"longer than the manifest says")
    size = (small / bundle.MANIFEST).stat().st_size
    found = signing._hashes_of(small)
    monkeypatch.setattr(bundle, "MANIFEST_MAX_BYTES", size if fits else size - 1)
    assert signing._hashes_of(small) == (found if fits else found | {bundle.MANIFEST: "0" * 64})
    assert found == {
        path.name: "0" * 64 if path.name == "model.onnx.data" else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in small.iterdir()
    }


def test_a_file_that_is_now_a_link_is_not_hashed(small: Path) -> None:
    (small / "model.onnx").rename(small.parent / "copy")
    (small / "model.onnx").symlink_to(small.parent / "copy")
    with pytest.raises(ValidationFailed, match="it is a link"):
        signing._hashes_of(small)


def test_the_largest_file_that_may_be_a_signature(small: Path) -> None:
    """A mebibyte; a real one has 3 kB."""
    for size, problem in ((1 << 20, "JSONDecodeError"), ((1 << 20) + 1, "no such file has more than 1,048,576")):
        (small / bundle.SIGNATURE).write_bytes(bytes(size))
        with pytest.raises(ValidationFailed, match=f"is not readable: .*{problem}"):
            signing.signed_by(small)


def test_an_encrypted_key_asks_for_its_passphrase(small: Path, keys: Path) -> None:
    signing.open_signer(keys / "locked.pem", ask=lambda: "open sesame").sign(small)
    signing.verify(small, keys / "locked.pub")
    with pytest.raises(UsageError, match="not the passphrase of"):
        signing.open_signer(keys / "locked.pem", ask=lambda: "sesame")


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("absent.pem", "cannot be read: No such file"), ("sign.pub", "is a public key"),
        ("rsa.pem", "not a private key in PEM"), ("text.pem", "not a private key in PEM"),
        ("bitcoin.pem", "on the curves secp256r1"), ("", "cannot be read: it is a folder"),
        ("large.pem", "cannot be read: it has .* bytes"),
    ],
)  # fmt: skip
def test_what_cannot_sign(keys: Path, key: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        signing.open_signer(keys / key, ask=never)
    assert caught.value.next_step


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("absent.pub", "cannot be read"), ("sign.pem", "is a private key"), ("rsa.pub", "not a public key in PEM"),
        ("bitcoin.pub", "on the curves"), ("text.pem", "not a public key in PEM"),
    ],
)  # fmt: skip
def test_what_cannot_verify(signed: Path, keys: Path, key: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        signing.verify(signed, keys / key)
    assert caught.value.next_step


def resigned(folder: Path, keys: Path, **changes: Any) -> None:
    """The statement inside the envelope changed, the signature left: what an attacker without the key can do."""
    import base64

    content = json.loads((folder / bundle.SIGNATURE).read_text())
    statement = json.loads(base64.b64decode(content["dsseEnvelope"]["payload"]))
    statement["predicate"] |= changes
    content["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    (folder / bundle.SIGNATURE).write_text(json.dumps(content))


def foreign(folder: Path, keys: Path) -> None:
    signing.open_signer(keys / "other.pem", ask=never).sign(folder)


def pretended(folder: Path, keys: Path) -> None:
    """Signed by another key, under the fingerprint of the right one."""
    right = signing.signed_by(folder)
    foreign(folder, keys)
    content = json.loads((folder / bundle.SIGNATURE).read_text())
    content["verificationMaterial"]["publicKey"]["hint"] = right
    (folder / bundle.SIGNATURE).write_text(json.dumps(content))


def linked(folder: Path, keys: Path) -> None:
    (folder / "model.onnx").rename(folder.parent / "elsewhere")
    (folder / "model.onnx").symlink_to(folder.parent / "elsewhere")


def forged_manifest(folder: Path, keys: Path) -> None:
    """A manifest whose own hash is right, by somebody who knows how it is made."""
    found = bundle.read_manifest(folder).model_copy(update={"variant": "another"})
    (folder / bundle.MANIFEST).write_bytes(found.to_bytes())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder, _: (folder / bundle.SIGNATURE).unlink(), "is not signed"),
        (lambda folder, _: (folder / "model.onnx").write_bytes(b"grapj"), "signed: model.onnx was changed.$"),
        (forged_manifest, "signed: manifest.json was changed.$"),
        (lambda folder, _: (folder / "model.onnx").unlink(), "signed: model.onnx is missing.$"),
        (lambda folder, _: (folder / "extra.bin").write_bytes(b""), "signed: extra.bin was added.$"),
        (lambda folder, _: (folder / ".gitattributes").write_bytes(b""), "signed: .gitattributes was added.$"),
        (linked, "model.onnx"),
        (foreign, r"signed by another key \([0-9a-f]{16}, not [0-9a-f]{16}\)\.$"),
        (pretended, "model.sig was changed"),
        (lambda folder, keys: resigned(folder, keys, resources=[]), "model.sig was changed"),
        (lambda folder, _: (folder / bundle.SIGNATURE).write_bytes(b"{}"), "model.sig is not readable"),
        (lambda folder, _: (folder / bundle.SIGNATURE).write_bytes(b"["), "model.sig is not readable"),
        (lambda folder, _: (folder / bundle.SIGNATURE).write_bytes(b"\xff" * 2_000_000), "model.sig is not readable"),
    ],
)  # fmt: skip
def test_what_was_changed_is_refused(signed: Path, keys: Path, change: Any, words: str) -> None:
    signing.verify(signed, keys / "sign.pub")
    change(signed, keys)
    with pytest.raises(ValidationFailed, match=words) as caught:
        signing.verify(signed, keys / "sign.pub")
    assert caught.value.next_step and caught.value.exit_code == 1


def test_what_is_no_bundle_is_not_called_forged(tmp_path: Path, keys: Path) -> None:
    for path in (tmp_path / "absent", keys / "text.pem"):
        assert signing.signed_by(path) is None
        with pytest.raises(UsageError, match="is not a bundle"):
            signing.verify(path, keys / "sign.pub")


@pytest.mark.parametrize("field", ["dsseEnvelope", "mediaType", "verificationMaterial"])
def test_a_signature_without_a_part_is_refused(signed: Path, keys: Path, field: str) -> None:
    content = json.loads((signed / bundle.SIGNATURE).read_text())
    del content[field]
    (signed / bundle.SIGNATURE).write_text(json.dumps(content))
    with pytest.raises(ValidationFailed, match="is not what was signed"):
        signing.verify(signed, keys / "sign.pub")


def test_nothing_is_signed_that_no_build_put_there(small: Path, keys: Path) -> None:
    signer = signing.open_signer(keys / "sign.pem", ask=never)
    (small / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"notes\.txt"):
        signer.sign(small)
    (small / "notes.txt").unlink()
    (small / bundle.MANIFEST).write_bytes(
        manifest(verdict="rejected", files=bundle.read_manifest(small).files).to_bytes()
    )
    with pytest.raises(UsageError, match="only bundles that passed are signed"):
        signer.sign(small)
    assert signing.signed_by(small) is None and not list(small.glob("*.partial"))


def test_without_the_package(small: Path, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    for refused in (
        lambda: signing.verify(small, keys / "sign.pub"),
        lambda: signing.open_signer(keys / "sign.pem", ask=never),
    ):
        with pytest.raises(MissingRequirement, match="model_signing") as caught:
            refused()
        assert "dinoexport[sign]" in caught.value.next_step


# The verbs


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, keys: Path) -> Path:
    """A tiny bundle, signed while it was built."""
    out = tmp_path_factory.mktemp("signed") / "bundle"
    made = run("build", TINY, "--weights", "synthetic:0", "--out", out, "--sign", keys / "sign.pem")
    assert made.exit_code == 0 and "Signed: by key" in made.stdout, made.output
    return out


def test_build_signs_what_it_publishes(built: Path, keys: Path, tmp_path: Path) -> None:
    signing.verify(built, keys / "sign.pub")
    assert [path.name for path in built.parent.iterdir()] == ["bundle"]
    assert "not verified here" in run("inspect", built).stdout
    copy = tmp_path / "bundle"
    shutil.copytree(built, copy)
    request = pipeline.build_request(TINY, weights="synthetic:0", out=copy)
    assert "export" in pipeline.build(request).reused, "a signed bundle is one that may be replaced"
    assert signing.signed_by(copy) is None and run("inspect", copy, "--json").stdout.count('"signed": "no"') == 1


def test_validate_and_deploy_verify(built: Path, keys: Path, tmp_path: Path) -> None:
    told = json.loads(run("validate", built, "--verify", keys / "sign.pub", "--json").stdout)
    assert told["verified"] and told["signed_by"] == signing.signed_by(built)
    shown = run("validate", built)
    assert shown.exit_code == 0 and "not verified; --verify KEY does that" in shown.stdout
    assert json.loads(run("validate", built, "--json").stdout)["verified"] is False
    repository = tmp_path / "models"
    for verb in (("validate", built), ("deploy", built, "--to", repository)):
        refused = run(*verb, "--verify", keys / "other.pub")
        assert refused.exit_code == 1 and "signed by another key" in refused.stderr
    assert not repository.exists()


def test_what_was_rejected_is_published_unsigned(keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dinoexport.models.dinov2.model import Dinov2Model

    right = Dinov2Model.drive
    wrong = lambda self, runners, inputs: {n: 1.001 * a for n, a in right(self, runners, inputs).items()}  # noqa: E731
    monkeypatch.setattr(Dinov2Model, "drive", wrong)
    out = tmp_path / "bundle"
    made = run("build", TINY, "--weights", "synthetic:0", "--out", out, "--keep-rejected", "--sign", keys / "sign.pem")
    assert made.exit_code == 1 and "marked rejected" in made.stderr
    assert bundle.read_manifest(out).verdict == "rejected" and signing.signed_by(out) is None


def test_bad_keys_are_refused_before_any_work(built: Path, keys: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    refused = run("build", TINY, "--weights", "synthetic:0", "--out", out, "--sign", keys / "absent.pem")
    assert refused.exit_code == 2 and "openssl ecparam" in refused.stderr
    refused = run("build", TINY, "--weights", "synthetic:0", "--out", out, "--sign", keys / "locked.pem")
    assert refused.exit_code == 2 and "no terminal to ask" in refused.stderr
    assert not any(tmp_path.iterdir())


def test_the_passphrase_is_asked_for_on_a_terminal(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dinoexport.cli import terminal

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(typer, "prompt", lambda words, **how: "open sesame" if how["hide_input"] else words)
    assert terminal.signer_of(keys / "locked.pem").passphrase == b"open sesame"


def test_a_signed_manifest_changes_only_with_its_signature(
    built: Path, keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the target the engine's run is recorded in the manifest, which is signed: by the target's own key, or not."""
    folder = with_engine(built, tmp_path / "bundle")
    assert signing.signed_by(folder) is None, "whoever rewrites a manifest removes the signature of the old one"
    signer = signing.open_signer(keys / "sign.pem", ask=never)
    signer.sign(folder)
    before = (folder / bundle.MANIFEST).read_bytes()

    def open_engines(model: Any, _engines: Any, graphs: Any, **_: Any) -> runners.OnGpu:
        return runners.OnGpu(candidate=runners.open_candidate(model, graphs), name="the engine", device=A100.name)

    monkeypatch.setattr(runners, "open_engines", open_engines)
    shown = run("validate", folder, "--verify", keys / "sign.pub")
    assert shown.exit_code == 0 and "Not recorded, because the bundle is signed" in shown.stdout
    assert (folder / bundle.MANIFEST).read_bytes() == before
    signing.verify(folder, keys / "sign.pub")
    told = run("validate", folder, "--verify", keys / "sign.pub", "--sign", keys / "other.pem", "--json")
    assert json.loads(told.stdout)["recorded"] and bundle.verify(folder).engines[0].executed.startswith("on ")
    signing.verify(folder, keys / "other.pub")
    with pytest.raises(DinoexportError, match="signed by another key"):
        signing.verify(folder, keys / "sign.pub")
