"""What a classic plan says once it is opened: `python -m dinoexport.engines.inspector JOB`, with JOB as JSON.

In a process of its own, after the builder's has ended: the plan is on the disk by then and stays there whatever happens
here, and the builder's memory is free again.
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
    """Reports on job["engine"], which was built here: what it holds may run."""
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
    """None where TensorRT does not say: 10.13 has no such call, and that of 10.14 always raises TypeError."""
    try:
        return int(opened.get_engine_stat())
    except (AttributeError, TypeError):
        return None


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
