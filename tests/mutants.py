"""Random single-point mutants of the package, and whether the tests notice: `make mutants` (MUTANTS=40 SEED=0).

A mutant is one changed comparison, boolean operator, constant or dropped `not`. The tests that mirror the mutated
module run on it, then all quick tests if those pass. What survives is printed with its line: either a test is missing,
or the code does nothing. The tree itself is never touched: each mutant lives in a copy.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult,
}  # fmt: skip
SECONDS_MAX = 600


def mutations(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """Every place that can be changed: the node, and which change."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            yield from ((node, f"ops {i}") for i, op in enumerate(node.ops) if type(op) in SWAPS)
        elif isinstance(node, (ast.BoolOp, ast.BinOp)) and type(node.op) in SWAPS:
            yield node, "op"
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield node, "not"
        elif isinstance(node, ast.Constant) and type(node.value) in (bool, int, float):
            yield node, "constant"


def mutate(node: ast.AST, change: str) -> None:
    """Changes `node` in place."""
    if change.startswith("ops"):
        assert isinstance(node, ast.Compare)
        index = int(change.split()[1])
        node.ops[index] = SWAPS[type(node.ops[index])]()  # type: ignore[assignment]
    elif change == "op":
        assert isinstance(node, (ast.BoolOp, ast.BinOp))
        node.op = SWAPS[type(node.op)]()  # type: ignore[assignment]
    elif change == "not":
        assert isinstance(node, ast.UnaryOp)
        node.operand = ast.UnaryOp(op=ast.Not(), operand=node.operand)
    else:
        assert isinstance(node, ast.Constant)
        assert isinstance(node.value, (bool, int, float))
        node.value = not node.value if isinstance(node.value, bool) else node.value + 1


def mirrored(module: Path) -> list[str]:
    """The tests of a module: those named after it, else those of its package, else every quick one."""
    package = Path("tests", *module.parts[1:-1])
    named = sorted(package.glob(f"test_{module.stem}*.py")) if (ROOT / package).is_dir() else []
    named = [path for path in named if (ROOT / path).exists()]
    return [str(path) for path in named] or [str(package if (ROOT / package).is_dir() else "tests")]


def killed(copy: Path, tests: list[str]) -> bool:
    """Whether `tests` fail on the mutant in `copy`; one that never ends is noticed too."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        ran = subprocess.run(
            command, cwd=copy, env={**os.environ, "PYTHONPATH": str(copy)}, capture_output=True, timeout=SECONDS_MAX,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return True
    return ran.returncode not in (0, 5)


def main() -> None:
    """Tries the mutants and prints a line for each, and the share that was killed."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--count", type=int, default=40)
    options.add_argument("--seed", type=int, default=0)
    wanted = options.parse_args()
    chance = random.Random(wanted.seed)
    modules = sorted(path.relative_to(ROOT) for path in (ROOT / "dinoexport").rglob("*.py"))
    places = [
        (module, index)
        for module in modules
        for index, _ in enumerate(mutations(ast.parse((ROOT / module).read_text())))
    ]
    survivors = 0
    for module, index in chance.sample(places, min(wanted.count, len(places))):
        tree = ast.parse((ROOT / module).read_text())
        node, change = list(mutations(tree))[index]
        line = getattr(node, "lineno", 0)
        mutate(node, change)
        with tempfile.TemporaryDirectory() as place:
            copy = Path(place) / "copy"
            ignored = shutil.ignore_patterns(".git", ".venv*", ".triton", "bundles", "build", "__pycache__", ".*_cache")
            shutil.copytree(ROOT, copy, ignore=ignored)
            (copy / module).write_text(ast.unparse(ast.fix_missing_locations(tree)))
            dead = killed(copy, mirrored(module)) or killed(copy, ["-m", "not slow", "--quick", "tests"])
        survivors += not dead
        source = (ROOT / module).read_text().splitlines()[line - 1].strip()
        print(f"{'killed  ' if dead else 'SURVIVED'} {module}:{line} {change}: {source}", flush=True)
    print(f"{wanted.count - survivors} of {wanted.count} killed")


if __name__ == "__main__":
    main()
