"""A client of a served text model: sends a prompt and receives text while it is written, over HTTP or gRPC.

A caller that stops reading closes the stream, and the server stops writing within two seconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinoexport.errors import UsageError
from dinoexport.serving import address, client, connection, transport
from dinoexport.serving.answers import Malformed
from dinoexport.serving.triton import text_signature as signature
from dinoexport.serving.triton.signature import Served
from dinoexport.spec import closest
from dinoexport.text import requests

REASONS = ("stop", "length", "cancelled")
_COUNT_MAX = 1 << 31


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How an answer ended. reason: one of REASONS."""

    reason: str
    prompt_tokens: int
    completion_tokens: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class TextAnswer:
    """A whole answer."""

    text: str
    ended: Ended


class TextClient:
    """One served text model.

    url: http://HOST:8000 or grpc://HOST:8001. model: its deployed name; optional if a server has only one. timeout_s:
    for the first words of an answer, and between any two; a whole answer takes at most five seconds more for each
    requested token. headers, ca: files, see `address.parse`.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        timeout_s: float = 60.0,
        headers: Path | None = None,
        ca: Path | None = None,
    ) -> None:
        self.address = address.parse(url, headers=headers, ca=ca)
        self._transport = connection.connect(self.address, timeout_s=timeout_s)
        found = {name: s for name, s in client.discover(self._transport).items() if s.role == "text"}
        self.name, self.served = _chosen(found, str(self.address), model)

    def stream(self, **values: Any) -> Iterator[str | Ended]:
        """The answer in pieces, and last how it ended. values: see `text.requests.parse`.

        Raises InputRefused before anything is sent if the server would refuse it, ServerBusy if its queue is full.
        """
        requests.parse(values)
        with closing(self._transport.stream(self.name, wire(values, stream=True))) as events:
            for event in events:
                yield from read(event)

    def answer(self, **values: Any) -> TextAnswer:
        """The whole answer."""
        text, ended = [], None
        for item in self.stream(**values):
            if isinstance(item, str):
                text.append(item)
            else:
                ended = item
        if ended is None:
            raise transport.ServerError("The answer broke off.", next_step="Read the server's log.")
        return TextAnswer(text="".join(text), ended=ended)


def wire(values: Mapping[str, Any], *, stream: bool) -> dict[str, Any]:
    """A request's values in Triton's JSON form."""
    sent = {key: value for key, value in values.items() if value is not None} | {signature.STREAM: stream}
    if not isinstance(sent.get("messages", ""), str):
        sent["messages"] = json.dumps(
            [{"role": turn.role, "content": turn.content} for turn in requests.messages_of(sent["messages"])]
        )
    return sent


def read(event: Mapping[str, Any]) -> Iterator[str | Ended]:
    """The content of one of the server's responses in a streamed answer; raises Malformed for any other content."""
    text, reason = event.get(signature.TEXT) or "", event.get(signature.REASON)
    if not isinstance(text, str):
        raise Malformed("the text of an event is not a text")
    if text:
        yield text
    if not reason:
        return
    if reason not in REASONS:
        raise Malformed("it ended for a reason that is unknown")
    ids = event.get(signature.TOKEN_IDS)
    ids = [] if ids is None else ids if isinstance(ids, list | tuple) else [ids]
    tokens_read, tokens_written = event.get(signature.PROMPT_TOKENS), event.get(signature.TOKENS)
    if not all(type(number) is int and 0 <= number < _COUNT_MAX for number in (tokens_read, tokens_written, *ids)):
        raise Malformed("its counts of tokens or its ids are not whole numbers")
    yield Ended(reason=str(reason), prompt_tokens=tokens_read, completion_tokens=tokens_written, token_ids=tuple(ids))  # type: ignore[arg-type]


def _chosen(found: Mapping[str, Served], url: str, model: str | None) -> tuple[str, Served]:
    wanted = {name: served for name, served in found.items() if model in (None, name, served.name)}
    if len(wanted) == 1:
        return next(iter(wanted.items()))
    if not found:
        raise UsageError(f"{url} serves no text model of dinoexport's.", next_step="dinoexport deploy makes one.")
    problem = f"no text model {model!r}.{closest(model or '', list(found))}" if model else f"{len(found)} text models."
    raise UsageError(f"{url} serves {problem}", next_step=f"Name one as the model: {', '.join(sorted(found))}.")
