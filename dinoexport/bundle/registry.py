"""A bundle as an OCI artifact in a registry: each of its files is a layer, and a digest names exactly one bundle.

oras-py talks to the registry and reads the credentials that `docker login` keeps. A registry's answers are not trusted:
the artifact must have the digest in the reference, and each file the hash in the bundle's manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dinoexport.bundle import checks
from dinoexport.bundle import manifest as manifests
from dinoexport.bundle.manifest import MANIFEST, MANIFEST_MAX_BYTES, SIGNATURE, Manifest
from dinoexport.errors import MissingRequirement, UsageError, ValidationFailed, require
from dinoexport.spec import Progress, silent
from dinoexport.system import files

_FILE_TYPE = "application/vnd.dinoexport.bundle.file"
_ARTIFACT = "application/vnd.oci.image.manifest.v1+json"
_TITLE = "org.opencontainers.image.title"
_ARTIFACT_MAX_BYTES = 4 << 20
_SIGNATURE_MAX_BYTES = 1 << 22
_PIECE_BYTES = 1 << 20
_REFERENCE = re.compile(
    r"(?P<host>[A-Za-z0-9.-]+(?::\d{1,5})?)/(?P<name>[a-z0-9][a-z0-9._/-]*)"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{0,127})|@(?P<digest>sha256:[0-9a-f]{64}))",
    re.ASCII,
)


def push(folder: Path, reference: str, *, plain_http: bool = False) -> str:
    """Pushes the bundle in `folder` to HOST/NAME:TAG; returns HOST/NAME@sha256:..., which always names these bytes.

    Raises UsageError for a reference without a tag, ValidationFailed for a damaged bundle, MissingRequirement for a
    registry that cannot be reached or refuses.
    """
    parts = _parts(reference)
    if parts["tag"] is None:
        raise UsageError(f"{reference} has no tag to push to.", next_step="Write it as HOST/NAME:TAG.")
    if ":" in str(folder):
        raise UsageError(f"{folder} has a colon in its path, which oras takes for a type.", next_step="Rename it.")
    manifest = checks.verify(folder)
    names = [file.name for file in manifest.files] + [MANIFEST]
    names += [SIGNATURE] if (folder / SIGNATURE).exists() else []
    registry = _registry(plain_http)
    with _errors(reference):
        registry.push(
            reference,
            files=[f"{(folder / name).absolute()}:{_FILE_TYPE}" for name in names],
            disable_path_validation=True,
            manifest_annotations={
                "org.opencontainers.image.licenses": manifest.checkpoint.licence,
                "dinoexport.variant": manifest.variant,
                "dinoexport.verdict": manifest.verdict,
            },
            quiet=True,
        )
        artifact = _artifact(registry, reference)
    return f"{parts['host']}/{parts['name']}@sha256:{hashlib.sha256(artifact).hexdigest()}"


def pull(reference: str, out: Path, *, plain_http: bool = False, progress: Progress = silent) -> str:
    """Puts the bundle at `reference` into the new folder `out`; returns the reference by digest.

    Raises UsageError for an `out` that is there already, ValidationFailed for bytes that are not what the digest or the
    bundle's manifest says, MissingRequirement for a registry that cannot be reached, refuses or has no such thing.
    """
    parts = _parts(reference)
    if os.path.lexists(out):
        raise UsageError(f"{out} is there already.", next_step="Choose another --out.")
    registry = _registry(plain_http)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    with files.disk_errors(out):
        partial.mkdir(parents=True)
        try:
            with _errors(reference):
                artifact = _artifact(registry, reference)
                digest = f"sha256:{hashlib.sha256(artifact).hexdigest()}"
                if parts["digest"] not in (None, digest):
                    raise ValidationFailed(
                        f"{reference}: the registry answers with another artifact, {digest}.",
                        next_step="Do not use it.",
                    )
                layers = _layers(artifact, reference)
                manifest = _manifest(registry, reference, layers, partial)
                for file in manifest.files:
                    progress(f"pulling {file.name}", 0, file.size_bytes)
                    _layer(registry, reference, layers, file.name, partial, max_bytes=file.size_bytes)
                if SIGNATURE in layers:
                    _layer(registry, reference, layers, SIGNATURE, partial, max_bytes=_SIGNATURE_MAX_BYTES)
            checks.check_files(partial, manifest.files, progress=progress)
            partial.rename(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return f"{parts['host']}/{parts['name']}@{digest}"


def _parts(reference: str) -> dict[str, str | None]:
    found = _REFERENCE.fullmatch(reference)
    if found is None:
        raise UsageError(
            f"{reference!r} names nothing in a registry.", next_step="Write HOST/NAME:TAG or HOST/NAME@sha256:DIGEST."
        )
    return found.groupdict()


def _registry(plain_http: bool) -> Any:
    require("registry", "oras")
    import logging

    from oras import provider  # its modules import each other, and only in this order
    from oras.auth import TokenAuth
    from oras.logger import logger

    logger.set_level(logging.CRITICAL + 1)  # what a registry answers may repeat credentials

    class Sooner(provider.Registry):  # type: ignore[misc]
        """Retries twice, after three and five seconds: oras' own five retries take two minutes."""

        do_request = provider.decorator.retry(attempts=2)(provider.Registry.do_request.__wrapped__)

    class PasswordOrToken(TokenAuth):  # type: ignore[misc]
        """Also supports registries with passwords: oras' own class takes their realm for a token's address."""

        def authenticate_request(self, original: Any, headers: Any, refresh: bool = False) -> tuple[Any, bool]:
            if not original.headers.get("Www-Authenticate", "").lower().startswith("basic"):
                return super().authenticate_request(original, headers, refresh)  # type: ignore[no-any-return]
            known = getattr(self, "_basic_auth", None)
            if not known:
                return headers, False
            # For all further requests: an upload can not be sent twice.
            self.session.headers["Authorization"] = f"Basic {known}"
            return {**(headers or {}), "Authorization": f"Basic {known}"}, True

    registry = Sooner(insecure=plain_http)
    auth = PasswordOrToken()
    auth.session, auth.prefix, auth._tls_verify = registry.session, registry.prefix, True
    registry.auth = auth
    return registry


def _artifact(registry: Any, reference: str) -> bytes:
    """The artifact's own bytes, whose hash is its digest; oras returns them only parsed."""
    container = registry.get_container(reference)
    registry.auth.load_configs(container)
    url = f"{registry.prefix}://{container.manifest_url()}"
    with registry.do_request(url, "GET", headers={"Accept": _ARTIFACT}, stream=True) as answer:
        return b"".join(_pieces(answer, "the artifact", _ARTIFACT_MAX_BYTES))


def _pieces(answer: Any, name: str, max_bytes: int) -> Iterator[bytes]:
    """What a registry sends; raises ValidationFailed as soon as that is more than `max_bytes`."""
    answer.raise_for_status()
    received = 0
    for piece in answer.iter_content(_PIECE_BYTES):
        received += len(piece)
        if received > max_bytes:
            raise manifests.damaged(f"{name} is larger than {max_bytes} bytes")
        yield piece


def _layers(artifact: bytes, reference: str) -> Mapping[str, str]:
    """File name -> the digest of its layer; names are looked up only, so none of them becomes a path."""
    try:
        layers = json.loads(artifact)["layers"]
        return {str(layer["annotations"][_TITLE]): str(layer["digest"]) for layer in layers}
    except (ValueError, KeyError, TypeError):
        raise ValidationFailed(f"{reference} is not a bundle.", next_step="dinoexport push makes one.") from None


def _manifest(registry: Any, reference: str, layers: Mapping[str, str], folder: Path) -> Manifest:
    if MANIFEST not in layers:
        raise ValidationFailed(f"{reference} is not a bundle.", next_step="dinoexport push makes one.")
    _layer(registry, reference, layers, MANIFEST, folder, max_bytes=MANIFEST_MAX_BYTES)
    return manifests.read_manifest(folder)


def _layer(
    registry: Any, reference: str, layers: Mapping[str, str], name: str, folder: Path, *, max_bytes: int
) -> None:
    if name not in layers:
        raise manifests.damaged(f"{name} is not in the artifact")
    with registry.get_blob(reference, layers[name], stream=True) as answer, (folder / name).open("xb") as file:
        file.writelines(_pieces(answer, name, max_bytes))
    if f"sha256:{files.sha256(folder / name)}" != layers[name]:
        raise manifests.damaged(f"{name} does not have the digest of its layer")


@contextmanager
def _errors(reference: str) -> Iterator[None]:
    """Turns an exception of oras into one sentence that quotes nothing of the registry's answer."""
    import requests

    try:
        yield
    except requests.HTTPError as error:
        status = error.response.status_code if error.response is not None else "an error"
        raise MissingRequirement(
            f"{reference}: the registry answers {status}.",
            next_step="Check the name and `docker login`." if status in (401, 403, 404) else "Try again later.",
        ) from None
    except (requests.RequestException, ConnectionError, ValueError) as error:
        refused = isinstance(error, ValueError) and not isinstance(error, requests.RequestException)
        problem = "the registry refuses" if refused else "the registry cannot be reached or broke off"
        raise MissingRequirement(
            f"{reference}: {problem}.", next_step="Check the address, the network and `docker login`; see --plain-http."
        ) from None
