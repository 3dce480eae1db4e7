"""The routes, as an ASGI application."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import ExitStack, aclosing, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from dinoexport.errors import DinoexportError, InputRefused, UsageError, require
from dinoexport.serving.openai import schema
from dinoexport.serving.openai.schema import ResponseShape
from dinoexport.serving.openai.sources import Items, Source
from dinoexport.serving.text_client import Ended
from dinoexport.spec import closest

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

# A prompt of 100,000 tokens in the widest characters, several times over.
_BODY_MAX_BYTES = 1 << 23
_LOOK_S = 0.5  # how often to check that a waiting client is still connected
T = TypeVar("T")


def application(source: Source) -> Starlette:
    """OpenAI's interface to one model."""
    require("openai", "starlette", "uvicorn")
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        yield
        await source.close()

    async def models(_request: Request) -> Response:
        entry = {"id": source.name, "object": "model", "created": 0, "owned_by": "dinoexport"}
        return JSONResponse({"object": "list", "data": [entry]})

    async def health(_request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def completions(request: Request) -> Response:
        return await _answered(request, source, schema.completion_values, chat=False)

    async def chat(request: Request) -> Response:
        return await _answered(request, source, schema.chat_values, chat=True)

    return Starlette(
        routes=[
            Route("/v1/models", models),
            Route("/health", health),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chat, methods=["POST"]),
        ],
        lifespan=lifespan,
    )


def bind(host: str, port: int) -> socket.socket:
    """A socket of that address, which accepts nothing until `serve`; raises UsageError if the address is not free."""
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with ExitStack() as opened:
            bound = opened.enter_context(socket.socket(family, kind))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            opened.pop_all()
            return bound
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not a name of this machine"
        raise UsageError(
            f"Port {port} of {host} cannot be listened on: {reason}.", next_step="Choose another --host or --port."
        ) from None


def serve(source: Source, bound: socket.socket) -> None:
    """Serves requests that arrive there until interrupted."""
    require("openai", "starlette", "uvicorn")
    import uvicorn

    config = uvicorn.Config(application(source), log_level="warning", timeout_graceful_shutdown=5)
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[bound])


async def _answered(
    request: Request, source: Source, values_of: Callable[[Mapping[str, Any]], dict[str, Any]], *, chat: bool
) -> Response:
    from starlette.responses import JSONResponse, StreamingResponse

    try:
        body = await _body(request)
        if (asked := body.get("model")) not in (None, source.name):
            raise UsageError(
                f"There is no model {asked!r}.{closest(str(asked), [source.name])}", next_step=f"Ask {source.name}."
            )
        shape = ResponseShape(source.name, chat=chat)
        events = source.stream(values_of(body))
        if body.get("stream"):
            # Waits for the first item, so that a refusal can still have its own status.
            first = await _while_there(request, anext(events))
            options = body.get("stream_options")
            counted = isinstance(options, Mapping) and bool(options.get("include_usage"))
            return StreamingResponse(
                _lines(shape, first, events, counted=counted), media_type="text/event-stream", headers=_UNBUFFERED
            )
        text, ended = await _while_there(request, _collected(events))
        return JSONResponse(shape.whole(text, ended))
    except _ClientLeft:
        return JSONResponse({}, status_code=499)  # nobody is there to read this
    except DinoexportError as told:
        status, content = schema.error(told)
        return JSONResponse(content, status_code=status)


_UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class _ClientLeft(Exception):
    """The client has closed the connection."""


async def _collected(events: Items) -> tuple[str, Ended]:
    """The whole answer."""
    text = []
    async with aclosing(events):
        while not isinstance(item := await anext(events), Ended):
            text.append(item)
    return "".join(text), item


async def _while_there(request: Request, wanted: Awaitable[T]) -> T:
    """The result of `wanted`; if the client leaves first, the work is cancelled."""
    waiting = asyncio.ensure_future(wanted)
    try:
        while not (await asyncio.wait({waiting}, timeout=_LOOK_S))[0]:
            if await request.is_disconnected():
                raise _ClientLeft
    except BaseException:
        waiting.cancel()
        await asyncio.wait({waiting})
        raise
    return waiting.result()


async def _lines(shape: ResponseShape, first: str | Ended, events: Items, *, counted: bool) -> AsyncIterator[str]:
    """Server-sent events. An error after the first event is sent as an event."""
    async with aclosing(events):
        try:
            item, begun = first, False
            while not isinstance(item, Ended):
                yield _event(shape.piece(item, first=not begun))
                item, begun = await anext(events), True
            yield _event(shape.last(item))
            if counted:
                yield _event(shape.counts(item))
        except DinoexportError as told:
            yield _event(schema.error(told)[1])
        yield "data: [DONE]\n\n"


def _event(content: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def _body(request: Request) -> Mapping[str, Any]:
    raw = bytearray()
    async for piece in request.stream():
        raw += piece
        if len(raw) > _BODY_MAX_BYTES:
            raise InputRefused(f"The request has more than {_BODY_MAX_BYTES} bytes.", next_step="Shorten it.")
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise InputRefused("The request is not a JSON object.", next_step="Send one.")
    return body
