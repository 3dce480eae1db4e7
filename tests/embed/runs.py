"""What a run of `embed` wrote, and what ONNX Runtime itself makes of the images."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from dinoexport import bundle
from dinoexport.embed.embedder import model_of

LENIENT = {"max_failed": 0.2, "workers": 1}


def rows_of(out: Path) -> list[dict[str, Any]]:
    """Every row, in the order of the parts' names."""
    return [row for part in sorted(out.glob("*.parquet")) for row in pq.read_table(part).to_pylist()]


def hashes(out: Path) -> dict[str, str]:
    return {part.name: hashlib.sha256(part.read_bytes()).hexdigest() for part in sorted(out.glob("*.parquet"))}


def expected(tiny: Path, photos: Path, names: list[str]) -> dict[str, Any]:
    """Class tokens by ONNX Runtime's own session, one image at a time: nothing of `embed` but the preparation."""
    import onnxruntime

    session = onnxruntime.InferenceSession(tiny / "model.onnx", providers=["CPUExecutionProvider"])
    model = model_of(bundle.read_manifest(tiny))
    found = {}
    for name in names:
        inputs = model.prepare("images", {}, [(photos / name).read_bytes()])
        found[name] = dict(
            zip(("class_token", "patch_tokens"), session.run(["class_token", "patch_tokens"], inputs), strict=True)
        )
    return found


def command(tiny: Path, photos: Path, out: Path, *more: str) -> list[str]:
    words = ["embed", str(tiny), "--images", str(photos), "--out", str(out), "--max-failed", "20%", *more]
    return [sys.executable, "-m", "dinoexport", *words]


def in_workers(monkeypatch: pytest.MonkeyPatch, folder: Path, code: str) -> None:
    """Every Python process that starts from now on runs `code` first, from a file in `folder`."""
    (folder / "sitecustomize.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{os.environ.get('PYTHONPATH', '')}")
