"""Triton over HTTP.

tritonclient builds HTTP bodies; urllib3 sends them, because tritonclient's own connection works in one thread only.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

from dinoexport.serving import answers
from dinoexport.serving.address import Address
from dinoexport.serving.answers import Malformed
from dinoexport.serving.deadline import Deadline, EventLines, StreamBounds, watched
from dinoexport.serving.transport import (
    METADATA_MAX_BYTES,
    MemoryPlace,
    ServerError,
    event_of,
    inputs_of,
    names_of,
    no_answer,
    refusal,
    unreachable,
)
from dinoexport.spec import Array, Arrays


class Http:
    """HTTP requests on a pool of connections."""

    def __init__(self, address: Address, timeout_s: float) -> None:
        import urllib3

        self._address, self._timeout_s, self._max_bytes = address, timeout_s, METADATA_MAX_BYTES
        trust: dict[str, Any] = {"ca_certs": str(address.ca)} if address.ca is not None else {}
        self._pool = urllib3.PoolManager(
            maxsize=32,
            retries=False,
            timeout=urllib3.Timeout(connect=min(5.0, timeout_s), read=timeout_s),
            **trust,
        )
        self._pool.pool_classes_by_scheme = {
            scheme: watched(found) for scheme, found in self._pool.pool_classes_by_scheme.items()
        }

    def limit(self, max_bytes: int) -> None:
        """The largest size of an answer's body."""
        self._max_bytes = max(max_bytes, METADATA_MAX_BYTES)

    def models(self) -> tuple[str, ...]:
        """From the repository's index."""
        index = answers.parsed_json(self._ask("POST", "/v2/repository/index", b'{"ready": true}').body, "its index")
        return names_of(index)

    def config(self, model: str) -> dict[str, Any]:
        """From the model's own address."""
        asked = self._ask("GET", f"/v2/models/{quote(model, safe='')}/config")
        found = answers.parsed_json(asked.body, f"the configuration of {model!r}")
        if not isinstance(found, dict):
            raise Malformed(f"the configuration of {model!r} is not an object")
        return found

    def infer(
        self, model: str, arrays: Arrays, outputs: Sequence[str], *, shared: Mapping[str, MemoryPlace]
    ) -> dict[str, Array]:
        """One binary request."""
        import tritonclient.http as triton

        wanted = [triton.InferRequestedOutput(name, binary_data=True) for name in outputs]
        inputs = inputs_of(triton, arrays, shared)
        body, json_size = triton.InferenceServerClient.generate_request_body(inputs, outputs=wanted)
        headers = {} if json_size is None else {"Inference-Header-Content-Length": str(json_size)}
        answer = self._ask("POST", f"/v2/models/{quote(model, safe='')}/infer", body, headers)
        return answers.decoded(answer.body, answer.header_length, outputs)

    def stream(self, model: str, values: Mapping[str, Any]) -> Generator[dict[str, Any], None, None]:
        """Server-sent events; one that holds an error ends them."""
        path, body = f"/v2/models/{quote(model, safe='')}/generate_stream", json.dumps(values).encode()
        deadline, bounds = Deadline(self._timeout_s), StreamBounds(values, self._timeout_s)
        with ExitStack() as whole:
            with deadline:
                json_form = {"Content-Type": "application/json"}
                response = whole.enter_context(self._begun("POST", path, body, json_form, deadline))
            for line in self._events(response, bounds):
                yield event_of(line)

    def _events(self, response: Any, bounds: StreamBounds) -> Iterator[bytes]:
        """The lines of events in a response that is still being sent. Other lines do not move an event's deadline."""
        lines = EventLines(bounds)
        while True:
            with Deadline(bounds.next_s, response.shutdown) as deadline, self._errors(deadline):
                while (line := lines.next()) is None:
                    piece = response.read1(1 << 16)
                    if not piece:
                        return
                    lines.add(piece)
            yield line

    def register(self, region: str, key: str, size_bytes: int) -> None:
        """A region begins at the start of its memory."""
        body = json.dumps({"key": key, "offset": 0, "byte_size": size_bytes}).encode()
        self._ask("POST", f"/v2/systemsharedmemory/region/{quote(region)}/register", body)

    def unregister(self, region: str) -> None:
        """The region's name is free again."""
        self._ask("POST", f"/v2/systemsharedmemory/region/{quote(region)}/unregister")

    def _ask(self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> _Answer:
        """The whole answer within one deadline; a body that is larger than an answer can be is not read."""
        with Deadline(self._timeout_s) as deadline, self._begun(method, path, body, headers, deadline) as response:
            with self._errors(deadline):
                answer = _Answer(
                    body=self._body(response), header_length=response.headers.get("Inference-Header-Content-Length")
                )
            response.release_conn()
        return answer

    @contextmanager
    def _begun(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str] | None, deadline: Deadline
    ) -> Iterator[Any]:
        """A response whose body is still to be read; an unread rest is never taken for the next answer."""
        url, sent = f"{self._address}{path}", {**self._address.headers, **(headers or {})}
        response: Any = None
        try:
            with self._errors(deadline):  # also raises where the answer came when the deadline had passed
                response = self._pool.request(
                    method, url, body=body, headers=sent, preload_content=False, redirect=False, decode_content=False
                )
            with self._errors(deadline):
                deadline.also(response.shutdown)  # a body without a length has left its connection
                if response.status != HTTPStatus.OK:
                    raise refusal(response.status, self._body(response))
            yield response
        finally:
            # Not back into the pool, so that the server sees that the client has left.
            if response is not None and response.connection is not None:
                response.close()

    @contextmanager
    def _errors(self, deadline: Deadline) -> Iterator[None]:
        import urllib3

        try:
            yield
        except urllib3.exceptions.ReadTimeoutError:
            raise no_answer(self._address) from None
        except urllib3.exceptions.SSLError as error:
            raise ServerError(
                f"{self._address} is not trusted: {error}.", next_step="Give its CA's certificates (--ca FILE)."
            ) from None
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:  # ValueError: a URL, a closed file
            if deadline.expired:
                raise no_answer(self._address) from None
            raise unreachable(self._address, error) from None
        if deadline.expired:
            raise no_answer(self._address)

    def _body(self, response: Any) -> bytes:
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise Malformed("it is compressed, which was not requested")
        pieces, left = [], self._max_bytes + 1
        while left and (piece := response.read(min(left, 1 << 20))):
            pieces.append(piece)
            left -= len(piece)
        if not left:
            raise Malformed(f"its body has more than the {self._max_bytes:,} bytes that an answer can have")
        return b"".join(pieces)


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """The body of an HTTP response, and the length of its JSON header as the server gave it."""

    body: bytes
    header_length: str | None
