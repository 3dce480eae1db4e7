"""The inputs and outputs of a served text model, the same for its server, its configuration and its clients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from dinoexport.text import service


@dataclass(frozen=True, kw_only=True)
class Value:
    """An input or output. many: whether it may have several values."""

    data_type: str
    meaning: str
    many: bool = False


STREAM: Final = "stream"
INPUTS: Final[Mapping[str, Value]] = {
    "prompt": Value(data_type="TYPE_STRING", meaning="a text to go on with, UTF-8; or what stands before the gap"),
    "suffix": Value(data_type="TYPE_STRING", meaning="what stands behind the gap that is to be filled"),
    "suffix_first": Value(data_type="TYPE_BOOL", meaning="whether the suffix is put before the prefix"),
    "messages": Value(data_type="TYPE_STRING", meaning='a conversation: JSON, [{"role": "user", "content": "..."}]'),
    "prompt_ids": Value(data_type="TYPE_INT64", meaning="the prompt as token ids", many=True),
    "max_tokens": Value(data_type="TYPE_INT32", meaning="the most tokens of the answer; 256"),
    "temperature": Value(data_type="TYPE_FP32", meaning="0, the default, takes the likeliest token"),
    "top_p": Value(data_type="TYPE_FP32", meaning="the share of probability that is drawn from; 1"),
    "seed": Value(data_type="TYPE_INT64", meaning="the same answer for the same seed; any"),
    "stop": Value(data_type="TYPE_STRING", meaning="texts that end the answer and are not part of it", many=True),
    STREAM: Value(data_type="TYPE_BOOL", meaning="whether the answer comes in pieces; else it is one response"),
}
TEXT, REASON, PROMPT_TOKENS, TOKENS, TOKEN_IDS = (
    "text", "finish_reason", "prompt_tokens", "completion_tokens", "token_ids",
)  # fmt: skip
OUTPUTS: Final[Mapping[str, Value]] = {
    TEXT: Value(data_type="TYPE_STRING", meaning="the answer, or more of it"),
    REASON: Value(data_type="TYPE_STRING", meaning="stop, length or cancelled; with the last response alone"),
    PROMPT_TOKENS: Value(data_type="TYPE_INT32", meaning="tokens read; with the last response"),
    TOKENS: Value(data_type="TYPE_INT32", meaning="tokens written; with the last response"),
    TOKEN_IDS: Value(data_type="TYPE_INT64", meaning="the answer's tokens; with the last response", many=True),
}
# In every refusal of a full queue, by which clients know it.
QUEUE_FULL: Final = service.FULL
METRIC_TOKENS: Final = "dinoexport_text_tokens_written"
METRIC_PROMPT_TOKENS: Final = "dinoexport_text_tokens_read"
METRIC_ANSWERS: Final = "dinoexport_text_answers"
METRIC_WAITING: Final = "dinoexport_text_requests_waiting"
