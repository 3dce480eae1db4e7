"""Facts of TensorRT plans, which no machine of ours can build."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dinoexport import bundle
from dinoexport.spec import Runtime


def plan_facts(file: str, cc: str, *, version: str = "11.2.1.2", profiles: int = 1) -> Any:
    """Facts of a classic plan, as a build for a data-centre GPU records them."""
    shapes = [((1, 3, 14, 14), (b, 3, 224, 224), (4, 3, 518, 518)) for b in (1, 4)[:profiles]]
    return SimpleNamespace(
        file=file,
        graph="model",
        runtime=Runtime.TENSORRT,
        version_compatible=False,
        stripped=False,
        runtime_version=version,
        compute_capabilities=(cc,),
        profiles={f"p{i}": {"pixels": shape} for i, shape in enumerate(shapes)},
    )


def with_plans(monkeypatch: pytest.MonkeyPatch, built: Path, *engines: Any) -> None:
    """The bundle, as if it held these plans: no machine of ours can build one."""
    manifest = bundle.read_manifest(built)
    for engine in engines:
        (built / engine.file).write_bytes(b"a plan")
    listed = bundle.describe(built, [engine.file for engine in engines], "engine")
    manifest = manifest.model_copy(update={"engines": engines, "files": (*manifest.files, *listed)})
    monkeypatch.setattr(manifest.__class__, "to_bytes", lambda _: b"")
    monkeypatch.setattr(bundle, "read_manifest", lambda *_: manifest)
