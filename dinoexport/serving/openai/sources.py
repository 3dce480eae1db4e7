"""The model behind OpenAI's interface: a text model on a Triton server, or a bundle opened in this process.

Both give an answer as an asynchronous iterator; closing it stops the generation.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

from dinoexport.errors import DinoexportError, UsageError
from dinoexport.serving import text_client, transport
from dinoexport.serving.deadline import EventLines, StreamBounds
from dinoexport.serving.text_client import Ended, TextClient
from dinoexport.text import requests
from dinoexport.text.generation import Written
from dinoexport.text.requests import OpenTextModel
from dinoexport.text.service import Service

if TYPE_CHECKING:
    import httpx


_REFUSAL_MAX_BYTES = 1 << 20
# The pieces of an answer, then how it ended.
Items = AsyncGenerator[str | Ended, None]


class Source(Protocol):
    """A text model. name: what clients call it."""

    @property
    def name(self) -> str:
        """The model's name."""

    def stream(self, values: Mapping[str, Any]) -> Items:
        """The answer to `values`, see `text.requests.parse`."""

    async def close(self) -> None:
        """Releases its resources."""


class LocalSource:
    """A model opened in this process, and the thread that generates with it."""

    def __init__(self, name: str, model: OpenTextModel) -> None:
        self.name, self._model = name, model
        self._service = Service(model.tokenizer, model.decoder)

    async def stream(self, values: Mapping[str, Any]) -> Items:
        """See `Source`."""
        task = await asyncio.to_thread(lambda: self._model.task(requests.parse(values)))
        reader = _Queue(asyncio.get_running_loop())
        self._service.submit(task, reader)
        try:
            while True:
                item = await reader.items.get()
                if isinstance(item, DinoexportError):
                    raise item
                yield item
                if isinstance(item, Ended):
                    return
        finally:
            reader.left.set()

    async def close(self) -> None:
        """Ends the thread."""
        await asyncio.to_thread(self._service.close)


class _Queue:
    """A `service.Reader` that passes items to an event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.items: asyncio.Queue[str | Ended | DinoexportError] = asyncio.Queue()
        self.left = threading.Event()
        self._loop = loop

    def text(self, text: str) -> None:
        self._put(text)

    def done(self, written: Written) -> None:
        ended = Ended(
            reason=written.reason,
            prompt_tokens=written.prompt_tokens,
            completion_tokens=len(written.ids),
            token_ids=written.ids,
        )
        self._put(ended)

    def failed(self, error: DinoexportError) -> None:
        self._put(error)

    def gone(self) -> bool:
        return self.left.is_set()

    def _put(self, item: str | Ended | DinoexportError) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.items.put_nowait, item)


class TritonSource:
    """A text model on a Triton server, over HTTP. timeout_s: see `TextClient`."""

    def __init__(self, client: TextClient, *, timeout_s: float = 60.0) -> None:
        where = client.address
        if not where.scheme.startswith("http"):
            raise UsageError(
                f"{where} is a gRPC address.", next_step="Give the server's HTTP address, http://HOST:8000."
            )
        self.name = client.served.name
        self._url = f"{where}/v2/models/{quote(client.name, safe='')}/generate_stream"
        self._address, self._timeout_s = where, timeout_s
        self._client: httpx.AsyncClient | None = None

    async def stream(self, values: Mapping[str, Any]) -> Items:
        """See `Source`."""
        import httpx

        requests.parse(values)
        if self._client is None:
            self._client = httpx.AsyncClient(
                timeout=self._timeout_s,
                limits=httpx.Limits(),
                trust_env=False,
                headers={**self._address.headers, "Accept-Encoding": "identity"},
                verify=self._trust(),
            )
        body, bounds = text_client.wire(values, stream=True), StreamBounds(values, self._timeout_s)
        ended = False
        try:
            async with AsyncExitStack() as whole:
                async with asyncio.timeout(bounds.next_s):
                    response = await whole.enter_async_context(self._client.stream("POST", self._url, json=body))
                    if response.status_code != 200:
                        raise transport.refusal(response.status_code, await _some(response))
                async for line in _events(response, bounds):
                    for item in text_client.read(transport.event_of(line)):
                        yield item
                        ended = ended or isinstance(item, Ended)
            if not ended:
                raise transport.ServerError("The answer broke off.", next_step="Read the server's log.")
        except TimeoutError:
            raise transport.ServerError("The model did not answer in time.", next_step="Look at its load.") from None
        except httpx.TimeoutException:
            raise transport.ServerError(
                "The model did not answer in time.", next_step="Check the server's load."
            ) from None
        except httpx.HTTPError as error:
            raise transport.ServerBusy(
                f"The model's server cannot be reached ({type(error).__name__}).", next_step="Check that it runs."
            ) from None

    def _trust(self) -> ssl.SSLContext | bool:
        """Whose certificates are trusted; plain HTTP has none, and loading a machine's takes a second."""
        if not self._address.secure:
            return False
        return True if self._address.ca is None else ssl.create_default_context(cafile=self._address.ca)

    async def close(self) -> None:
        """Closes the connections."""
        if self._client is not None:
            await self._client.aclose()


async def _events(response: httpx.Response, bounds: StreamBounds) -> AsyncGenerator[bytes, None]:
    """The lines of events in a response that is still being sent. Other lines do not move an event's deadline."""
    pieces, lines = response.aiter_raw(), EventLines(bounds)
    while True:
        async with asyncio.timeout(bounds.next_s):
            while (line := lines.next()) is None:
                piece = await anext(pieces, b"")
                if not piece:
                    return
                lines.add(piece)
        yield line


async def _some(response: httpx.Response) -> bytes:
    """The beginning of a refusal, which holds its sentence."""
    raw = b""
    async for piece in response.aiter_raw():
        raw += piece
        if len(raw) > _REFUSAL_MAX_BYTES:
            break
    return raw


def open_source(
    place: str, *, model: str | None, timeout_s: float, headers: Path | None = None, ca: Path | None = None
) -> Source:
    """A bundle's folder, or a server's address."""
    folder = Path(place)
    if not folder.exists():
        client = TextClient(place, model=model, timeout_s=timeout_s, headers=headers, ca=ca)
        return TritonSource(client, timeout_s=timeout_s)
    for option, value, why in (
        ("--model", model, "A bundle holds one model."),
        ("--headers", headers, "A bundle is opened here, and no request is sent."),
        ("--ca", ca, "A bundle is opened here, and no request is sent."),
    ):
        if value is not None:
            raise UsageError(why, next_step=f"Leave {option} out.")
    from dinoexport import bundle
    from dinoexport.runtime import text_model

    return LocalSource(bundle.read_manifest(folder).variant, text_model.open_bundle(folder))
