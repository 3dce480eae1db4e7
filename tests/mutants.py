"""Random single-point mutants of the package, and whether the tests notice: `make mutants` (MUTANTS=40 SEED=0).

A mutant is one changed comparison, boolean operator, constant or dropped `not`. The quick tests that run its line run
on it, or all quick ones where the line runs when the module is imported, then all tests that mirror its package, until
one fails. What survives is printed with its line: either a test is missing, or the code does nothing. The tree itself
is never touched: each mutant lives in a copy.
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

from coverage import Coverage, CoverageData

ROOT = Path(__file__).parents[1]
SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult,
}  # fmt: skip
SECONDS_MAX = 1800
# What make sets up beside the code.
ENVIRONMENTS = (".venv", ".triton", ".text", ".interop", ".tensorrt-bindings")


def mutations(tree: ast.Module) -> Iterator[tuple[ast.expr, str]]:
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


def pytest_runtest_logstart(nodeid: str) -> None:
    """As a plugin of pytest under coverage: what runs from now on, fixtures too, is of this test."""
    running = Coverage.current()
    if running is not None:
        running.switch_context(nodeid)


def who_runs_what(place: Path) -> CoverageData:
    """Which quick test runs which line; a line that runs at import is of the test without a name."""
    settings = place / "coveragerc"
    settings.write_text(f"[run]\nsource = dinoexport\ndata_file = {place / 'lines'}\n")
    command = ["-m", "coverage", "run", f"--rcfile={settings}", "-m", "pytest", "--quick", "-q", "-p", "tests.mutants"]
    # A test that fails under coverage, which is slow, still shows what it runs.
    subprocess.run([sys.executable, *command, "tests"], cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
    found = CoverageData(str(place / "lines"))
    found.read()
    if not found.measured_contexts() - {""}:
        raise SystemExit("The quick tests ran nothing under coverage: make quick shows why.")
    return found


def runs_at_import(tree: ast.Module, node: ast.AST) -> bool:
    """Whether `node` runs when its module is imported: it is in the body of no function. Defaults of arguments do."""
    functions = (part for part in ast.walk(tree) if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef))
    return not any(node in ast.walk(statement) for function in functions for statement in function.body)


def stages(module: Path, lines: set[int], runners: CoverageData, *, at_import: bool) -> list[list[str]]:
    """The tests to run on a mutant of these lines of `module`, those that most likely notice it first.

    at_import: the lines run when the module is imported, which many are within a test; it is one test's by chance.
    """
    package = Path("tests", *module.parts[1:-1])
    while not (ROOT / package).is_dir():
        package = package.parent
    by_line = runners.contexts_by_lineno(str(ROOT / module))
    tests = sorted({test for line in lines for test in by_line.get(line, [])})
    quick = [["--quick", "tests"]] if at_import or "" in tests else [["--quick", *tests]] if tests else []
    here = (path.relative_to(ROOT) for path in (ROOT / package).glob("test_*.py"))
    return [*quick, [str(package)] if package != Path("tests") else sorted(map(str, here))]


def copy_tree(to: Path) -> None:
    """The tree with the changes that are not committed; what `make` set up beside it is linked."""
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True,
        check=True, text=True,
    ).stdout  # fmt: skip
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file() and not (ROOT / name).is_symlink():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    for name in ENVIRONMENTS:
        if (ROOT / name).exists():
            (to / name).symlink_to((ROOT / name).resolve())


def killer(copy: Path, tests: list[str]) -> str:
    """The first of `tests` that fails on the mutant in `copy`; empty where all pass.

    One that never ends is noticed too, but so is a machine that is too slow: it is named as such.
    """
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "-p", "no:cacheprovider", *tests]
    try:
        ran = subprocess.run(
            command, cwd=copy, env={**os.environ, "PYTHONPATH": str(copy)}, capture_output=True, timeout=SECONDS_MAX,
            check=False, text=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"no end after {SECONDS_MAX} s"
    if ran.returncode in (0, 5):
        return ""
    failed = [line.split()[1] for line in ran.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    if not failed and "ERROR: not found" in ran.stderr:
        raise SystemExit(f"A test has another name in a copy of the tree: {ran.stderr.strip()[-400:]}")
    return failed[0] if failed else f"pytest itself: {ran.stderr.strip()[-200:]}"


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
    sample = chance.sample(places, min(wanted.count, len(places)))
    survivors = 0
    with tempfile.TemporaryDirectory() as place:
        runners = who_runs_what(Path(place))
    for module, index in sample:
        tree = ast.parse((ROOT / module).read_text())
        node, change = list(mutations(tree))[index]
        line = node.lineno
        # A line of a statement of several lines need not be one that Python counts.
        lines = {line, max(s.lineno for s in ast.walk(tree) if isinstance(s, ast.stmt) and node in ast.walk(s))}
        at_import = runs_at_import(tree, node)
        mutate(node, change)
        with tempfile.TemporaryDirectory() as place:
            copy = Path(place) / "copy"
            copy_tree(copy)
            (copy / module).write_text(ast.unparse(ast.fix_missing_locations(tree)))
            by = next(
                filter(None, (killer(copy, tests) for tests in stages(module, lines, runners, at_import=at_import))), ""
            )
        survivors += not by
        source = (ROOT / module).read_text().splitlines()[line - 1].strip()
        said = f"killed by {by}" if by else "SURVIVED"
        print(f"{module}:{line} {change}: {source}\n    {said}", flush=True)
    print(f"{len(sample) - survivors} of {len(sample)} killed")


if __name__ == "__main__":
    main()
