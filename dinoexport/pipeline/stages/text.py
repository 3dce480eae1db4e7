"""Stage `text`: the tokenizer of a model that generates text, as a file of the bundle."""

from __future__ import annotations

import hashlib
from pathlib import Path

from dinoexport.errors import require
from dinoexport.pipeline.request import BuildRequest
from dinoexport.pipeline.workspace import Stage, Workspace, key_of
from dinoexport.runtime import text_model
from dinoexport.text import tokenizer
from dinoexport.weights import download
from dinoexport.weights.checkpoint import SYNTHETIC


def text_stage(work: Workspace, request: BuildRequest) -> dict[str, Stage]:
    """The tokenizer in or beside the weights, by the stage's name; empty if there is none.

    Raises UsageError for a tokenizer that cannot be read, or whose vocabulary is not the model's.
    """
    model, weights = request.model, request.weights
    if model.text is None or (weights is None and not request.recipe.weights):
        return {}
    if weights is not None and weights.startswith(SYNTHETIC):
        return {}
    place = Path(weights) if weights else download.fetch(request.recipe.weights[0], progress=work.progress)
    content = model.text.tokenizer(place)
    if not content:
        return {}

    def make(folder: Path) -> None:
        require("text", "tokenizers", "sentencepiece")
        rows = text_model.vocabulary_of(model.graphs[0])
        for name, data in content.items():
            (folder / name).write_bytes(data)
            tokenizer.check_vocabulary(tokenizer.load(folder / name), rows)

    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}
    return {"text": work.stage("text", key_of(files=hashes, rows=text_model.vocabulary_of(model.graphs[0])), make)}
