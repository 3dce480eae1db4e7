"""What a served text model takes and gives: types and counts, in its configuration as the server reads it."""

from __future__ import annotations

import re

from dinoexport.serving.triton import text_models
from dinoexport.serving.triton import text_signature as signature
from dinoexport.serving.triton.config import to_text

INPUTS = {
    "prompt": "STRING", "suffix": "STRING", "suffix_first": "BOOL", "messages": "STRING", "prompt_ids": "INT64",
    "max_tokens": "INT32", "temperature": "FP32", "top_p": "FP32", "seed": "INT64", "stop": "STRING", "stream": "BOOL",
}  # fmt: skip
OUTPUTS = {
    "text": "STRING", "finish_reason": "STRING", "prompt_tokens": "INT32", "completion_tokens": "INT32",
    "token_ids": "INT64",
}  # fmt: skip
MANY = {"prompt_ids", "stop", "token_ids"}


def test_types_and_counts() -> None:
    """Every input may be left out; lists of tokens and of stop texts have any length, all else is one value."""
    for side, expected in (("input", INPUTS), ("output", OUTPUTS)):
        listed = signature.INPUTS if side == "input" else signature.OUTPUTS
        assert {name: value.data_type.removeprefix("TYPE_") for name, value in listed.items()} == expected
        for name, value in listed.items():
            text = to_text([text_models._value(side, name, value)])
            assert re.search(rf'name: "{name}"', text) and f"data_type: TYPE_{expected[name]}" in text
            assert re.findall(r"dims: \[ ?(-?\d+) ?\]", text) == ["-1" if name in MANY else "1"]
            assert ("optional: true" in text) == (side == "input")
