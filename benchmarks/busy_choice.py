"""`python -m benchmarks.busy_choice`: a build's choice of a runtime, twenty times, with four busy processes beside it.

Each choice is made in a new process with an empty cache, as the first build on a machine makes it, from the graph of
ViT-S with four of its blocks. One choice before, without the load, is what the others are compared with.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

RECIPE = 'base = "vits14"\nname = "vits14_four_blocks"\n\n[model]\ndepth = 4\n'
CHOOSE = """
import json, sys
from pathlib import Path
from dinoexport import bundle, family
from dinoexport.config.recipe import Recipe, parse
from dinoexport.runtime import autotune
from dinoexport.runtime.autotune import GraphForms
from dinoexport.spec import Precision

folder = Path(sys.argv[1])
manifest = bundle.read_manifest(folder)
model = family.find(manifest.family).model(parse(Recipe, manifest.recipe, where="the bundle"))
files = {folder / graph.file: graph.graph() for graph in manifest.graphs}
wanted = GraphForms(precision=Precision.FP32, graphs={r: files for r in autotune.RUNTIMES[Precision.FP32]})
facts = autotune.tune(model, wanted)
print(json.dumps([facts.chosen.runtime, facts.chosen.threads, facts.basis, round(facts.others_share, 2)]))
"""


def choice(folder: Path) -> tuple[str, int, str, float]:
    """(runtime, threads, on what it was chosen, others' share of the CPUs) of a new process with an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        ran = subprocess.run(
            [sys.executable, "-c", CHOOSE, str(folder)],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "XDG_CACHE_HOME": cache},
        )
    runtime, threads, basis, others = json.loads(ran.stdout)
    return runtime, threads, basis, others


def main() -> None:
    """Prints every choice, and how many were the same."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--builds", type=int, default=20)
    parser.add_argument("--load", type=int, default=4, help="processes that never rest")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        recipe, folder = Path(scratch) / "four.toml", Path(scratch) / "bundle"
        recipe.write_text(RECIPE)
        words = ["export", str(recipe), "--weights", "synthetic:0", "--out", str(folder)]
        subprocess.run([sys.executable, "-m", "dinoexport", *words], check=True, capture_output=True)
        print("quiet:", *choice(folder), flush=True)
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(given.load)]
        try:
            found: Counter[str] = Counter()
            for number in range(1, given.builds + 1):
                started = time.monotonic()
                chosen = choice(folder)
                found[chosen[0]] += 1
                print(f"{number}:", *chosen, f"{time.monotonic() - started:.0f} s", flush=True)
        finally:
            for process in busy:
                process.kill()
                process.wait()
    print(dict(found))


if __name__ == "__main__":
    main()
