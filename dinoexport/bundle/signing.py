"""Who made a bundle: OpenSSF model signing, with an elliptic-curve key of your own.

`model.sig` is an in-toto statement of every file's SHA-256 in a DSSE envelope, what `model_signing verify key` and
other tools of that scheme read too (https://github.com/ossf/model-signing-spec). The manifest's own hashes notice
damage; a signature notices who did it.
"""

from __future__ import annotations

import hashlib
import json
from base64 import b64decode
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinoexport import bundle
from dinoexport.errors import UsageError, ValidationFailed, require
from dinoexport.system import files

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from model_signing import hashing

# model-signing 1.1 imports the second and does not ask for it.
PACKAGES = ("model_signing", "OpenSSL")
CURVES = ("secp256r1", "secp384r1", "secp521r1")
_MAKE_A_KEY = (
    "Make a pair: openssl ecparam -name prime256v1 -genkey -noout -out sign.pem; "
    "openssl ec -in sign.pem -pubout -out verify.pem"
)
# A statement of a bundle's dozen files takes 3 kB; what is larger is none, and is not read.
_SIGNATURE_MAX_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Signer:
    """A private key that was opened. fingerprint: of its public half, as it stands in a signature."""

    path: Path
    passphrase: bytes | None
    fingerprint: str

    def sign(self, folder: Path) -> None:
        """Signs every file of the bundle in `folder`; the signature appears by rename.

        Raises UsageError when it did not pass, or holds what no build put there: that would be signed too.
        """
        from model_signing import signing

        manifest = bundle.read_manifest(folder)
        if manifest.verdict != "passed":
            raise UsageError(
                f"{folder} is {manifest.verdict}, and only what passed is signed.",
                next_step="dinoexport build makes a judged bundle.",
            )
        known = {file.name for file in manifest.files} | {bundle.MANIFEST, bundle.SIGNATURE}
        if added := sorted({path.name for path in folder.iterdir()} - known):
            raise UsageError(
                f"{folder} holds what no build put there: {', '.join(added)}.",
                next_step="Move that away first: a signature speaks for everything in the folder.",
            )
        # The annotation of `password` says str, but it is handed on to what takes bytes alone.
        passphrase: Any = self.passphrase
        config = signing.Config().use_elliptic_key_signer(private_key=self.path, password=passphrase)
        partial = folder / f"{bundle.SIGNATURE}.partial"
        with files.disk_errors(folder):
            try:
                config.set_hashing_config(_all_files()).sign(folder, partial)
                partial.replace(folder / bundle.SIGNATURE)
            finally:
                partial.unlink(missing_ok=True)


def open_signer(path: Path, *, ask: Callable[[], str]) -> Signer:
    """The private key in `path`, opened; `ask` is asked for its passphrase if it has one.

    Raises UsageError when it is no private key for this scheme.
    """
    require("sign", *PACKAGES)
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    raw = _read(path)
    if b"PUBLIC KEY" in raw:
        raise UsageError(
            f"{path} is a public key, and signing takes the private one.", next_step="Give that one as --sign."
        )
    passphrase = None
    try:
        key = load_pem_private_key(raw, None)
    except TypeError:  # how it says that the key is encrypted
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


def verify(folder: Path, public_key: Path) -> str:
    """The fingerprint of `public_key`, after every file of the bundle in `folder` was found to be what it signed.

    Nothing else of the bundle is looked at before. Raises ValidationFailed for a bundle that is unsigned, signed by
    another key or changed, UsageError for what is no public key.
    """
    require("sign", *PACKAGES)
    from cryptography.exceptions import InvalidSignature
    from model_signing import verifying

    fingerprint = _fingerprint(_open_public(public_key))
    if not (folder / bundle.MANIFEST).is_file():
        raise UsageError(f"{folder} is no bundle: it has no {bundle.MANIFEST}.", next_step="Check the path.")
    signer = signed_by(folder)
    if signer is None:
        raise ValidationFailed(
            f"{folder} is not signed.", next_step="dinoexport validate BUNDLE --sign KEY signs it, if you trust it."
        )
    if signer != fingerprint:
        raise _not_theirs(folder, f"it was signed by another key ({signer[:16]}, not {fingerprint[:16]})")
    config = verifying.Config().use_elliptic_key_verifier(public_key=public_key).set_hashing_config(_all_files())
    try:
        config.verify(folder, folder / bundle.SIGNATURE)
    except InvalidSignature:
        raise _not_theirs(folder, f"{bundle.SIGNATURE} was changed after it was signed") from None
    except ValueError as error:
        raise _not_theirs(folder, _differences(folder) if "Signature mismatch" in str(error) else str(error)) from None
    except Exception as error:  # a signature lacks its parts in a dozen ways
        raise _not_theirs(folder, f"{bundle.SIGNATURE} is not readable: {error!r}") from None
    return fingerprint


def _differences(folder: Path) -> str:
    """Which files are not those of the statement, whose own signature is right."""
    envelope = json.loads((folder / bundle.SIGNATURE).read_bytes())["dsseEnvelope"]
    resources = json.loads(b64decode(envelope["payload"]))["predicate"]["resources"]
    signed = {resource["name"]: resource["digest"] for resource in resources}
    found = {item.identifier: item.digest.digest_hex for item in _all_files().hash(folder).resource_descriptors()}
    lines = [f"{name} was added" for name in sorted(found.keys() - signed.keys())]
    lines += [f"{name} is missing" for name in sorted(signed.keys() - found.keys())]
    lines += [f"{name} was changed" for name in sorted(signed.keys() & found.keys()) if signed[name] != found[name]]
    return ", ".join(lines)


def signed_by(folder: Path) -> str | None:
    """The fingerprint that the signature of the bundle in `folder` bears, unverified; None when it has no signature."""
    path = folder / bundle.SIGNATURE
    try:
        if path.is_symlink() or path.stat().st_size > _SIGNATURE_MAX_BYTES:
            raise ValueError("it is a link, or too large")
        return str(json.loads(path.read_bytes())["verificationMaterial"]["publicKey"]["hint"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _not_theirs(folder, f"{bundle.SIGNATURE} is not readable: {error!r}") from None


def _all_files() -> hashing.Config:
    """Every file but the signature; by default the scheme would pass over those it takes for git's."""
    from model_signing import hashing

    return hashing.Config().set_ignored_paths(paths=[bundle.SIGNATURE], ignore_git_paths=False)


def _open_public(path: Path) -> EllipticCurvePublicKey:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    raw = _read(path)
    if b"PRIVATE KEY" in raw:
        raise UsageError(
            f"{path} is a private key, and verifying takes the public one.",
            next_step=f"openssl ec -in {path} -pubout -out verify.pem writes it; keep the private one where you sign.",
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
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"The key {path} cannot be read: {error.strerror}.", next_step=_MAKE_A_KEY) from None


def _fingerprint(key: EllipticCurvePublicKey) -> str:
    """As model-signing writes it: the SHA-256 of the public key as PEM."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return hashlib.sha256(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def _no_key(path: Path, half: str) -> UsageError:
    return UsageError(f"{path} is no {half} key in PEM on the curves {', '.join(CURVES)}.", next_step=_MAKE_A_KEY)


def _not_theirs(folder: Path, problem: str) -> ValidationFailed:
    return ValidationFailed(
        f"{folder} is not what was signed: {problem}.",
        next_step="Get it again from who signed it; do not serve it as it is.",
    )
