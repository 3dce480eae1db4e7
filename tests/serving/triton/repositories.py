"""What stands in a model repository, read as Triton reads it, and what `deploy` and `rollback` do to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dinoexport.serving.triton import model_repository
from tests.conftest import DATA

IMAGES = DATA.parent.parent / "validate" / "images"


def parsed(config: Path) -> Any:
    """The configuration as Triton's own schema reads it: an unknown field or type is an error."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    return text_format.Parse(config.read_text(), model_config_pb2.ModelConfig())


def config_of(repository: Path, name: str) -> str:
    return (repository / name / "config.pbtxt").read_text()


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def served_by(repository: Path) -> dict[str, Any]:
    """What a server would answer from: each model's version, and what each ensemble asks; no version is incomplete."""
    found: dict[str, Any] = {}
    for config in repository.glob("*/config.pbtxt"):
        parsed_config = parsed(config)
        (version,) = parsed_config.version_policy.specific.versions
        assert (config.parent / str(version) / "config.pbtxt").read_bytes() == config.read_bytes()
        found[config.parent.name] = version
        for step in parsed_config.ensemble_scheduling.step:
            assert step.model_version == version, f"{config} asks another release"
    return found


def plain(repository: Path) -> dict[str, bytes]:
    """Every file, without what the clock writes."""
    found = snapshot(repository)
    for name, content in found.items():
        if name.endswith(".releases.json"):
            record = json.loads(content)
            found[name] = json.dumps(record["served"]).encode()
    return found


VERBS = {
    "first": lambda built, models: model_repository.deploy(built, models, name="tiny"),
    "second": lambda built, models: model_repository.deploy(built, models, name="tiny", backend="python"),
    "with another front end": lambda built, models: model_repository.deploy(built, models, name="tiny", samples=IMAGES),
    "rollback": lambda _, models: model_repository.rollback(models, "tiny"),
}
