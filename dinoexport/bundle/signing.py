"""Sign bundles and verify signatures: OpenSSF model signing, with the user's own elliptic-curve key.

`model.sig` is an in-toto statement of every file's SHA-256 in a DSSE envelope. `model_signing verify key` and other
tools of that scheme read it too (https://github.com/ossf/model-signing-spec). The manifest's hashes detect damage; a
signature proves who made the bundle.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import tempfile
from base64 import b64decode
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinoexport import bundle
from dinoexport.bundle import Manifest
from dinoexport.errors import DinoexportError, UsageError, ValidationFailed, require
from dinoexport.system import changes, files, untrusted
from dinoexport.system.untrusted import Unreadable

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

# model-signing 1.1 imports the second and does not declare it as a dependency.
PACKAGES = ("model_signing", "OpenSSL")
CURVES = ("secp256r1", "secp384r1", "secp521r1")
_MAKE_A_KEY = (
    "Make a pair: openssl ecparam -name prime256v1 -genkey -noout -out sign.pem; "
    "openssl ec -in sign.pem -pubout -out verify.pem"
)
# A statement of a bundle's dozen files takes 3 kB; a larger file is not a signature and is not read.
_SIGNATURE_MAX_BYTES = 1 << 20
_KEY_MAX_BYTES = 1 << 16
# Stands for the hash of a file that is not read.
_OTHER = "0" * 64


@dataclass(frozen=True, kw_only=True)
class Verified:
    """A verified signature. fingerprint: of the key; manifest: the manifest that was signed."""

    fingerprint: str
    manifest: Manifest


@dataclass(frozen=True, kw_only=True)
class Signer:
    """An opened private key. fingerprint: of its public half, as written in a signature."""

    path: Path
    passphrase: bytes | None
    fingerprint: str

    def sign(self, folder: Path) -> None:
        """Checks every byte of the bundle in `folder` against the manifest and signs it, in one step.

        Raises UsageError if the bundle did not pass or holds files that no build wrote: a signature covers the folder.
        """
        with changes.reading(folder):
            manifest = bundle.verify(folder)
        bundle.rewrite(folder, before=manifest, after=manifest, sign=self.signature)

    def signature(self, manifest: Manifest, name: str) -> bytes:
        """The signature of a folder called `name` that holds `manifest` and its files.

        Nothing is read: the hashes are the manifest's, so the signed content is the verified content.
        """
        from model_signing import signing

        if manifest.verdict != "passed":
            raise UsageError(
                f"{name} is {manifest.verdict}; only bundles that passed are signed.",
                next_step="dinoexport build makes a validated bundle.",
            )
        # The annotation of `password` is str, but it is passed on to a function that takes only bytes.
        passphrase: Any = self.passphrase
        config = signing.Config().use_elliptic_key_signer(private_key=self.path, password=passphrase)
        hashes: Any = _Hashes(name=name, sha256={f.name: f.sha256 for f in manifest.files} | _of_manifest(manifest))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / bundle.SIGNATURE
            config.set_hashing_config(hashes).sign(name, path)
            return path.read_bytes()


@dataclass(frozen=True, kw_only=True)
class _Hashes:
    """Replaces model-signing's hashing of a folder by hashes that are already known, by file name."""

    name: str
    sha256: Mapping[str, str]

    def hash(self, _folder: Any, **_: Any) -> Any:
        """The folder's manifest as model-signing defines it."""
        from model_signing import manifest
        from model_signing._hashing.hashing import Digest

        kind = {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": [bundle.SIGNATURE]}
        stated = manifest.SerializationType.from_args(kind)
        items = [stated.new_item(name, Digest("sha256", bytes.fromhex(found))) for name, found in self.sha256.items()]
        return manifest.Manifest(self.name, items, stated)

    def add_ignored_paths(self, **_: Any) -> None:
        """A statement cannot make dinoexport ignore a file."""


def _of_manifest(manifest: Manifest) -> dict[str, str]:
    return {bundle.MANIFEST: hashlib.sha256(manifest.to_bytes()).hexdigest()}


def open_signer(path: Path, *, ask: Callable[[], str]) -> Signer:
    """The opened private key in `path`; `ask` returns its passphrase if it has one.

    Raises UsageError when it is not a private key for this scheme.
    """
    require("sign", *PACKAGES)
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    raw = _read(path)
    if b"PUBLIC KEY" in raw:
        raise UsageError(
            f"{path} is a public key, and signing needs the private key.", next_step="Give that one as --sign."
        )
    passphrase = None
    try:
        key = load_pem_private_key(raw, None)
    except TypeError:  # raised for an encrypted key
        passphrase = ask().encode()
        try:
            key = load_pem_private_key(raw, passphrase)
        except ValueError:
            raise UsageError(f"That is not the passphrase of {path}.", next_step="Try again.") from None
    except Exception:  # a dozen kinds of damage
        raise _no_key(path, "private") from None
    if not isinstance(key, EllipticCurvePrivateKey) or key.curve.name not in CURVES:
        raise _no_key(path, "private")
    return Signer(path=path, passphrase=passphrase, fingerprint=_fingerprint(key.public_key()))


def verify(folder: Path, public_key: Path) -> Verified:
    """Verifies that `public_key` signed the bundle in `folder` and that every file is the signed one.

    Nothing else of the bundle is read before. Raises ValidationFailed for a bundle that is unsigned, signed by another
    key or changed, UsageError if `public_key` is not a public key.
    """
    require("sign", *PACKAGES)
    from cryptography.exceptions import InvalidSignature
    from model_signing import verifying

    fingerprint = _fingerprint(_open_public(public_key))
    with changes.reading(folder):
        if not untrusted.is_regular(folder / bundle.MANIFEST):
            raise UsageError(f"{folder} is not a bundle: it has no {bundle.MANIFEST}.", next_step="Check the path.")
        raw = _raw_signature(folder)
        signer = None if raw is None else _hint(folder, raw)
        if raw is None or signer is None:
            raise ValidationFailed(
                f"{folder} is not signed.", next_step="dinoexport validate BUNDLE --sign KEY signs it, if you trust it."
            )
        if signer != fingerprint:
            raise _not_theirs(folder, f"it was signed by another key ({signer[:16]}, not {fingerprint[:16]})")
        found = _hashes_of(folder)
        hashes: Any = _Hashes(name=folder.name, sha256=found)
        config = verifying.Config().use_elliptic_key_verifier(public_key=public_key).set_hashing_config(hashes)
        try:
            with tempfile.TemporaryDirectory() as private:
                (Path(private) / bundle.SIGNATURE).write_bytes(raw)
                config.verify(folder, Path(private) / bundle.SIGNATURE)
            manifest = bundle.read_manifest(folder)
            if _of_manifest(manifest)[bundle.MANIFEST] != found[bundle.MANIFEST]:
                raise _not_theirs(folder, f"{bundle.MANIFEST} was changed while it was read")
        except ValidationFailed:
            raise
        except InvalidSignature:
            raise _not_theirs(folder, f"{bundle.SIGNATURE} was changed after it was signed") from None
        except ValueError as error:
            problem = _differences(raw, found) if "Signature mismatch" in str(error) else str(error)
            raise _not_theirs(folder, problem) from None
        except Exception as error:  # a damaged signature raises a dozen kinds of exceptions
            raise _not_theirs(folder, f"{bundle.SIGNATURE} is not readable: {error!r}") from None
    return Verified(fingerprint=fingerprint, manifest=manifest)


def _hashes_of(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file in the folder but the signature; a ValidationFailed for anything that is not a file.

    A file that is not as large as the manifest says cannot be what was signed, so it is not read, whatever its size.
    """
    sizes: dict[str, int] = {}
    with suppress(DinoexportError):
        sizes = {file.name: file.size_bytes for file in bundle.read_manifest(folder).files}
    found = {}
    try:
        for name in sorted(path.name for path in folder.iterdir()):
            if name == bundle.SIGNATURE:
                continue
            with untrusted.opened(folder / name, links=False) as file:
                size = os.fstat(file.fileno()).st_size
                right = size <= bundle.MANIFEST_MAX_BYTES if name == bundle.MANIFEST else size == sizes.get(name)
                found[name] = files.sha256_of(file, doing=f"hashing {name}") if right else _OTHER
    except Unreadable as error:
        raise _not_theirs(folder, error.message) from None
    return found


def _differences(raw: bytes, found: Mapping[str, str]) -> str:
    """Which files differ from the statement, whose own signature is valid."""
    resources = json.loads(b64decode(json.loads(raw)["dsseEnvelope"]["payload"]))["predicate"]["resources"]
    signed = {resource["name"]: resource["digest"] for resource in resources}
    lines = [f"{name} was added" for name in sorted(found.keys() - signed.keys())]
    lines += [f"{name} is missing" for name in sorted(signed.keys() - found.keys())]
    lines += [f"{name} was changed" for name in sorted(signed.keys() & found.keys()) if signed[name] != found[name]]
    return ", ".join(lines)


def signed_by(folder: Path) -> str | None:
    """The fingerprint in the signature of the bundle in `folder`, unverified; None if it has no signature."""
    raw = _raw_signature(folder)
    return None if raw is None else _hint(folder, raw)


def _raw_signature(folder: Path) -> bytes | None:
    try:
        return untrusted.read_bytes(folder / bundle.SIGNATURE, max_bytes=_SIGNATURE_MAX_BYTES, links=False)
    except Unreadable as error:
        if error.absent:
            return None
        raise _not_theirs(folder, f"{bundle.SIGNATURE} is not readable: {error.problem}") from None


def _hint(folder: Path, raw: bytes) -> str:
    try:
        hint = json.loads(raw)["verificationMaterial"]["publicKey"]["hint"]
        if not isinstance(hint, str) or not re.fullmatch(r"[0-9a-f]{64}", hint):
            raise ValueError("it names no key")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _not_theirs(folder, f"{bundle.SIGNATURE} is not readable: {error!r}") from None
    return hint


def _open_public(path: Path) -> EllipticCurvePublicKey:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    raw = _read(path)
    if b"PRIVATE KEY" in raw:
        raise UsageError(
            f"{path} is a private key, and verifying needs the public key.",
            next_step=f"openssl ec -in {shlex.quote(str(path))} -pubout -out verify.pem writes it.",
        )
    try:
        key = load_pem_public_key(raw)
    except Exception:
        raise _no_key(path, "public") from None
    if not isinstance(key, EllipticCurvePublicKey) or key.curve.name not in CURVES:
        raise _no_key(path, "public")
    return key


def _read(path: Path) -> bytes:
    try:
        return untrusted.read_bytes(path, max_bytes=_KEY_MAX_BYTES)
    except Unreadable as error:
        raise UsageError(f"The key {path} cannot be read: {error.problem}.", next_step=_MAKE_A_KEY) from None


def _fingerprint(key: EllipticCurvePublicKey) -> str:
    """The SHA-256 of the public key as PEM, as model-signing writes it."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return hashlib.sha256(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def _no_key(path: Path, half: str) -> UsageError:
    return UsageError(f"{path} is not a {half} key in PEM on the curves {', '.join(CURVES)}.", next_step=_MAKE_A_KEY)


def _not_theirs(folder: Path, problem: str) -> ValidationFailed:
    return ValidationFailed(
        f"{folder} is not what was signed: {problem}.",
        next_step="Get it again from the owner of the key; do not serve it as it is.",
    )
