"""The model behind OpenAI's interface: a text model on a Triton server, or a bundle opened in this process.

Both give an answer as an asynchronous iterator; closing it stops the generation.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

from dinoexport.errors import DinoexportError, UsageError
from dinoexport.serving import text_client, transport
from dinoexport.serving.text_client import Ended, TextClient
from dinoexport.text import requests
from dinoexport.text.generation import Written
from dinoexport.text.requests import TextModel
from dinoexport.text.service import Service

if TYPE_CHECKING:
    import httpx


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

    def __init__(self, name: str, model: TextModel) -> None:
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
    """A text model on a Triton server, over HTTP. timeout_s: until the first piece, and between two pieces."""

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
                headers=dict(self._address.headers),
                verify=True if self._address.ca is None else ssl.create_default_context(cafile=self._address.ca),
            )
        body = text_client.wire(values, stream=True)
        try:
            async with self._client.stream("POST", self._url, json=body) as response:
                if response.status_code != 200:
                    raise transport.refusal(response.status_code, await response.aread())
                async for line in response.aiter_lines():
                    if line.startswith("data:"):
                        event = json.loads(line.removeprefix("data:"))
                        if "error" in event:
                            raise transport.refusal(500, line.encode())
                        for item in text_client.read(event):
                            yield item
        except httpx.TimeoutException:
            raise transport.ServerError(
                "The model did not answer in time.", next_step="Check the server's load."
            ) from None
        except httpx.HTTPError as error:
            raise transport.ServerBusy(
                f"The model's server cannot be reached ({type(error).__name__}).", next_step="Check that it runs."
            ) from None

    async def close(self) -> None:
        """Closes the connections."""
        if self._client is not None:
            await self._client.aclose()


def open_source(
    place: str, *, model: str | None, timeout_s: float, headers: Path | None = None, ca: Path | None = None
) -> Source:
    """A bundle's folder, or a server's address."""
    folder = Path(place)
    if not folder.exists():
        client = TextClient(place, model=model, timeout_s=timeout_s, headers=headers, ca=ca)
        return TritonSource(client, timeout_s=timeout_s)
    if model is not None:
        raise UsageError("A bundle holds one model.", next_step="Leave --model out.")
    from dinoexport import bundle
    from dinoexport.runtime import text_model

    return LocalSource(bundle.read_manifest(folder).variant, text_model.open_bundle(folder))
