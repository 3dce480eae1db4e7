"""Stage `text`: the tokenizer of a model that generates text, as a file of the bundle."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from dinoexport.errors import require
from dinoexport.pipeline.request import BuildRequest
from dinoexport.pipeline.workspace import Stage, Workspace, key_of
from dinoexport.runtime import text_model
from dinoexport.spec import SYNTHETIC, Progress, silent
from dinoexport.text import tokenizer
from dinoexport.weights import download


def text_stage(work: Workspace, request: BuildRequest) -> dict[str, Stage]:
    """The tokenizer in or beside the weights, by the stage's name; empty if there is none.

    Raises UsageError for a tokenizer that cannot be read, or whose vocabulary is not the model's.
    """
    content = _content(request, work.progress)
    if not content:
        return {}

    def make(folder: Path) -> None:
        for name, data in content.items():
            (folder / name).write_bytes(data)
        _check(folder, content, request)

    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}
    return {"text": work.stage("text", key_of(files=hashes, rows=_rows(request)), make)}


def check_tokenizer(request: BuildRequest) -> None:
    """Raises what `text_stage` raises, and keeps nothing. Downloads nothing, so published weights are not looked at."""
    content = {} if request.weights is None else _content(request, silent)
    with TemporaryDirectory() as place:
        for name, data in content.items():
            (Path(place) / name).write_bytes(data)
        _check(Path(place), content, request)


def _content(request: BuildRequest, progress: Progress) -> Mapping[str, bytes]:
    text, weights = request.model.text, request.weights
    if text is None or (weights is None and not request.recipe.weights):
        return {}
    if weights is not None and weights.startswith(SYNTHETIC):
        return {}
    return text.tokenizer(Path(weights) if weights else download.fetch(request.recipe.weights[0], progress=progress))


def _check(folder: Path, content: Mapping[str, bytes], request: BuildRequest) -> None:
    if content:
        require("text", "tokenizers", "sentencepiece")
    for name in content:
        tokenizer.check_vocabulary(tokenizer.load(folder / name), _rows(request))


def _rows(request: BuildRequest) -> int:
    """The number of the model's logits."""
    return text_model.vocabulary_of(request.model.graphs[0])
