"""Bundles of one small stage, for tests of the workspace: made, published, and what then lies beside them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from dinoexport.bundle import CheckpointFacts, Manifest
from dinoexport.pipeline.workspace import Stage, key_of, workspace
from dinoexport.spec import Precision, silent

KEY = key_of(weights="a")


class Maker:
    """Makes a stage of one file and counts how often it did."""

    def __init__(self, name: str = "model.onnx", content: bytes = b"graph") -> None:
        self.name, self.content, self.calls = name, content, 0

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        (folder / self.name).write_bytes(self.content)


def manifest_of(*stages: Stage) -> Manifest:
    return Manifest(
        variant="vits14",
        family="dinov2",
        precision=Precision.FP32,
        target="cpu",
        verdict="unjudged",
        recipe={},
        checkpoint=CheckpointFacts(source="synthetic:0", sha256=key_of(), licence="none"),
        graphs=(),
        files=tuple(file for stage in stages for file in stage.files),
        stage_keys={stage.name: stage.key for stage in stages},
        versions={},
        card={},
        report={},
        created=datetime(2025, 1, 1, tzinfo=UTC),
    )


def build(
    out: Path, make: Callable[[Path], None], *, key: str = KEY, force: bool = False, publish: bool = True
) -> Stage:
    """One build of a bundle of one stage."""
    with workspace(out, force=force, progress=silent) as work:
        stage = work.stage("export", key, make)
        if publish:
            work.publish({"export": stage}, manifest_of(stage))
    return stage


def everything_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
