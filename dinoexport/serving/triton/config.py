"""Write Triton's config.pbtxt: protobuf's text format, with the reason beside every derived value.

dinoexport has its own small writer because protobuf's printer drops comments, which explain the values.
Field names: model_config.proto of triton-inference-server/common.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

# NumPy's name of a dtype -> Triton's. Encoded files are sent as `bytes`.
DATA_TYPES: Mapping[str, str] = {
    "bool": "TYPE_BOOL",
    "uint8": "TYPE_UINT8",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
    "bytes": "TYPE_STRING",
}


class Word(str):
    """A value that is written without quotes: a member of an enumeration."""

    __slots__ = ()


@dataclass(frozen=True)
class Entry:
    """One field of a message: its name, its value, and why it has this one."""

    name: str
    value: Word | str | int | bool | Sequence[int] | Sequence[Entry]
    why: str = ""


def to_text(entries: Iterable[Entry], indent: int = 0) -> str:
    """The entries in protobuf's text format; `why` follows as a comment."""
    lines = []
    for entry in entries:
        margin, comment = "  " * indent, f"  # {' '.join(entry.why.split())}" if entry.why else ""
        value = entry.value
        if isinstance(value, Sequence) and not isinstance(value, str) and any(isinstance(v, Entry) for v in value):
            inner = to_text([v for v in value if isinstance(v, Entry)], indent + 1)
            lines.append(f"{margin}{entry.name} {{{comment}\n{inner}{margin}}}")
        else:
            lines.append(f"{margin}{entry.name}: {_scalar(value)}{comment}")
    return "".join(f"{line}\n" for line in lines)


def _scalar(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Word):
        return str(value)
    # JSON's strings and lists of numbers are valid in the text format, except surrogate pairs, which stay UTF-8.
    return json.dumps(value, ensure_ascii=False)


def parameter(key: str, value: str, why: str = "") -> Entry:
    """One entry of a config's `parameters`, which Triton gives to the backend and to every client that asks."""
    return Entry("parameters", (Entry("key", key), Entry("value", (Entry("string_value", value),))), why)
