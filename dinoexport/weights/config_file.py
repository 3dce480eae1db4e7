"""The small files beside a checkpoint that say what it is: read as data, key by key, never imported or run.

A key with an invalid value raises a UsageError that names it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinoexport.errors import UsageError, require
from dinoexport.family import Fact
from dinoexport.system import untrusted

_BYTES_MAX = 1 << 20
_TELLS_NOTHING = frozenset(
    {"model", "pytorch_model", "weights", "checkpoint", "teacher_checkpoint", "last", "best", "consolidated-00"}
)


class Config:
    """One configuration file, read key by key with the type that is wanted."""

    def __init__(self, path: Path, content: Mapping[str, Any]) -> None:
        self.path = path
        self.content = content

    def get(self, key: str, kind: type | tuple[type, ...]) -> Any:
        """The value of `key`, None when there is none; a UsageError when it is of another kind."""
        value = self.content.get(key)
        wrong = isinstance(value, bool) and kind is not bool
        if value is not None and (wrong or not isinstance(value, kind)):
            raise self.senseless(key)
        return value

    def senseless(self, key: str) -> UsageError:
        """The error for an invalid value of `key`."""
        return UsageError(
            f"{self.path}: {key} is {self.content[key]!r}, which makes no sense.",
            next_step="Fix the file, or move it away.",
        )

    def table(self, key: str) -> Config:
        """The table under `key`, empty when there is none."""
        return Config(self.path, self.get(key, dict) or {})

    def facts(self, keys: Mapping[str, tuple[str, type | tuple[type, ...]]], *, under: str = "") -> list[Fact]:
        """A fact for each of `keys` that the file has. keys: the file's key -> (the recipe's key, kind)."""
        return [
            Fact(key=ours, value=value, source=self.source(f"{under}{theirs}"))
            for theirs, (ours, kind) in keys.items()
            if (value := self.get(theirs, kind)) is not None
        ]

    def source(self, key: str) -> str:
        """Where `key` stands, in words."""
        return f"{self.path.name}: {key}"


def read_json(path: Path) -> Config | None:
    """The JSON object in `path`; None if the file is missing or holds something else."""
    text = _text(path)
    if text is None:
        return None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON ({error}).", next_step="Fix the file, or move it away.") from None
    return Config(path, content) if isinstance(content, dict) else None


def read_yaml(path: Path) -> Config | None:
    """The YAML mapping in `path`; None if the file is missing or holds something else."""
    text = _text(path)
    if text is None:
        return None
    require("export", "yaml")
    import yaml

    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not YAML ({error}).", next_step="Fix the file, or move it away.") from None
    return Config(path, content) if isinstance(content, dict) else None


def _text(path: Path) -> str | None:
    try:
        if not untrusted.is_regular(path) or path.stat().st_size > _BYTES_MAX:
            return None
        return untrusted.read_text(path, max_bytes=_BYTES_MAX)
    except (OSError, UsageError):
        raise UsageError(f"{path} cannot be read.", next_step="Fix the file, or move it away.") from None


def name_of(weights: Path) -> str:
    """The user's name for a model: the file's name, or the folder's if that is generic, such as `model`."""
    within = weights.absolute()
    for part in (within.name if within.is_dir() else within.stem, within.parent.name):
        name = re.sub(r"[^a-z0-9_-]+", "-", part.lower()).strip("-_")[:64]
        if name and name not in _TELLS_NOTHING:
            return name
    return "mine"
