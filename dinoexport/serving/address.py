"""A server's address and the credentials for it: headers, a bearer token, the user's own CA.

Secrets come from a file, from the environment or from the address, and are never shown: errors name the address
without them.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from dinoexport.errors import UsageError
from dinoexport.system import untrusted

TOKEN_VARIABLE = "DINOEXPORT_TOKEN"  # noqa: S105 (a variable's name, not a token)
_SCHEMES = {"http": 8000, "https": 443, "grpc": 8001, "grpcs": 443}
_HEADER = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\x21-\x7e](?:[\x20-\x7e\t]*[\x21-\x7e])?)")
_HEADERS_MAX_BYTES = 1 << 16
_CA_MAX_BYTES = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where a server is. headers: sent with every request. ca: certificates to trust instead of the system's, PEM."""

    scheme: str
    host: str
    port: int
    path: str = ""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    ca: Path | None = None

    @property
    def netloc(self) -> str:
        """HOST:PORT, with an IPv6 host in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def secure(self) -> bool:
        """Whether the connection uses TLS."""
        return self.scheme in ("https", "grpcs")

    def __str__(self) -> str:
        return f"{self.scheme}://{self.netloc}{self.path}"


def parse(url: str, *, headers: Path | None = None, ca: Path | None = None) -> Address:
    """The address in `url`: http://HOST:8000 or grpc://HOST:8001, with an s for TLS; a bare HOST:PORT is HTTP.

    A user and password in it are sent as basic authentication, a token in $DINOEXPORT_TOKEN as a bearer token. headers:
    a file of lines `Name: value`. ca: a file of certificates. Raises UsageError for an invalid address.
    """
    if ca is not None:
        untrusted.read_bytes(ca, max_bytes=_CA_MAX_BYTES)
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        host, port, scheme = parts.hostname, parts.port, parts.scheme
        user, password = parts.username, parts.password
        pair = f"{unquote(user or '')}:{unquote(password or '')}".encode()
    except ValueError:
        raise _no_address(url) from None
    if not host or scheme not in _SCHEMES or parts.query or parts.fragment or not re.fullmatch(r"[\w.:%-]+", host):
        raise _no_address(url)
    if parts.path.strip("/") and scheme.startswith("grpc"):
        raise _no_address(url)
    if ca is not None and scheme not in ("https", "grpcs"):
        raise UsageError(f"{scheme} uses no certificates.", next_step="Use https or grpcs, or leave the CA file out.")
    sent = {} if headers is None else _headers(headers)
    if token := os.environ.get(TOKEN_VARIABLE):
        sent["authorization"] = f"Bearer {_visible(token, f'${TOKEN_VARIABLE}')}"
    if user is not None:
        sent["authorization"] = f"Basic {base64.b64encode(pair).decode()}"
    port = _SCHEMES[scheme] if port is None else port
    return Address(scheme=scheme, host=host, port=port, path=parts.path.rstrip("/"), headers=sent, ca=ca)


def _headers(path: Path) -> dict[str, str]:
    found = {}
    for number, line in enumerate(untrusted.read_text(path, max_bytes=_HEADERS_MAX_BYTES).splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        header = _HEADER.fullmatch(line.strip())
        if header is None:
            raise UsageError(f"Line {number} of {path} is not a header.", next_step="Write each as Name: value.")
        found[header[1].lower()] = header[2]
    return found


def _visible(secret: str, where: str) -> str:
    """A secret that is valid in a header; errors never show it."""
    secret = secret.strip()
    if not re.fullmatch(r"[\x21-\x7e]+", secret):
        raise UsageError(
            f"{where} holds spaces or control characters, which a token must not.", next_step="Set it again."
        )
    return secret


def _no_address(url: str) -> UsageError:
    return UsageError(
        f"{url!r} is not an address of a server.",
        next_step="Use http://HOST:8000 or grpc://HOST:8001; https, grpcs for TLS.",
    )
