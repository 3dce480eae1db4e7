"""Read the facts of a classic plan by opening it: `python -m dinoexport.engines.inspector JOB`, with JOB as JSON.

Runs in a separate process after the builder's has ended. The plan is then on the disk and stays there even if this
process crashes, and the builder's memory is free again.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from dinoexport.runtime.trt import open_plan
from dinoexport.spec import Runtime
from dinoexport.system import subprocess_job


def main(job: dict[str, Any]) -> None:
    """Reports on job["engine"], which was built here, so the code in it may run."""
    module, opened, _ = open_plan(Path(job["engine"]), Runtime.TENSORRT, host_code=job["host_code"])
    with os.fdopen(int(os.environ[subprocess_job.REPORT]), "w") as report:
        report.write(json.dumps({"said": looked_at(module, opened)}) + "\n")


def looked_at(module: Any, opened: Any) -> dict[str, Any]:
    """Scratch memory, weights and layers of an opened plan."""
    inspector = opened.create_engine_inspector()
    inspected = json.loads(inspector.get_engine_information(module.LayerInformationFormat.JSON))
    return {
        "scratch_bytes": opened.device_memory_size_v2,
        "weight_bytes": _weight_bytes(opened),
        "layers": inspected.get("Layers", []),
    }


def _weight_bytes(opened: Any) -> int | None:
    """None if TensorRT does not report it: 10.13 has no such call, and the call in 10.14 always raises TypeError."""
    try:
        return int(opened.get_engine_stat())
    except (AttributeError, TypeError):
        return None


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
