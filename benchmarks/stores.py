"""`python -m benchmarks.stores`: what object stores cost beside the disk, against the S3 server of the tests (moto).

A ViT-S bundle is built twice as whole processes with an empty cache each, which share a cache in the store: the second
repeats no stage. Then the bundle is sent, copied, copied again, deployed and rolled back, on disk and in the store.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dinoexport import bundle
from dinoexport.bundle import in_store
from dinoexport.serving.triton import model_repository, store_repository
from tests.stores.s3_server import S3Server, missing


def measured(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds by the clock, and of this process's and its ended children's CPU time."""
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    before = sum(sum(resource.getrusage(who)[:2]) for who in whose)
    started = time.monotonic()
    work()
    cpu_s = sum(sum(resource.getrusage(who)[:2]) for who in whose) - before
    return {"wall_s": round(time.monotonic() - started, 2), "cpu_s": round(cpu_s, 2)}


def build(out: Path, cache: Path, shared: str) -> Callable[[], Any]:
    """A build on a machine of its own. shared: the store's URL, or nothing."""
    words = ["build", "vits14", "--weights", "synthetic:0", "--target", "cpu", "--runtime", "onnxruntime"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "DINOEXPORT_CACHE": shared}
    command = [sys.executable, "-m", "dinoexport", *words, "--out", str(out)]
    return lambda: subprocess.run(command, check=True, capture_output=True, env=environment)


def main() -> None:
    """Prints one JSON object."""
    if reason := missing():
        raise SystemExit(reason)
    server = S3Server()
    os.environ |= server.environment
    found: dict[str, Any] = {}
    try:
        with tempfile.TemporaryDirectory() as scratch:
            work = Path(scratch)
            os.environ["XDG_CACHE_HOME"] = str(work / "cache")
            for name, shared in (
                ("no shared cache", ""),
                ("fills it", "s3://bucket/c"),
                ("takes from it", "s3://bucket/c"),
            ):
                found[f"build, {name}"] = measured(build(work / name, work / f"cache of {name}", shared))
            made = work / "no shared cache"
            found["bundle_bytes"] = sum(file.size_bytes for file in bundle.read_manifest(made).files)
            there = "s3://bucket/bundles/vits14"
            found["send a bundle"] = measured(lambda: in_store.send(made, there))
            found["copy it here"] = measured(lambda: in_store.local_copy(there))
            found["copy it again"] = measured(lambda: in_store.local_copy(there))
            models = work / "models"
            found["deploy on disk"] = measured(lambda: model_repository.deploy(made, models, name="vits14"))
            found["deploy in the store"] = measured(
                lambda: store_repository.deploy(made, "s3://bucket/models", name="vits14")
            )
            store_repository.deploy(made, "s3://bucket/models", name="vits14")
            found["roll back in the store"] = measured(
                lambda: store_repository.rollback("s3://bucket/models", "vits14")
            )
    finally:
        server.stop()
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
