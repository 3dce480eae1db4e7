"""What a whole build costs beside what nobody can avoid: `python benchmarks/build_cost.py [VARIANT]`.

Three whole processes, in turn, several times: plain `torch.onnx.export` of the plain formulation at one fixed size (the
export people write first; its file runs at that size only), the PyTorch runs of all validation cases alone, and
`dinoexport build` in fp32 with validation. The figure to look at is the ratio of the build to the sum of the other two.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

ROUNDS = 3
BUILD = [sys.executable, "-m", "dinoexport", "build", "--weights", "synthetic:0"]
# The plain formulation with its weights as a module, exported as it stands.
PLAIN = """
import sys, warnings, torch
warnings.simplefilter("ignore")
from dinoexport import family
from dinoexport.config import recipe
from dinoexport.models.dinov2 import reference
model = family.find("dinov2").model(recipe.load(sys.argv[1]))
class Plain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.names = {n.replace(".", "_"): n for n in model.tensors}
        for flat, name in self.names.items():
            self.register_buffer(flat, torch.from_numpy(model.synthetic(name, 0)))
    def forward(self, pixels):
        load = lambda name: getattr(self, name.replace(".", "_"))
        last = model.arch.depth - 1
        function = reference.tokens_of.__wrapped__
        return function(model.arch, load, [pixels], blocks=[last], block_done=lambda i: None)[0][last]
pixels = torch.zeros(1, 3, 518, 518)
torch.onnx.export(Plain().eval(), (pixels,), sys.argv[2] + "/plain.onnx", dynamo=True, verbose=False)
"""
RUNS = """
import sys
from dinoexport.pipeline.request import build_request
from dinoexport.spec import silent
from dinoexport.validation import evaluate
from dinoexport.weights.checkpoint import open_checkpoint
request = build_request(sys.argv[1], weights="synthetic:0")
checkpoint = open_checkpoint(request.model, request.recipe, request.weights, progress=silent)
evaluate.compute_reference(request.model, checkpoint, request.cases, request.limits,
                           precision=request.recipe.precision, judge_code="plain")
"""


def measure(command: list[str]) -> tuple[float, int]:
    """Wall seconds and peak memory in MB of one whole process."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command[:4])} … failed with {process.returncode}")
    return time.perf_counter() - started, usage.ru_maxrss // 1024


def main(variant: str) -> None:
    """Prints one JSON object: medians over the rounds, the ratio per round, and peak memory."""
    rounds = []
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as folder:
            rounds.append(
                {
                    "plain_export": measure([sys.executable, "-c", PLAIN, variant, folder]),
                    "pytorch_runs": measure([sys.executable, "-c", RUNS, variant]),
                    "build": measure([*BUILD, variant, "--out", f"{folder}/bundle"]),
                }
            )
    ratios = [r["build"][0] / (r["plain_export"][0] + r["pytorch_runs"][0]) for r in rounds]
    print(
        json.dumps(
            {
                "variant": variant,
                "build over plain export plus PyTorch runs": [round(ratio, 2) for ratio in ratios],
                "median seconds": {name: round(statistics.median(r[name][0] for r in rounds), 1) for name in rounds[0]},
                "peak MB": {name: max(r[name][1] for r in rounds) for name in rounds[0]},
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "vits14")
