"""The child process of `engine.build`: `python -m dinoexport.engine_worker JOB`, with JOB as JSON.

Strongly typed: each tensor has the precision the graph gives it, and no builder flag says otherwise.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def main(job: dict[str, Any]) -> None:
    """Compiles job["onnx"] into job["engine"], which appears by rename."""
    import tensorrt_rtx
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX
    from polygraphy.backend.trt import PostprocessConfig, Profile, engine_bytes_from_network, network_from_onnx_path

    def without_tf32(_builder: Any, _network: Any, config: Any) -> None:
        """Takes away TF32, which the builder has on by default: fp32 in the graph means fp32, not ten bits of it."""
        config.clear_flag(tensorrt_rtx.BuilderFlag.TF32)

    profile = Profile()
    for name, (smallest, likely, largest) in job["profile"].items():
        profile.add(name, min=tuple(smallest), opt=tuple(likely), max=tuple(largest))
    config = CreateConfigRTX(
        profiles=[profile], compute_capabilities=[(major, minor) for major, minor in job["compute_capabilities"]]
    )
    exact = PostprocessConfig(config, without_tf32)
    network = network_from_onnx_path(job["onnx"], strongly_typed=True)
    engine = Path(job["engine"])
    partial = engine.with_name(f"{engine.name}.partial")
    partial.write_bytes(engine_bytes_from_network(network, config=exact))
    os.replace(partial, engine)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
