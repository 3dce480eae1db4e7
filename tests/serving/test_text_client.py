"""The client of a served text model: which model, what is sent, and what each response of the server means."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from dinoexport.errors import UsageError
from dinoexport.serving import text_client
from dinoexport.serving.answers import Malformed
from dinoexport.serving.text_client import Ended, TextClient
from dinoexport.serving.transport import ServerError
from dinoexport.serving.triton.signature import PARAMETER
from tests.serving.endpoints import SERVED

LAST = {"finish_reason": "stop", "prompt_tokens": 1, "completion_tokens": 2, "token_ids": [7, 8]}


class Server:
    """Models of these roles by Triton's name; `events` is what each stream gives."""

    def __init__(self, **roles: str) -> None:
        self.roles, self.events = roles, []  # type: ignore[var-annotated]
        self.sent: list[tuple[str, dict[str, Any]]] = []

    def models(self) -> tuple[str, ...]:
        return tuple(self.roles)

    def config(self, model: str) -> dict[str, Any]:
        facts = SERVED.changed(name=model.partition("-")[0], role=self.roles[model])
        return {"parameters": {PARAMETER: {"string_value": facts.model_dump_json()}}}

    def stream(self, model: str, values: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        self.sent.append((model, dict(values)))
        yield from self.events


def opened(monkeypatch: pytest.MonkeyPatch, server: Server, model: str | None = None) -> TextClient:
    monkeypatch.setattr(text_client.connection, "connect", lambda *_, **__: server)
    return TextClient("http://host:8000", model=model)


def test_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked for in pieces; what is not given is not sent; a conversation goes as JSON."""
    server = Server(**{"tiny-1": "text", "other": "graph"})
    ours = opened(monkeypatch, server)
    assert (ours.name, ours.served.name) == ("tiny-1", "tiny")
    server.events = [{"text": "a"}, {"text": "", "finish_reason": None}, {"text": "b"} | LAST]
    ended = Ended(reason="stop", prompt_tokens=1, completion_tokens=2, token_ids=(7, 8))
    assert list(ours.stream(prompt="p", seed=None, max_tokens=2)) == ["a", "b", ended]
    answer = ours.answer(messages=[{"role": "user", "content": "é"}])
    assert (answer.text, answer.ended) == ("ab", ended)
    messages = '[{"role": "user", "content": "\\u00e9"}]'
    assert server.sent == [
        ("tiny-1", {"prompt": "p", "max_tokens": 2, "stream": True}),
        ("tiny-1", {"messages": messages, "stream": True}),
    ]
    server.events = [{"text": "a"}]
    with pytest.raises(ServerError, match="The answer broke off"):
        ours.answer(prompt="p")


@pytest.mark.parametrize(
    ("roles", "model", "message", "step"),
    [
        ({}, None, "http://host:8000 serves no text model of dinoexport's.", "dinoexport deploy makes one."),
        ({"a": "graph"}, "a", "http://host:8000 serves no text model of dinoexport's.", "dinoexport deploy makes one."),
        ({"b": "text", "a": "text"}, None, "http://host:8000 serves 2 text models.", "Name one as the model: a, b."),
        ({"tiny": "text"}, "tinny", "http://host:8000 serves no text model 'tinny'. Did you mean 'tiny'?",
         "Name one as the model: tiny."),
    ],
)  # fmt: skip
def test_no_one_model(
    roles: dict[str, str], model: str | None, message: str, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError) as refused:
        opened(monkeypatch, Server(**roles), model)
    assert (refused.value.message, refused.value.next_step) == (message, step)


@pytest.mark.parametrize("model", ["tiny", "tiny-1"])
def test_one_model_by_either_name(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert opened(monkeypatch, Server(**{"tiny-1": "text", "other": "text"}), model).name == "tiny-1"


MOST = (1 << 31) - 1


@pytest.mark.parametrize(
    ("change", "ended"),
    [
        ({}, (1, 2, (7, 8))), ({"token_ids": None}, (1, 2, ())), ({"token_ids": 9}, (1, 2, (9,))),
        ({"prompt_tokens": 0, "completion_tokens": MOST}, (0, MOST, (7, 8))),
        ({"token_ids": (0, MOST)}, (1, 2, (0, MOST))),
        *(({field: wrong}, None) for field in ("prompt_tokens", "completion_tokens", "token_ids")
          for wrong in (-1, MOST + 1, 1.0, True, "1", [[1]], math.nan)),
        ({"prompt_tokens": None}, None), ({"token_ids": [1, -1]}, None),
    ],
)  # fmt: skip
def test_counts_and_ids_are_whole_numbers(change: dict[str, Any], ended: tuple[Any, ...] | None) -> None:
    if ended is None:
        with pytest.raises(Malformed, match="its counts of tokens or its ids are not whole numbers"):
            list(text_client.read(LAST | change))
    else:
        (found,) = text_client.read(LAST | change)
        assert isinstance(found, Ended)
        assert (found.prompt_tokens, found.completion_tokens, found.token_ids) == ended


@pytest.mark.parametrize(
    ("event", "words"),
    [({"text": 3}, "the text of an event is not a text"), ({"finish_reason": "tired"}, "a reason that is unknown")],
)
def test_what_is_no_event(event: dict[str, Any], words: str) -> None:
    with pytest.raises(Malformed, match=words):
        list(text_client.read(LAST | event))
