"""Open the transport that an address names."""

from __future__ import annotations

import threading

from dinoexport.errors import UsageError, require
from dinoexport.serving.address import Address, parse
from dinoexport.serving.grpc_transport import Grpc
from dinoexport.serving.http_transport import Http
from dinoexport.serving.transport import Transport


def connect(url: str | Address, *, timeout_s: float) -> Transport:
    """The transport for an address. timeout_s: for one whole answer, however slowly the server sends it."""
    address = url if isinstance(url, Address) else parse(url)
    if not 0 < timeout_s < threading.TIMEOUT_MAX:
        raise UsageError(f"{timeout_s} s is not a valid timeout.", next_step="Give seconds, more than 0.")
    require("triton", "tritonclient")
    return (Http if address.scheme.startswith("http") else Grpc)(address, timeout_s)
