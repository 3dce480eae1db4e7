"""OpenAI's requests as ours, and our answers as OpenAI's.

An unsupported option is refused by name, unless its value is the default.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from dinoexport.errors import DinoexportError, InputRefused, UsageError
from dinoexport.serving.text_client import Ended
from dinoexport.serving.transport import ServerBusy
from dinoexport.text.service import QueueFull

_SHARED = ("temperature", "top_p", "seed", "stop")
# Fields that clients send and that do not change an answer.
_IGNORED = {"model", "stream", "stream_options", "user", "metadata", "store", "safety_identifier", "service_tier"}
# Values that request nothing special; any other is refused.
_NEUTRAL: Mapping[str, Sequence[Any]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "logprobs": (False, 0), "top_logprobs": (0,),
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "tools": ([],), "tool_choice": ("none",),
    "response_format": ({"type": "text"},), "parallel_tool_calls": (True, False), "functions": ([],),
    "modalities": (["text"],),
}  # fmt: skip


def completion_values(body: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a request to /v1/completions."""
    _check(body, {"prompt", "suffix", "max_tokens", *_SHARED})
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    values = {key: body.get(key) for key in ("suffix", "max_tokens", *_SHARED)}
    if isinstance(prompt, list) and not any(isinstance(part, str | list) for part in prompt):
        return values | {"prompt_ids": prompt}
    if not isinstance(prompt, str):
        raise InputRefused(
            "prompt is not a single text.", next_step="Send one prompt for each request: a string, or token ids."
        )
    return values | {"prompt": prompt}


def chat_values(body: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a request to /v1/chat/completions."""
    _check(body, {"messages", "max_tokens", "max_completion_tokens", *_SHARED})
    messages = body.get("messages")
    if not isinstance(messages, list):
        raise InputRefused("messages are not a list.", next_step='Send [{"role": "user", "content": "..."}].')
    limit = body.get("max_completion_tokens")
    return {
        "messages": [_message(message) for message in messages],
        "max_tokens": body.get("max_tokens") if limit is None else limit,
        **{key: body.get(key) for key in _SHARED},
    }


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InputRefused("A message is not an object.", next_step='Send {"role": "user", "content": "..."}.')
    content = message.get("content")
    if isinstance(content, list):
        texts = [
            part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in content
        ]
        if not all(isinstance(text, str) for text in texts):
            raise InputRefused("A message has a part that is not text.", next_step="Send only text.")
        content = "".join(str(text) for text in texts)
    if further := sorted(key for key in set(message) - {"role", "content", "name"} if message[key] not in (None, [])):
        raise InputRefused(f"A message has {further[0]}, which is not supported.", next_step="Leave it out.")
    role = "system" if message.get("role") == "developer" else message.get("role")
    return {"role": role, "content": content}


def _check(body: Mapping[str, Any], known: set[str]) -> None:
    for key, value in body.items():
        if value is None or key in known or key in _IGNORED or value in _NEUTRAL.get(key, ()):
            continue
        raise InputRefused(f"{key} is not supported with this value.", next_step="Leave it out.")


class ResponseShape:
    """One answer in OpenAI's format. chat: of a conversation; if false, of a completion."""

    def __init__(self, model: str, *, chat: bool) -> None:
        self._chat, self._model = chat, model
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def whole(self, text: str, ended: Ended) -> dict[str, Any]:
        """The answer in one response."""
        said = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        return self._answer("chat.completion" if self._chat else "text_completion", said, ended.reason) | usage(ended)

    def piece(self, text: str, *, first: bool) -> dict[str, Any]:
        """The next part of the answer."""
        delta = {"delta": ({"role": "assistant"} if first else {}) | {"content": text}}
        return self._chunk(delta if self._chat else {"text": text}, None)

    def last(self, ended: Ended) -> dict[str, Any]:
        """The last chunk, with the reason why the answer ended."""
        return self._chunk({"delta": {}} if self._chat else {"text": ""}, ended.reason)

    def counts(self, ended: Ended) -> dict[str, Any]:
        """The chunk of usage counts, which has no choices."""
        return self._chunk({}, None) | {"choices": []} | usage(ended)

    def _chunk(self, said: Mapping[str, Any], reason: str | None) -> dict[str, Any]:
        return self._answer("chat.completion.chunk" if self._chat else "text_completion", said, reason)

    def _answer(self, kind: str, said: Mapping[str, Any], reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": reason}
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model, "choices": [choice]}


def usage(ended: Ended) -> dict[str, Any]:
    """The number of tokens of prompt and answer."""
    counts = {"prompt_tokens": ended.prompt_tokens, "completion_tokens": ended.completion_tokens}
    return {"usage": counts | {"total_tokens": ended.prompt_tokens + ended.completion_tokens}}


def error(told: DinoexportError) -> tuple[int, dict[str, Any]]:
    """(HTTP status, body) of an error."""
    status, kind = 500, "server_error"
    if isinstance(told, UsageError):
        status, kind = 400, "invalid_request_error"
    elif isinstance(told, QueueFull | ServerBusy):
        status, kind = 503, "overloaded_error"
    message = f"{told.message} {told.next_step}".strip()
    return status, {"error": {"message": message, "type": kind, "param": None, "code": None}}
