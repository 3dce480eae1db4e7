"""The weights of a build: the checkpoint and, if the model has a head, the head's file. No stage is made here."""

from __future__ import annotations

import json
from dataclasses import asdict

from dinoexport.bundle import HeadManifest
from dinoexport.pipeline.request import BuildRequest
from dinoexport.spec import Progress
from dinoexport.weights.checkpoint import Checkpoint, open_checkpoint


def open_weights(request: BuildRequest, progress: Progress) -> Checkpoint:
    """The checkpoint with the head's weights in it; see `open_checkpoint`."""
    return open_checkpoint(
        request.model,
        request.recipe,
        request.weights,
        prefix=request.prefix,
        head_source=request.head_weights,
        progress=progress,
    )


def head_of(request: BuildRequest, checkpoint: Checkpoint) -> HeadManifest | None:
    """The manifest's facts of the model's head."""
    facts = request.model.head_facts
    if facts is None:
        return None
    found = checkpoint.head
    return HeadManifest(**asdict(facts), source=found.source if found else "", sha256=found.sha256 if found else None)


def head_metadata(request: BuildRequest, checkpoint: Checkpoint) -> dict[str, str]:
    """The ONNX file's own metadata of its head: the source of the weights, and the names of the classes."""
    facts = request.model.head_facts
    if facts is None:
        return {}
    found = {"dinoexport.head": facts.kind}
    if checkpoint.head is not None:
        found["dinoexport.head_sha256"] = checkpoint.head.sha256
    return found | ({"dinoexport.classes": json.dumps(facts.classes)} if facts.classes else {})
