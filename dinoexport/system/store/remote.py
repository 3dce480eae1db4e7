"""A prefix in an object store (S3, Google, Azure) or a web server as a place, by way of obstore.

A file appears by one PUT or a completed multipart upload. obstore reads credentials and endpoints from the environment
as each vendor's own tools do (AWS_ENDPOINT_URL, AWS_PROFILE is not read; GOOGLE_APPLICATION_CREDENTIALS,
AZURE_STORAGE_ACCOUNT_NAME).
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from dinoexport.errors import MissingRequirement, UsageError, require
from dinoexport.system.store.place import PIECE_BYTES, check_size, draft_name

SCHEMES = ("s3", "gs", "az", "http", "https")
_READ_ONLY = ("http", "https")
# A request that a store answers with 503 is repeated, at growing intervals, for this time.
_RETRY_S = 60
# How many times an object is requested again, from its beginning, if the store breaks off.
_FETCHES = 4


@dataclass(frozen=True, kw_only=True)
class Tag:
    """One content of an object: S3 and Azure distinguish it by its e_tag, Google by its version."""

    e_tag: str | None
    version: str | None


class RemotePlace:
    """A prefix of an object store, or a web server that is only read from."""

    def __init__(self, url: str) -> None:
        try:
            address = urlsplit(url)
            _ = address.port, url.encode()
        except ValueError:
            raise UsageError(f"{url!r} is not an address.", next_step="Write s3://BUCKET/PATH.") from None
        scheme = address.scheme
        if scheme not in SCHEMES:
            raise UsageError(f"{url}: {scheme}:// is not a known scheme.", next_step=f"Use {', '.join(SCHEMES)}.")
        if not address.netloc:
            raise UsageError(f"{url!r} names no bucket and no host.", next_step="Write s3://BUCKET/PATH.")
        if "@" in address.netloc or address.query or address.fragment:
            raise UsageError(
                f"{scheme}:// must not contain a user name, a password or a query: the address is written into files.",
                next_step="Give credentials in the environment variables that the vendor's tools read.",
            )
        require("store", "obstore")
        self.local: Path | None = None
        self._url, self._scheme = url.rstrip("/"), scheme
        self._opened: Any = None
        # Names that a web server lists begin with the path of the URL; a store's are relative to it.
        path = unquote(address.path).strip("/")
        self._base = f"{path}/" if path and scheme in _READ_ONLY else ""
        self._drafts = tempfile.gettempdir()

    def __str__(self) -> str:
        return self._url

    @property
    def _store(self) -> Any:
        if self._opened is None:
            from datetime import timedelta

            from obstore.store import from_url

            with self._errors():
                open_url: Any = from_url  # its overloads depend on the kind of store, which is not known here
                self._opened = open_url(
                    self._url,
                    # A store's address without TLS is one that the user's environment names.
                    client_options={"allow_http": self._scheme != "https"},
                    retry_config={"retry_timeout": timedelta(seconds=_RETRY_S), "max_retries": 8},
                )
        return self._opened

    def files(self, under: str = "") -> Iterator[tuple[str, int]]:
        """Every object below `under`, a thousand for each request; a web server lists them only if it speaks WebDAV."""
        import obstore

        with self._errors(), self._no_listing():
            for page in obstore.list(self._store, under or None, chunk_size=1000):
                yield from ((str(found["path"]).removeprefix(self._base), int(found["size"])) for found in page)

    def read(self, name: str, *, max_bytes: int | None = None) -> bytes:
        """The object's content."""
        import obstore

        with self._errors(name):
            found = obstore.get(self._store, name)
            check_size(name, int(found.meta["size"]), max_bytes)
            return bytes(found.bytes())

    def fetch(self, name: str, target: Path, *, max_bytes: int | None = None) -> None:
        """In pieces; again from the beginning if the store breaks off."""
        import obstore

        with self._errors(name), target.open("xb") as file:
            for left in reversed(range(_FETCHES)):
                file.seek(0)
                file.truncate()
                try:
                    found = obstore.get(self._store, name)
                    check_size(name, int(found.meta["size"]), max_bytes)
                    for piece in found.stream(min_chunk_size=PIECE_BYTES):
                        check_size(name, file.tell() + len(piece), max_bytes)
                        file.write(piece)
                except obstore.exceptions.GenericError:
                    if not left:
                        raise
                else:
                    break

    def size(self, name: str) -> int | None:
        """From the object itself, because a listing may be out of date."""
        import obstore

        with suppress(FileNotFoundError), self._errors(name):
            return int(obstore.head(self._store, name)["size"])
        return None

    def write(self, name: str, content: bytes, *, new: bool = False) -> None:
        """One PUT; a conditional one for a new object."""
        import obstore

        self.check_writable()
        with self._no_bucket(), self._errors(name):
            obstore.put(self._store, name, content, mode="create" if new else "overwrite", use_multipart=False)

    def draft(self, name: str) -> Path:
        """A file in the folder for temporary files."""
        self.check_writable()
        return Path(self._drafts) / draft_name(name.replace("/", "_"))

    def publish(self, draft: Path, name: str) -> None:
        """As `upload`."""
        self.upload(draft, name)
        draft.unlink()

    def upload(self, source: Path, name: str, *, new: bool = False) -> None:
        """One PUT, or a multipart upload, which is invisible until it is complete; a new object is always one PUT."""
        import obstore

        self.check_writable()
        with self._no_bucket(), self._errors(name), source.open("rb") as file:
            if new:
                obstore.put(self._store, name, file, mode="create", use_multipart=False)
            else:
                obstore.put(self._store, name, file)

    def remove(self, name: str) -> None:
        """Removes the object."""
        import obstore

        self.check_writable()
        with self._errors(name), suppress(FileNotFoundError):
            obstore.delete(self._store, name)

    def copy(self, source: str, target: str) -> None:
        """Copies an object inside the store."""
        import obstore

        self.check_writable()
        with self._errors(source):
            obstore.copy(self._store, source, target)

    def read_tagged(self, name: str, *, max_bytes: int) -> tuple[bytes, Tag | None]:
        """An object's content and the store's tag of that content; (b"", None) if it is missing."""
        import obstore

        with suppress(FileNotFoundError), self._errors(name):
            found = obstore.get(self._store, name)
            check_size(name, int(found.meta["size"]), max_bytes)
            return bytes(found.bytes()), Tag(e_tag=found.meta["e_tag"], version=found.meta["version"])
        return b"", None

    def write_over(self, name: str, content: bytes, *, tag: Tag | None) -> None:
        """One PUT over the content that has `tag`, or where there is none; a FileExistsError when there is another."""
        import obstore

        self.check_writable()
        if tag is None:
            self.write(name, content, new=True)
            return
        with self._no_bucket(), self._errors(name):
            known: Any = {key: value for key, value in asdict(tag).items() if value is not None}
            obstore.put(self._store, name, content, mode=known, use_multipart=False)

    def check_writable(self) -> None:
        """Raises UsageError for a place that cannot be written to."""
        if self._scheme in _READ_ONLY:
            raise UsageError(
                f"{self._url} is a web server, which cannot be written to.", next_step="Write to s3://, gs:// or az://."
            )

    @contextmanager
    def _no_listing(self) -> Iterator[None]:
        """Turns a web server's refusal of WebDAV's PROPFIND into a UsageError."""
        from obstore import exceptions

        try:
            yield
        except exceptions.BaseError as error:
            if self._scheme not in _READ_ONLY or not re.search(r"\b(?:400|405|501)\b", str(error)):
                raise
            raise UsageError(
                f"{self._url}: this web server does not list its files.",
                next_step="Use a server with WebDAV or an object store, or copy the files here.",
            ) from None

    @contextmanager
    def _no_bucket(self) -> Iterator[None]:
        """The error for a PUT that a store answers with "not found"."""
        try:
            yield
        except FileNotFoundError:
            raise MissingRequirement(
                f"{self._url}: there is no such bucket.", next_step="Create it, or check its name."
            ) from None

    @contextmanager
    def _errors(self, name: str = "") -> Iterator[None]:
        """Turns a store's error into one sentence that does not quote it: it may repeat credentials."""
        from obstore import exceptions

        where = f"{self._url}/{name}" if name else self._url
        try:
            yield
        except (FileNotFoundError, exceptions.NotFoundError):
            raise FileNotFoundError(where) from None
        except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
            raise FileExistsError(where) from None
        except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError):
            raise MissingRequirement(
                f"{where}: access denied.",
                next_step="Check the credentials in the environment and what they are allowed to do.",
            ) from None
        except exceptions.BaseError as error:
            said = str(error)
            if re.search(r"credential|169\.254\.169\.254|metadata\.google|token", said, re.IGNORECASE):
                raise MissingRequirement(
                    f"{where}: no credentials were found.",
                    next_step="Set them in the environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
                ) from None
            status = re.search(r"\b(?:status|HTTP(?: status)?(?: server error)?)\D{0,20}([45]\d\d)\b", said)
            raise MissingRequirement(
                f"{where}: the store {f'answers {status[1]}' if status else 'cannot be reached or broke off'}.",
                next_step="Check the address and the network, and run it again: what is finished is kept.",
            ) from None
