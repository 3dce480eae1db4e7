"""What `generate` makes of its options and of stdin, what it prints of an answer, and what `openai` says."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dinoexport.cli import text
from dinoexport.errors import UsageError
from dinoexport.runtime import text_model
from dinoexport.serving.openai import app, sources
from dinoexport.text import generation
from dinoexport.text.generation import Written
from tests.command_line import run


def asked(prompt: str | None = None, infill: tuple[str, str] | None = None, **options: Any) -> dict[str, Any]:
    return text._asked(prompt, infill, **{"suffix_first": False, "chat": False, "system": None} | options)


@pytest.mark.parametrize(
    ("options", "request_of"),
    [
        ({"prompt": "a"}, {"prompt": "a"}),
        ({"prompt": ""}, {"prompt": ""}),
        ({"infill": ("a", "b")}, {"prompt": "a", "suffix": "b", "suffix_first": False}),
        ({"infill": ("a", "b"), "suffix_first": True}, {"prompt": "a", "suffix": "b", "suffix_first": True}),
        ({"prompt": "a", "chat": True}, {"messages": [{"role": "user", "content": "a"}]}),
        (
            {"prompt": "a", "chat": True, "system": "s"},
            {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]},
        ),
    ],
)
def test_options_as_a_request(options: dict[str, Any], request_of: dict[str, Any]) -> None:
    assert asked(**options) == request_of


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "Give a prompt, or --infill"),
        ({"prompt": "a", "infill": ("a", "b")}, "Give a prompt, or --infill"),
        ({"infill": ("a", "b"), "chat": True}, "Give a prompt, or --infill"),
        ({"prompt": "a", "system": "s"}, "--system has no effect"),
        ({"prompt": "a", "suffix_first": True}, "--suffix-first has no effect"),
        ({"prompt": "a", "chat": True, "suffix_first": True}, "--suffix-first has no effect"),
    ],
)
def test_options_that_do_not_belong_together(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        asked(**options)


def stdin(monkeypatch: pytest.MonkeyPatch, raw: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(raw)))


def test_the_prompt_on_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin(monkeypatch, "é\n".encode())
    assert asked("-") == {"prompt": "é\n"}
    most = 8 * 1024 * 1024
    stdin(monkeypatch, b"x" * most)
    assert len(asked("-")["prompt"]) == most
    stdin(monkeypatch, b"x" * (most + 1))
    with pytest.raises(UsageError, match="more than"):
        asked("-")
    stdin(monkeypatch, b"ab\xff")
    with pytest.raises(UsageError, match="at byte 2"):
        asked("-")
    monkeypatch.setattr(sys, "stdin", None)
    assert asked("-") == {"prompt": ""}


def written(**changes: Any) -> Written:
    facts = {
        "text": "ab", "reason": "stop", "prompt_tokens": 5, "ids": (7, 8, 9), "first_s": 0.51234, "seconds": 4.51238,
    }  # fmt: skip
    return Written(**facts | changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "5 tokens read, 3 written, the first after 0.51 s, 0.5 tokens/s; the model or a stop text"),
        ({"ids": (7,), "reason": "length"}, "5 tokens read, 1 written, the first after 0.51 s; the limit of tokens"),
        ({"seconds": 0.51234}, "5 tokens read, 3 written, the first after 0.51 s; the model or a stop text"),
        ({"ids": ()}, "5 tokens read, 0 written, the first after 0.51 s; the model or a stop text"),
    ],
)
def test_the_end_of_an_answer(changes: dict[str, Any], said: str, capsys: Any) -> None:
    """The first token is not part of the speed: it waits for the prompt."""
    text._show_end(written(**changes), False)
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("\n", f"{said}\n")


def test_the_end_of_an_answer_in_json(capsys: Any) -> None:
    text._show_end(written(), True)
    assert json.loads(capsys.readouterr().out) == {
        "text": "ab", "finish_reason": "stop", "prompt_tokens": 5, "completion_tokens": 3, "token_ids": [7, 8, 9],
        "first_token_s": 0.5123, "seconds": 4.5124,
    }  # fmt: skip


@pytest.fixture
def writing(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """`generate` writes "a" and "b"; the list has its progress, and what was asked of the bundle."""
    noted: list[Any] = []

    @contextmanager
    def progress_lines() -> Iterator[Any]:
        yield lambda *step: noted.append(step)

    model = SimpleNamespace(tokenizer="tokenizer", decoder="decoder", task=lambda request: request)
    monkeypatch.setattr(text, "progress_lines", progress_lines)
    monkeypatch.setattr(text_model, "open_bundle", lambda bundle: noted.append(bundle) or model)
    monkeypatch.setattr(generation, "write", lambda *given: noted.append(given) or iter(("a", "b", written())))
    return noted


@pytest.mark.parametrize("as_json", [False, True])
def test_an_answer_is_printed_as_it_comes(as_json: bool, writing: list[Any]) -> None:
    """And in one object at its end."""
    shown = run("generate", "B", "a prompt", "--max-tokens", 3, "--stop", "x", "--seed", 7, *["--json"] * as_json)
    assert shown.exit_code == 0, shown.output
    *opened, (tokenizer, decoder, request) = writing
    assert opened == [("opening B", 0, 0), Path("B"), ("opening B", 1, 1)]
    assert (tokenizer, decoder, request.prompt) == ("tokenizer", "decoder", "a prompt")
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.stop, sampling.seed, sampling.temperature) == (3, ("x",), 7, 0.0)
    if as_json:
        assert json.loads(shown.stdout)["text"] == "ab" and shown.stderr == ""
    else:
        assert shown.stdout == "ab\n" and shown.stderr.startswith("5 tokens read, 3 written")


def test_an_answer_without_stop_texts(writing: list[Any]) -> None:
    assert run("generate", "B", "a prompt").exit_code == 0
    assert writing[-1][2].sampling.stop == ()


@pytest.mark.parametrize(
    ("bound", "url"),
    [(("127.0.0.1", 8123), "http://host:8123/v1"), (("::1", 8123, 0, 0), "http://[::1]:8123/v1")],
)
def test_openai_says_where_it_serves(bound: tuple[Any, ...], url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On stderr; in JSON on stdout, before it serves. An address of IPv6 stands in brackets."""
    pytest.importorskip("uvicorn")
    socket = nullcontext(SimpleNamespace(getsockname=lambda: bound))
    asked: list[Any] = []
    monkeypatch.setattr(app, "bind", lambda *where: asked.append(where) or socket)
    monkeypatch.setattr(app, "serve", lambda source, _bound: asked.append(source.name))
    monkeypatch.setattr(sources, "open_source", lambda place, **how: SimpleNamespace(name=place))
    shown, as_json = run("openai", "B", "--host", "host", "--port", 0), run("openai", "B", "--host", "host", "--json")
    line = f"Serving B at {url}   (Ctrl-C ends it)\n"
    assert (shown.stdout, shown.stderr) == ("", line)
    assert (json.loads(as_json.stdout), as_json.stderr) == ({"model": "B", "url": url}, line)
    assert asked == [("host", 0), "B", ("host", 8080), "B"]


def test_the_server_of_openais_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C is its usual end, and answers that are being written have five seconds then."""
    uvicorn = pytest.importorskip("uvicorn")
    ran: list[Any] = []

    class Server:
        def __init__(self, config: Any) -> None:
            ran.append(config)

        def run(self, *, sockets: list[Any]) -> None:
            ran.append(sockets)
            raise KeyboardInterrupt

    monkeypatch.setattr(uvicorn, "Config", lambda _app, **how: how)
    monkeypatch.setattr(uvicorn, "Server", Server)
    source: Any = SimpleNamespace(name="tiny")
    app.serve(source, "the socket")  # type: ignore[arg-type]
    assert ran == [{"log_level": "warning", "timeout_graceful_shutdown": 5}, ["the socket"]]
